"""Predictions for rows without answers: asked as in training, with calibrated probabilities, from file to file."""

import csv
import io
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import byte_level_tokenizer, make_atv, make_generator, make_llm, toy_task
from labels import steered_by_hand
from refusals import refused
from rendering import encode_pair, prompt_text

from atv import ATVConfig, ATVModel, Example, TrainConfig, predict, train
from atv.data import Rendering, load_tasks
from atv.data.stream import CHUNK
from atv.evaluation.predict import Predictor, loaded_method
from atv.evaluation.run import evaluate
from atv.methods.atv import ATVMethod
from atv.training.calibration import best_temperature


def trained(folder, task=None, **options):
    """A tiny ATV that has learned a task a little."""
    atv = make_atv(dtype=torch.float32, scale=0.5, **options)
    config = TrainConfig.paper(epochs=2, batch_size=4, learning_rate=5e-3, generator_learning_rate=5e-3)
    train(atv, [task or toy_task()], folder, config)
    return atv


QUERIES = ["the harbour quiet 90", "the harbour leaks 91", "a harbour of another kind", "leaks leaks leaks"]


def test_probabilities_are_those_of_the_options_as_a_whole(tmp_path):
    task, atv = toy_task(), trained(tmp_path)
    read = steered_by_hand(atv, "last")
    about = atv.training_summary["tasks"]["toy"]
    assert about["options"] == ["no", "yes"]
    assert about["answer_tokens"] == max(len(encode_pair(atv.tokenizer, "A:", o)[1]) for o in ("no", "yes"))
    rows = predict(atv, QUERIES, batch_size=3)
    for query, row in zip(QUERIES, rows, strict=True):
        scores = []
        for option in ("no", "yes"):  # by a plain pass for each token
            prompt, ids = encode_pair(atv.tokenizer, prompt_text(task, query), option)
            chances = [read(Example(query, ""), prompt, ids[:place]).log_softmax(-1) for place in range(len(ids))]
            total = sum(chance[token].item() for chance, token in zip(chances, ids, strict=True))
            scores.append(total / about["temperature"])
        largest = max(scores)
        weights = [math.exp(score - largest) for score in scores]
        expected = [weight / sum(weights) for weight in weights]
        assert [row["p(no)"], row["p(yes)"]] == pytest.approx(expected, rel=1e-3)
        assert row["answer"] == ("no", "yes")[expected.index(max(expected))]
        assert row["input"] == query
    assert len({row["p(no)"] for row in rows}) == len(rows)


def test_answers_are_those_of_evaluation(tmp_path):
    atv, task = trained(tmp_path), toy_task()
    found = evaluate(ATVMethod(atv), [task], ["option_likelihood"], variants="first")
    rows = predict(atv, [row.input for row in task.test])
    assert [row["answer"] for row in rows] == [row["outputs"]["option_likelihood"] for row in found]


@pytest.mark.parametrize("seed", range(3))
def test_the_temperature_makes_the_answers_likeliest(seed):
    draw = torch.Generator().manual_seed(seed)
    scores = 5 * torch.randn(60, 4, generator=draw, dtype=torch.float64)
    right = torch.where(torch.rand(60, generator=draw) < 0.6, scores.argmax(1), torch.randint(4, (60,), generator=draw))
    found = best_temperature(scores, right)

    targets = torch.full((60, 4), 1 / 64, dtype=torch.float64)  # (0 + 1) / (60 + 4), and (60 + 1) / (60 + 4)
    targets[range(60), right] = 61 / 64

    def loss(temperature):
        return -(targets * (scores / temperature).log_softmax(1)).sum(1).mean().item()

    assert loss(found) <= min(loss(0.05 * 1.01**step) for step in range(600)) + 1e-6
    assert 0.05 < found < 20


def test_rows_that_are_all_right_do_not_make_it_certain():
    scores = torch.tensor([[0.0, -4.0], [-4.0, 0.0]], dtype=torch.float64).repeat(20, 1)
    chance = (scores / best_temperature(scores, scores.argmax(1))).softmax(1).amax(1)
    assert chance.tolist() == pytest.approx([41 / 42] * 40, abs=1e-3)


