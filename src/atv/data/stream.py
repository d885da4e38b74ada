"""New columns for the rows of a file, in constant memory and resumable: the file side of `atv predict`.

While OUT is made, each process has a file of answers beside it, OUT.partial-RANK.jsonl. Afterwards OUT.json records how
OUT was made.
"""

import json
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from itertools import islice
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from atv.data.rows import Kinds, Row, RowFile, json_line, json_rows, note_kinds, require_writable, write_joined
from atv.errors import ATVError
from atv.files import local, read_json, replace_file, same_settings, sha256, write_json
from atv.processes import barrier, is_main, rank, world_size
from atv.progress import bar, log

STANDARD = "-"
"""Name of standard input or output, which hold JSON lines."""
CHUNK = 512
"""Consecutive rows that are handed out together, so that they can be sorted by length."""
NEW = "new"
"""Key of a row's new columns in a line of a partial file."""

Numbered = tuple[int, Row]
"""A row and its number in the file, from 0; or its new columns and its number."""
Answer = Callable[[list[Numbered]], Iterable[list[Numbered]]]
Choose = Callable[[list[str]], Sequence[str]]
"""From the names of the input's columns to those of the columns that are read."""


def predict_stream(
    source: str | Path,
    out: str | Path,
    columns: Sequence[str],
    answer: Answer,
    settings: dict[str, Any],
    force: bool = False,
    choose: Choose = list,
) -> int:
    """Write the rows of `source` with new columns behind the others to `out`.

    Answers are appended to a file beside `out` as soon as `answer` yields them. Called again after an interruption, it
    asks only for rows that have none; called again after the end, it asks for nothing. `out` appears when it is
    complete. If a launcher has started several processes, all of them call it: they divide the rows by chunks, and the
    main process writes `out`. A later call may have another number of processes.

    The whole input is read once before anything is asked, so that an error in its last line is found first, and once
    more to write `out`. Neither rows nor answers are kept in memory, only 8 bytes per row.

    From standard input (`-`) to standard output, rows are written as they are answered; what `-` names is JSON lines.

    Args:
        source: CSV, TSV, JSONL, JSON or Parquet file, or `-`. `RowFile` names its columns.
        out: CSV, TSV, JSONL or Parquet file, or `-`, which is not resumed.
        columns: names of the new columns.
        answer: takes at most `CHUNK` consecutive rows of those not yet answered, each with its number from 0. Yields,
            in any order and in batches, for each row its number and its new columns, as values that JSON has. It is
            called only if a row has no answer, so it may load a model when it is first called.
        settings: everything else that affects the answers: adapter, LLM, options. A resumed call must have the same.
        force: start over, also if `out` is something else.
        choose: called with all columns of the input before anything is asked; a resumed call must have the same result.
            By default all are read. From `-` to `-` it is called before each chunk, with the columns so far.

    Returns:
        The number of rows that this process has asked for.

    Raises:
        ATVError: the input cannot be read or has one of `columns`; `out` is there and is not this result; answers
            beside it were made with other settings; another command is writing it; or `answer` left out a row.
    """
    if str(out) == STANDARD:
        return _to_standard_output(source, columns, answer, choose)
    out = local(out)
    suffix = require_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(out), _rows_of(source, out) as rows:
        _require_new(rows.name, rows.columns, columns)
        made_by = {
            "input": {"sha256": sha256(rows.path), "format": rows.suffix},
            "read": list(choose(rows.columns)) if rows.count else [],
            "columns": list(columns),
            **settings,
        }
        if is_main():
            _clear_or_refuse(out, made_by, force)
        barrier()
        if out.exists():
            log.info(f"{out} holds these answers already; nothing to do (--force starts over).")
            return 0
        store = Answers(out, made_by, rows.count)
        barrier()  # before any process appends
        asked = _ask(rows, columns, answer, store)
        barrier()
        if is_main():
            _write(rows, columns, out, suffix, made_by)
        barrier()
        return asked


# ---- input ----


@contextmanager
def _rows_of(source: str | Path, out: Path) -> Iterator[RowFile]:
    """The input; standard input as a file beside `out`, since it is read more than once."""
    if str(source) != STANDARD:
        path = local(source)
        if path.exists() and out.exists() and path.samefile(out):
            raise ATVError(f"{path} is both the input and --out; name another file for --out.")
        yield RowFile(path)
        return
    _require_one_process()
    copy = out.with_name(f".{out.name}.stdin.jsonl")
    try:
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield RowFile(copy, "standard input")
    finally:
        copy.unlink(missing_ok=True)


