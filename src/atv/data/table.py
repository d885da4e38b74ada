"""Tasks from tables: CSV, TSV, JSON lines, JSON and Parquet files, a folder with one of these per split, the hub.

The columns are recognised by name or given. `atv.data.rows` reads text files. Parquet files, data sets of the hub and
`datasets` objects carry types and names of classes of their own.
"""

import hashlib
import json
import logging
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from atv.data.conversation import example_of, turns_of
from atv.data.render import INPUT, Example
from atv.data.rendering import Rendering
from atv.data.rows import SUFFIXES, Row, class_names, load_json, objects, read_rows, suffix_of
from atv.data.task import DRAWN_TEST, QUERY_COLUMNS, SPLITS, Task, composed, shown, text_of
from atv.errors import ATVError
from atv.files import local
from atv.progress import log, log_once

HUB = "hub:"
"""Begins the name of a data set of the hub: hub:ORG/NAME or hub:ORG/NAME:CONFIG."""
SPLIT_NAMES = {name: split for split, names in {
    "train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)
}.items() for name in names}  # fmt: skip
"""Names that files and data sets have for the three splits."""
COLUMNS = (("instruction", "output"), ("input", "output"), ("prompt", "completion"), ("text", "label"))
"""Columns that are recognised: the query's and the answer's. An instruction is followed by its input, if it has one."""
MESSAGES = "messages"
"""Column of a conversation, which is recognised first."""
KWARGS = "chat_template_kwargs"
"""Column of the options of the LLM's chat template."""
DRAWN = {"valid": (0.1, 500), "test": (0.2, 1000)}
"""The share of the training rows that a missing split is drawn from, and how many rows it has at most."""
SEED = 42
"""Of these draws. The same for every command, since rows that one of them trains on must not be tested by another."""


class Loaded(NamedTuple):
    """The rows of each split that there is, and the names of a column's classes where it has some."""

    splits: dict[str, list[Row]]
    classes: dict[str, list[str]]


def is_table(data: Any) -> bool:
    """Whether `load_table` reads this: a file, hub:NAME, a `datasets` object, or a folder with a file per split."""
    if _is_dataset(data) or str(data).startswith(HUB):
        return True
    path = local(data)
    return path.is_file() or bool(path.is_dir() and _split_files(path))


def load_table(
    data: Any,
    *,
    input: str | None = None,
    output: str | None = None,
    templates: Sequence[str] | None = None,
    rendering: Rendering | None = None,
) -> Task:
    """One task from a table.

    Cells are texts; those of `messages`, or of `prompt` and `completion`, may be lists of messages with role and
    content, of which the last user's is the query and the assistant's after it the answer.

    Rows with an empty cell and repeated inputs are dropped and counted; inputs count as equal if they differ only in
    case, white space or the composition of accents. A training row whose input is among the validation or test rows is
    dropped too. A missing validation or test split is drawn from the training rows, stratified by answer.

    Args:
        data: a file, a folder, hub:ORG/NAME[:CONFIG], a `datasets.Dataset` or a `DatasetDict`.
        input: column of the queries; by default recognised (`COLUMNS`).
        output: column of the answers; likewise.
        templates: with {input}; by default the query alone.
        rendering: how prompts are written. Default: in the LLM's chat template if it has one, else as plain text. If it
            has no options of the chat template, those of the column `chat_template_kwargs` are used.

    Raises:
        ATVError: it cannot be read, its columns are not recognised, a cell is no text, or too few rows are left.
    """
    name, loaded = _read(data)
    columns = _columns(name, _keys(loaded), input, output)
    dropped: Counter[str] = Counter()
    found = {
        split: _examples(f"{name}: {split}", rows, columns, loaded.classes, dropped)
        for split, rows in loaded.splits.items()
    }
    splits, drawn = _split(name, found, dropped)
    named = zip(("training", "validation", "test"), SPLITS, strict=True)
    sizes = ", ".join(f"{len(splits[split])} {said}" for said, split in named)
    said = f" ({' and '.join(sorted(drawn))} drawn from the training rows, seed {SEED})" if drawn else ""
    log.info(f"{name}: {sizes} rows{said}; {' and '.join(dict.fromkeys(columns))}")
    if dropped:
        log.warning(f"{name}: dropped {', '.join(f'{count} {why}' for why, count in dropped.items())}")
    return Task(
        name,
        tuple(templates or (INPUT,)),
        train=tuple(splits["train"]),
        valid=tuple(splits["valid"]),
        test=tuple(splits["test"]),
        answer_prefixes=(None,),
        renderer=_with_kwargs(name, rendering or Rendering(), loaded),
        prepared=_prepared(columns[:-1], splits, drawn, dropped),
    )


