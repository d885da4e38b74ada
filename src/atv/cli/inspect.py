"""`atv inspect`: what an adapter does for single queries."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from atv.cli.generate import onto_llm, read_adapter
from atv.cli.options import Inspect
from atv.cli.output import print_lines, print_table
from atv.data import Task, as_trained, load_tasks
from atv.errors import ATVError
from atv.evaluation.inspect import TrainingQueries, inspect_query
from atv.files import read_json
from atv.report import inspection_lines, inspection_table
from atv.training.record import RECORD_FILE, training_tasks


def inspect_queries(given: Inspect) -> None:
    """For each query, print what the vectors change, in sentences and then layer by layer."""
    folder, saved, _ = read_adapter(given)
    tasks, note = _training_rows(given, folder, saved.training)
    atv = onto_llm(given, folder, saved)
    known = TrainingQueries(atv, tasks) if tasks else None
    for number, query in enumerate(given.query, start=1):
        found = inspect_query(atv, query, task=given.task, template=given.template, known=known)
        print_lines([*inspection_lines(found, note), ""])
        if found.layers:
            table = inspection_table(found)
            print_table(table if number == len(given.query) else replace(table, note=""))


def _training_rows(given: Inspect, adapter: Path, training: Mapping[str, Any]) -> tuple[list[Task], str]:
    """The training tasks, and why they are not there or may have other rows than in training."""
    if given.data is not None:
        return _drawn_again(_given_rows(given, training["tasks"]), adapter.parent / RECORD_FILE)
    if given.input is not None or given.output is not None:
        raise ATVError("--input and --output name columns of a table; expected --data with that table.")
    try:
        return training_tasks(adapter), ""
    except ATVError as error:
        return [], f"{error} Give --data with the training data to see them."


def _given_rows(given: Inspect, trained: Mapping[str, Any]) -> list[Task]:
    """The tasks of --data that the adapter was trained on; a single one may have another name."""
    tasks = load_tasks(None, given.data, input=given.input, output=given.output)
    if len(tasks) == len(trained) == 1:
        tasks = [replace(tasks[0], name=next(iter(trained)))]
    known = [as_trained(task, {"tasks": trained}) for task in tasks if task.name in trained]
    if not known:
        raise ATVError(
            f"{given.data} has the tasks {', '.join(task.name for task in tasks)}; expected one that the adapter was "
            f"trained on: {', '.join(trained)}."
        )
    return known


def _drawn_again(tasks: list[Task], file: Path) -> tuple[list[Task], str]:
    """The tasks with the rows that a training drew from them, as its record says, and why they may be others."""
    if not file.is_file():
        return tasks, f"{file}, which would say which rows were drawn, does not exist."
    try:
        record = read_json(file, "the record of a training")
        made, drawn = record["settings"]["tasks"], []
        for task in tasks:
            for draw in record.get("data", {}).get(task.name, {}).get("draws", ()):
                task = task.drawn(**draw)
            drawn.append(task)
        others = [task.name for task in drawn if task.digest("train", "valid") != made[task.name]["digest"]]
    except ATVError as error:
        return tasks, str(error)
    except (AttributeError, KeyError, TypeError) as error:
        return tasks, f"{file} is damaged: {error!r}."
    return drawn, f"according to {file} it had other rows of {', '.join(others)}." if others else ""
