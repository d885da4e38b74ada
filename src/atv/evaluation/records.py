"""The one record format: a run is a folder with `run.json` and `predictions.jsonl`, one row for each prediction.

Rows are appended as they are made, so an interrupted run resumes where it stopped. Averages are not stored: tables are
computed from rows. The analysis of an adapter's vectors is a separate file, `analysis.json`.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from atv.errors import ATVError
from atv.files import local, occupied, read_json, same_settings, write_json, write_text
from atv.processes import barrier, is_main, rank
from atv.provenance import provenance

SCHEMA = 2
RUN_FILE = "run.json"
ROWS_FILE = "predictions.jsonl"
ANALYSIS_FILE = "analysis.json"
OTHERS_FILES = "predictions-*.jsonl"
"""Rows of the processes other than the main one, one file each, until the run is finished or resumed."""

Key = tuple[str, int, str | None, int]
"""Task, template, answer prefix and example."""


@dataclass(frozen=True)
class Row:
    """One example in one variant, with the scores of its answers."""

    task: str
    category: str
    split: str
    template: int
    answer_prefix: str | None
    example: int
    """Its index among the task's test rows, or those drawn by `--test-rows`, in file order."""
    target: str
    scores: dict[str, float | None]
    """Scores by name, from 0 to 1. None: not defined for this example (`atv.evaluation.metrics`)."""
    outputs: dict[str, str]
    """The LLM's output: the generated answer as `generated`, or the text that a score judges, under the score's
    name."""
    prompt_tokens: int
    seconds: float
    """Time from prompt to answer, including everything that the method and the metrics do; a batch's time is divided
    among its rows."""
    demonstrations: int = 0
    """Number of demonstrations in the prompt, without those that did not fit the LLM's context."""
    probabilities: dict[str, float] | None = None
    """Probability of each of the task's options, as in `Likelihoods.probabilities`. None: options were not scored as a
    whole, or there are more than `FEW_OPTIONS`."""
    query: str = ""
    """The example's input, if one of the scores is 0; otherwise empty, to keep records small."""


_DEFAULTS = {each.name: each.default for each in fields(Row) if each.default is not MISSING}
"""Fields that rows of earlier versions may lack."""
_FIELDS = {each.name for each in fields(Row)} - _DEFAULTS.keys()


class RunWriter:
    """Writes a run: opens its folder or resumes it.

    With several processes, each appends to its own file; the main process writes everything else.

    Args:
        folder: the run's folder.
        settings: everything that affects the rows (method, LLM, tasks, seed ...), which an existing run must share; and
            the `label` of its table rows, which is replaced.
        force: start over, even if the folder holds a run.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], force: bool = False) -> None:
        self.folder = folder = local(folder)
        self.run: dict[str, Any] = {"schema": SCHEMA, "finished": False, "settings": settings, "seconds": 0.0}
        self.rows: list[dict[str, Any]] = []
        self._file = folder / (ROWS_FILE if is_main() else OTHERS_FILES.replace("*", str(rank())))
        if is_main():
            self._open(settings, force)
        barrier()
        if not is_main():
            self.run, self.rows = read_run(folder), read_rows(folder)
        barrier()  # before any process appends

    def _open(self, settings: dict[str, Any], force: bool) -> None:
        folder = self.folder
        if (folder / RUN_FILE).exists() and not force:
            former = read_run(folder)
            named = {"label": settings.get("label")}  # it affects no row, and a comparison that grows may change it
            same_settings(former.get("settings", {}) | named, settings | named, folder)
            self.run = former | {"settings": settings}
            self.rows = read_rows(folder)
            self._keep_in_one_file()  # without a truncated line
            if former.get("settings", {}).get("label") != settings.get("label"):
                write_json(folder / RUN_FILE, self.run)
        elif occupied(folder) and not (folder / RUN_FILE).exists():
            raise ATVError(f"{folder} exists and is not a run; choose a new folder, so that nothing there is lost.")
        else:
            self.run |= provenance()
            for file in (folder / ROWS_FILE, *_others_files(folder)):
                file.unlink(missing_ok=True)  # first: if killed, no old rows may remain in the new run
            write_json(folder / RUN_FILE, self.run)
            self._keep_in_one_file()

    def _keep_in_one_file(self) -> None:
        """Merge the rows into one file. If killed midway, rows are in two files; `read_rows` reads each only once."""
        write_text(self.folder / ROWS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))
        for file in _others_files(self.folder):
            file.unlink()

    @property
    def finished(self) -> bool:
        """Whether the run was complete when it was opened or has been completed since."""
        return bool(self.run["finished"])

    def append(self, new: Iterable[Row]) -> None:
        """Append rows. They are on disk when this returns."""
        rows = [asdict(row) for row in new]
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.rows.extend(rows)

    def describe(self, **facts: Any) -> None:
        """Record `facts` about the run, such as the method's configuration and the device."""
        self.run |= facts
        if is_main():
            write_json(self.folder / RUN_FILE, self.run)

    def gather(self, order: Sequence[Key]) -> None:
        """Wait for all processes and merge their rows into one file, in this order."""
        barrier()
        place = {key: index for index, key in enumerate(order)}
        self.rows = sorted(read_rows(self.folder), key=lambda row: place.get(row_key(row), len(place)))
        barrier()  # before files are deleted that others still read
        if missing := len(place.keys() - set(map(row_key, self.rows))):
            raise ATVError(
                f"{missing} of {len(place)} rows are missing in {self.folder}: its files were changed while this run "
                "wrote them, as another run into the same folder does. Run one of them again to resume."
            )
        if is_main():
            self._keep_in_one_file()

    def finish(self, **facts: Any) -> None:
        """Mark the run as complete and record `facts` about it."""
        self.describe(**facts, rows=len(self.rows), finished=True)
        barrier()


