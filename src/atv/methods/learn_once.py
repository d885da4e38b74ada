"""Learning without a training loop: recorded, resumed and started over like a training."""

import shutil
import time
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import Any, cast

from torch import nn

from atv.config import Checked, is_whole
from atv.data import Task
from atv.errors import ATVError
from atv.files import write_json
from atv.lm.hooks import decoder_layers
from atv.lm.scoring import note_shared
from atv.processes import barrier, is_main
from atv.progress import log
from atv.provenance import provenance
from atv.training.record import RECORD_FILE, begin, former_record, training_settings

BEST = "best"
"""Instead of a number: the value that does best on validation rows."""
TINY = 1e-12
"""The smallest penalty."""
FEW = 100
"""With fewer validation rows, a choice is reported as uncertain: one standard error is 5 points or more."""

Learn = Callable[[Path, Path, Callable[..., None]], None]
"""Called with the adapter's folder to write, a folder for parts that must survive an interruption, and a function to
call after each part, which records the seconds so far and its arguments."""


def learn_once(
    llm: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    out: Path,
    config: Checked,
    train: dict[str, Any],
    learn: Learn,
    *,
    force: bool,
    together: bool = False,
) -> Path:
    """Let `learn` write `out/adapter`, unless it is finished already; the record is `out/train.json`.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        tasks: the training tasks.
        out: the folder of this training.
        config: the method's configuration.
        train: other settings that affect the result.
        learn: called in the main process only, unless `together`.
        force: start over, even if `out` holds a training.
        together: call `learn` in every process.

    Raises:
        ATVError: `out` holds another training.
    """
    note_shared(tokenizer, tasks)
    settings = training_settings(llm, tasks, config.to_dict(), train)
    record = former_record(out, settings, force)
    adapter, parts = out / "adapter", out / "parts"
    if record is not None and record["finished"]:
        log.info(f"{out} holds this training already, finished; nothing to do (start over with --force).")
        return adapter
    barrier()  # before other processes can find the record
    if record is None:
        record = dict[str, Any](finished=False, settings=settings, seconds=0.0) | provenance()
        if is_main():
            shutil.rmtree(parts, ignore_errors=True)
            begin(out, record)
    barrier()
    began = time.perf_counter()

    def keep(**found: Any) -> None:
        nonlocal began
        now = time.perf_counter()
        record.update(found, seconds=record["seconds"] + now - began)
        began = now
        if is_main():
            write_json(out / RECORD_FILE, record)

    if is_main() or together:
        learn(adapter, parts, keep)
        keep(finished=True)
    barrier()
    if is_main():
        shutil.rmtree(parts, ignore_errors=True)
    return adapter


def number_or_best(name: str, value: object, *, whole: bool = False) -> None:
    """Raise ATVError unless a setting is `best` or a number: positive or, if `whole`, a whole number from 0."""
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if value != BEST and not (number and (0 if whole else TINY) <= cast(float, value) < inf):
        expected = "a whole number from 0" if whole else f"a number from {TINY}"
        raise ATVError(f"{name} is {value!r}; expected {expected}, or {BEST}: the best one on validation rows.")


def at_least_one(config: Checked, *names: str) -> None:
    """Raise ATVError unless these settings are whole numbers from 1."""
    for name in names:
        value = getattr(config, name)
        if not is_whole(value, 1):
            raise ATVError(f"{name} is {value!r}; expected a whole number from 1.")


def layers_to_try(layer: int | str, candidates: int, llm: nn.Module) -> list[int]:
    """Indices of the candidate decoder layers: the middles of equal parts of the depth.

    Args:
        layer: the only candidate, or `best`.
        candidates: how many, at most all layers of the LLM.
        llm: the LLM.
    """
    count = len(decoder_layers(llm))
    if layer == BEST:
        parts = min(candidates, count)
        return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]
    if int(layer) >= count:
        raise ATVError(f"layer is {layer}; this LLM has layers 0 to {count - 1}.")
    return [int(layer)]


def note_few(name: str, tasks: Sequence[Task], settings: int) -> None:
    """Warn if settings are chosen on few validation rows."""
    rows = sum(len(task.valid) for task in tasks)
    if rows < FEW:
        log.warning(
            f"{name}: {rows} validation rows choose among {settings} settings, and one row is {100 / rows:.1f} points: "
            "the best setting may be chance. Use more rows (--valid-rows) or set the value."
        )