def test_generated_answers_of_a_chat(tmp_path):
    """A chat whose answers are texts of their own: they are generated in the chat template, to the end of the turn."""
    rows = [{"messages": [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": f"is it {n}?"},
        {"role": "assistant", "content": f"yes {n}"},
    ]} for n in range(60)]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_tasks(data=tmp_path / "chat.jsonl")
    assert not task.chooses
    config = ATVConfig(generator="self", scale=0.5)
    atv = ATVModel(make_llm(dtype=torch.float32), config, tokenizer=chat_tokenizer("chatml"))
    train(atv, [task], tmp_path / "run", TrainConfig(epochs=1, batch_size=8))
    conversation = rows[0]["messages"][:2]
    found = predict(atv, [{"messages": conversation, "id": 7}], max_new_tokens=5)
    assert list(found[0]) == ["messages", "id", "answer"]
    ids = atv.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    end = atv.tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad(), atv.steer(["x"]):
        out = atv.llm.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0)
    new = [token for token in out[0, len(ids) :].tolist() if token != end]
    assert found[0]["answer"] == atv.tokenizer.decode(new).strip()
    assert atv.generate([conversation], max_new_tokens=5, do_sample=False) == [
        atv.tokenizer.decode(new, skip_special_tokens=True)
    ]


def test_a_row_without_an_answer_is_counted_and_the_others_are_answered(tmp_path, caplog):
    atv = trained(tmp_path)
    atv.llm.config.max_position_embeddings = 40
    with caplog.at_level(logging.WARNING, "atv"):
        rows = predict(
            atv, [{"input": "the harbour leaks"}, {"input": None}, {"input": 1.5}, {"input": "leaks " * 400}]
        )
    assert [row["answer"] is None for row in rows] == [False, True, True, False]
    assert rows[1]["p(no)"] is None
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "2 of 4 rows have no answer" in said
    assert "1 row: The query is empty." in said
    assert "1 row: The row has input 1.5" in said


def test_queries_that_are_cut_are_counted(tmp_path, caplog):
    atv = trained(tmp_path)
    atv.llm.config.max_position_embeddings = 40
    after = max(len(encode_pair(atv.tokenizer, "A:", option)[1]) for option in ("no", "yes")) - 1
    lengths = [len(encode_pair(atv.tokenizer, prompt_text(toy_task(), "7" * n), "no")[0]) for n in range(1, 40)]
    fits, long = ("7" * (sum(length <= 40 - after for length in lengths) + more) for more in (0, 1))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "atv"):
        predict(atv, [fits, {"input": None}, long, "the harbour", "leaks " * 400])
    said = [record.getMessage() for record in caplog.records]
    assert "The queries of 2 of 5 rows are cut at their end" in said[0]
    assert said[0].endswith("the first of them row 2.")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "atv"):
        predict(atv, [fits])
    assert not caplog.records


def test_reasons_are_counted_without_the_numbers_of_their_rows(tmp_path, caplog):
    rows = [{"input": cell} for n in range(20) for cell in ([{"role": "tool", "content": "a"}], f"leaks {n}")]
    rows += [{"input": n + 0.5} for n in range(6)]
    with caplog.at_level(logging.WARNING, "atv"):
        predict(trained(tmp_path), rows)
    said = [record.getMessage() for record in caplog.records if record.name == "atv"]
    assert "26 of 46 rows have no answer" in said[-7]
    assert said[-6].startswith("20 rows: The row, input 0 has the role 'tool'")
    assert all(line.startswith("1 row: The row has input ") for line in said[-5:-1])
    assert said[-1] == "and 2 other reasons"