def read_run(folder: Path) -> dict[str, Any]:
    """A run's description, `run.json`."""
    return _of_schema(folder / RUN_FILE, "a run's description")


def _of_schema(file: Path, expected: str) -> dict[str, Any]:
    record = read_json(file, expected)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ATVError(
            f"{file} has schema {found!r}; expected {SCHEMA}: it was written by another version, whose records are not "
            "read. Run the command again into a new folder, or over this one with --force."
        )
    if not isinstance(record.get("settings", {}), dict):
        raise ATVError(f"{file} has settings {record['settings']!r}; expected an object. Restore it.")
    return record


def _others_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(OTHERS_FILES))


def row_key(row: dict[str, Any]) -> Key:
    """A row's key: one example in one variant."""
    return row["task"], row["template"], row["answer_prefix"], row["example"]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, each once. A truncated last line is skipped; any other damage raises ATVError.

    Fields that earlier versions did not record have their default.
    """
    rows: dict[Key, dict[str, Any]] = {}
    for file in (folder / ROWS_FILE, *_others_files(folder)):
        for row in _read_file(file):
            rows.setdefault(row_key(row), row)
    return list(rows.values())


def _read_file(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row: Any = json.loads(line.decode("utf-8")) if line else None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if number == len(lines):
                break
            raise ATVError(f"{path} line {number} is not JSON ({error}); expected one row a line.") from None
        if not line:
            continue
        if not _whole(row):
            raise ATVError(f"{path} line {number} is {line[:60]!r}; expected a row with all of its fields.")
        rows.append(row | {name: default for name, default in _DEFAULTS.items() if name not in row})
    return rows


def _whole(row: Any) -> bool:
    """Whether it has all fields without a default, and its scores and outputs are objects."""
    if not isinstance(row, dict) or not row.keys() >= _FIELDS:
        return False
    return isinstance(row["scores"], dict) and isinstance(row["outputs"], dict)


def load_runs(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Rows of several runs, each with its run's `method` (or label), `llm`, `seed` and `run` (the folder).

    `asking` is how the prompts of the row's task were written, as JSON. Runs of one method that differ in more than
    their seeds and the rows drawn with them (in demonstrations, dtype, prompts, configuration, training, training tasks
    or their numbers of rows) have their folder in `method`; so do runs with the same seeds and different adapters.

    Args:
        folders: folders of runs, or folders that contain runs at any depth. A run found twice is read once.

    Raises:
        ATVError: there is no run, one is not finished, or two have different test rows for a task of the same name.
    """
    flat: list[dict[str, Any]] = []
    asked: dict[tuple[str, str], tuple[Any, Path]] = {}  # by LLM and task: the test rows and the first run on them
    runs = {run: read_run(run) for run in dict.fromkeys(run for name in folders for run in _runs_below(local(name)))}
    labels = _labels(runs)
    for folder, run in runs.items():
        settings = run.get("settings", {})
        about = {key: settings.get(key) for key in ("llm", "seed")} | {"run": str(folder), "method": labels[folder]}
        rows = read_rows(folder)
        if not run.get("finished"):
            raise ATVError(f"{folder} is not finished ({len(rows)} rows); run its command again to resume.")
        if len(rows) != run.get("rows", len(rows)):
            raise ATVError(
                f"{folder} has {len(rows)} rows and was finished with {run['rows']}: {ROWS_FILE} was changed. Restore "
                "it, or run the command again with --force."
            )
        for task, test in settings.get("tasks", {}).items():
            first, where = asked.setdefault((str(settings.get("llm")), task), (test, folder))
            if first != test:
                raise ATVError(
                    f"{where} and {folder} have different test rows for the task {task} ({first}; {test}), so their "
                    "rows cannot be compared. Report them separately, or evaluate both on the same rows."
                )
        asking = {task: _asking(settings, task) for task in {row["task"] for row in rows}}
        flat.extend(about | {"asking": asking[row["task"]]} | row for row in rows)
    return flat