class Queries(NamedTuple):
    """The queries of a table, whose answers are not read."""

    name: str
    splits: dict[str, tuple[Example, ...]]
    """Examples without an answer, by split: train, valid and test."""
    prepared: dict[str, Any]
    """As in `Task.prepared`."""
    rendering: Rendering = Rendering()
    """How prompts are written for the student."""

    def drawn(self, train: int | None, valid: int | None, seed: int) -> "Queries":
        """At most that many training and validation queries, drawn at random; None keeps a split unchanged."""
        draw, kept = random.Random(f"{seed} {self.name}"), dict(self.splits)
        for split, count in (("train", train), ("valid", valid)):
            if count is not None and count < len(kept[split]):
                kept[split] = tuple(draw.sample(kept[split], count))
        return self._replace(splits=kept)


def load_queries(
    data: Any, *, input: str | None = None, output: str | None = None, rendering: Rendering | None = None
) -> Queries:
    """The queries of a table: like `load_table`, but answers are not needed, and left out of the examples.

    Rows with an answer are in the same splits as in `load_table` of the same table, so that what is trained on these
    queries can be evaluated on the table's answers. A row without an answer is a training row, unless it is in a
    validation or test split that the table has. If the table has no answers, or `load_table` cannot draw splits from
    the rows that have one, missing splits are drawn from all training rows.

    Args:
        data: as for `load_table`.
        input: column of the queries; by default recognised.
        output: column of the answers; by default recognised, if there is one. It is given with `input`.
        rendering: as for `load_table`.

    Raises:
        ATVError: it cannot be read, no column of queries is recognised, a query is no text, or too few rows are left.
    """
    name, loaded = _read(data)
    query, both = _columns_of_queries(name, _keys(loaded), input, output)
    dropped: Counter[str] = Counter()
    found: dict[str, list[Example]] = {}
    for split, rows in loaded.splits.items():
        examples = [
            _perhaps_answered(f"{name}: {split} row {number}", row, query, both, loaded.classes)
            for number, row in enumerate(rows)
        ]
        found[split] = [example for example in examples if example.input]
        dropped["with an empty cell"] += len(examples) - len(found[split])
    splits, drawn = _split_like_answers(name, found, dropped)
    sizes = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    log.info(f"{name}: {sizes} queries; {' and '.join(query)}")
    asked = {split: tuple(row._replace(output="") for row in splits[split]) for split in SPLITS}
    prepared = _prepared(query, splits, drawn, +dropped)
    return Queries(name, asked, prepared, _with_kwargs(name, rendering or Rendering(), loaded))


def _prepared(
    query: Sequence[str], splits: Mapping[str, Sequence[Example]], drawn: Sequence[str], dropped: Mapping[str, int]
) -> dict[str, Any]:
    """As in `Task.prepared`."""
    found: dict[str, Any] = {
        QUERY_COLUMNS: list(query),
        "drawn": {split: len(splits[split]) for split in drawn},
        "dropped": dict(dropped),
    }
    if "test" in drawn:
        inputs = json.dumps([row.asked for row in splits["test"]])
        found[DRAWN_TEST] = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    return found


# ---- reading ----


def _is_dataset(data: Any) -> bool:
    return type(data).__module__.partition(".")[0] == "datasets"