def test_rows_that_no_tokenizer_reads_have_no_answer_and_keep_their_columns(tmp_path, atv):
    model = trained(tmp_path / "run")
    model.llm.save_pretrained(tmp_path / "llm")
    model.tokenizer.save_pretrained(tmp_path / "llm")
    long = "7" * 4301
    turns = ['[{"role": "user", "content": "a \\ud83d"}]', f'[{{"role": {long}}}]']
    bad = ['"a \\ud83d"', long, *turns]
    (tmp_path / "t.jsonl").write_text("".join(f'{{"input": {cell}, "id": {long}}}\n' for cell in ['"leaks"', *bad]))
    use = ("--adapter", tmp_path / "run", "--llm", tmp_path / "llm", "--dtype", "float32", "--device", "cpu")
    code, _, err = atv("predict", tmp_path / "t.jsonl", *use, "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [row["answer"] is None for row in found] == [False, True, True, True, True]
    assert {row["id"] for row in found} == {long}


def test_a_whole_number_of_python_with_too_many_digits_has_no_answer(tmp_path):
    model = trained(tmp_path)
    assert [row["answer"] is None for row in predict(model, [{"input": 10**4300}, {"input": 7}])] == [True, False]


def test_the_columns_of_training_are_read(tmp_path, caplog):
    rows = [{"body": f"the harbour {('quiet', 'leaks')[n % 2]} {n}", "team": "yn"[n % 2]} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = trained(tmp_path / "run", load_tasks(data=tmp_path / "t.jsonl", input="body", output="team")[0])
    assert model.training_summary["tasks"]["t"]["query_columns"] == ["body"]

    def read(row, **how):
        caplog.clear()
        with caplog.at_level(logging.INFO, "atv"):
            (found,) = predict(model, [row], **how)
        said = " ".join(record.getMessage() for record in caplog.records)
        queries = ("the harbour leaks 7", "another one")
        expected = [row["p(y)"] for row in predict(model, queries)]
        assert abs(expected[0] - expected[1]) > 1e-4
        return {
            query for query, chance in zip(queries, expected, strict=True) if abs(found["p(y)"] - chance) < 1e-5
        }, said

    both = {"text": "another one", "body": "the harbour leaks 7"}
    assert read(both) == ({"the harbour leaks 7"}, "The table: queries are read from 'body', as in training.")
    assert read(both, input="text") == ({"another one"}, "")
    text = {"text": "another one", "id": "the harbour leaks 7"}
    missing = "The table: queries are read from 'text'; in training from 'body', which is missing."
    assert read(text) == ({"another one"}, missing)
    for row, said in ((text | {"prompt": "x"}, "may hold them: 'prompt', 'text'"), ({"id": "x"}, "trained on 'body'")):
        with refused("'body'", said, "--input"):
            predict(model, [row])


def test_what_is_refused(tmp_path):
    atv = trained(tmp_path)
    with refused("answer", "the name of a new one"):
        predict(atv, [{"input": "a", "answer": "b"}])
    with refused("expected messages, instruction", "--input"):
        predict(atv, [{"body": "a"}])
    with refused("task 'other'"):
        predict(atv, ["a"], task="other")
    untrained = make_atv(dtype=torch.float32)
    with refused("does not say on which tasks it was trained"):
        predict(untrained, ["a"])
    assert predict(atv, []) == []


def test_without_a_task_among_several_the_query_alone_is_asked(tmp_path):
    atv = make_atv(dtype=torch.float32, scale=0.5)
    other = replace(toy_task(), name="other", train=tuple(Example(f"o {r.input}", r.output) for r in toy_task().train),
                    valid=tuple(Example(f"o {r.input}", r.output) for r in toy_task().valid),
                    test=tuple(Example(f"o {r.input}", r.output) for r in toy_task().test))  # fmt: skip
    train(atv, [toy_task(), other], tmp_path, TrainConfig(epochs=1, batch_size=8))
    assert list(predict(atv, ["leaks"])[0]) == ["input", "answer"]
    assert list(predict(atv, ["leaks"], task="other")[0]) == ["input", "answer", "p(no)", "p(yes)"]
    predictor = Predictor(*loaded_method(atv))
    assert predictor.render.text == "{input}"
    assert predictor.render.answer_prefix == "A:"


# ---- an adapter's rendering ----


def test_an_adapter_is_refused_if_the_chat_template_has_changed(tmp_path):
    task = replace(toy_task(), renderer=Rendering("chat"), answer_prefixes=(None,))
    llm = make_llm(dtype=torch.float32)
    config = ATVConfig(generator="self")
    atv = ATVModel(llm, config, tokenizer=chat_tokenizer("chatml"))
    train(atv, [task], tmp_path, TrainConfig(epochs=1, batch_size=8))
    again = ATVModel.from_pretrained(tmp_path, llm, tokenizer=chat_tokenizer("chatml"))
    assert again.render(["leaks"])[0].ids == list(
        again.tokenizer.apply_chat_template(
            [{"role": "user", "content": task.templates[0].replace("{input}", "leaks")}], add_generation_prompt=True
        )["input_ids"]
    )
    for tokenizer, words in ((chat_tokenizer("granite"), "another one"), (byte_level_tokenizer(), "has none")):
        with refused("trained with a chat template", words):
            ATVModel.from_pretrained(tmp_path, llm, tokenizer=tokenizer)


def test_the_chat_template_is_checked_for_every_method(tmp_path):
    task = replace(toy_task(), renderer=Rendering("chat"), answer_prefixes=(None,))
    atv = ATVModel(make_llm(dtype=torch.float32), ATVConfig(generator="self"), tokenizer=chat_tokenizer("chatml"))
    train(atv, [task], tmp_path, TrainConfig(epochs=1, batch_size=8))
    method = ATVMethod(atv)
    method.tokenizer = chat_tokenizer("granite")
    with refused("trained with a chat template", "another one"):
        Predictor(method, atv.training_summary)


def test_a_tasks_name_may_be_written_with_combining_accents(tmp_path):
    atv = trained(tmp_path, replace(toy_task(), name="caf\u00e9"))
    assert "p(yes)" in predict(atv, ["leaks"], task="cafe\u0301")[0]


# ---- the command ----


def test_the_command_keeps_all_columns_and_resumes(tmp_path, monkeypatch, capsys):
    import sys

    from atv.cli import main

    make_llm(dtype=torch.float32).save_pretrained(tmp_path / "llm")
    byte_level_tokenizer().save_pretrained(tmp_path / "llm")
    make_generator(ATVConfig()).save(tmp_path / "generator")
    lines = [(n, f"the harbour {'quiet' if n % 2 else 'leaks'} {n}", "yes" if n % 2 else "no") for n in range(40)]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *lines])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atv", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    how = ("--generator", tmp_path / "generator", "--epochs", 1, "--batch-size", 8, "--dtype", "float32")
    code, _, err = run(
        "train", "--data", tmp_path / "t.csv", "--llm", tmp_path / "llm", *how, "--out", tmp_path / "run"
    )
    assert code == 0, err
    use = ("predict", tmp_path / "t.csv", "--adapter", tmp_path / "run", "--dtype", "float32")
    code, said, err = run(*use, "--out", tmp_path / "out.csv")
    assert code == 0, err
    assert "40 rows answered now" in said
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "text", "label", "answer", "p(no)", "p(yes)"]
    assert [(int(row["id"]), row["text"], row["label"]) for row in rows] == lines
    assert all(float(row["p(no)"]) + float(row["p(yes)"]) == pytest.approx(1, abs=1e-4) for row in rows)
    assert run(*use, "--out", tmp_path / "out.csv")[1].strip().endswith("(0 rows answered now)")
    (tmp_path / "more.csv").write_text("prompt,label,completion,text\n" + "".join(f"x,a,b,{n[1]}\n" for n in lines))
    code, _, err = run("predict", tmp_path / "more.csv", *use[2:], "--out", tmp_path / "more.jsonl")
    assert code == 0, err
    assert json.loads((tmp_path / "more.jsonl.json").read_text())["settings"]["read"] == ["text"]
    code, _, err = run(*use, "--max-new-tokens", 9, "--out", tmp_path / "b.csv")
    assert (code, "--max-new-tokens is for generated answers" in err) == (2, True), err
    code, _, err = run(*use, "--input", "body", "--out", tmp_path / "b.csv")
    assert (code, "no column 'body'" in err) == (2, True), err
    code, said, err = run(*use, "--out", "-")
    assert code == 0, err
    assert [json.loads(line)["answer"] for line in said.splitlines()] == [row["answer"] for row in rows]


