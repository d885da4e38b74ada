"""`atv train`."""

import shlex
from pathlib import Path
from typing import Any

from atv.cli.loading import frozen_llm, named_tasks, taught_queries
from atv.cli.options import Train
from atv.cli.output import print_lines
from atv.data import UNSEEN
from atv.errors import ATVError, unknown
from atv.files import require_writable, write_json
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.settings import Settings, method_settings
from atv.processes import world_size
from atv.progress import log

DISTILLED = ("atv", "fixed", "lora", "prefix", "full")
"""Methods that learn the distribution of a teacher."""
TEACHER_TOKENS = 64
"""Maximum number of tokens of a teacher's answer by default."""


def train_adapter(given: Train, store: PrefixStore | None = None) -> Path:
    """Train a method. Everything that can be checked without a model is checked before one is loaded.

    Args:
        given: the options.
        store: cached prompt prefixes; by default a new store with the size given by the options.

    Returns:
        The adapter's folder.
    """
    name = given.method
    require_writable(given.out)
    settings = method_settings(name, [given.file.tables, {name: given.settings}], given.seed)
    settings.train.rows_per_call(world_size())
    memory, disk = (_bytes(f"prefix_{kind}", getattr(given, f"prefix_{kind}")) for kind in ("memory", "disk"))
    store = store or PrefixStore(memory, disk)
    if given.teacher_system is not None or given.teacher_shots is not None:
        return _distil(given, settings, store)
    if given.teacher_tokens is not None:
        raise ATVError("--teacher-tokens is for a teacher; add --teacher-system or --teacher-shots, or leave it out.")
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
    adapter = METHODS[name].fit(llm, tokenizer, tasks, given.out, *settings, force=given.force, store=store)
    named = {"data": given.tasks.data, "input": given.tasks.input, "output": given.tasks.output}
    same = "".join(f" --{option} {shlex.quote(value)}" for option, value in named.items() if value)
    print_lines([f"Adapter: {adapter}", f"Next: atv eval --adapter {adapter} --task {tasks[0].name}{same}"])
    return adapter


def _distil(given: Train, settings: Settings, store: PrefixStore) -> Path:
    """Ask the teacher, train the method on its answers, and say how much of the teacher it recovers."""
    from atv.evaluation.distil import distilled  # here: it loads what a training alone does not need
    from atv.lm.teacher import taught_task

    if world_size() > 1:
        raise ATVError(
            f"A teacher is asked in one process; found {world_size()}. Start the command without a launcher."
        )
    if given.method not in DISTILLED:
        raise unknown("method that a teacher can train", given.method, DISTILLED)
    system = None if given.teacher_system is None else _text_of(given.teacher_system)
    queries, student, shots = taught_queries(given.tasks, given.teacher_shots or 0, given.seed)
    queries = queries.drawn(given.train_rows, given.valid_rows, given.seed)
    llm, tokenizer = frozen_llm(given.llm, given.loading).load()
    cache = given.out.parent / "teachers"
    how: dict[str, Any] = {
        "system": system,
        "shots": shots,
        "limit": given.teacher_tokens or TEACHER_TOKENS,
        "cache": cache,
    }
    task = taught_task(llm, tokenizer, queries, student, **how)
    method = METHODS[given.method]
    adapter = method.fit(llm, tokenizer, [task], given.out, *settings, force=given.force, store=store)
    found = distilled(method.load(llm, tokenizer, adapter), task, llm)
    write_json(given.out / "distil.json", found)
    percent = {key: f"{100 * found[key]:.0f}%" for key in found if key.startswith(("recovered", "agreement"))}
    print_lines(
        [
            f"Adapter: {adapter}",
            f"{given.method} recovers {percent['recovered']} of the teacher on {found['queries']} held-out queries "
            f"(95% interval {percent['recovered_low']} to {percent['recovered_high']}).",
            f"Kullback-Leibler divergence per token: {found['divergence']:.3f} nats, without it "
            f"{found['divergence_without']:.3f}. Same next token: {percent['agreement']}, without it "
            f"{percent['agreement_without']}.",
            f"Prompt tokens: {found['prompt_tokens']:.0f}, of the teacher {found['prompt_tokens_teacher']:.0f}.",
            f'Next: atv generate --adapter {adapter} --compare "your query"',
        ]
    )
    return adapter


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ATVError(f"{file} is not UTF-8; save it as UTF-8.") from None
    except OSError as error:
        raise ATVError(f"{file} cannot be read: {error.strerror}.") from error


def _bytes(name: str, gib: float | None) -> int | None:
    """An option in GiB as bytes."""
    if gib is not None and not 0 <= gib < float("inf"):
        raise ATVError(f"--{name.replace('_', '-')} is {gib}; expected a number of GiB from 0.")
    return None if gib is None else int(gib * 2**30)
