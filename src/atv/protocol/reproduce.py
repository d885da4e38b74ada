"""The paper's tables: every method on the same rows, each trained once per seed on all tasks that are not Unseen."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atv.errors import ATVError, unknown
from atv.files import occupied, read_json, same_settings, write_json
from atv.methods import METHODS
from atv.processes import barrier, is_main
from atv.progress import note
from atv.protocol.measure import Frozen, measure
from atv.protocol.profiles import Profile
from atv.protocol.settings import Settings, Tables, method_settings
from atv.records import provenance
from atv.store import PrefixStore
from atv.tasks import UNSEEN, Task

RECORD_FILE = "reproduce.json"


@dataclass(frozen=True)
class Job:
    """One step: a method trained, or measured, with one seed."""

    kind: str
    method: str
    seed: int

    @property
    def folder(self) -> str:
        """Where it writes, inside the folder of the whole."""
        return f"{'trained' if self.kind == 'train' else 'runs'}/{self.method}-{self.seed}"


def reproduce(
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    *,
    methods: Sequence[str] = (),
    recipe: Tables | None = None,
    given: Tables | None = None,
    batch_size: int = 16,
    force: bool = False,
) -> list[Path]:
    """Train and measure methods as `profile` says; returns the folders of the runs.

    Everything goes into `out`: `reproduce.json` (what was asked for), `trained/METHOD-SEED` and `runs/METHOD-SEED`.
    What is finished is not done again, what was interrupted goes on.

    Args:
        profile: rows, variants, seeds.
        frozen: the LLM.
        tasks: those of the category Unseen are measured, never trained on.
        out: folder of the whole.
        methods: names; by default all that are `by_default`.
        recipe: settings that suit this LLM; the profile's are stronger.
        given: settings that are stronger than the profile's.
        batch_size: prompts per call of the LLM when measuring.
        force: begin anew.

    Raises:
        ATVError: an unknown method or setting, no task to train on, or `out` was made with other settings.
    """
    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    tasks = chosen_tasks(profile, tasks)
    jobs = _jobs(list(methods) or [name for name in METHODS if METHODS[name].by_default], profile.seeds)
    tables = (recipe or {}, profile.tables(), given or {})
    trained = [job for job in jobs if job.kind == "train"]
    settings = {(job.method, job.seed): method_settings(job.method, tables, job.seed) for job in trained}
    _open(profile, frozen, tasks, settings, batch_size, out, force)
    clock = _Clock(jobs, {job: _work(job, profile, tasks, settings.get((job.method, job.seed))) for job in jobs})
    for seed in profile.seeds:
        drawn = [task.drawn(profile.train_rows, profile.valid_rows, seed) for task in tasks]
        store = PrefixStore()  # prompts that several methods are trained on are read once
        for job in (job for job in jobs if job.seed == seed):
            clock.begin(job)
            if job.kind == "train":
                new = _train(job, frozen, drawn, out, settings[job.method, seed], store, force)
            else:
                store = PrefixStore()  # its memory is free again
                new = _measure(job, profile, frozen, drawn, out, batch_size, force)
            clock.end(job, new)
    return [out / job.folder for job in jobs if job.kind == "measure"]


def chosen_tasks(profile: Profile, tasks: Sequence[Task]) -> list[Task]:
    """The tasks of a profile, with its test rows; ATVError if none is left to train on."""
    kept: dict[str, list[Task]] = {}
    for task in tasks:
        kept.setdefault(task.category, []).append(task.limited(test=profile.test_rows))
    if profile.tasks_per_category is not None:
        kept = {name: sorted(alike, key=_length)[: profile.tasks_per_category] for name, alike in kept.items()}
    chosen = [task for alike in kept.values() for task in alike]
    if all(task.category == UNSEEN for task in chosen):
        raise ATVError(f"All tasks are of the category {UNSEEN}, which is not trained on; expected others beside them.")
    return chosen


def _length(task: Task) -> float:
    """Mean characters of a prompt, roughly."""
    return 200 + sum(len(row.input) for row in task.test) / len(task.test)


def _jobs(methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """In an order in which whatever is needed is there: all training of a seed, then all measuring."""
    trained = list(dict.fromkeys(made for name in methods if (made := METHODS[name].trained_as()) is not None))
    return [
        job
        for seed in seeds
        for job in [*(Job("train", name, seed) for name in trained), *(Job("measure", name, seed) for name in methods)]
    ]


def _open(
    profile: Profile,
    frozen: Frozen,
    tasks: Sequence[Task],
    settings: Mapping[tuple[str, int], Settings],
    batch_size: int,
    out: Path,
    force: bool,
) -> None:
    """Record what is asked for, or see that `out` was made with the same; more methods may be asked for than before."""
    asked: dict[str, Any] = {
        "profile": {name: value for name, value in asdict(profile).items() if name != "settings"},
        **frozen.described(),
        "batch_size": batch_size,
        "tasks": {task.name: task.digest("train", "valid", "test") for task in tasks},
        "templates": {task.name: task.templates for task in tasks},
    }
    learned = {
        f"{name}-{seed}": {"config": of.config.to_dict(), "train": of.train.to_dict()}
        for (name, seed), of in settings.items()
    }
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
        write_json(file, {"asked": asked, "learned": learned} | provenance())
    barrier()


def _train(
    job: Job, frozen: Frozen, tasks: Sequence[Task], out: Path, settings: Settings, store: PrefixStore, force: bool
) -> bool:
    """Train a method on the tasks that are not Unseen; false if that was done already."""
    folder = out / job.folder
    record = folder / "train.json"
    if record.exists() and not force and read_json(record, "the record of a training")["finished"]:
        return False
    llm, tokenizer = frozen.load()
    seen = [task for task in tasks if task.category != UNSEEN]
    METHODS[job.method].fit(llm, tokenizer, seen, folder, *settings, force=force, store=store)
    return True


def _measure(
    job: Job, profile: Profile, frozen: Frozen, tasks: Sequence[Task], out: Path, batch_size: int, force: bool
) -> bool:
    """Measure a method on all tasks; false if that was done already."""
    method = METHODS[job.method]
    trained = method.trained_as()
    return measure(
        job.method,
        frozen,
        tasks,
        out / job.folder,
        adapter=None if trained is None else out / Job("train", trained, job.seed).folder,
        shots=profile.shots if method.shots else None,
        seed=job.seed,
        variants=profile.variants,
        batch_size=batch_size,
        force=force,
    )


def _work(job: Job, profile: Profile, tasks: Sequence[Task], settings: Settings | None) -> float:
    """A rough measure of a job's work, in characters of prompt that the LLM reads: enough to tell the time left."""
    length = {task.name: _length(task) for task in tasks}
    if settings is not None:
        seen = [task for task in tasks if task.category != UNSEEN]
        once = sum(length[task.name] * min(profile.train_rows, len(task.train)) for task in seen)
        if METHODS[job.method].train_defaults is None:
            return once * profile.shots / 4
        reads_once = "positions" in settings.config.to_dict()
        return once * settings.train.epochs * settings.train.templates_per_row * (1.5 if reads_once else 5)
    shown = profile.shots if job.method == "bm25" else 1 if METHODS[job.method].shots else 0  # icl's are read once
    asked = sum(length[task.name] * len(task.test) * len(task.variants(profile.variants)) for task in tasks)
    return asked * (1 + shown)


class _Clock:
    """Says which job begins and about how long the rest will take, from the work done in the time since the start."""

    def __init__(self, jobs: Sequence[Job], work: Mapping[Job, float]) -> None:
        self.work, self.left, self.count, self.place = work, sum(work.values()), len(jobs), 0
        self.done, self.seconds, self.began = 0.0, 0.0, 0.0

    def begin(self, job: Job) -> None:
        self.place += 1
        rest = ""
        if self.done:
            minutes = self.left * self.seconds / self.done / 60
            rest = f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"
        note(f"[{self.place} of {self.count}] {job.kind} {job.method}, seed {job.seed}{rest}")
        self.began = time.perf_counter()

    def end(self, job: Job, new: bool) -> None:
        self.left -= self.work[job]
        if new:
            self.done += self.work[job]
            self.seconds += time.perf_counter() - self.began
