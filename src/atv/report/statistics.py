"""Statistics of rows: scores with their spread over seeds, and the uncertainty of differences between methods."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atv.data import UNSEEN
from atv.errors import ATVError
from atv.evaluation.records import row_key

RESAMPLES = 10_000
"""Number of bootstrap resamples, and of sign flips in the permutation test."""

_FEW_VALUES = 100
_AT_ONCE = 2**20  # numbers of 8 bytes that are drawn at once

COSTS = ("prompt_tokens", "seconds")
"""A row's costs, in addition to its scores."""
Row = dict[str, Any]


class Score(NamedTuple):
    """A mean over seeds and the sample standard deviation over seeds (None with one seed)."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Scores:
    """One method's scores; None if it was not evaluated in full."""

    tasks: dict[str, Score | None]
    categories: dict[str, Score | None]
    """By category, without the unseen tasks."""
    in_domain: Score | None
    """Mean of the categories."""
    unseen: Score | None
    """Mean of the unseen tasks."""
    both: Score | None
    """Mean of `in_domain` and `unseen`."""


class Difference(NamedTuple):
    """One method's average minus another's."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    p: float


def value(row: Mapping[str, Any], key: str) -> float | None:
    """A row's score by name, or its cost `prompt_tokens` or `seconds`. None: the score is not defined.

    Raises:
        KeyError: the row was not measured with that score.
    """
    found: float | None = row[key] if key in COSTS else row["scores"][key]
    return found


def score_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all scores in rows."""
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def scored(rows: Iterable[Row], key: str) -> list[Row]:
    """The rows that have a score."""
    return [row for row in rows if key in row["scores"]]


def tasks_of(rows: Iterable[Row]) -> dict[str, str]:
    """Names of the rows' tasks with their categories, in the order of the rows."""
    return {row["task"]: row["category"] for row in rows}


