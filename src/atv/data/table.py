"""Tasks from tables: CSV, TSV, JSON lines, JSON and Parquet files, a folder with one of these per split, the hub.

`atv.data.rows` reads text files, `atv.data.columns` recognises columns, and `atv.data.splits` draws missing splits.
Parquet files, data sets of the hub and `datasets` objects carry types and names of classes of their own.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from atv.data.columns import answered_columns, columns_of_queries, examples_of, perhaps_answered
from atv.data.render import INPUT, Example
from atv.data.rendering import Rendering
from atv.data.rows import SUFFIXES, Row, class_names, load_json, objects, read_rows, suffix_of
from atv.data.splits import SEED, split_like_answers, split_rows
from atv.data.task import DRAWN_TEST, QUERY_COLUMNS, SPLITS, Task, composed
from atv.errors import ATVError
from atv.files import local
from atv.progress import log

HUB = "hub:"
"""Begins the name of a data set of the hub: hub:ORG/NAME or hub:ORG/NAME:CONFIG."""
SPLIT_NAMES = {name: split for split, names in {
    "train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)
}.items() for name in names}  # fmt: skip
"""Names that files and data sets have for the three splits."""
KWARGS = "chat_template_kwargs"
"""Column of the options of the LLM's chat template."""


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
        input: column of the queries; by default recognised (`atv.data.columns.COLUMNS`).
        output: column of the answers; likewise.
        templates: with {input}; by default the query alone.
        rendering: how prompts are written. Default: in the LLM's chat template if it has one, else as plain text. If it
            has no options of the chat template, those of the column `chat_template_kwargs` are used.

    Raises:
        ATVError: it cannot be read, its columns are not recognised, a cell is no text, or too few rows are left.
    """
    name, loaded = _read(data)
    columns = answered_columns(name, _keys(loaded), input, output)
    dropped: Counter[str] = Counter()
    found = {
        split: examples_of(f"{name}: {split}", rows, columns, loaded.classes, dropped)
        for split, rows in loaded.splits.items()
    }
    splits, drawn = split_rows(name, found, dropped)
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
    query, both = columns_of_queries(name, _keys(loaded), input, output)
    dropped: Counter[str] = Counter()
    found: dict[str, list[Example]] = {}
    for split, rows in loaded.splits.items():
        examples = [
            perhaps_answered(f"{name}: {split} row {number}", row, query, both, loaded.classes)
            for number, row in enumerate(rows)
        ]
        found[split] = [example for example in examples if example.input]
        dropped["with an empty cell"] += len(examples) - len(found[split])
    splits, drawn = split_like_answers(name, found, dropped)
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


def _keys(loaded: Loaded) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(key for rows in loaded.splits.values() for row in rows for key in row))


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