def _split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are named like a split: train.csv, validation.csv, ..."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(file.stem.lower())
        if split is not None and file.suffix.lower() in SUFFIXES:
            if split in found:
                raise ATVError(f"{folder} has {found[split].name} and {file.name}; expected one file for each split.")
            found[split] = file
    return found


def _read(data: Any) -> tuple[str, Loaded]:
    """A table's name and rows."""
    if _is_dataset(data):
        return "data", _from_datasets("data", data)
    if str(data).startswith(HUB):
        name, _, config = str(data).removeprefix(HUB).partition(":")
        return name.rpartition("/")[2], _from_datasets(name, _load_hub(name, config or None))
    path = local(data)
    files = {"train": path} if path.is_file() else _split_files(path)
    _require_train(path, files, [file.name for file in files.values()])
    parts = {split: _read_file(file) for split, file in files.items()}
    if len(parts) == 1 and path.is_file() and len(only := parts["train"].splits) > 1:
        return composed(path.stem), Loaded(only, parts["train"].classes)
    classes = {key: names for part in parts.values() for key, names in part.classes.items()}
    called = path.stem if path.is_file() else path.resolve().name  # "." has no name of its own
    return composed(called), Loaded({split: part.splits["train"] for split, part in parts.items()}, classes)


def _datasets(what: str) -> Any:
    """The library `datasets`; ATVError if it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise ATVError(f"{what} needs the package datasets: pip install 'adaptive-task-vectors[data]'") from error
    return datasets


def _load_hub(name: str, config: str | None) -> Any:
    library = _datasets(f"{HUB}{name}")
    _require_hub_name(name)
    try:
        return library.load_dataset(name, config)
    except Exception as error:  # whatever goes wrong between here and the hub
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"The data set {name} could not be loaded from the hub: {reason}") from error


def _require_hub_name(name: str) -> None:
    """Raise ATVError unless `name` is a data set of the hub: the library would also read a folder of this machine."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ATVError(f"{HUB}{name} does not name a data set of the hub; expected {HUB}ORG/NAME[:CONFIG].")
    if local(name).exists():
        raise ATVError(f"{HUB}{name} is a file or folder here: leave out {HUB} to read it, or rename it.")


def _read_file(file: Path) -> Loaded:
    suffix = suffix_of(file, SUFFIXES)
    if suffix == ".json":
        return Loaded(_json_splits(file, load_json(file)), {})
    return Loaded({"train": list(read_rows(file))}, class_names(file) if suffix == ".parquet" else {})


def _json_splits(file: Path, found: Any) -> dict[str, list[Row]]:
    """A list of rows, or an object of such lists by split."""
    also = ", or an object with such a list for train, valid and test"
    if not isinstance(found, dict):
        return {"train": objects(found, str(file), also)}
    splits: dict[str, list[Row]] = {}
    for key, rows in found.items():
        split = SPLIT_NAMES.get(key.lower())
        if split is None:
            continue
        if split in splits:
            raise ATVError(f"{file} has several lists that are {split}; found {list(found)}. Keep one of them.")
        splits[split] = objects(rows, str(file), also)
    _require_train(file, splits, list(found))
    return splits


def _require_train(where: object, splits: Collection[str], found: Sequence[str]) -> None:
    """Raise ATVError if there are no training rows, from which missing splits are drawn."""
    if "train" not in splits:
        raise ATVError(
            f"{where} has no training rows: found {', '.join(found) or 'nothing'}; expected train, and valid and test "
            "if there are any."
        )


def _from_datasets(name: str, data: Any) -> Loaded:
    """Rows and class names of a `datasets` object, whose splits may have any of the usual names."""
    parts = dict(data) if hasattr(data, "keys") else {str(data.split or "train"): data}
    splits: dict[str, list[Row]] = {}
    classes: dict[str, list[str]] = {}
    for key, part in parts.items():
        split = SPLIT_NAMES.get(key.lower()) or ("train" if len(parts) == 1 else None)
        if split is None:
            continue
        if split in splits:
            raise ATVError(f"{name} has several splits that are {split}; found {list(parts)}.")
        splits[split] = list(part)
        for column, feature in part.features.items():
            if hasattr(feature, "int2str"):
                classes[column] = list(feature.names)
    _require_train(name, splits, list(parts))
    return Loaded(splits, classes)