def _require_one_process() -> None:
    if world_size() > 1:
        raise ATVError(f"{world_size()} processes cannot share standard input or output; name files instead of -.")


def _require_new(name: str, there: Iterable[str], columns: Sequence[str]) -> None:
    for column in there:
        if column in columns:
            raise ATVError(
                f"{name} has a column {column!r} already, which is the name of a new one; rename it in the input, or "
                "name the new one differently."
            )


def _chunks(rows: Iterable[Row]) -> Iterator[list[Numbered]]:
    numbered = enumerate(rows)
    while chunk := list(islice(numbered, CHUNK)):
        yield chunk


# ---- answers ----


class Answers:
    """The answers so far, in one file per process beside `out`. In memory is only where each row's answer lies.

    Each file begins with a line that holds the settings. A line that a kill has cut is dropped.

    Args:
        out: the file that is made.
        settings: of this result. Files that other settings have made are refused.
        rows: number of rows of the input.
    """

    def __init__(self, out: Path, settings: dict[str, Any], rows: int) -> None:
        self.files = partial_files(out)
        self._places = array("q", [-1]) * rows  # by row: offset in a file x number of files + index of the file
        for index, file in enumerate(self.files):
            self._find(index, file)
        self._own = _partial_file(out, rank())
        if not self._own.exists():
            with self._own.open("wb") as opened:
                opened.write(json_line({"settings": settings}).encode("utf-8"))

    def _find(self, index: int, file: Path) -> None:
        with file.open("rb") as lines:
            offset = len(lines.readline())
            for number, line in enumerate(lines, 2):
                if not line.endswith(b"\n"):
                    break
                row = _answer_of(file, number, line)[0]
                if 0 <= row < len(self._places) and self._places[row] < 0:
                    self._places[row] = offset * len(self.files) + index
                offset += len(line)

    def __contains__(self, row: int) -> bool:
        return self._places[row] >= 0

    @property
    def missing(self) -> int:
        """Number of rows without an answer."""
        return sum(place < 0 for place in self._places)

    @contextmanager
    def appending(self) -> Iterator[Callable[[list[Numbered]], None]]:
        """Yield a function that appends answers; they are in the file when it returns."""
        with self._own.open("ab") as file:

            def append(answers: list[Numbered]) -> None:
                lines = "".join(json_line({"row": number, NEW: new}) for number, new in answers)
                file.write(lines.encode("utf-8"))
                file.flush()

            yield append

    def in_order(self) -> Iterator[Row]:
        """Yield the new columns of every row, in the order of the rows."""
        with ExitStack() as opened:
            files: list[IO[bytes]] = [opened.enter_context(file.open("rb")) for file in self.files]
            for place in self._places:
                offset, index = divmod(place, len(files))
                files[index].seek(offset)
                yield json.loads(files[index].readline())[NEW]


def _partial_file(out: Path, process: int) -> Path:
    return out.with_name(f"{out.name}.partial-{process}.jsonl")


def partial_files(out: Path) -> list[Path]:
    """The files of answers beside `out`."""
    return sorted(out.parent.glob(f"{escape(out.name)}.partial-[0-9]*.jsonl"))


def _answer_of(file: Path, number: int, line: bytes) -> Numbered:
    """The row number and the new columns of a line."""
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(line)
        if isinstance(found["row"], int) and isinstance(found[NEW], dict):
            return found["row"], found[NEW]
    raise ATVError(
        f"{file}, line {number} is {line[:60]!r}; expected an answer. The file is damaged: remove this line, so that "
        "its row is answered again, or start over with --force."
    )


def _ask(rows: RowFile, columns: Sequence[str], answer: Answer, store: Answers) -> int:
    """Ask for this process's rows that have no answer; return their number."""
    missing = store.missing
    if missing < rows.count:
        log.info(f"Resuming: {rows.count - missing} of {rows.count} rows have their answer.")
    asked = 0
    with bar("predict", missing) as progress, store.appending() as append:
        for index, chunk in enumerate(_chunks(rows)):
            todo = [row for row in chunk if row[0] not in store]
            if index % world_size() != rank() or not todo:
                continue
            asked += len(todo)
            for batch in _checked(answer, todo, columns):
                append(batch)
                progress.advance(len(batch) * world_size())  # the others are about as far
    return asked


