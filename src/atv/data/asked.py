"""How an adapter's training asked its LLM, so that evaluation and use ask alike.

An adapter records its tasks by name, each with templates, answer prefixes and rendering (`Task.asking`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from atv.data.render import INPUT, Renderer, query_template
from atv.data.rendering import chat_template_digest, described, recorded
from atv.data.task import DRAWN_TEST, QUERY_COLUMNS, Task, composed
from atv.errors import ATVError, unknown
from atv.progress import log_once

Training = Mapping[str, Any]
"""The training summary of an adapter."""


def as_trained(task: Task, training: Training) -> Task:
    """Return a task asked as in an adapter's training.

    A task that it was trained on gets the templates, answer prefixes and rendering of training, and so does a task
    without a template of its own if the adapter was trained on one task. Any other one gets the rendering, if all
    training tasks share it.
    """
    tasks: Mapping[str, Any] = training.get("tasks", {})
    asked = tasks.get(task.name)
    if asked is None and task.templates == (INPUT,) and len(tasks) == 1:
        (asked,) = tasks.values()
    if asked is not None:
        if "custom" in asked["renderer"]:
            same = described(task.renderer) == asked["renderer"]
            return task if same else replace(task, renderer=recorded(asked["renderer"]))
        return replace(
            task,
            templates=tuple(asked["templates"]),
            answer_prefixes=tuple(asked["answer_prefixes"]),
            renderer=recorded(asked["renderer"]),
        )
    formats = [each["renderer"] for each in tasks.values()]
    if not formats or "custom" in formats[0] or any(other != formats[0] for other in formats):
        return task
    rendering = recorded(formats[0])
    prefixes = task.answer_prefixes if rendering.format == "template" else (None,)
    return replace(task, renderer=rendering, answer_prefixes=prefixes)


def query_renderer(training: Training, reads: str, task: str | None = None, template: str | None = None) -> Renderer:
    """Return the renderer of a user's queries, as in an adapter's training.

    Args:
        training: the adapter's training summary.
        reads: what the generator reads, as in `ATVConfig.reads`.
        task: name of a training task, whose first template is used. None: the only one; if there are several, the
            query alone.
        template: used instead of the task's.

    Raises:
        ATVError: the task is unknown, the training rendered its prompts with a custom renderer, or the adapter does not
            say how it was trained.
    """
    tasks: Mapping[str, Any] = training.get("tasks", {})
    if not tasks:
        raise ATVError(
            "The adapter does not say on which tasks it was trained, and so not how to write a prompt for a query. "
            "Give prompts that a renderer has made (atv.data.Template, atv.data.Chat)."
        )
    _, asked = trained_task(training, task)
    if not asked:  # several tasks: any of them says how prompts are written around the query
        asked = next(iter(tasks.values()))
        if template is None:
            known = ", ".join(tasks)
            said = f"No task or template is named: the LLM reads the query alone. Trained tasks: {known}."
            log_once(said, logging.INFO)
            template = INPUT
    text = asked["templates"][0] if template is None else template
    prefix = asked["answer_prefixes"][0]
    return recorded(asked["renderer"])(text, prefix, query_template(reads, text, prefix))


def trained_task(training: Training, task: str | None = None) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a training task and what the adapter records of it.

    Args:
        training: the adapter's training summary.
        task: its name. None: the only one; if there are several, both are empty.

    Raises:
        ATVError: the task is unknown.
    """
    tasks: Mapping[str, Any] = training.get("tasks", {})
    if task is None:
        return next(iter(tasks.items())) if len(tasks) == 1 else ("", {})
    name = composed(task)
    if name not in tasks:
        raise unknown("task", name, tasks, "These are the tasks that the adapter was trained on.")
    return name, tasks[name]


def table_of(prepared: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a training summary says of a task's table.

    Args:
        prepared: `Task.prepared`.

    Returns:
        The digest of the test inputs if they were drawn (`DRAWN_TEST`), and the columns that queries are read from
        (`QUERY_COLUMNS`); nothing for a task that is no table.
    """
    return {key: prepared[key] for key in (DRAWN_TEST, QUERY_COLUMNS) if key in prepared}


def check_test_rows(task: Task, training: Training) -> None:
    """Raise ATVError if a task's test rows are drawn from other rows than in an adapter's training.

    Args:
        task: with all of its test rows.
        training: the adapter's training summary.
    """
    made = training.get("tasks", {}).get(task.name, {}).get(DRAWN_TEST)
    if made is not None and made != task.prepared.get(DRAWN_TEST, made):
        raise ATVError(
            f"{task.name}: the table has changed since the adapter was trained, so other test rows are drawn from it, "
            "and the adapter may have been trained on some of them. Train again, or keep the test rows in a file of "
            "their own (a folder with train, validation and test)."
        )


def asking_of(tasks: Sequence[Task], tokenizer: Any) -> dict[str, Any]:
    """Return the entries of a training summary that say how tasks are asked, for `as_trained` and the check below.

    It also has the number of training rows of each task.
    """
    return {
        "tasks": {task.name: task.asking() | table_of(task.prepared) for task in tasks},
        "chat_template": chat_template_digest(tokenizer),
        "train_rows": {task.name: len(task.train) for task in tasks},
    }


def check_chat_template(training: Training, tokenizer: Any) -> None:
    """Raise ATVError if an adapter was trained with another chat template than the tokenizer has."""
    made, found = training.get("chat_template"), chat_template_digest(tokenizer)
    used = any(asked["renderer"].get("format", "chat") != "template" for asked in training.get("tasks", {}).values())
    if used and made != found:
        has = {True: "none", False: "another one"}
        raise ATVError(
            f"The adapter was trained with {'no' if made is None else 'a'} chat template, and the LLM's tokenizer now "
            f"has {has[found is None]}: prompts would not be those of training. Load the LLM's revision of training, "
            "or train the adapter again."
        )
