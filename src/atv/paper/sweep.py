"""Choosing settings on validation rows: the same number of trials for every method, each recorded."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from atv.data import UNSEEN, Task
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen, measure
from atv.evaluation.metrics import FirstToken
from atv.evaluation.records import load_runs
from atv.files import read_json, same_settings, write_json, write_text
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.methods.settings import Tables, method_settings
from atv.paper.profiles import IN_TABLES, Profile
from atv.paper.reproduce import chosen_tasks
from atv.progress import log
from atv.provenance import provenance

RECORD_FILE = "sweep.json"
SETTINGS_FILE = "settings.toml"


def trials_of(name: str, count: int, tables: Sequence[Tables], seed: int) -> list[dict[str, Any]]:
    """`count` different choices: first the method's defaults, then others from its `search`."""
    config, train = method_settings(name, tables, seed)
    paper = getattr(config, "parametrisation", "") == "paper"
    search = cast(type[ATVMethod], METHODS[name]).paper_search if paper else METHODS[name].search
    values = train.to_dict() | config.to_dict()
    default = {key: values[key] for key in search}
    others = [dict(zip(search, some, strict=True)) for some in product(*search.values())]
    others = [choice for choice in others if choice != default]
    if count > 1 + len(others):
        raise ATVError(f"The method {name} has {1 + len(others)} settings to choose from; expected no more trials.")
    return [default, *random.Random(f"{seed} {name}").sample(others, count - 1)]


def sweep(
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    *,
    methods: Sequence[str] = (),
    trials: int = 4,
    given: Tables | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Try settings of trained methods on validation rows; returns each method's best and writes `settings.toml`.

    Other methods that were swept into `out` before are kept beside these, if the same was asked of them.

    Each trial is trained on a seed's training rows with `profile`. Half of the validation rows choose the epoch; the
    trial is evaluated on the other half. The test split is never used. The best trial has the highest mean
    `first_token` over tasks; ties go to the earlier trial, so the default is kept unless another is better.

    Args:
        profile: gives rows, variants, and the seed (its first).
        frozen: the LLM.
        tasks: those of the category Unseen are not used.
        out: folder for `sweep.json` (all trials), `settings.toml` and the trials' folders.
        methods: names of trained methods; by default those of `IN_TABLES` with settings to choose from.
        trials: number of trials per method.
        given: settings of all trials; they override the profile's.
        force: start over, and drop the methods of before.

    Raises:
        ATVError: a method has no settings to choose from, or fewer than `trials`; or `out` was made with another
            profile, LLM, data, number of trials or settings of all methods.
    """
    names = list(methods) or [name for name in IN_TABLES if METHODS[name].search]
    for name in names:
        if name not in METHODS or not METHODS[name].search:
            raise unknown("method to choose settings for", name, [name for name in METHODS if METHODS[name].search])
    seed = profile.seeds[0]
    tables = (profile.tables(), given or {})
    chosen = {name: trials_of(name, trials, tables, seed) for name in names}
    in_domain = [task for task in chosen_tasks(profile, tasks) if task.category != UNSEEN]
    seen = [_on_validation_rows(task, profile, seed) for task in in_domain]
    asked = {
        "profile": {key: value for key, value in asdict(profile).items() if key != "settings"},
        **frozen.described(),
        "tasks": {task.name: task.digest("train", "valid") for task in in_domain},
        "all": dict((given or {}).get("all", {})),
    }
    results, best = ({}, {}) if force else _others(out, names, asked, trials)
    store = PrefixStore()
    done = 0
    for name in names:
        rows: list[dict[str, Any]] = []
        for number, trial in enumerate(chosen[name]):
            done += 1
            said = ", ".join(f"{key} {value}" for key, value in trial.items())
            log.info(f"[{done} of {trials * len(names)}] {name}: {said}")
            score = _try(name, trial, profile, frozen, seen, out / f"{name}-{number}", tables, store, force)
            rows.append({"settings": trial, **score})
        results[name] = rows
        best[name] = max(rows, key=lambda row: row["first_token"])["settings"]
        write_json(out / RECORD_FILE, asked | {"trials": results, "best": best} | provenance())
    write_text(out / SETTINGS_FILE, _toml(best))
    return best


def _others(
    out: Path, names: Sequence[str], asked: Mapping[str, Any], trials: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """The trials and the best settings of other methods swept before; ATVError if something else was asked of them."""
    file = out / RECORD_FILE
    if not file.exists():
        return {}, {}
    record = read_json(file, "the record of a sweep")
    try:
        results, best = (
            {name: of for name, of in record[key].items() if name not in names} for key in ("trials", "best")
        )
        there = {key: record.get(key, asked[key]) for key in asked}
        there["trials"] = {name: len(rows) for name, rows in results.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ATVError(f"{file} is damaged: {error!r}. Use another --out, or --force.") from error
    same_settings(there, {**asked, "trials": dict.fromkeys(results, trials)}, out)
    return results, best


def _on_validation_rows(task: Task, profile: Profile, seed: int) -> Task:
    """The task with half of the drawn validation rows in place of its test rows."""
    drawn = task.drawn(profile.train_rows, 2 * profile.valid_rows, seed)
    half = len(drawn.valid) // 2
    if not half:
        raise ATVError(f"Task {task.name} has {len(drawn.valid)} validation rows; a sweep needs at least 2.")
    return replace(drawn, valid=drawn.valid[:half], test=drawn.valid[half:])


def _try(
    name: str,
    trial: Mapping[str, Any],
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    folder: Path,
    tables: Sequence[Tables],
    store: PrefixStore,
    force: bool,
) -> dict[str, float]:
    seed = profile.seeds[0]
    settings = method_settings(name, [*tables, {name: trial}], seed)
    llm, tokenizer = frozen.load()
    METHODS[name].fit(llm, tokenizer, tasks, folder / "trained", *settings, force=force, store=store)
    measure(
        name,
        frozen,
        tasks,
        folder / "run",
        metrics=(FirstToken.name,),
        adapter=folder / "trained",
        seed=seed,
        variants="first",
        force=force,
    )
    rows = load_runs([folder / "run"])
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    means = {
        score: fmean(fmean(_judged(row, score) for row in alike) for alike in by_task.values())
        for score in ("first_token", "first_token_among_options")
    }
    log.info("    " + ", ".join(f"{score} {100 * mean:.1f}" for score, mean in means.items()))
    return means


def _judged(row: Mapping[str, Any], score: str) -> float:
    """A row's score, or its score among options if only that is defined, so that every task counts."""
    scores = row["scores"]
    return float(scores["first_token_among_options"] if scores[score] is None else scores[score])


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of settings as TOML; values are numbers and words. None, a default that TOML cannot say, is left out."""
    lines = []
    for name, values in tables.items():
        said = {key: value for key, value in values.items() if value is not None}
        lines += [f'["{name}"]', *(f"{key} = {_value(value)}" for key, value in said.items()), ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
