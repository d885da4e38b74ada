"""The columns of a table that make a query and its answer, recognised by name or given, and rows as examples."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from atv.data.conversation import example_of, turns_of
from atv.data.render import Example
from atv.data.rows import Row
from atv.data.task import shown, text_of
from atv.errors import ATVError
from atv.progress import log_once

COLUMNS = (("instruction", "output"), ("input", "output"), ("prompt", "completion"), ("text", "label"))
"""Columns that are recognised: the query's and the answer's. An instruction is followed by its input, if it has one."""
MESSAGES = "messages"
"""Column of a conversation, which is recognised first."""


def answered_columns(name: str, there: Sequence[str], input: str | None, output: str | None) -> tuple[str, ...]:
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


def columns_of_queries(
    name: str, there: Sequence[str], input: str | None, output: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that make a query; and these with the answer's as `load_table` reads them, or () if it reads none."""
    if output is not None:
        both = answered_columns(name, there, input, output)
        return both[:-1], both
    query = query_columns(name, there, input)
    try:
        both = answered_columns(name, there, None, None)
    except ATVError:  # it says that no answers are recognised
        return query, ()
    return query, both if both[:-1] == query else ()


def perhaps_answered(
    where: str, row: Row, query: Sequence[str], both: Sequence[str], classes: Mapping[str, list[str]]
) -> Example:
    """A row as an example, without an answer if the row has none that `load_table` reads."""
    if both:
        try:
            return _example(where, row, both, classes)
        except ATVError:  # of the answer; if it is of the query, the next line raises it again
            pass
    return query_of(where, row, query)


def examples_of(
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
        return answered_columns(name, there, input, input)[:1]
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
