"""A user's metric selects a training's epoch, and the record says what was done to the rows."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from refusals import refused
from training_runs import quick, tiny, weights
from transformers import set_seed

import atv
from atv.data import Example
from atv.evaluation.validation import ValidationMetric
from atv.methods import METHODS
from atv.methods.encoder import EncoderModel
from atv.methods.lora import LoRA
from atv.methods.peft_model import PEFTModel
from atv.training import loop
from atv.training.loop import train


def letters(example, text):
    """Depends on every letter of an answer."""
    return sum(map(ord, text)) % 97 / 97


def scored(values):
    """A metric that gives these values, one per epoch, and keeps the weights that it saw."""
    seen = []

    def metric(model):
        assert not model.training
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return values[len(seen) - 1]

    return metric, seen


def test_the_epoch_with_the_highest_score_is_kept(tmp_path):
    metric, seen = scored([0.2, 0.9, 0.5])
    model = tiny()
    record = train(model, [toy_task()], tmp_path / "out", quick(), metric=metric).record
    assert [entry["eval_metric"] for entry in record["history"] if "eval_metric" in entry] == [0.2, 0.9, 0.5]
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in model.state_dict().items())
    assert record["settings"]["metric"] == "metric"
    with refused(
        "made with other settings (metric: 'metric' there, None now)"
    ):  # a training chosen otherwise is another one
        train(tiny(), [toy_task()], tmp_path / "out", quick())


def test_of_equal_scores_the_lowest_loss_is_kept(tmp_path):
    record = train(tiny(), [toy_task()], tmp_path / "out", quick(), metric=lambda model: 0.5).record
    losses = {entry["step"]: entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry}
    assert record["best_step"] == min(losses, key=losses.get)


def test_a_score_that_is_no_number_is_refused(tmp_path):
    with refused("The metric that selects the epoch is nan"):
        train(tiny(), [toy_task()], tmp_path / "out", quick(), metric=lambda model: float("nan"))


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "world_size", lambda: 2)
    with refused("metric selects the epoch in one process only"):
        train(tiny(), [toy_task()], tmp_path / "out", quick(), metric=lambda model: 1.0)


@pytest.mark.parametrize("kind", ["atv", "lora"])
def test_a_validation_metric_is_what_evaluate_says_of_the_validation_rows(tmp_path, kind):
    """Compared with `evaluate` of the saved adapter on a task whose test rows are the validation rows."""
    task = toy_task(rows=24)
    metric = ValidationMetric([task], letters)
    if kind == "atv":
        model = tiny()
    else:
        set_seed(0)
        llm = make_llm("llama", dtype=torch.float32)
        model = PEFTModel(llm, byte_level_tokenizer(), LoRA, LoRA.config_class())
    result = train(model, [task], tmp_path / "out", quick(epochs=4, learning_rate=0.02), metric=metric)
    scores = [entry["eval_metric"] for entry in result.record["history"] if "eval_metric" in entry]
    assert result.record["settings"]["metric"] == "test_validation:letters"
    swapped = atv.Task(task.name, task.templates[:1], task.train, task.test, task.valid, options=task.options)
    method = METHODS[kind]
    loaded = method.load(model.llm, model.tokenizer, result.adapter)
    rows = atv.evaluate(loaded, [swapped], [letters])
    assert max(scores) == pytest.approx(sum(row["scores"]["letters"] for row in rows) / len(rows))
    assert len(set(scores)) > 1  # it depends on the weights


def test_a_training_with_a_metric_learns_the_same(tmp_path):
    """Measuring between epochs changes no random number: with a constant score, the lowest loss is kept."""
    task, config = toy_task(), quick(best_epoch="loss")
    train(tiny(), [task], tmp_path / "plain", config)
    metric = ValidationMetric([task], lambda example, text: 0.0)
    train(tiny(), [task], tmp_path / "measured", config, metric=metric)
    plain, measured = weights(tmp_path / "plain"), weights(tmp_path / "measured")
    assert all(torch.equal(tensor, measured[name]) for name, tensor in plain.items())


def test_a_score_is_named_and_an_unknown_one_refused(tmp_path):
    model, task = tiny(), toy_task()
    assert ValidationMetric([task], "json", "json_valid")(model) >= 0
    with refused("score of the metric json: 'json_field'", "Did you mean 'json_fields'?"):
        ValidationMetric([task], "json", "json_field")(model)
    with refused("json_fields is defined for none of the"):
        ValidationMetric([task], "json", "json_fields")(model)
    encoder = EncoderModel.__new__(EncoderModel)
    with refused("EncoderModel does not answer with the LLM; expected an ATV or a PEFT adapter"):
        ValidationMetric([task], "exact_match")(encoder)


def test_the_record_counts_drawn_dropped_and_too_long_rows(tmp_path):
    lines = [
        {"text": f"film {i} is {'good' if i % 2 else 'bad'}", "label": "yes" if i % 2 else "no"} for i in range(60)
    ]
    lines += [lines[0], {"text": "", "label": "yes"}, {"text": "film 2 IS bad", "label": "yes"}]
    file = tmp_path / "films.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (task,) = atv.load_tasks(data=file)
    record = train(tiny(), [task], tmp_path / "out", quick(epochs=1)).record
    prepared = record["data"]["films"]
    assert prepared["drawn"] == {"test": 12, "valid": 5}
    assert prepared["dropped"] == {"with an empty cell": 1, "repeated": 1, "repeated with another answer": 1}
    assert json.loads((tmp_path / "out" / "train.json").read_text())["data"] == record["data"]


def test_the_record_counts_rows_that_the_context_has_no_room_for(tmp_path):
    model = tiny()
    model.llm.config.max_position_embeddings = 60
    task = toy_task(rows=24)
    long = task.train[0]._replace(input="x" * 200 + "1")
    task = atv.Task(task.name, task.templates, (*task.train[1:], long), task.valid, task.test, options=task.options)
    record = train(model, [task], tmp_path / "out", quick(epochs=1)).record
    assert record["data"][task.name] == {"train": {"cut": 1}, "valid": {}}


@pytest.mark.parametrize(
    ("positions", "answer", "said"), [("last", "a long one", 1), ("answer", "a long one", 0), ("last", "yes", 0)]
)
def test_long_answers_that_are_not_steered_are_noted(tmp_path, capsys, positions, answer, said):
    rows = [Example(f"harbour {i}", f"{answer} {i}" if " " in answer else "yn"[i % 2]) for i in range(12)]
    task = atv.Task("t", ("{input}",), tuple(rows[:6]), tuple(rows[6:9]), tuple(rows[9:]))
    train(tiny(positions=positions), [task], tmp_path / "out", quick(epochs=1))
    assert capsys.readouterr().err.count("Long answers are learned better with --positions answer") == said
