"""Methods compared on one's own data sets: each is trained and evaluated on each data set, with several seeds."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atv.data import UNSEEN, Task
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen, learn, measure, remove_results
from atv.evaluation.run import metrics_of
from atv.files import occupied, read_json, same_settings, write_json
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.settings import Settings, Tables, method_settings
from atv.progress import Steps
from atv.provenance import provenance

RECORD_FILE = "compare.json"


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (42, 43, 44)
    train_rows: tuple[int | None, ...] = (None,)
    """Training rows per data set, drawn with the seed; None: all. Several make a learning curve."""
    valid_rows: int | None = None
    """Validation rows per data set, drawn with the seed; None: all."""
    test_rows: int | None = None
    """Test rows per data set, the same for all methods and seeds; None: all."""
    shots: int | None = None
    """Demonstrations of the methods that have them; None: each method's default."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in self.methods:
            if name not in METHODS:
                raise unknown("method", name, METHODS)
        for what, values in (("method", self.methods), ("seed", self.seeds), ("number of rows", self.train_rows)):
            if not values:
                raise ATVError(f"No {what} is given; expected at least one.")
            if len(set(values)) < len(values):
                raise ATVError(f"A {what} is given twice; found {', '.join(map(str, values))}.")
        if self.shots is not None and not any(METHODS[name].shots for name in self.methods):
            raise ATVError(f"No method in {', '.join(self.methods)} has demonstrations; leave --shots out.")


@dataclass(frozen=True)
class Cell:
    """One method on one data set, with one number of training rows and one seed."""

    method: str
    task: str
    rows: int | None
    seed: int

    @property
    def _place(self) -> str:
        return f"{'all' if self.rows is None else self.rows}-{self.seed}"

    @property
    def run(self) -> str:
        """The folder of its rows, relative to the comparison's."""
        return f"runs/{self.task}/{self.method}-{self._place}"

    @property
    def learned(self) -> str:
        """The method that is trained for it, itself or another; empty for one that learns nothing."""
        return METHODS[self.method].trained_as() or ""

    @property
    def trained(self) -> str | None:
        """The folder of its training; None for a method that has none."""
        return f"trained/{self.task}/{self.learned}-{self._place}" if self.learned else None


def cells_of(plan: Plan, tasks: Sequence[Task]) -> list[Cell]:
    """All cells in the order of their evaluation. A method that uses no training rows has one per data set."""
    found = []
    for seed in plan.seeds:
        for task in tasks:
            for rows in plan.train_rows:
                first = seed == plan.seeds[0] and rows == plan.train_rows[0]
                found += [Cell(name, task.name, rows, seed) for name in plan.methods if first or _uses_rows(name)]
    return found


def _uses_rows(name: str) -> bool:
    return METHODS[name].trained_as() is not None or METHODS[name].shots > 0


