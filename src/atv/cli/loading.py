"""Loading the frozen LLM and the tasks given by a command's options."""

from dataclasses import asdict

from atv.cli.options import Loading, Tasks
from atv.data import Task, load_tasks
from atv.evaluation.measure import Frozen


def frozen_llm(name: str, loading: Loading) -> Frozen:
    """Which LLM and how it is loaded."""
    return Frozen(name, **asdict(loading))


def named_tasks(given: Tasks) -> list[Task]:
    """The tasks given by the options."""
    return load_tasks(given.task, given.data, given.template, input=given.input, output=given.output)