# ---- columns and cells ----


def _keys(loaded: Loaded) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(key for rows in loaded.splits.values() for row in rows for key in row))


def _columns(name: str, there: Sequence[str], input: str | None, output: str | None) -> tuple[str, ...]:
    """The columns that make a query, and the answer's; one of the former in most cases."""
    if (input is None) != (output is None):
        raise ATVError("Give --input and --output together; found one of them.")
    if input is not None and output is not None:
        for column in (input, output):
            if column not in there:
                raise ATVError(f"{name} has no column {column!r}; found {', '.join(map(repr, there)) or 'none'}.")
        return input, output
    by_name = {column.strip().lower(): column for column in there}
    if MESSAGES in by_name:
        return by_name[MESSAGES], by_name[MESSAGES]
    for query, answer in COLUMNS:
        if query in by_name and answer in by_name:
            beside = ["input"] if query == "instruction" and "input" in by_name else []
            return (*(by_name[column] for column in (query, *beside)), by_name[answer])
    raise ATVError(
        f"{name} has the columns {', '.join(map(repr, there)) or '(none)'}; expected "
        f"{', '.join(f'{query} and {answer}' for query, answer in COLUMNS)}, or {MESSAGES}. Name yours with "
        "--input and --output."
    )


def _columns_of_queries(
    name: str, there: Sequence[str], input: str | None, output: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that make a query; and these with the answer's as `load_table` reads them, or () if it reads none."""
    if output is not None:
        both = _columns(name, there, input, output)
        return both[:-1], both
    query = query_columns(name, there, input)
    try:
        both = _columns(name, there, None, None)
    except ATVError:  # it says that no answers are recognised
        return query, ()
    return query, both if both[:-1] == query else ()


def _perhaps_answered(
    where: str, row: Row, query: Sequence[str], both: Sequence[str], classes: Mapping[str, list[str]]
) -> Example:
    """A row as an example, without an answer if the row has none that `load_table` reads."""
    if both:
        try:
            return _example(where, row, both, classes)
        except ATVError:  # of the answer; if it is of the query, the next line raises it again
            pass
    return query_of(where, row, query)


def _examples(
    where: str, rows: Sequence[Row], columns: Sequence[str], classes: Mapping[str, list[str]], dropped: Counter[str]
) -> list[Example]:
    """Rows as examples, without those that have an empty cell."""
    examples = []
    for number, row in enumerate(rows):
        example = _example(f"{where} row {number}", row, columns, classes)
        if example.input and example.output:
            examples.append(example)
        else:
            dropped["with an empty cell"] += 1
    return examples


def _example(where: str, row: Row, columns: Sequence[str], classes: Mapping[str, list[str]]) -> Example:
    """A row as an example, whose input or output is empty if the row has none."""
    if any(isinstance(row.get(column), list) for column in columns):
        return _conversation(where, row, columns)
    *query, answer = (_text(where, column, row.get(column), classes) for column in columns)
    return Example(_joined(query), answer)


def _joined(query: Sequence[str]) -> str:
    """An instruction and its input, which may be empty."""
    return "\n".join(part for part in query if part) if query[0] else ""


def _conversation(where: str, row: Row, columns: Sequence[str]) -> Example:
    cells = {column: row.get(column) for column in columns}
    return example_of(
        where, [t for column, cell in cells.items() if cell is not None for t in turns_of(where, column, cell)]
    )


def query_columns(
    name: str, there: Sequence[str], input: str | None = None, trained: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The columns that make a query, of a table whose answers are not known.

    Args:
        name: of the table in errors.
        there: its columns.
        input: the column; by default those of training, or recognised.
        trained: columns of the table that an adapter was trained on (`QUERY_COLUMNS`). If the first of them is not
            there, what is recognised is taken in their place, and logged.

    Raises:
        ATVError: it is not there, or none is recognised; or several are, and those of training are not there.
    """
    if input is not None:
        return _columns(name, there, input, input)[:1]
    recognised = _recognised_queries(there)
    if trained and (trained[0] in there or recognised):
        return _as_in_training(name, there, trained, recognised)
    if not recognised:
        was = f" The adapter was trained on {_named(trained)}." if trained else ""
        raise ATVError(
            f"{name} has the columns {', '.join(map(repr, there)) or '(none)'}; expected {MESSAGES}, "
            f"{', '.join(query for query, _ in COLUMNS)}. Name yours with --input.{was}"
        )
    return recognised[0]


def _as_in_training(
    name: str, there: Sequence[str], trained: Sequence[str], recognised: Sequence[tuple[str, ...]]
) -> tuple[str, ...]:
    """The columns of training that are there, or the only ones that are recognised in their place."""
    if trained[0] in there:
        found = tuple(column for column in trained if column in there)
        if found != tuple(trained):
            log_once(f"{name}: queries are read from {_named(found)}; in training from {_named(trained)}.")
        elif recognised and recognised[0] != found:
            log_once(f"{name}: queries are read from {_named(found)}, as in training.", logging.INFO)
        return found
    if len(recognised) > 1:
        raise ATVError(
            f"{name} has no column {trained[0]!r}, from which queries were read in training, and several others that "
            f"may hold them: {', '.join(repr(columns[0]) for columns in recognised)}. Name one with --input."
        )
    log_once(
        f"{name}: queries are read from {_named(recognised[0])}; in training from {_named(trained)}, which is missing."
    )
    return recognised[0]


def _named(columns: Sequence[str]) -> str:
    return " and ".join(map(repr, columns))


def _recognised_queries(there: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns that may make a query: first those that are recognised with their answer, as `load_table` does."""
    by_name = {column.strip().lower(): column for column in there}
    both = [query for query, answer in COLUMNS if query in by_name and answer in by_name]
    found: dict[str, tuple[str, ...]] = {}
    for query in (MESSAGES, *both, *(query for query, _ in COLUMNS)):
        if query in by_name and query not in found and not (query == "input" and "instruction" in found):
            beside = ["input"] if query == "instruction" and "input" in by_name else []
            found[query] = tuple(by_name[column] for column in (query, *beside))
    return list(found.values())


def query_of(where: str, row: Row, columns: Sequence[str]) -> Example:
    """A row's query as an example without an answer; the input is empty if the row has none.

    Args:
        where: names the row in errors.
        row: the row.
        columns: from `query_columns`.

    Raises:
        ATVError: a cell is neither a text, a whole number nor a list of messages.
    """
    if any(isinstance(row.get(column), list) for column in columns):
        return _conversation(where, row, columns)._replace(output="")
    return Example(_joined([_text(where, column, row.get(column), {}) for column in columns]), "")


def _with_kwargs(name: str, rendering: Rendering, loaded: Loaded) -> Rendering:
    """The rendering with the options of the chat template that the rows have, which must be the same in all of them."""
    found = {
        json.dumps(row.get(KWARGS) or {}, sort_keys=True, default=str)
        for rows in loaded.splits.values()
        for row in rows
    }
    if rendering.template_kwargs != "{}" or found <= {"{}"}:
        return rendering
    if len(found) > 1:
        raise ATVError(
            f"{name} has rows with different {KWARGS} ({', '.join(sorted(found)[:3])}); expected the same in all rows, "
            "since answers are trained and scored alike after every prompt. Split the table, or give "
            "--chat-template-kwargs."
        )
    return replace(rendering, template_kwargs=found.pop())


def _class_name(where: str, column: str, value: Any, names: Sequence[str]) -> str:
    """The name of a class by its number; empty for -1, which the library `datasets` writes where it is unknown."""
    if value == -1:
        return ""
    if value not in range(len(names)):
        raise ATVError(
            f"{where} has {column} {value!r:.80}; expected the number of one of its {len(names)} classes, or -1 where "
            "the class is unknown."
        )
    return str(names[int(value)])


def _text(where: str, column: str, value: Any, classes: Mapping[str, list[str]]) -> str:
    """A cell as text without white space around it; empty if there is nothing in it."""
    if value is None:
        return ""
    if column in classes:
        return _class_name(where, column, value, classes[column])
    text = text_of(value)
    if text is None or column.strip().lower() == MESSAGES:
        expected = "a list of messages" if column.strip().lower() == MESSAGES else "a text or a whole number"
        raise ATVError(f"{where} has {column} {shown(value)}; expected {expected}.")
    return text.strip()


# ---- splits ----


def _split(
    name: str, found: Mapping[str, list[Example]], dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str]]:
    """Each input once, in all three splits; and the names of those that are drawn."""
    splits = _apart(found, dropped)
    drawn = [split for split in ("test", "valid") if split not in splits]
    for split in drawn:
        splits[split] = _draw(name, splits, split)
    return splits, drawn


def _split_like_answers(
    name: str, found: Mapping[str, list[Example]], dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str]]:
    """Like `_split` of the rows with an answer, with the other rows behind them where the table has them."""
    answered, counted = {split: [row for row in rows if row.output] for split, rows in found.items()}, Counter[str]()
    try:
        splits, drawn = _split(name, answered, counted)
    except ATVError:  # too few answers to draw from, so that no evaluation reads this table
        return _split(name, {s: [row._replace(output="") for row in rows] for s, rows in found.items()}, dropped)
    dropped.update(counted)
    known = {same(row.asked) for rows in answered.values() for row in rows}
    others = _apart({split: [row for row in rows if not row.output] for split, rows in found.items()}, dropped)
    for split, rows in others.items():
        new = [row for row in rows if same(row.asked) not in known]
        dropped["repeated"] += len(rows) - len(new)
        splits[split] = splits[split] + new
    return splits, drawn


