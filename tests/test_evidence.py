"""The figures of README have a record, and `make evidence` runs what pages mark, once, and says what failed."""

import json
import re

import pytest
from documents import ROOT, prose

from atv.data import load_tasks
from benchmarks import evidence

PAGE = """# A page

```toml title="made.toml"
[all]
epochs = 5
```

<!-- evidence -->
```sh
cat made.toml > copy.toml
echo once >> count.txt
```

```sh
touch unmarked
```

<!-- evidence -->
```python
print(6 * 7)
```

It prints:

```text
42
```
"""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Nothing\n")
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    return tmp_path


def made(place, *arguments):
    code = evidence.main(list(arguments), place, place / "evidence.json")
    record = place / "evidence.json"
    return code, json.loads(record.read_text()) if record.exists() else []


def test_marked_blocks_run_once_and_are_recorded(place):
    folder = place / "runs" / "evidence" / "docs-page"
    for _ in range(2):
        code, entries = made(place)
        assert code == 0
        assert [(entry["page"], entry["text"].splitlines()[0]) for entry in entries] == [
            ("docs/page.md", "cat made.toml > copy.toml"),
            ("docs/page.md", "print(6 * 7)"),
        ]
        assert (folder / "copy.toml").read_text() == "[all]\nepochs = 5\n"
        assert (folder / "count.txt").read_text() == "once\n"
        assert not (folder / "unmarked").exists()
    assert {"commit", "versions", "machine", "seconds", "date"} <= set(entries[0])
    made(place, "--force")
    assert (folder / "count.txt").read_text() == "once\nonce\n"


def test_a_changed_block_runs_again_and_replaces_its_record(place):
    made(place)
    (place / "docs" / "page.md").write_text(PAGE.replace("6 * 7", "7 * 6"))
    code, entries = made(place)
    assert code == 0
    assert [entry["text"] for entry in entries if "print" in entry["text"]] == ["print(7 * 6)"]
    assert (place / "runs" / "evidence" / "docs-page" / "count.txt").read_text() == "once\n"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("echo once", "false; echo once", "ended with 1"),
        ("6 * 7", "6 * 8", "shows something else than what was printed"),
    ],
)
def test_what_fails_is_said_and_the_rest_runs(place, capsys, before, after, said):
    (place / "docs" / "page.md").write_text(PAGE.replace(before, after))
    code, entries = made(place)
    assert (code, len(entries)) == (1, 1)
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_needs_data_is_left_out_or_finds_them(place, capsys):
    text = PAGE.replace("echo once", "ls DATA; true --data some.json; cat some.json; echo once")
    (place / "docs" / "page.md").write_text(text)
    code, entries = made(place)
    assert (code, len(entries)) == (0, 1)
    assert "it needs --data" in " ".join(capsys.readouterr().err.split())
    (place / "data" / "tasks").mkdir(parents=True)
    (place / "data" / "tasks" / "some.json").write_text("{}")
    code, entries = made(place, "--data", str(place / "data"))
    assert (code, len(entries)) == (0, 2)
    assert "tasks\n{}" in (place / "runs" / "evidence" / "docs-page" / "output.txt").read_text()


def test_an_unknown_page_is_refused_and_a_list_runs_nothing(place, capsys):
    with pytest.raises(SystemExit):
        made(place, "--page", "docs/none.md")
    assert "known: docs/page.md" in capsys.readouterr().err
    assert made(place, "--list") == (0, [])
    assert not (place / "runs").exists()


# ---- the README ----

WORDS = {
    "a": 1,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "fifteen": 15,
}
UNITS = "seconds|minutes?|hours?|percent|points|times|rows"
NAMES = (r"arxiv\S*", r"arXiv \d+\.\d+", r"Python 3\.\d+", r"Apache-2\.0")
"""Digits that measure nothing."""


def test_no_figure_of_readme_stands_without_a_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    steps = {
        step.page: step for page in ("README.md", "docs/results.md") for step in evidence.marked(ROOT / page, ROOT)
    }
    recorded = json.loads(evidence.RECORD.read_text(encoding="utf-8"))
    seconds = {
        page: next(entry["seconds"] for entry in recorded if (entry["page"], entry["text"]) == (page, step.text))
        for page, step in steps.items()
    }
    text = " ".join(prose(readme).split())
    (demo,) = re.findall(r"`make demo`[^.]*? in about (\w+) minutes on two CPU cores", text)
    (block,) = re.findall(r"This takes (\w+) minutes on two CPU cores and prints:", text)
    assert 0.75 < seconds["docs/results.md"] / 60 / WORDS[demo] < 1.33
    assert 0.75 < seconds["README.md"] / 60 / WORDS[block] < 1.33
    (rows,) = re.findall(r"a built-in task with (\d+) training rows", readme)
    (topic,) = load_tasks(["topic"])
    assert int(rows) == len(topic.train)
    assert steps["README.md"].shows is not None  # what a recorded block printed was compared with what is shown
    for name in NAMES:
        text = re.sub(name, "", text)
    assert not re.findall(r"\d+", text)
    assert len(re.findall(rf"\b(?:{'|'.join(WORDS)}) (?:{UNITS})\b", text)) == 2
