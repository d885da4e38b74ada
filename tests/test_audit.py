"""The audit: rows that two tasks share are refused, all else is said in a line, by eval and by `atv tasks --audit`."""

import sys
from dataclasses import replace

import pytest
from conftest import TEXT, byte_level_tokenizer, make_generator, make_llm, sentencepiece_tokenizer, toy_task
from refusals import refused
from rendering import Letters, encode_prompt, prompt_text
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from training_runs import quick, tiny
from transformers import PreTrainedTokenizerFast

from atv.config import EMBEDDED_GENERATOR
from atv.data import Example, Renderer, Task, findings, load_tasks, long_prompts, refuse_shared_inputs, unread_queries
from atv.data.audit import unread
from atv.data.render import answer_ids
from atv.data.splits import same
from atv.errors import ATVError
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.methods import METHODS
from atv.model import ATVModel
from atv.training.loop import train


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
        f"toy: 1 of 2 test rows make a prompt of more than {longest - 1} tokens (up to {longest}); eval cuts their "
        "queries to fit."
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


# ---- what the generator cannot read ----


def wordpiece_tokenizer():
    """As BERT's: a character that is not in the vocabulary makes its whole word the unknown token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    ("queries", "unknown", "alike"),
    [
        (["quiet", "the kettle"], 0, 0),
        (["\u0e01\u0e32", "\u1780\u1781", "\u12a0\u1208", "quiet"], 3, 3 / 4),  # Thai, Khmer, Amharic
        (["quiet \U0001f600", "quiet \U0001f622", "yes no yes"], 2, 2 / 3),
        (["Quiet  ", "quiet", "QUIET"], 0, 0),  # one query
        (["quiet", "qui\u00ebt"], 0, 1),  # the accent is stripped
        ([], 0, 0),
    ],
)
def test_unknown_tokens_and_queries_that_look_alike_are_counted(queries, unknown, alike):
    tokenizer = wordpiece_tokenizer()
    pieces = sum(len(tokenizer.tokenize(query)) for query in {same(query) for query in queries})
    assert unread(tokenizer, queries) == pytest.approx((unknown / max(1, pieces), alike))


def in_thai(task):
    """Each query with its words in a script that the tokenizer does not have."""

    def thai(rows):
        return tuple(Example("".join(chr(0x0E01 + int(d)) for d in row.input.split()[-1]), row.output) for row in rows)

    return replace(task, train=thai(task.train), valid=thai(task.valid), test=thai(task.test))


def test_a_generator_that_cannot_read_the_queries_is_said_with_a_remedy():
    (line,) = unread_queries(in_thai(toy_task()), wordpiece_tokenizer())
    assert line.startswith(
        "toy: 100% of the tokens that the generator reads of the queries are its unknown token, and 100%"
    )
    assert "Use the generator self, or a multilingual encoder." in line
    assert unread_queries(toy_task(), wordpiece_tokenizer(), ("train",)) != []  # digits are unknown too
    words = replace(toy_task(), train=rows("quiet=yes", "the kettle leaks=no"))
    assert unread_queries(words, wordpiece_tokenizer(), ("train",)) == []
    assert unread_queries(in_thai(toy_task()), byte_level_tokenizer()) == []


def test_train_says_it_once_before_the_first_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atv.progress._WARNED", set())
    atv = tiny()
    atv.generator.tokenizer = wordpiece_tokenizer()
    with caplog.at_level("WARNING", "atv"):
        train(atv, [in_thai(toy_task())], tmp_path / "out", quick(epochs=1))
    assert caplog.text.count("100% of the tokens that the generator reads") == 1


@pytest.fixture
def thai_table(tmp_path):
    path = tmp_path / "thai.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("input,output\n")
        file.writelines(f"{chr(0x0E01 + n)}{chr(0x0E02 + n)},{'ab'[n % 2]}\n" for n in range(40))
    return path


def test_the_audit_reads_with_the_given_generator_or_the_default_one(tmp_path, thai_table, capsys, monkeypatch):
    from atv.cli.options import ListTasks, Tasks
    from atv.cli.tasks import list_tasks

    wordpiece_tokenizer().save_pretrained(tmp_path / "bert")
    tasks = Tasks(data=str(thai_table))
    said = "100% of the tokens that the generator reads"
    list_tasks(ListTasks(tasks=tasks, audit=True, generator=str(tmp_path / "bert")))
    assert said in capsys.readouterr().out
    for name in ("self", "random:1x64"):
        list_tasks(ListTasks(tasks=tasks, audit=True, generator=name))
        assert said not in capsys.readouterr().out
    with refused("--generator is only used with --audit"):
        list_tasks(ListTasks(tasks=tasks, generator="self"))
    loaded = []
    monkeypatch.setattr("atv.lm.load.load_tokenizer", lambda name: loaded.append(name) or wordpiece_tokenizer())
    list_tasks(ListTasks(tasks=tasks, audit=True))
    assert loaded == [EMBEDDED_GENERATOR]
    assert said in capsys.readouterr().out

    def missing(name):
        raise ATVError("not installed")

    monkeypatch.setattr("atv.lm.load.load_tokenizer", missing)
    list_tasks(ListTasks(tasks=tasks, audit=True))
    shown = capsys.readouterr()
    assert "the most frequent answer" in shown.out
    assert "is not checked: not installed" in shown.err


def test_doctor_says_it_for_given_tasks(thai_table, capsys, monkeypatch):
    from atv.cli import doctor
    from atv.cli.options import Doctor

    class Loaded:
        def load(self):
            return make_llm(), byte_level_tokenizer()

    def small_atv(llm, config, tokenizer):
        generator = make_generator(config)
        generator.tokenizer = wordpiece_tokenizer()
        return ATVModel(llm, config, tokenizer=tokenizer, generator=generator)

    monkeypatch.setattr(doctor, "frozen_llm", lambda *_: Loaded())
    monkeypatch.setattr(doctor, "ATVModel", small_atv)
    monkeypatch.setattr(doctor, "check_wiring", lambda atv: [])
    doctor.examine(Doctor(data=str(thai_table)))
    assert "thai: 100% of the tokens that the generator reads" in capsys.readouterr().out
    doctor.examine(Doctor())
    assert "tokens that the generator reads" not in capsys.readouterr().out
