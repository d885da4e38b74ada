"""Class weights: scikit-learn's, in the loss of training alone, for every method; and nothing changes without them."""

import json

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from training_runs import quick, tiny, weights

from atv.config import TrainConfig
from atv.data import Example, Task
from atv.methods.fixed import FixedModel
from atv.methods.full import FullModel
from atv.methods.lora import LoRA
from atv.methods.peft_model import PEFTModel
from atv.training.batches import Batches, Rows, balanced_weights, training_rows
from atv.training.loop import train


def rare_task(name="rare", often=9, rarely=1):
    answers = ["yes"] * often + ["no"] * rarely
    rows = [Example(f"{name} the harbour {n}", answer) for n, answer in enumerate(answers)]
    other = toy_task(name)
    return Task(name, ("{input}\nyes or no?",), tuple(rows), other.valid, other.test)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdé"), min_size=1, max_size=50))
def test_the_weights_are_those_of_scikit_learn_and_their_mean_is_one(answers):
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    classes = np.unique(answers)
    expected = dict(zip(classes, sklearn.compute_class_weight("balanced", classes=classes, y=answers), strict=True))
    found = balanced_weights(answers)
    assert found == pytest.approx(expected)
    assert np.mean([found[answer] for answer in answers]) == pytest.approx(1)


def models():
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    return {
        "atv": tiny,
        "fixed": lambda: FixedModel(llm, tokenizer=tokenizer),
        "lora": lambda: PEFTModel(llm, tokenizer, LoRA, LoRA.config_class(dropout=0.0)),
        "full": lambda: FullModel(llm, tokenizer),
    }


@pytest.mark.parametrize(("kind", "split"), [("atv", 1), ("atv", 2), ("fixed", 1), ("lora", 2), ("full", 1)])
def test_the_first_step_follows_the_weighted_gradient_computed_by_hand(tmp_path, kind, split):
    """Two tasks, each with its own weights: 5/9 and 5 in one, 2/3 and 2 in the other. Adam's first step is g / |g|.

    A batch that is split is filled up with two rows that do not count.
    """
    tasks = [rare_task(), rare_task("other", 3, 1)]
    by_hand = {"rare": {"yes": 10 / 18, "no": 10 / 2}, "other": {"yes": 4 / 6, "no": 4 / 2}}
    config = quick(
        epochs=1, batch_size=16, weight_decay=0.0, class_weights="balanced", gradient_accumulation_steps=split
    )
    make = models()[kind]
    torch.manual_seed(5)
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    raw = [row for task in tasks for row in training_rows(task, "train", model.reads)]
    rows = Rows([model.encode_row(row) for row in raw], 1)
    order = list(Batches(rows, 16, config.seed))
    output = model(**model.collator()([rows[index] for index in order]))
    factors = [by_hand[raw[index].task][raw[index].example.output] for index in order]
    loss = sum(factor * one for factor, one in zip(factors, output.losses, strict=True)) / 14
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learned.items()}
    gradients = torch.autograd.grad(loss, list(learned.values()))
    result = train(model, tasks, tmp_path / "out", config)
    for (name, was), g in zip(before.items(), gradients, strict=True):
        clear = g.abs() > 1e-5  # where rounding does not decide the sign
        step = config.learning_rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(learned[name][clear], (was - step)[clear], atol=3e-5, rtol=0)
    logged = [entry["loss"] for entry in result.record["history"] if "loss" in entry]
    assert logged == [pytest.approx(loss.item(), rel=1e-4)]


def test_the_validation_loss_is_not_weighted(tmp_path):
    found = []
    for kind in ("none", "balanced"):
        config = quick(epochs=1, learning_rate=0.0, class_weights=kind)
        record = train(tiny(), [rare_task()], tmp_path / kind, config).record
        found.append([entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry])
        logged = [entry["loss"] for entry in record["history"] if "loss" in entry]
        found[-1] += [record["settings"]["train"].get("class_weights")]
        found[-1] += logged
    assert found[0][0] == found[1][0]
    assert found[0][1:2] + found[1][1:2] == [None, "balanced"]
    assert found[0][2] != pytest.approx(found[1][2], rel=1e-3)


def test_equal_counts_train_as_without_weights(tmp_path):
    for kind in ("none", "balanced"):
        train(tiny(), [toy_task()], tmp_path / kind, quick(class_weights=kind))
    there, here = weights(tmp_path / "none"), weights(tmp_path / "balanced")
    for name, tensor in there.items():
        torch.testing.assert_close(here[name], tensor, atol=1e-5, rtol=1e-4)


def test_unequal_answers_are_said_unless_they_are_weighted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("atv.progress._WARNED", set())
    said = "rare: 9 training rows have the answer 'yes' and 1 have 'no'"
    with caplog.at_level("WARNING", "atv"):
        train(tiny(), [rare_task()], tmp_path / "balanced", quick(epochs=1, class_weights="balanced"))
        train(tiny(), [rare_task(often=5)], tmp_path / "five", quick(epochs=1))
        assert "training rows have the answer" not in caplog.text
        train(tiny(), [rare_task()], tmp_path / "none", quick(epochs=1))
    assert said in caplog.text
    assert "--class-weights balanced" in caplog.text


def test_other_weights_are_other_settings_and_none_is_no_setting(tmp_path):
    train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=1))
    assert "class_weights" not in json.loads((tmp_path / "out" / "train.json").read_text())["settings"]["train"]
    with refused("train.class_weights: None there, 'balanced' now"):
        train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=1, class_weights="balanced"))
    with refused("class_weights 'balance'", "Did you mean 'balanced'?"):
        TrainConfig(class_weights="balance")
