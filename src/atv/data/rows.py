"""Rows of CSV, TSV, JSON lines, JSON and Parquet files, read and written one by one.

Text files are read with the standard library, because a value must stay the text that it is: libraries that guess types
make 1 of "01" and a missing value of "None". Parquet files carry types of their own. Only a JSON list is read as a
whole; of any other file a few rows at a time are in memory.
"""

import base64
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import IO, Any

from atv.errors import ATVError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WRITTEN = (".csv", ".tsv", ".jsonl", ".parquet")
"""What rows are written as; a JSON list cannot be read back row by row."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_ROWS = 4096
"""Rows of a Parquet file that are read at once or written as one row group."""
EXACT = 2**53
"""Whole numbers up to this one are exact as float64."""

Row = dict[str, Any]
Kinds = dict[str, set[str]]
"""The kinds of values that each column has: text, bool, whole, long, real or other."""


# ---- reading ----


def read_rows(file: Path, name: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file in order.

    A row of a CSV or TSV file has each column as text, and None where the line has fewer cells than the first one.

    Args:
        file: CSV, TSV, JSONL, JSON (a list of objects) or Parquet, by its ending.
        name: of the file in messages; by default its path.

    Raises:
        ATVError: it cannot be read, is not UTF-8, or a line is no row.
    """
    suffix, said = suffix_of(file, SUFFIXES), name or str(file)
    if suffix == ".parquet":
        for batch in _parquet_batches(file):
            yield from batch.to_pylist()
    elif suffix in DELIMITERS:
        with _opened_csv(file) as reader:
            yield from _csv_rows(said, reader)
    elif suffix == ".json":
        yield from objects(load_json(file), said)
    else:
        with _readable(file), file.open("rb") as lines:
            yield from json_rows(lines, said)


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    """Yield the objects of JSON lines; blank lines are skipped. A line that is no object raises ATVError."""
    for number, line in enumerate(lines, 1):
        try:
            # utf-8-sig: a byte order mark is no part of the first line
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = _parsed(text)
        except UnicodeDecodeError:
            raise _not_utf8(name, number) from None
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise ATVError(f"{name}, line {number}: no JSON: {reason}.") from None
        if not isinstance(row, dict):
            raise ATVError(f"{name}, line {number}: a JSON {type(row).__name__}; expected an object for each row.")
        yield row


