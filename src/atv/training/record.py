"""What a training is recorded as, so that it can be resumed, skipped or refused."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from atv import artifact
from atv.data import Task, as_trained, load_tasks
from atv.errors import ATVError
from atv.files import occupied, read_json, same_settings, write_json
from atv.lm.hooks import base_llm, quantization

RECORD_FILE = "train.json"
LOGS = "logs"
"""Folder of TensorBoard's files."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

    adapter: Path
    """Folder of the adapter."""
    record: dict[str, Any]
    """The contents of `train.json`: settings, history, seconds, versions."""


def training_settings(
    llm: nn.Module, tasks: Sequence[Task], config: dict[str, Any], train: dict[str, Any]
) -> dict[str, Any]:
    """Return all settings that determine what is learned, which a resumed training must share with the interrupted one.

    Args:
        llm: the frozen LLM.
        tasks: the training tasks.
        config: the method's configuration.
        train: the training configuration: `TrainConfig.learned_with()`.
    """
    described = {
        task.name: {
            "train": len(task.train),
            "valid": len(task.valid),
            "asking": task.asking(),
            "digest": task.digest("train", "valid"),
        }
        | ({"teacher": _teacher_digest(task)} if task.taught else {})
        for task in tasks
    }
    return {
        "llm": cast(Any, llm).name_or_path,
        "revision": getattr(base_llm(llm).config, "_commit_hash", None),
        "dtype": str(next(llm.parameters()).dtype),
        "quantization": quantization(llm),
        "config": config,
        "train": train,
        "tasks": described,
    }


def _teacher_digest(task: Task) -> str:
    """Return a short digest of a teacher's answers: two teachers may write the same texts and not be equally sure."""
    digest = hashlib.sha256()
    for example in (*task.train, *task.valid):
        if example in task.taught:
            lesson = task.taught[example]
            digest.update(repr(lesson.ids).encode())
            digest.update(lesson.likeliest.long().cpu().numpy().tobytes())
            digest.update(lesson.probabilities.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def former_record(out: Path, settings: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Return the record of the training in `out`, if it is to be resumed; its settings must be the same."""
    file = out / RECORD_FILE
    if file.exists() and not force:
        record: dict[str, Any] = read_json(file, "the record of a training")
        same_settings(_with_teachers(record, settings), settings, out)
        if record["finished"]:
            artifact.restore(out / "adapter")  # a kill came before the first record of another training: see `begin`
        return record
    if occupied(out) and not file.exists():
        raise ATVError(f"{out} exists and is not a training; choose a new folder, so that nothing there is lost.")
    return None


def begin(out: Path, record: dict[str, Any]) -> None:
    """Write the record of a new training; an adapter of a former one is retired first, since it would not be its."""
    artifact.retire(out / "adapter")
    write_json(out / RECORD_FILE, record)


def _with_teachers(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a record's settings; those of a taught task without a digest of its teacher get the one in `settings`."""
    former: dict[str, Any] = record.get("settings", {})
    tasks = former.get("tasks", {})
    given = {
        name: {"teacher": task["teacher"]} | tasks[name]
        for name, task in settings["tasks"].items()
        if "teacher" in task and name in tasks and "teacher" in record.get("data", {}).get(name, {})
    }
    return {**former, "tasks": tasks | given} if given else former


def training_tasks(adapter: Path) -> list[Task]:
    """Load the tasks that an adapter was trained on again, asked as in its training.

    An adapter contains none of its training rows. `train.json` beside it says where they came from.

    Args:
        adapter: the adapter's folder.

    Raises:
        ATVError: there is no such file, it does not say where the rows came from, they cannot be read, or they have
            changed since the training.
    """
    file = adapter.parent / RECORD_FILE
    if not file.is_file():
        raise ATVError(f"the adapter contains none, and {file}, which would say where they came from, does not exist.")
    record = read_json(file, "the record of a training")
    tasks = []
    try:
        for name, made in record["settings"]["tasks"].items():
            about = record.get("data", {}).get(name, {})
            if "source" not in about:
                raise ATVError(f"{file} does not say where the rows of {name} came from.")
            asking = made["asking"]
            how = {"templates": asking["templates"], "format": asking["renderer"].get("format")}
            (task,) = load_tasks([name], **about["source"], **how)
            for draw in about.get("draws", ()):
                task = task.drawn(**draw)
            if task.digest("train", "valid") != made["digest"]:
                raise ATVError(f"{_source(about)} has changed since the training, according to {file}.")
            tasks.append(as_trained(task, {"tasks": {name: asking}}))
    except (AttributeError, KeyError, TypeError) as error:
        raise ATVError(f"{file} is damaged: {error!r}.") from error
    return tasks


def _source(about: dict[str, Any]) -> str:
    return about["source"]["data"] or "the built-in data"


def clear(out: Path) -> None:
    """Remove the files that a training needs only while it runs."""
    for name in ("checkpoints", "prefixes"):
        shutil.rmtree(out / name, ignore_errors=True)
