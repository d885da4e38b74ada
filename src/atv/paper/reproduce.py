"""Comparison of conditions on the same rows, each trained once per seed on all tasks that are not Unseen.

An unmodified method is a condition; together they make the paper's tables. Experiments have conditions that differ in
settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from atv.data import UNSEEN, Task
from atv.errors import ATVError
from atv.evaluation.measure import Frozen, learn, measure, remove_results
from atv.evaluation.metrics import FirstToken
from atv.files import occupied, read_json, same_settings, write_json
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.settings import Settings, Tables
from atv.paper.experiments import Condition, condition_settings
from atv.paper.profiles import IN_TABLES, Profile
from atv.processes import barrier, is_main
from atv.progress import Steps
from atv.provenance import provenance
from atv.report.experiments import FOLDER, is_experiment

RECORD_FILE = "reproduce.json"


@dataclass(frozen=True)
class Job:
    """One step: training or evaluating a condition with one seed."""

    kind: str
    name: str
    seed: int
    condition: Condition = field(compare=False)
    """For a training shared by several conditions, the first of them."""

    @property
    def folder(self) -> str:
        """The output folder, relative to the reproduction's folder."""
        return f"{'trained' if self.kind == 'train' else 'runs'}/{self.name}-{self.seed}"


def reproduce(
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    *,
    conditions: Sequence[Condition] = (),
    given: Tables | None = None,
    batch_size: int = 16,
    force: bool = False,
) -> list[Path]:
    """Train and evaluate conditions with `profile`; returns the folders of the runs.

    Everything goes into `out`: `reproduce.json` (the request), `trained/NAME-SEED` and `runs/NAME-SEED`. Finished steps
    are skipped, interrupted ones resumed; new conditions are added.

    Args:
        profile: rows, variants, seeds.
        frozen: the LLM.
        tasks: those of the category Unseen are evaluated, never trained on.
        out: folder of the reproduction.
        conditions: by default every method of `IN_TABLES`, unmodified.
        given: settings that override the profile's.
        batch_size: prompts per call of the LLM in evaluation.
        force: start over.

    Raises:
        ATVError: an unknown setting, no task to train on, or `out` was made with other settings.
    """
    tasks = chosen_tasks(profile, tasks)
    plain = [Condition(name) for name in IN_TABLES]
    jobs = _jobs(conditions or plain, profile.seeds)
    tables = (profile.tables(), given or {})
    settings = {job: condition_settings(job.condition, tables, job.seed) for job in jobs if job.kind == "train"}
    _open(profile, frozen, tasks, settings, batch_size, out, force)
    steps = Steps([f"{job.kind} {job.name}" for job in jobs])
    for seed in profile.seeds:
        store = PrefixStore()  # prompts shared by several trainings are read once
        for job in (job for job in jobs if job.seed == seed):
            steps.begin(f"{job.kind} {job.name}", f"{job.kind} {job.name}, seed {seed}")
            rows = job.condition.train_rows or profile.train_rows
            drawn = [task.drawn(rows, profile.valid_rows, seed) for task in tasks]
            if job.kind == "train":
                seen = [task for task in drawn if task.category != UNSEEN]
                name = str(job.condition.trained_as)
                new = learn(name, frozen, seen, out / job.folder, settings[job], store, force)
            else:
                store = PrefixStore()  # frees its memory
                new = _measure(job, profile, frozen, drawn, out, batch_size, force)
            steps.end(new)
    return [out / job.folder for job in jobs if job.kind == "measure"]


def chosen_tasks(profile: Profile, tasks: Sequence[Task]) -> list[Task]:
    """The tasks of a profile with its test rows; ATVError if none is left to train on."""
    named = [task for task in tasks if profile.tasks is None or task.name in profile.tasks]
    if not named:
        raise ATVError(
            f"The profile {profile.name} needs the tasks {', '.join(profile.tasks or ())}; none of them is among those "
            f"given: {', '.join(task.name for task in tasks[:8])}. Give --profile small, or --data with these tasks."
        )
    kept: dict[str, list[Task]] = {}
    for task in named:
        kept.setdefault(task.category, []).append(task.first_test_rows(profile.test_rows))
    if profile.tasks_per_category is not None:
        kept = {name: sorted(alike, key=_length)[: profile.tasks_per_category] for name, alike in kept.items()}
    chosen = [task for alike in kept.values() for task in alike]
    if all(task.category == UNSEEN for task in chosen):
        raise ATVError(f"All tasks are of the category {UNSEEN}, which is not trained on; expected other tasks too.")
    return chosen


def _length(task: Task) -> float:
    """Approximate mean number of characters of a prompt."""
    return 200 + sum(len(row.input) for row in task.test) / len(task.test)


def _jobs(conditions: Sequence[Condition], seeds: Sequence[int]) -> list[Job]:
    """The steps in order of their dependencies: all trainings of a seed, then all evaluations."""
    jobs = []
    for seed in seeds:
        trained = [Job("train", of.trained, seed, of) for of in conditions if of.trained is not None]
        jobs += [*dict.fromkeys(trained), *(Job("measure", of.name, seed, of) for of in conditions)]
    return jobs


def _open(
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    settings: Mapping[Job, Settings],
    batch_size: int,
    out: Path,
    force: bool,
) -> None:
    """Record the request, or check that it matches the one recorded in `out`; conditions may be added."""
    asked: dict[str, Any] = {
        "profile": {name: value for name, value in asdict(profile).items() if name != "settings"},
        **frozen.described(),
        "batch_size": batch_size,
        "tasks": {task.name: task.digest("train", "valid", "test") for task in tasks},
        "asking": {task.name: task.asking() for task in tasks},
    }
    learned: dict[str, Any] = {}
    for job, of in settings.items():
        rows = {} if job.condition.train_rows is None else {"train_rows": job.condition.train_rows}
        learned[f"{job.name}-{job.seed}"] = {"config": of.config.to_dict(), "train": of.train.learned_with()} | rows
    file = out / RECORD_FILE
    if file.exists() and not force:
        former = read_json(file, "the record of a reproduction")
        known = former.get("learned", {})
        common = known.keys() & learned.keys()
        same_settings(
            former.get("asked", {}) | {"learned": {name: known[name] for name in common}},
            asked | {"learned": {name: learned[name] for name in common}},
            out,
        )
        learned = known | learned
    elif occupied(out) and not file.exists():
        raise ATVError(f"{out} exists and is not a reproduction; choose a new folder, so that nothing there is lost.")
    barrier()
    if is_main():
        if force:
            for experiment in filter(is_experiment, (out / FOLDER).glob("*.json")):
                experiment.unlink()  # it names runs that are removed next
            remove_results(out, "[!.]*-[0-9]*")
        write_json(file, {"asked": asked, "learned": learned} | provenance())
    barrier()


def _measure(
    job: Job, profile: Profile, frozen: Frozen, tasks: Sequence[Task], out: Path, batch_size: int, force: bool
) -> bool:
    """Evaluate a condition on all tasks; false if already done."""
    asked = job.condition
    return measure(
        asked.method,
        frozen,
        tasks,
        out / job.folder,
        metrics=(FirstToken.name,),
        label=asked.label,
        adapter=None if asked.trained is None else out / Job("train", asked.trained, job.seed, asked).folder,
        shots=(asked.shots or profile.shots) if METHODS[asked.method].shots else None,
        seed=job.seed,
        variants=profile.variants,
        batch_size=batch_size,
        force=force,
    )