def load_json(file: Path) -> Any:
    """Return the contents of a JSON file; ATVError if it is none."""
    try:
        with _readable(file):
            return _parsed(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ATVError(f"{file}, line {error.lineno}: no JSON: {error.msg}.") from None
    except RecursionError:
        raise ATVError(f"{file}: no JSON: nested too deeply.") from None


def _parsed(text: str) -> Any:
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int | Decimal:
    """A whole number of JSON; as a Decimal, which no query is, if it has more digits than Python makes an int of."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


def objects(found: Any, name: str, also: str = "") -> list[Row]:
    """Return `found` if it is a list of objects; otherwise raise ATVError, with what is `also` expected."""
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ATVError(f"{name}: expected a list of objects{also}.")
    return found


def suffix_of(file: Path, known: Sequence[str]) -> str:
    """Return a file's ending in lower case; ATVError if it is not a known one."""
    suffix = file.suffix.lower()
    if suffix not in known:
        raise ATVError(f"{file} has the ending {file.suffix!r}; expected one of {', '.join(known)}.")
    return suffix


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a text file into errors for users."""
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(str(file), _first_bad_line(file)) from None
    except OSError as error:
        raise ATVError(f"{file} cannot be read: {error.strerror or ' '.join(str(error).split())[:200]}.") from error


def _first_bad_line(file: Path) -> int:
    """The first line that is not UTF-8: the error of a text stream only knows its place in a buffer."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1


def _not_utf8(name: str, line: int) -> ATVError:
    return ATVError(f"{name}, line {line}: not UTF-8; save it as UTF-8.")


@contextmanager
def _opened_csv(file: Path) -> Iterator["csv.DictReader[str]"]:
    csv.field_size_limit(2**31 - 1)
    with _readable(file), file.open(encoding="utf-8-sig", newline="") as text:
        yield csv.DictReader(text, delimiter=DELIMITERS[file.suffix.lower()], strict=True)


def _csv_rows(name: str, reader: "csv.DictReader[str]") -> Iterator[Row]:
    try:
        columns = reader.fieldnames or ()
        if len(set(columns)) < len(columns):
            raise ATVError(f"{name} has two columns of one name; found {columns}.")
        for row in reader:
            if None in row:
                raise ATVError(
                    f"{name}, line {reader.line_num}: {len(row) - 1 + len(row[None])} cells, and the first line names "
                    f"{len(row) - 1} columns. Put cells with a comma, a tab or a line break in double quotes."
                )
            yield row
    except csv.Error as error:
        raise ATVError(f"{name}, line {reader.line_num}: {error}.") from error


def _parquet_file(file: Path) -> Any:
    """Return an open `pyarrow.parquet.ParquetFile`; ATVError if it is none or has two columns of one name."""
    with _reading_parquet(file):
        found = _arrow(file)[1].ParquetFile(file)
    columns = found.schema_arrow.names
    if len(set(columns)) < len(columns):
        raise ATVError(f"{file} has two columns of one name; found {columns}.")
    return found


def _parquet_batches(file: Path) -> Iterator[Any]:
    with _reading_parquet(file):
        yield from _parquet_file(file).iter_batches(batch_size=PARQUET_ROWS)


@contextmanager
def _reading_parquet(file: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a Parquet file into errors for users."""
    arrow, _ = _arrow(file)
    try:
        with _readable(file):
            yield
    except arrow.ArrowException as error:
        raise ATVError(f"{file} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def class_names(file: Path) -> dict[str, list[str]]:
    """Names of the classes of columns of whole numbers, which the library `datasets` notes in a Parquet file."""
    noted = (_parquet_file(file).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(noted).get("info", {}).get("features", {})
        return {column: list(about["names"]) for column, about in features.items() if "names" in about}
    except (ValueError, AttributeError, TypeError):
        return {}  # another program's note


def require_writable(file: Path) -> str:
    """Return the ending of a file to write; ATVError if rows are not written so, or not without another package."""
    suffix = suffix_of(file, WRITTEN)
    if suffix == ".parquet":
        _arrow(file)
    return suffix


def _arrow(file: Path) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; ATVError if they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ATVError(f"{file} needs the package pyarrow: pip install 'adaptive-task-vectors[data]'") from error
    return pyarrow, parquet


class RowFile:
    """A file of rows that is read several times and must not change between reads. Iterating yields its rows.

    Args:
        path: CSV, TSV, JSONL, JSON (a list of objects) or Parquet, by its ending. The file is read once, so that every
            error in it is found now.
        name: in messages; by default the path.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, name or str(path)
        self.suffix = suffix_of(path, SUFFIXES)
        self.kinds: Kinds = {}
        self.count = 0
        """Number of rows."""
        self._state = self._stat()
        if self.suffix == ".parquet":
            found = _parquet_file(path)
            self.kinds = {column: set() for column in found.schema_arrow.names}
            self.count = found.metadata.num_rows
            return
        for row in read_rows(path, self.name):
            self.count += 1
            note_kinds(self.kinds, row)
        if self.suffix in DELIMITERS and not self.count:  # the first line alone names columns too
            with _opened_csv(path) as reader:
                self.kinds = {column: set() for column in reader.fieldnames or ()}

    @property
    def columns(self) -> list[str]:
        """Names of all columns, in the order of their first appearance."""
        return list(self.kinds)

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows in order; ATVError if the file has changed since it was first read."""
        for number, row in enumerate(read_rows(self.path, self.name)):
            if number == self.count:
                break
            yield row
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Raise ATVError if the file has changed since it was first read."""
        if self._stat() != self._state:
            raise ATVError(f"{self.name} changed while it was read. Run the command again on the file as it is now.")

    def _stat(self) -> tuple[int, int]:
        with _readable(self.path):
            found = self.path.stat()
        return found.st_size, found.st_mtime_ns


# ---- writing ----


def json_line(row: Row) -> str:
    """Return a row as one line of JSON that UTF-8 can encode; values that JSON does not have become text."""
    line = json.dumps(row, ensure_ascii=False, default=_plain) + "\n"
    return line.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair is escaped, as in JSON


def _plain(value: Any) -> Any:
    """A value of a Parquet file, such as a date, as JSON has it; bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def cell(value: Any) -> str | None:
    """Return a value as the text of a cell: text as it is, dates and bytes as in JSON, the rest as JSON; None stays."""
    if value is None or isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return str(json.loads(text)) if text.startswith('"') else text


def note_kinds(kinds: Kinds, row: Row) -> None:
    """Add the kinds of a row's values."""
    for column, value in row.items():
        known = kinds.setdefault(column, set())
        if value is not None:
            known.add(_kind(value))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "whole" if abs(value) <= EXACT else "long" if -(2**63) <= value < 2**63 else "other"
    return {str: "text", float: "real"}.get(type(value), "other")


def write_joined(source: RowFile, added: Iterable[Row], kinds: Kinds, file: Path, suffix: str) -> None:
    """Write a file's rows with new columns behind the others.

    In JSON lines a row keeps the columns that it has. Elsewhere every row has all columns: a missing value is an empty
    cell, and `cell` makes text of the others. A column of a Parquet file keeps its type if all of its values are texts,
    truth values, 64-bit whole numbers or numbers, or if it comes from a Parquet file; otherwise it is text.

    Args:
        source: the rows.
        added: for each row its new columns.
        kinds: the new columns and the kinds of their values.
        file: written to.
        suffix: .csv, .tsv, .jsonl or .parquet.
    """
    if suffix == ".parquet":
        _write_parquet(source, added, kinds, file)
        return
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text:
        rows = (row | new for row, new in zip(source, added, strict=True))
        if suffix == ".jsonl":
            text.writelines(json_line(row) for row in rows)
            return
        columns = [*source.columns, *kinds]
        writer = csv.writer(_Lines(text), delimiter=DELIMITERS[suffix])
        writer.writerow(columns)
        writer.writerows([cell(row.get(column)) for column in columns] for row in rows)


class _Lines:
    """Ends lines with a line feed. Python 3.11 leaves out quotes that a carriage return needs if told to do so."""

    def __init__(self, text: IO[str]) -> None:
        self._text = text

    def write(self, line: str) -> None:
        """Write a line of the csv module, which ends with a carriage return and a line feed."""
        self._text.write(line[:-2] + "\n")


def _write_parquet(source: RowFile, added: Iterable[Row], kinds: Kinds, file: Path) -> None:
    arrow, parquet = _arrow(file)
    new = arrow.schema([(column, _arrow_type(arrow, kinds[column])) for column in kinds])
    own = arrow.schema([(column, _arrow_type(arrow, source.kinds[column])) for column in source.columns])
    if source.suffix == ".parquet":
        own = _parquet_file(source.path).schema_arrow.remove_metadata()
    answers = iter(added)
    with parquet.ParquetWriter(file, arrow.schema([*own, *new])) as writer:
        for count, columns in _columns(arrow, source, own):
            beside = _arrays(arrow, [next(answers) for _ in range(count)], new)
            writer.write_batch(arrow.record_batch([*columns, *beside], schema=writer.schema))
    source.require_unchanged()


def _columns(arrow: Any, source: RowFile, schema: Any) -> Iterator[tuple[int, list[Any]]]:
    """The number of rows of each part of a file, and their columns; those of a Parquet file as they are."""
    if source.suffix == ".parquet":
        for batch in _parquet_batches(source.path):
            yield batch.num_rows, batch.columns
        return
    rows = iter(source)
    while part := list(islice(rows, PARQUET_ROWS)):
        yield len(part), _arrays(arrow, part, schema)


def _arrays(arrow: Any, rows: Sequence[Row], schema: Any) -> list[Any]:
    arrays = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if arrow.types.is_string(field.type):
            values = [_encodable(cell(value)) for value in values]
        arrays.append(arrow.array(values, field.type))
    return arrays


def _encodable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _arrow_type(arrow: Any, kinds: set[str]) -> Any:
    """The type of a column whose values have these kinds."""
    if kinds == {"bool"}:
        return arrow.bool_()
    if kinds and kinds <= {"whole", "long"}:
        return arrow.int64()
    if kinds and kinds <= {"whole", "real"}:
        return arrow.float64()
    return arrow.string()
