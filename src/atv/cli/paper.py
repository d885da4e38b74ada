"""The work behind `atv reproduce` and `atv sweep`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atv import artifact
from atv.cli.analysis import require_packages, write_analysis
from atv.cli.output import print_lines, print_table
from atv.cli.work import frozen
from atv.data import Task
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen
from atv.evaluation.records import load_runs
from atv.files import write_json
from atv.methods.settings import read_settings
from atv.paper.experiments import Condition, Experiment, conditions_of, read_experiment
from atv.paper.profiles import PROFILES, Profile
from atv.paper.published import PaperNumbers
from atv.paper.reproduce import chosen_tasks, reproduce
from atv.paper.sweep import sweep
from atv.paper.tasks import load_paper_tasks
from atv.processes import is_main
from atv.progress import log
from atv.report import (
    EXPERIMENTS,
    FORMATS,
    all_tables,
    comparison_tables,
    experiment_tables,
    load_experiment,
    write_tables,
)


def _profile(options: Mapping[str, Any]) -> Profile:
    name = options["profile"]
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    log.info(f"Profile {name}: {PROFILES[name].says}")
    return PROFILES[name]


def paper_tasks(options: Mapping[str, Any]) -> list[Task]:
    """The tasks that the options of a command name; the paper's have what it says of them."""
    return load_paper_tasks(options["task"], options["data"], options["template"])


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"given": read_settings(options["settings"]) if options["settings"] else {}}


def reproduce_tables(options: Mapping[str, Any]) -> None:
    """`atv reproduce`: everything that is not done yet, then the tables."""
    if options["experiment"] and options["method"]:
        raise ATVError("An experiment names its methods; found --experiment and --method: leave one of them out.")
    experiments = [read_experiment(name) for name in options["experiment"] or ()]
    profile, out = _profile(options), Path(options["out"])
    conditions = conditions_of(experiments) if experiments else [Condition(name) for name in options["method"] or ()]
    how = _settings(options) | {"batch_size": options["batch_size"], "force": options["force"]}
    analysed = any(of.analysis for of in experiments)
    if analysed:
        require_packages()
    llm, tasks = frozen(options), paper_tasks(options)
    runs = reproduce(profile, llm, tasks, out, conditions=conditions, **how)
    rows = load_runs(runs)
    named = {
        of.name: experiment_tables(load_experiment(_record(of, profile, out)), PaperNumbers()) for of in experiments
    }
    for name, tables in (named or {"tables": all_tables(rows, PaperNumbers())}).items():
        for table in tables if named else comparison_tables(rows, PaperNumbers()):
            print_table(table)
        for suffix in FORMATS:
            write_tables(tables, out / "tables" / f"{name}{suffix}")
    if analysed and is_main():
        _analyse(profile, llm, tasks, out)
    print_lines([f"Runs: {out / 'runs'}    Tables: {out / 'tables'} ({', '.join(FORMATS)})"])


def _analyse(profile: Profile, llm: Frozen, tasks: Sequence[Task], out: Path) -> None:
    """What the vectors of the method atv are like, beside ELICIT's, for each seed; written again by each call."""
    for seed in profile.seeds:
        atv, elicit = (artifact.locate(out / "trained" / f"{name}-{seed}") for name in ("atv", "elicit"))
        shown = [task.drawn(profile.train_rows, profile.valid_rows, seed) for task in chosen_tasks(profile, tasks)]
        write_analysis(llm, shown, atv, elicit, out / "analysis" / f"atv-{seed}", rows=20, query=None, seed=seed)


def _record(experiment: Experiment, profile: Profile, out: Path) -> Path:
    """Write which runs and trainings answer the experiment's question; what they say stands in them alone."""
    conditions = {
        of.label: {
            "runs": [f"runs/{of.name}-{seed}" for seed in profile.seeds],
            "trained": [f"trained/{of.trained}-{seed}" for seed in profile.seeds if of.trained],
        }
        for of in experiment.conditions
    }
    said = {name: getattr(experiment, name) for name in ("name", "title", "asks", "reference")}
    file = out / EXPERIMENTS / f"{experiment.name}.json"
    if is_main():
        write_json(file, said | {"profile": profile.name, "conditions": conditions})
    return file


def choose_settings(options: Mapping[str, Any]) -> None:
    """`atv sweep`: the trials that are not done yet, then the best of each method."""
    profile, out = _profile(options), Path(options["out"])
    rows = {name: options[name] for name in ("train_rows", "valid_rows") if options[name] is not None}
    how = _settings(options) | {name: options[name] for name in ("trials", "force")}
    how["methods"] = options["method"] or ()
    best = sweep(replace(profile, **rows), frozen(options), paper_tasks(options), out, **how)
    print_lines([f"{name}: {', '.join(f'{key} {value}' for key, value in of.items())}" for name, of in best.items()])
    print_lines([f"Next: atv reproduce --settings {out / 'settings.toml'}"])