def _labels(runs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """The name of each run's method: with the run's folder if runs of that name differ in more than their seeds."""
    found = {run: about.get("settings", {}) for run, about in runs.items()}
    names = {run: settings.get("label", settings.get("method")) for run, settings in found.items()}
    alike: dict[tuple[Any, ...], list[Path]] = {}
    for folder, settings in found.items():
        for task in settings.get("tasks", {}):
            alike.setdefault((names[folder], settings.get("llm"), task), []).append(folder)
    mixed = {run for (*_, task), some in alike.items() if _differ([runs[run] for run in some], task) for run in some}
    if not mixed:
        return names
    above = os.path.commonpath([run.absolute().parent for run in mixed])
    return names | {run: f"{names[run]} ({run.absolute().relative_to(above).as_posix()})" for run in mixed}


def _differ(runs: Iterable[Mapping[str, Any]], task: str) -> bool:
    """Whether runs of one name differ, for a task, in more than their seeds and the rows drawn with them."""
    ways: dict[str, set[str]] = {}
    for run in runs:
        ways.setdefault("settings", set()).add(_way(run, task))
        for what, found in _learned_from(run, task).items():
            ways.setdefault(what, set()).add(found)
    return any(len(found) > 1 for found in ways.values())


def _way(run: Mapping[str, Any], task: str) -> str:
    """Every setting that affects a run's rows of a task, except for seeds."""
    settings, method = run["settings"], run.get("method") or {}
    training = method.get("training") or {}
    train = {key: value for key, value in training.get("train", {}).items() if key != "seed"}
    of_run = {key: settings.get(key) for key in ("method", "revision", "dtype", "quantization", "variants", "shots")}
    found = [of_run, _asking(settings, task), method.get("config"), train, sorted(training.get("tasks", {}))]
    return json.dumps(found, sort_keys=True)


def _learned_from(run: Mapping[str, Any], task: str) -> dict[str, str]:
    """What a run learned from, as far as it is recorded: numbers of training rows, adapter and demonstrations.

    Other seeds may draw other rows, so the last two stand for the run's seeds alone.
    """
    settings, training = run["settings"], (run.get("method") or {}).get("training") or {}
    seeds = f"{settings.get('seed')} {training.get('train', training).get('seed')}"
    found = {
        "training rows": training.get("train_rows"),
        f"adapter {seeds}": settings.get("adapter"),
        f"demonstrations {seeds}": settings.get("demonstrations from", {}).get(task),
    }
    return {what: json.dumps(value, sort_keys=True) for what, value in found.items() if value is not None}


def _asking(settings: Mapping[str, Any], task: str) -> str | None:
    asking = settings.get("asking", {}).get(task)
    if asking is None:
        return None
    return json.dumps({key: value for key, value in asking.items() if key != "options"}, sort_keys=True)


def load_analyses(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records of `atv paper analysis` in or below these folders, each read once and with its path as `file`."""
    found = dict.fromkeys(file for name in folders for file in below(local(name), ANALYSIS_FILE))
    return [_of_schema(file, "what atv paper analysis wrote") | {"file": str(file)} for file in found]


def below(folder: Path, pattern: str) -> list[Path]:
    """The files that match a pattern in the folder and below it, without leftovers in hidden folders."""
    found = sorted(folder.rglob(pattern))
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _runs_below(folder: Path) -> list[Path]:
    """The runs below a folder; ATVError if there is neither a run nor an analysis."""
    runs = [file.parent for file in below(folder, RUN_FILE)]
    if not runs and not below(folder, ANALYSIS_FILE):
        raise ATVError(
            f"{folder} is not a run and contains none: {RUN_FILE} is missing in and below it. "
            "Make one with: atv eval --out DIR"
        )
    return runs
