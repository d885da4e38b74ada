"""Load tasks from a folder with one JSON file per task and `templates.json`.

`DIR/TASK.json` or `DIR/tasks/TASK.json` is `{"train": [...], "valid": [...], "test": [...]}` with rows
`{"input": text, "output": text}`, and optionally `"category": text` and `"answer_prefixes": [text, ...]`, in which null
means no prefix. `DIR/templates.json` maps a task's name to its templates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from atv.data.builtin import BUILTIN, builtin_task
from atv.data.render import Example
from atv.data.task import ANSWER_PREFIXES, SPLITS, Task, composed, not_text, text_of
from atv.errors import ATVError, unknown
from atv.files import local, read_json

TEMPLATES_FILE = "templates.json"


def _task_files(data: Path) -> dict[str, Path]:
    """Return the names of the tasks in a folder, in NFC, and their files."""
    if not data.is_dir():
        raise ATVError(
            f"No file or folder {data}; expected a CSV, TSV, JSONL, JSON or Parquet file, or a folder with TASK.json "
            f"files and {TEMPLATES_FILE}."
        )
    folder = data / "tasks" if (data / "tasks").is_dir() else data
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.json")):
        if file.name not in (TEMPLATES_FILE, "answer_prefixes.json"):
            name = composed(file.stem)
            if name in found:
                raise ATVError(
                    f"{folder} holds two files {name}.json, whose names differ only in how accents are composed; "
                    "rename one of them."
                )
            found[name] = file
    return found


def available_tasks(data: str | Path | None = None) -> list[str]:
    """Return the names of the tasks in a folder, or of the built-in tasks."""
    return list(BUILTIN) if data is None else sorted(_task_files(local(data)))


class Known(NamedTuple):
    """Category and templates of a known task, for folders that do not give them."""

    category: str
    templates: list[str]


def folder_tasks(
    names: Sequence[str] | None = None,
    data: str | Path | None = None,
    templates: Sequence[str] | None = None,
    known: Mapping[str, Known] | None = None,
) -> list[Task]:
    """Load tasks by name, without duplicates; all available ones if no name is given.

    Args:
        names: names of the tasks.
        data: folder of task files; None: the built-in tasks.
        templates: templates to use instead of the tasks' own.
        known: categories and templates of tasks whose folder does not give them.
    """
    wanted = [composed(name) for name in names] if names else available_tasks(data)
    if not wanted:
        raise ATVError(f"{data} holds no TASK.json; expected at least one.")
    return [load_task(name, data, templates, known) for name in dict.fromkeys(wanted)]


def load_task(
    name: str,
    data: str | Path | None = None,
    templates: Sequence[str] | None = None,
    known: Mapping[str, Known] | None = None,
) -> Task:
    """Load one task, with the arguments of `folder_tasks`; ATVError says what is wrong with its file."""
    name, folder = composed(name), None if data is None else local(data)
    files = None if folder is None else _task_files(folder)
    there = BUILTIN if files is None else files
    if name not in there:
        where = "Give --data DIR for your own tasks." if folder is None else f"Tasks are the JSON files in {folder}."
        raise unknown("task", name, there, where)
    if folder is None or files is None:
        task = builtin_task(name)
        return replace(task, templates=tuple(templates)) if templates else task
    about = (known or {}).get(name)
    file = files[name]
    found = read_json(file, 'an object {"train": [...], "valid": [...], "test": [...]}')
    if not isinstance(found, dict):
        raise ATVError(f"{file} holds a JSON {type(found).__name__}; expected an object with {', '.join(SPLITS)}.")
    splits: dict[str, Any] = {split: _rows(found.get(split), split, file) for split in SPLITS}
    category = found.get("category", about.category if about else "other")
    if not isinstance(category, str) or not category.strip():
        raise ATVError(f"{file} has category {category!r}; expected some text, or no category.")
    prefixes = found.get("answer_prefixes", list(ANSWER_PREFIXES))
    if not isinstance(prefixes, list) or not all(prefix is None or isinstance(prefix, str) for prefix in prefixes):
        raise ATVError(f'{file} has answer_prefixes {prefixes!r}; expected a list such as ["A:"], or [null] for none.')
    return Task(
        name,
        tuple(templates or _templates(name, folder, about)),
        **splits,
        category=category,
        answer_prefixes=tuple(prefixes),
    )


def _rows(rows: Any, split: str, file: Path) -> tuple[Example, ...]:
    if not isinstance(rows, list) or not rows:
        what = "missing" if rows is None else "empty" if rows == [] else f"a JSON {type(rows).__name__}"
        raise ATVError(f"{file}: the split {split!r} is {what}; expected a list of rows.")
    examples = []
    for index, row in enumerate(rows):
        texts = []
        for key in ("input", "output"):
            value = row.get(key) if isinstance(row, dict) else None
            text = text_of(value)
            if value is None or (text is not None and not text.strip()):
                raise ATVError(
                    f"{file}: {split} row {index} has {key} {value!r}; expected an object with input and output."
                )
            if text is None:
                raise not_text(f"{file}: {split} row {index}", key, value)
            texts.append(text)
        examples.append(Example(texts[0], texts[1].strip()))
    return tuple(examples)


def _templates(name: str, data: Path, about: Known | None) -> list[str]:
    file = data / TEMPLATES_FILE
    if about is not None and not file.exists():
        return about.templates
    found = read_json(file, "an object of task names, each with its templates (or give --template three times)")
    if about is not None and isinstance(found, dict) and name not in found:
        return about.templates
    listed = {composed(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    templates = listed.get(name)
    if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
        raise ATVError(f"{file} has no list of templates for {name}; add one, or give --template three times.")
    return templates
