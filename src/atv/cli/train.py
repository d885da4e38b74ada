"""`atv train`."""

import shlex
from pathlib import Path

from atv.cli.loading import frozen_llm, named_tasks
from atv.cli.options import Train
from atv.cli.output import print_lines
from atv.data import UNSEEN
from atv.errors import ATVError
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.settings import method_settings
from atv.processes import world_size
from atv.progress import log


def train_adapter(given: Train, store: PrefixStore | None = None) -> Path:
    """Train a method. Everything that can be checked without a model is checked before one is loaded.

    Args:
        given: the options.
        store: cached prompt prefixes; by default a new store with the size given by the options.

    Returns:
        The adapter's folder.
    """
    name = given.method
    settings = method_settings(name, [given.file.tables, {name: given.settings}], given.seed)
    settings.train.rows_per_call(world_size())
    memory, disk = (_bytes(f"prefix_{kind}", getattr(given, f"prefix_{kind}")) for kind in ("memory", "disk"))
    tasks = named_tasks(given.tasks)
    if not given.tasks.task:
        left_out = [task.name for task in tasks if task.category == UNSEEN]
        tasks = [task for task in tasks if task.category != UNSEEN]
        if left_out:
            log.info(f"Not trained on, since their category is {UNSEEN}: {', '.join(left_out)} (--task names tasks)")
        if not tasks:
            raise ATVError(f"All tasks are of the category {UNSEEN}, which is not trained on; name them with --task.")
    tasks = [task.drawn(given.train_rows, given.valid_rows, given.seed) for task in tasks]
    llm, tokenizer = frozen_llm(given.llm, given.loading).load()
    rows = sum(len(task.train) for task in tasks)
    log.info(f"{name}: {rows} training rows of {', '.join(task.name for task in tasks)}")
    store = store or PrefixStore(memory, disk)
    adapter = METHODS[name].fit(llm, tokenizer, tasks, given.out, *settings, force=given.force, store=store)
    named = {"data": given.tasks.data, "input": given.tasks.input, "output": given.tasks.output}
    same = "".join(f" --{option} {shlex.quote(value)}" for option, value in named.items() if value)
    print_lines([f"Adapter: {adapter}", f"Next: atv eval --adapter {adapter} --task {tasks[0].name}{same}"])
    return adapter


def _bytes(name: str, gib: float | None) -> int | None:
    """An option in GiB as bytes."""
    if gib is not None and not 0 <= gib < float("inf"):
        raise ATVError(f"--{name.replace('_', '-')} is {gib}; expected a number of GiB from 0.")
    return None if gib is None else int(gib * 2**30)
