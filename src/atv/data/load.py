"""Tasks by what the user names: a table, a folder of task files, or the built-in ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atv.data.folder import Known, folder_tasks
from atv.data.rendering import Format, Rendering
from atv.data.table import HUB, is_table, load_table
from atv.data.task import Task, composed
from atv.errors import ATVError, unknown
from atv.files import local


def load_tasks(
    names: Sequence[str] | None = None,
    data: Any = None,
    templates: Sequence[str] | None = None,
    known: Mapping[str, Known] | None = None,
    *,
    input: str | None = None,
    output: str | None = None,
    format: Format | None = None,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | str | None = None,
) -> list[Task]:
    """Tasks by name, each once; all that there are when no name is given.

    Args:
        names: of the tasks.
        data: a table, as `load_table` takes it, which is one task; or a folder with a JSON file for each task, as
            `folder_tasks` takes it; None: the built-in tasks.
        templates: used instead of the tasks' own.
        known: categories and templates of tasks whose folder does not give them.
        input: column of a table's queries; by default recognised.
        output: column of a table's answers; likewise.
        format: how prompts are written, as in `Rendering`. Default: `auto` for a table, unless templates are given;
            `template` for other tasks, or `chat` if one of the next two is given.
        system: system prompt of a chat.
        chat_template_kwargs: options of the LLM's chat template, as a mapping or JSON; by default those in a table's
            column of that name.
    """
    if isinstance(data, str) and not data.strip():
        raise ATVError("The data have an empty name; expected a file, a folder or hub:NAME.")
    options = chat_template_kwargs if isinstance(chat_template_kwargs, str) else json.dumps(chat_template_kwargs or {})
    if format is None and (system is not None or options != "{}"):
        format = "chat"
    if data is not None and is_table(data):
        rendering = Rendering(format or ("template" if templates else "auto"), system, options)
        task = load_table(data, input=input, output=output, templates=templates, rendering=rendering)
        for name in names or ():
            if composed(name) != task.name:
                raise unknown("task", name, [task.name], f"{data} is one table, and so one task: leave --task out.")
        return [_sourced(task, data, input, output)]
    if input is not None or output is not None:
        raise ATVError(
            "--input and --output name columns of a table; expected --data with a CSV, TSV, JSONL, JSON or Parquet "
            f"file, a folder with one for each split, or hub:NAME; found {data or 'the built-in tasks'}."
        )
    tasks = [_sourced(task, data) for task in folder_tasks(names, data, templates, known)]
    if format is None:
        return tasks
    rendering = Rendering(format, system, options)
    prefixes: dict[str, Any] = {} if format == "template" else {"answer_prefixes": (None,)}
    return [replace(task, renderer=rendering, **prefixes) for task in tasks]


def _sourced(task: Task, data: Any, input: str | None = None, output: str | None = None) -> Task:
    """The task with what names its rows, as arguments of `load_tasks`; unchanged for an object in memory."""
    if data is not None and not isinstance(data, str | Path):
        return task
    name = data if data is None or str(data).startswith(HUB) else str(local(data).resolve())
    return replace(task, prepared={**task.prepared, "source": {"data": name, "input": input, "output": output}})
