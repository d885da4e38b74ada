"""`atv tasks`. Without --audit it does not import torch, which takes seconds."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.table import Table

from atv.cli.loading import named_tasks
from atv.cli.options import ListTasks
from atv.cli.output import output, print_lines
from atv.config import EMBEDDED_GENERATOR, random_sizes
from atv.data import Task, findings, long_prompts, refuse_shared_inputs, unread_queries
from atv.errors import ATVError
from atv.progress import log


def list_tasks(given: ListTasks) -> None:
    """Print tasks with their sizes, options and majority rate, with --audit also the audit's findings."""
    for name in ("llm", "generator"):
        if getattr(given, name) is not None and not given.audit:
            raise ATVError(f"--{name} is only used with --audit; add --audit, or leave --{name} out.")
    tasks = named_tasks(given.tasks)
    grid = Table()
    for column in ("task", "category", "train", "valid", "test", "majority", "options"):
        grid.add_column(column, justify="left" if column in ("task", "category", "options") else "right")
    for task in tasks:
        shown = ", ".join(task.options[:6]) + (" ..." if len(task.options) > 6 else "")
        sizes = (str(len(task.train)), str(len(task.valid)), str(len(task.test)))
        grid.add_row(task.name, task.category, *sizes, f"{100 * task.majority():.1f}%", shown)
    output.print(grid)
    if given.audit:
        _audit(tasks, given.llm, given.generator)


def _audit(tasks: Sequence[Task], llm: str | None, generator: str | None) -> None:
    """Refuse what evaluation refuses, print the findings; no weights are loaded."""
    from atv.lm.load import load_context_length, load_tokenizer
    from atv.lm.scoring import option_ids

    refuse_shared_inputs(list(tasks))
    tokenizer = None if llm is None else load_tokenizer(llm)
    limit = None if llm is None else load_context_length(llm)
    reads = _generator_tokenizer(generator)
    for task in tasks:
        print_lines(findings(task, None if tokenizer is None else partial(option_ids, tokenizer, task)))
        if limit is not None:
            print_lines(long_prompts(task, tokenizer, limit))
        if reads is not None:
            print_lines(unread_queries(task, reads))


def _generator_tokenizer(name: str | None) -> Any:
    """A generator's tokenizer; None for one that reads the LLM's tokens, and for a default that is not installed."""
    from atv.generator import GENERATORS
    from atv.lm.load import load_tokenizer

    if name is None:
        try:
            return load_tokenizer(EMBEDDED_GENERATOR)
        except ATVError as error:
            log.info(f"Whether the generator can read the queries is not checked: {error}")
            return None
    return None if name in GENERATORS or random_sizes(name) else load_tokenizer(name)