def same(text: str) -> str:
    """What two inputs have in common that count as one: case, white space and the composition of accents aside."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _apart(found: Mapping[str, list[Example]], dropped: Counter[str]) -> dict[str, list[Example]]:
    """Each input once: the test rows keep theirs, then the validation rows, then the training rows."""
    seen: dict[str, tuple[str, str]] = {}
    apart: dict[str, list[Example]] = {}
    for split in (split for split in reversed(SPLITS) if split in found):
        apart[split] = []
        for example in found[split]:
            key = same(example.asked)
            if key not in seen:
                seen[key] = split, example.output
                apart[split].append(example)
            elif seen[key][0] != split:
                dropped[f"of {split} that are in {seen[key][0]}"] += 1
            else:
                dropped["repeated" if seen[key][1] == example.output else "repeated with another answer"] += 1
    return apart


def _draw(name: str, splits: dict[str, list[Example]], split: str) -> list[Example]:
    """Take rows of a missing split from the training rows, as many of each answer as its share."""
    rows = splits.get("train", [])
    share, most = DRAWN[split]
    count = min(most, round(share * len(rows)))
    if count < 1:
        raise ATVError(f"{name} has no {split} split, and {len(rows)} training rows are too few to draw one from.")
    order = random.Random(f"{SEED} {split}")
    by_answer: dict[str, list[int]] = {}
    for index in order.sample(range(len(rows)), len(rows)):
        by_answer.setdefault(rows[index].output, []).append(index)
    # The i-th of n rows of an answer comes at (i + u) / n: any beginning of this order has each answer's share. Each
    # answer has a random u of its own, so that an answer with few rows is neither always drawn nor never.
    places: dict[int, float] = {}
    for of in by_answer.values():
        start = order.random()
        places |= {index: (i + start) / len(of) for i, index in enumerate(of)}
    taken = set(sorted(places, key=places.__getitem__)[:count])
    splits["train"] = [row for index, row in enumerate(rows) if index not in taken]
    return [rows[index] for index in sorted(taken)]