def _checked(answer: Answer, todo: list[Numbered], columns: Sequence[str]) -> Iterator[list[Numbered]]:
    """The batches of answers, each row once and with all new columns."""
    open_rows = {number for number, _ in todo}
    for batch in answer(todo):
        for number, new in batch:
            if number not in open_rows or list(new) != list(columns):
                raise ATVError(
                    f"An answer for row {number} has the columns {list(new)}; expected {list(columns)} once for each "
                    "row asked for."
                )
            open_rows.remove(number)
        yield batch
    if open_rows:
        raise ATVError(f"{len(open_rows)} rows got no answer, the first of them row {min(open_rows)}.")


# ---- output ----


def _record_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Refuse a second command that writes the same file; it would ask for the same rows."""
    if not is_main():
        yield
        return
    file = out.with_name(f".{out.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ATVError(f"Another command is writing {out}; wait for its end, or name another --out.") from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            file.unlink()


def _clear_or_refuse(out: Path, settings: dict[str, Any], force: bool) -> None:
    """Keep beside `out` only what a call with these settings can resume; raise ATVError if that would lose anything.

    Afterwards `out` exists only if it is complete.
    """
    for part in out.parent.glob(f".{escape(out.name)}.*.part"):
        part.unlink()  # of a call that was killed when it wrote the result
    record = _record_file(out)
    if force:
        for file in (*partial_files(out), record, out):
            file.unlink(missing_ok=True)
        return
    former: Any = read_json(record, "the record of a result") if record.exists() else {"output": {}, "settings": {}}
    if not isinstance(former, dict) or not {"output", "settings"} <= former.keys():
        raise ATVError(f"{record} is not the record of a result; move it away, or choose another --out.")
    if out.exists():
        if former["output"].get("sha256") != sha256(out):
            raise ATVError(
                f"{out} exists and is not what this command wrote; choose another --out, so that nothing there is "
                "lost, or --force."
            )
        same_settings(former["settings"], settings, out)
    for file in partial_files(out):
        if out.exists():
            file.unlink()  # a kill came right after the last step
        else:
            _check_partial(file, settings)


def _check_partial(file: Path, settings: dict[str, Any]) -> None:
    """Refuse answers of other settings; drop a cut last line, or a file without its first line."""
    with file.open("r+b") as lines:
        first = lines.readline()
        if first.endswith(b"\n"):
            same_settings(_settings_of(file, first), settings, file)
            lines.truncate(_end_of_last_line(lines))
            return
    file.unlink()


def _settings_of(file: Path, line: bytes) -> dict[str, Any]:
    with suppress(ValueError, KeyError, TypeError):
        found = json.loads(line)["settings"]
        if isinstance(found, dict):
            return found
    raise ATVError(f"{file} begins with {line[:60]!r}; expected the settings of answers. Move it away.")


def _end_of_last_line(file: IO[bytes]) -> int:
    """The offset behind the last line feed of a file that has one."""
    end = file.seek(0, 2)
    while end > 0:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write(rows: RowFile, columns: Sequence[str], out: Path, suffix: str, settings: dict[str, Any]) -> None:
    """Join rows and answers, write the record and then `out`, and remove the answers."""
    store = Answers(out, settings, rows.count)  # with the other processes' answers
    if store.missing:
        raise ATVError(f"{store.missing} of {rows.count} rows have no answer; run the command again to resume.")
    kinds: Kinds = {column: set() for column in columns}
    if suffix == ".parquet":
        for new in store.in_order():
            note_kinds(kinds, new)
    with replace_file(out) as part:
        write_joined(rows, store.in_order(), kinds, part, suffix)
        # The record is first: it tells a later call that `out` is complete, and without `out` it says nothing.
        write_json(_record_file(out), {"settings": settings, "rows": rows.count, "output": {"sha256": sha256(part)}})
    for file in store.files:
        file.unlink()


def _to_standard_output(source: str | Path, columns: Sequence[str], answer: Answer, choose: Choose) -> int:
    _require_one_process()
    name = "standard input" if str(source) == STANDARD else str(source)
    rows: Iterable[Row] = json_rows(sys.stdin.buffer, name) if str(source) == STANDARD else RowFile(local(source))
    there = dict.fromkeys(rows.columns if isinstance(rows, RowFile) else ())
    asked = 0
    for chunk in _chunks(rows):
        for _, row in chunk:
            _require_new(name, row, columns)
            there |= dict.fromkeys(row)
        choose(list(there))
        asked += len(chunk)
        waiting: dict[int, Row] = {}
        following = iter(chunk)
        number, row = next(following)
        for batch in _checked(answer, chunk, columns):
            waiting |= dict(batch)
            while number in waiting:
                sys.stdout.write(json_line(row | waiting.pop(number)))
                number, row = next(following, (-1, {}))
            sys.stdout.flush()
    return asked