def test_the_command_reads_the_columns_of_all_rows(tmp_path, atv, monkeypatch):
    model = trained(tmp_path / "run")
    model.llm.save_pretrained(tmp_path / "llm")
    model.tokenizer.save_pretrained(tmp_path / "llm")
    rows = [{"instruction": f"the harbour {n}"} for n in range(4)]
    rows += [{"instruction": "the harbour", "input": f"{word} {n}"} for n in range(4) for word in ("quiet", "leaks")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    use = ("--adapter", tmp_path / "run", "--llm", tmp_path / "llm", "--dtype", "float32", "--device", "cpu")
    code, _, err = atv("predict", tmp_path / "t.jsonl", *use, "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    expected = predict(model, [{"input": "\n".join(row.values())} for row in rows])
    assert [row["p(yes)"] for row in found] == pytest.approx([row["p(yes)"] for row in expected], abs=1e-4)
    assert len({row["p(yes)"] for row in found}) == len(rows)
    assert json.loads((tmp_path / "out.jsonl.json").read_text())["settings"]["read"] == ["instruction", "input"]
    lines = [json.dumps(row) + "\n" for row in rows[:1] * CHUNK + rows[4:5]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(lines).encode())))
    code, said, err = atv("predict", "-", *use, "--out", "-")
    assert (code, len(said.splitlines())) == (2, CHUNK)
    assert "were read from instruction, and would now be read from instruction and input. Name" in " ".join(err.split())
