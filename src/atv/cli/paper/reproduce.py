"""`atv paper reproduce`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atv import artifact
from atv.cli.loading import frozen_llm
from atv.cli.options import PaperTasks, Reproduce
from atv.cli.output import print_lines, print_table
from atv.cli.paper.analysis import require_packages, write_analysis
from atv.data import Task
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen
from atv.evaluation.records import load_runs
from atv.files import write_json
from atv.paper.experiments import Condition, Experiment, conditions_of, read_experiment
from atv.paper.profiles import PROFILES, Profile
from atv.paper.published import PaperNumbers
from atv.paper.reproduce import chosen_tasks, reproduce
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


def chosen_profile(name: str) -> Profile:
    """A profile by name; ATVError if it is unknown."""
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    log.info(f"Profile {name}: {PROFILES[name].says}")
    return PROFILES[name]


def paper_tasks(given: PaperTasks) -> list[Task]:
    """The tasks given by the options; the paper's tasks get its categories and templates."""
    return load_paper_tasks(given.task, given.data, given.template)


def reproduce_tables(given: Reproduce) -> None:
    """Do all unfinished steps, then write the tables."""
    if given.experiment and given.method:
        raise ATVError("An experiment names its methods; found --experiment and --method: leave one of them out.")
    experiments = [read_experiment(name) for name in given.experiment or ()]
    profile, out = chosen_profile(given.profile), given.out
    if given.seed:
        profile = replace(profile, seeds=tuple(dict.fromkeys(given.seed)))
    conditions = conditions_of(experiments) if experiments else [Condition(name) for name in given.method or ()]
    analysed = any(of.analysis for of in experiments)
    if analysed:
        require_packages()
    llm, tasks = frozen_llm(given.llm, given.loading), paper_tasks(given.tasks)
    how = {"given": given.file.tables, "batch_size": given.batch_size, "force": given.force}
    runs = reproduce(profile, llm, tasks, out, conditions=conditions, **how)  # type: ignore[arg-type]
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
    """Analyse the vectors of the method atv together with ELICIT's, for each seed; each call rewrites the results."""
    for seed in profile.seeds:
        atv, elicit = (artifact.locate(out / "trained" / f"{name}-{seed}") for name in ("atv", "elicit"))
        shown = [task.drawn(profile.train_rows, profile.valid_rows, seed) for task in chosen_tasks(profile, tasks)]
        write_analysis(llm, shown, atv, elicit, out / "analysis" / f"atv-{seed}", rows=20, query=None, seed=seed)


def _record(experiment: Experiment, profile: Profile, out: Path) -> Path:
    """Record which runs and trainings belong to the experiment; the results are only in those."""
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
