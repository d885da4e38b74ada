"""Reports to trackers, and callbacks: they see the training and are no part of what is learned."""

import json
from importlib.util import find_spec
from typing import ClassVar

import pytest
from conftest import toy_task
from refusals import refused
from training_runs import quick, tiny
from transformers import TrainerCallback

from atv.config import TrainConfig
from atv.methods.settings import method_settings
from atv.training import trainer
from atv.training.loop import train


def test_a_tracker_whose_package_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with refused(f"report_to is '{name}'", f"pip install {name}"):
            train(tiny(), [toy_task()], tmp_path / "out", quick(report_to=name))
    assert not (tmp_path / "out").exists()
    with refused("report_to 'tensorbord'", "Did you mean 'tensorboard'?"):
        TrainConfig(report_to="tensorbord")


class Tracker(TrainerCallback):
    """In place of a package that may not be installed: what the Trainer tells its callbacks."""

    told: ClassVar[list] = []

    def on_train_begin(self, args, state, control, model=None, **about):
        assert json.loads(model.config.to_json_string())["scale"] == 0.5  # as the report to TensorBoard does
        self.told.append(("begin", args.run_name))

    def on_log(self, args, state, control, logs=None, **about):
        self.told.append(("log", sorted(logs)))


def test_the_tracker_is_told_of_every_epoch_and_another_one_resumes(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(trainer, "find_spec", lambda name: name == "wandb")
    monkeypatch.setattr(Tracker, "told", [])
    given = method_settings("atv", [{"atv": {"report_to": "wandb"}}], 42).train
    assert given.report_to == "wandb"
    train(tiny(), [toy_task()], tmp_path / "run 7", quick(report_to="wandb"))
    assert Tracker.told[0] == ("begin", "run 7")
    assert sum("eval_accuracy" in keys for _, keys in Tracker.told[1:]) == 3
    assert "report_to" not in (tmp_path / "run 7" / "train.json").read_text()
    Tracker.told.clear()
    assert train(tiny(), [toy_task()], tmp_path / "run 7", quick()).record["finished"]  # the same training


def test_what_a_tracker_refuses_is_said_and_the_training_resumes_without_it(tmp_path, monkeypatch):
    from transformers.integrations import integration_utils

    class UsageError(Exception):
        __module__ = "wandb.errors"

    class Refusing(TrainerCallback):
        def on_train_begin(self, *_, **about):
            raise UsageError("No API key configured.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Refusing)
    monkeypatch.setattr(trainer, "find_spec", lambda name: name == "wandb")
    with refused("The tracker wandb failed: No API key configured.", "without --report-to wandb"):
        train(tiny(), [toy_task()], tmp_path / "out", quick(report_to="wandb"))
    assert train(tiny(), [toy_task()], tmp_path / "out", quick()).record["finished"]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_finds_the_losses_after_the_training(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = train(tiny(), [toy_task()], tmp_path / "out", quick(report_to="tensorboard")).record
    events = EventAccumulator(str(tmp_path / "out" / "logs")).Reload()
    found = [event.value for event in events.Scalars("eval/loss")]
    assert found == pytest.approx([entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry])


def test_callbacks_see_the_scores_and_can_stop_the_training(tmp_path):
    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **about):
            assert {"eval_loss", "eval_accuracy", "eval_choice"} <= metrics.keys()
            control.should_training_stop = state.epoch == 2

    result = train(tiny(), [toy_task()], tmp_path / "out", quick(), callbacks=[Stop()])
    assert len([entry for entry in result.record["history"] if "eval_loss" in entry]) == 2
    assert result.record["finished"]