def compare(
    plan: Plan,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    *,
    given: Tables | None = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    force: bool = False,
) -> list[Path]:
    """Train and evaluate every cell of a plan; return the folders of the runs.

    Everything goes into `out`: `compare.json` (the request and its cells), `trained/DATA/METHOD-ROWS-SEED` and
    `runs/DATA/METHOD-ROWS-SEED`. Finished cells are skipped, interrupted ones resumed; methods, seeds and numbers of
    training rows may be added.

    Args:
        plan: what is compared.
        frozen: the LLM.
        tasks: the data sets; a method is trained on each of them alone. In the runs each is its own category.
        out: folder of the comparison.
        given: settings by method, as for `method_settings`.
        metrics: names as for `load_metric`. None: each data set's default.
        batch_size: prompts per call of the LLM in evaluation.
        force: start over.

    Raises:
        ATVError: two data sets have one name, one has a name with a meaning in tables (`Unseen`, `all 2`), one has
            fewer training rows than the plan wants, a metric is not one that all methods have, a setting is unknown, or
            `out` was made with other settings.
    """
    _check_data_sets(plan, tasks)
    tasks = [replace(task.drawn(None, None, 0, test=plan.test_rows), category=task.name) for task in tasks]
    for method in plan.methods:
        metrics_of(METHODS[method], tasks, metrics)
    cells = cells_of(plan, tasks)
    trainings = {cell.trained: cell for cell in cells if cell.trained is not None}
    settings = {of: method_settings(cell.learned, [given or {}], cell.seed) for of, cell in trainings.items()}
    _open(plan, frozen, tasks, cells, settings, metrics, out, force)
    steps = Steps([*(f"train {cell.learned}" for cell in trainings.values()), *(cell.method for cell in cells)])
    for seed in plan.seeds:
        for task in tasks:
            store = PrefixStore()  # prompts shared by several trainings are read once
            for folder, cell in trainings.items():
                if (cell.seed, cell.task) == (seed, task.name):
                    steps.begin(
                        f"train {cell.learned}", f"train {cell.learned} on {task.name}, {_rows(cell.rows)}seed {seed}"
                    )
                    own = [task.drawn(cell.rows, plan.valid_rows, seed)]
                    steps.end(learn(cell.learned, frozen, own, out / folder, settings[folder], store, force))
            store = PrefixStore()  # frees its memory
            for cell in (cell for cell in cells if (cell.seed, cell.task) == (seed, task.name)):
                drawn = f", {_rows(cell.rows)}seed {seed}" if _uses_rows(cell.method) else ""
                steps.begin(cell.method, f"evaluate {cell.method} on {task.name}{drawn}")
                new = measure(
                    cell.method,
                    frozen,
                    [task.drawn(cell.rows, plan.valid_rows, seed)],
                    out / cell.run,
                    metrics=metrics,
                    label=f"{cell.method}, {cell.rows} rows" if drawn and cell.rows is not None else "",
                    adapter=None if cell.trained is None else out / cell.trained,
                    shots=plan.shots if METHODS[cell.method].shots else None,
                    seed=seed,
                    batch_size=batch_size,
                    force=force,
                )
                steps.end(new)
    return [out / cell.run for cell in cells]


def _check_data_sets(plan: Plan, tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ATVError(f"Two data sets have one name; found {', '.join(names)}. Rename a file or folder.")
    taken = [name for name in names if name == UNSEEN or re.fullmatch(r"all \d+", name)]
    if taken:
        raise ATVError(
            f"A data set has a name with a meaning in tables; found {', '.join(taken)}. Rename the file or folder."
        )
    most = max(rows or 0 for rows in plan.train_rows)
    few = [f"{task.name} has {len(task.train)}" for task in tasks if len(task.train) < most]
    if few:
        raise ATVError(f"--train-rows is {most}; of training rows, {' and '.join(few)}. Give at most as many.")


def _rows(rows: int | None) -> str:
    return "" if rows is None else f"{rows} rows, "


def _open(
    plan: Plan,
    frozen: Frozen,
    tasks: Sequence[Task],
    cells: Sequence[Cell],
    settings: Mapping[str, Settings],
    metrics: Sequence[str] | None,
    out: Path,
    force: bool,
) -> None:
    """Record the request, or check that it matches the one recorded in `out`; cells may be added."""
    asked: dict[str, Any] = {
        **frozen.described(),
        **{name: getattr(plan, name) for name in ("valid_rows", "test_rows", "shots")},
        "metrics": list(metrics or ()),
        "data": {task.name: task.digest("train", "valid", "test") for task in tasks},
        "asking": {task.name: task.asking() for task in tasks},
    }
    learned = {of: {"config": s.config.to_dict(), "train": s.train.learned_with()} for of, s in settings.items()}
    file = out / RECORD_FILE
    if file.exists() and not force:
        former = read_json(file, "the record of a comparison")
        known = former.get("learned", {})
        common = known.keys() & learned.keys()
        same_settings(
            former.get("asked", {}) | {"learned": {of: known[of] for of in common}},
            asked | {"learned": {of: learned[of] for of in common}},
            out,
        )
        learned = known | learned
    elif occupied(out) and not file.exists():
        raise ATVError(f"{out} exists and is not a comparison; choose a new folder, so that nothing there is lost.")
    elif force:
        remove_results(out, "*/[!.]*-[0-9]*")
    listed = [asdict(cell) | {"run": cell.run, "trained": cell.trained} for cell in cells]
    write_json(file, {"asked": asked, "learned": learned, "cells": listed} | provenance())