def scores(rows: Sequence[Row], key: str, tasks: Mapping[str, str] | None = None) -> Scores:
    """A method's scores: tasks, categories, and the paper's averages, computed for each seed, then over seeds.

    A task's score is the mean over its rows and variants, a category's the mean over its tasks, the in-domain average
    the mean over the categories except Unseen, the unseen average the mean over the unseen tasks.

    Args:
        rows: rows of one method on one LLM.
        key: what is averaged: the name of a score that all rows have, `prompt_tokens` or `seconds`.
        tasks: all tasks that should have been evaluated, with their categories. None: those of `rows`. A task that was
            not evaluated with one of the seeds has no score, and neither has any average that includes it.
    """
    tasks = tasks_of(rows) if tasks is None else tasks
    found: defaultdict[tuple[Any, str], list[float | None]] = defaultdict(list)
    for row in rows:
        found[row["seed"], row["task"]].append(value(row, key))
    seeds = list(dict.fromkeys(seed for seed, _ in found))
    by_task = {task: [_mean(found.get((seed, task), ())) for seed in seeds] for task in tasks}
    members: defaultdict[str, list[str]] = defaultdict(list)
    for task, category in tasks.items():
        members[category].append(task)
    by_category = {name: _means([by_task[task] for task in inside]) for name, inside in members.items()}
    unseen = by_category.pop(UNSEEN, [])
    in_domain = _means(list(by_category.values()))
    return Scores(
        {task: _over_seeds(values) for task, values in by_task.items()},
        {category: _over_seeds(values) for category, values in by_category.items()},
        _over_seeds(in_domain),
        _over_seeds(unseen),
        _over_seeds(_means([in_domain, unseen])),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if any value is missing, since a mean over fewer would be too optimistic."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _means(parts: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of the parts for each seed; empty if any part is."""
    return [_mean(values) for values in zip(*parts, strict=True)] if all(parts) else []


def _over_seeds(values: Sequence[float | None]) -> Score | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return Score(fmean(known), stdev(known) if len(known) > 1 else None)


def paired(rows: Sequence[Row], method: str, other: str, key: str, *, unseen: bool = False) -> Difference:
    """By how much `method` is above `other` on the same rows, with interval and p.

    The unit is a test row of a task, over all its variants and seeds. Its weight is that in the average, so the units'
    weighted differences add up to the difference of the averages of `scores`. The interval is a 95% percentile
    bootstrap interval with rows resampled within each task. p is from a two-sided permutation test that swaps the two
    methods' answers to a test row. Both use a fixed seed.

    Args:
        rows: rows on one LLM, including those of other methods: the average is over all tasks with this score. An
            example's number must mean the same test row in all of them.
        method: the method to compare.
        other: the method to compare it with.
        key: name of a score. Rows without it are ignored.
        unseen: compare the unseen averages, not the in-domain ones.

    Raises:
        ATVError: the two methods have different rows, a row occurs twice, or not all tasks have every seed.
    """
    asked_tasks = tasks_of(scored(rows, key))
    tasks = {task: category for task, category in asked_tasks.items() if (category == UNSEEN) == unseen}
    ours, theirs = (_asked(rows, name, tasks, key) for name in (method, other))
    alone, theirs_alone = len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())
    if alone or theirs_alone:
        raise ATVError(
            f"{method} and {other} were not asked the same {'unseen' if unseen else 'in-domain'} rows: {alone} of "
            f"{method}'s {len(ours)} are not among {other}'s, {theirs_alone} of {other}'s {len(theirs)} are not among "
            f"{method}'s. Evaluate both with the same tasks, test rows, variants and seeds."
        )
    sizes = Counter((seed, task) for seed, task, *_ in ours)
    seeds = list(dict.fromkeys(seed for seed, _ in sizes))
    absent = [f"{task} with seed {seed}" for task in tasks for seed in seeds if not sizes[seed, task]]
    if absent or not seeds:
        what = ", ".join(absent) or ("unseen tasks" if unseen else "in-domain tasks")
        raise ATVError(f"{method} and {other} were not asked {what}. Evaluate both with the same tasks and seeds.")
    ahead: defaultdict[tuple[str, int, Any], float] = defaultdict(float)
    for asked, found in ours.items():
        seed, task, *_, example = asked
        ahead[task, example, seed] += found - theirs[asked]
    siblings = Counter(tasks.values())
    units: dict[str, list[float]] = {task: [] for task in tasks}
    for task, example in dict.fromkeys((task, example) for task, example, _ in ahead):
        share = len(seeds) * len(siblings) * siblings[tasks[task]]
        units[task].append(sum(ahead[task, example, seed] / sizes[seed, task] for seed in seeds) / share)
    parts = [np.array(values) for values in units.values()]
    low, high = np.percentile(bootstrap(parts), [2.5, 97.5])
    everything = np.concatenate(parts)
    return Difference(float(everything.sum()), float(low), float(high), _p_value(everything))


def _asked(rows: Iterable[Row], method: str, tasks: Mapping[str, str], key: str) -> dict[tuple[Any, ...], float]:
    """A method's score by seed, task, template, answer prefix and example."""
    mine = [row for row in scored(rows, key) if row["method"] == method and row["task"] in tasks]
    asked = {(row["seed"], *row_key(row)): float(row["scores"][key]) for row in mine}
    if len(asked) < len(mine):
        raise ATVError(
            f"{method} has {len(mine) - len(asked)} rows twice, from several runs with one seed; "
            "give one run for each method, LLM and seed."
        )
    return asked


def bootstrap(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Bootstrap sums of units, resampled with replacement within each part: (resamples,)."""
    random = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for part in parts:
        values, counts = np.unique(part, return_counts=True)
        few = len(values) <= max(_FEW_VALUES, len(part) // 10)  # then drawing the count of each is faster
        step = max(1, _AT_ONCE // (len(values) if few else len(part)))
        for start in range(0, RESAMPLES, step):
            drawn = total[start : start + step]
            if few:
                drawn += random.multinomial(len(part), counts / len(part), size=len(drawn)) @ values
            else:
                drawn += part[random.integers(len(part), size=(len(drawn), len(part)))].sum(axis=1)
    return total


def _p_value(units: NDArray[np.float64]) -> float:
    """Two-sided p of the units' sum under random signs."""
    units = units[units != 0]  # their sign does not matter
    if len(units) < 2:
        return 1.0
    from scipy.stats import permutation_test  # here, since the import takes half a second

    result = permutation_test(
        (units,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(units)),  # 32 MiB at a time
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)
