"""Loading the frozen LLM and the tasks given by a command's options."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from atv.cli.options import Loading, Tasks
from atv.data import Example, Task, as_trained, load_tasks
from atv.data.rendering import Format, Rendering
from atv.data.table import Queries, is_table, load_queries, load_table
from atv.errors import ATVError

if TYPE_CHECKING:
    from atv.evaluation.measure import Frozen


def frozen_llm(name: str, loading: Loading) -> "Frozen":
    """Which LLM and how it is loaded."""
    from atv.evaluation.measure import Frozen

    return Frozen(name, **asdict(loading))


def named_tasks(given: Tasks, training: Mapping[str, Any] | None = None) -> list[Task]:
    """The tasks given by the options.

    Args:
        given: the options.
        training: training summary of the adapter whose tasks they are: they are asked as in its training, except for
            what the options say.
    """
    table = given.data is not None and is_table(given.data)
    if training is None:
        return _loaded(given, given.template)
    # A table without a template of its own may be the adapter's single training task under another name.
    tasks = _loaded(given, None if table else given.template)
    trained = [as_trained(task, training) for task in tasks]
    if table and trained[0] is tasks[0]:  # nothing of the training applies to it
        return _loaded(given, given.template)
    return [_asked_otherwise(task, given) for task in trained]


def _loaded(given: Tasks, templates: Sequence[str] | None) -> list[Task]:
    return load_tasks(
        given.task,
        given.data,
        templates,
        input=given.input,
        output=given.output,
        format=cast(Format | None, given.format),
        system=given.system,
        chat_template_kwargs=given.chat_template_kwargs,
    )


def _asked_otherwise(task: Task, given: Tasks) -> Task:
    """A task asked as in training, with what the options say in place of that."""
    if given.template:
        task = replace(task, templates=tuple(given.template))
    ways = {"format": given.format, "system": given.system, "template_kwargs": given.chat_template_kwargs}
    ways = {name: value for name, value in ways.items() if value is not None}
    if not ways or not isinstance(task.renderer, Rendering):
        return task
    former = task.renderer
    if given.format == "template" and (former.system is not None or former.template_kwargs != "{}"):
        raise ATVError(
            f"{task.name}: the adapter was trained in a chat with a system prompt or options of the chat template, for "
            "which --format template has no place. Leave --format out."
        )
    rendering = replace(former, **cast(dict[str, Any], ways))
    prefixes = task.answer_prefixes if rendering.format == "template" else (None,)
    return replace(task, renderer=rendering, answer_prefixes=prefixes)


def taught_queries(given: Tasks, shots: int, seed: int) -> tuple[Queries, Rendering, list[Example]]:
    """The queries of the table that the options name, how the student is asked, and drawn demonstrations.

    Args:
        given: the options.
        shots: number of demonstrations, which are training rows with their answers and no longer among the queries.
        seed: seed of the draw.
    """
    if given.data is None or not is_table(given.data) or given.task or given.template:
        raise ATVError(
            "A teacher answers the queries of one table; expected --data with a CSV, TSV, JSONL, JSON or Parquet file, "
            f"a folder with one for each split, or hub:NAME, and neither --task nor --template; found {given.data}."
        )
    student = Rendering(cast(Format, given.format or "auto"), given.system, given.chat_template_kwargs or "{}")
    how: dict[str, Any] = {"input": given.input, "output": given.output, "rendering": student}
    queries = load_queries(given.data, **how)
    if not shots:
        return queries, queries.rendering, []
    rows = load_table(given.data, **how).train
    if shots >= len(rows):
        raise ATVError(f"--teacher-shots is {shots}, and {given.data} has {len(rows)} training rows; give fewer.")
    shown = random.Random(f"{seed} shots").sample(rows, shots)
    taken = {example.asked for example in shown}
    splits = {split: tuple(row for row in some if row.asked not in taken) for split, some in queries.splits.items()}
    return queries._replace(splits=splits), queries.rendering, shown
