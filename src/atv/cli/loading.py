"""Loading the frozen LLM and the tasks given by a command's options."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from atv.cli.options import Loading, Tasks
from atv.data import Task, as_trained, load_tasks
from atv.data.rendering import Format
from atv.evaluation.measure import Frozen


def frozen_llm(name: str, loading: Loading) -> Frozen:
    """Which LLM and how it is loaded."""
    return Frozen(name, **asdict(loading))


def named_tasks(given: Tasks, training: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks given by the options.

    Args:
        given: the options.
        training: training summary of the adapter whose tasks they are: they are asked as in its training, unless the
            options say how.
    """
    tasks = load_tasks(
        given.task,
        given.data,
        given.template,
        input=given.input,
        output=given.output,
        format=cast(Format | None, given.format),
        system=given.system,
        chat_template_kwargs=given.chat_template_kwargs,
    )
    own = given.template or given.format or given.system or given.chat_template_kwargs
    return tasks if own or training is None else [as_trained(task, training) for task in tasks]
