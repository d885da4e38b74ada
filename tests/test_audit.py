"""The audit: rows that two tasks share are refused, all else is said in a line, by eval and by `atv tasks --audit`."""

import sys
from dataclasses import replace

import pytest
from conftest import byte_level_tokenizer, make_llm, sentencepiece_tokenizer, toy_task
from refusals import refused
from rendering import Letters, encode_prompt, prompt_text

from atv.data import Example, Renderer, Task, findings, load_tasks, long_prompts, refuse_shared_inputs
from atv.data.render import answer_ids
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.methods import METHODS


def rows(*texts: str) -> tuple[Example, ...]:
    return tuple(Example(*text.split("=")) for text in texts)


def small(name: str, train: str, test: str) -> Task:
    return Task(name, ("{input}",), rows(f"{train}=yes"), rows(f"{name} valid=no"), rows(f"{test}=no", f"{name}=yes"))


def test_a_training_input_of_one_task_that_is_a_test_input_of_another_is_refused_in_either_order():
    tasks = [small("one", "the moon", "a"), small("two", "b", "the moon")]
    for order in (tasks, tasks[::-1]):
        with refused("Task two: 1 of 2 test inputs", "('the moon' of one)", "remove them"):
            refuse_shared_inputs(order)


def test_tasks_may_share_training_inputs_or_test_inputs():
    refuse_shared_inputs([small("one", "x", "y"), small("two", "x", "y")])
    refuse_shared_inputs(load_tasks())


def test_eval_refuses_before_it_asks_anything_and_says_its_findings_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("atv.progress._WARNED", set())  # what another test had said would not be said again
    method = METHODS["zero-shot"].load(make_llm(), byte_level_tokenizer(), None)
    with refused("test inputs are training inputs of another task"):
        evaluate(
            method,
            [small("one", "m", "a"), small("two", "b", "m")],
            ["first_token"],
            RunWriter(tmp_path / "refused", {}),
        )
    assert (tmp_path / "refused" / "predictions.jsonl").read_text() == ""
    capsys.readouterr()
    evaluate(method, [toy_task(rows=6)], ["first_token"], RunWriter(tmp_path / "run", {}), variants="first")
    assert "toy: the most frequent answer alone scores 50.0%." in capsys.readouterr().err


def test_the_majority_is_the_share_of_a_constant_answer():
    task = replace(toy_task(), test=rows("a=yes", "b=yes", "c=yes", "d=no"))
    assert findings(task) == ["toy: the most frequent answer alone scores 75.0%."]


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_options_that_begin_with_one_token_are_found_for_this_tokenizer(make):
    tokenizer = make()
    words = ("10", "12", "yes", "yesterday", "no", "xylophone", "xenon")
    task = replace(toy_task(), options=words)

    def encode(asked: Renderer) -> tuple[tuple[int, ...], ...]:
        return answer_ids(tokenizer, asked, words)

    # Independently: the tokens of the whole text, where they depart from those of the prompt.
    prompt = encode_prompt(tokenizer, "A:")
    firsts = {word: encode_prompt(tokenizer, f"A: {word}")[len(prompt)] for word in words}
    groups = {token: [word for word in words if firsts[word] == token] for token in firsts.values()}
    expected = [
        f"toy: the answers {', '.join(map(repr, group))} begin with the same token after 'A:'; the first token cannot "
        "tell them apart. They are judged by their tokens up to where they differ, and the score first_token is not "
        "defined."
        for group in groups.values()
        if len(group) > 1
    ]
    assert expected
    assert findings(task, encode, task.renderers("first"))[1:] == expected
    assert not findings(replace(task, options=("yes", "no")), lambda _: [[1, 2], [2, 1]])[1:]


def test_of_many_options_the_first_ones_are_named():
    task = replace(toy_task(), options=tuple(f"answer {number}" for number in range(500)))
    (line,) = findings(task, lambda _: [[1, 2]] * 500, task.renderers("first"))[1:]
    assert "'answer 7' and 492 others begin with the same token" in line
    assert "answer 8'" not in line


def test_test_rows_with_too_long_a_prompt_are_counted_in_their_longest_variant():
    task = replace(toy_task(), test=rows("short=yes", "a longer one=no"), templates=("{input}", "Q {input} Q"))
    longest = max(len(prompt_text(task, "a longer one", *variant)) for variant in task.renderers())
    assert long_prompts(task, Letters(), longest) == []
    assert long_prompts(task, Letters(), longest - 1) == [
        f"toy: 1 of 2 test rows make a prompt of more than {longest - 1} tokens (up to {longest}); eval refuses them."
    ]
    assert "2 of 2 test rows" in long_prompts(task, Letters(), 1)[0]


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    from atv.cli import main

    monkeypatch.setattr(sys, "argv", ["atv", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_command_prints_the_findings_and_the_lengths_for_an_llm(monkeypatch, capsys, tmp_path):
    llm = make_llm()
    llm.config.max_position_embeddings = 10
    llm.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    asked = ("tasks", "--audit", "--task", "topic", "--template", "{input}" + " x y" * 10, "--llm", tmp_path)
    code, said, err = run(monkeypatch, capsys, *asked)
    assert code == 0, err
    assert "topic: the most frequent answer alone scores 25.0%." in said
    assert "topic: 120 of 120 test rows make a prompt of more than 10 tokens" in said
    _, said, _ = run(monkeypatch, capsys, "tasks", "--audit", "--task", "topic")
    assert "more than" not in said
    _, said, _ = run(monkeypatch, capsys, "tasks", "--task", "topic")
    assert "most frequent" not in said


def test_an_llm_without_the_audit_is_refused(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "tasks", "--llm", "x")
    assert code == 2
    assert "--llm is only used with --audit" in err
