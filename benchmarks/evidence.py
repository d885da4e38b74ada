"""Make the figures of the documentation again: run the commands that its pages mark as their evidence.

A line `<!-- evidence -->` before a fenced block of shell commands or Python marks it. Each page has a folder in
`runs/evidence`, where its commands run, its blocks with a title are written, and files of `--data` that they name are
found; `DATA` in a command stands for that folder. What has been run is skipped, and what was interrupted resumes as far
as its commands do. `docs/results/evidence.json` records seconds, versions and commit. What a Python block prints must
be what the page shows.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

from atv.files import write_json, write_text
from atv.progress import log
from atv.provenance import provenance

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "evidence.json"
MARK = "<!-- evidence -->"
FENCED = re.compile(
    r"(?P<marks>(?:^<!-- [^\n]+ -->\n)*)^```(?P<language>\w+)(?P<about>[^\n]*)\n(?P<text>.*?)\n```$", re.M | re.S
)
DATA = re.compile(r"\bDATA\b")


class Step(NamedTuple):
    """A marked block."""

    page: str
    """Path from the root of the repository."""
    language: str
    text: str
    shows: str | None
    """For Python: the block of text after it."""
    files: Mapping[str, str]
    """Blocks with a title, of the whole page."""


def main(argv: Sequence[str] | None = None, root: Path = ROOT, record: Path = RECORD) -> int:
    """Run what is marked; return 1 if something failed."""
    parse = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=(__doc__ or "").split("\n")[0])
    parse.add_argument("--data", type=Path, help="folder of the paper's tasks; without it, what needs it is left out")
    parse.add_argument("--page", action="append", help="only this page, such as README.md; repeatable")
    parse.add_argument("--list", action="store_true", help="only show what would be run")
    parse.add_argument("--force", action="store_true", help="run again what has been run")
    given = parse.parse_args(argv)
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    steps = [step for page in pages for step in marked(page, root)]
    unknown = set(given.page or ()) - {step.page for step in steps}
    if unknown:
        parse.error(f"--page {min(unknown)} marks no evidence; known: {', '.join(sorted({s.page for s in steps}))}")
    marked_now = {(step.page, step.text) for step in steps}
    steps = [step for step in steps if given.page is None or step.page in given.page]
    places = {step.page: root / "runs" / "evidence" / step.page.removesuffix(".md").replace("/", "-") for step in steps}
    there = {page for page, folder in places.items() if folder.is_dir()}  # before the first step of a page makes it
    failed = 0
    for number, step in enumerate(steps, 1):
        what = f"{number} of {len(steps)}, {step.page}: {step.text.splitlines()[0]}"
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
        if given.data is None and needs_data(step):
            log.info(f"{what}: left out, it needs --data")
        elif step.page in there and not given.force and any(_same(entry, step) for entry in known):
            log.info(f"{what}: has been run")
        else:
            log.info(what)
            found = None if given.list else run(step, places[step.page], given.data)
            if found is None:
                failed += not given.list
                continue
            others = [entry for entry in known if not _same(entry, step)]
            others = [entry for entry in others if (entry["page"], entry["text"]) in marked_now]  # pages change
            write_json(record, sorted([*others, found], key=lambda entry: (entry["page"], entry["text"])))
    return int(failed > 0)


def marked(page: Path, root: Path) -> Iterator[Step]:
    """The marked blocks of a page."""
    blocks = list(FENCED.finditer(page.read_text(encoding="utf-8")))
    titles = [re.search(r'title="([^"]+)"', block["about"]) for block in blocks]
    files = {title[1]: block["text"] + "\n" for title, block in zip(titles, blocks, strict=True) if title}
    for block, after in zip_longest(blocks, blocks[1:]):
        if MARK in block["marks"]:
            shows = after["text"] if after is not None and after["language"] == "text" else None
            name = page.relative_to(root).as_posix()
            yield Step(name, block["language"], block["text"], shows if block["language"] == "python" else None, files)


def needs_data(step: Step) -> bool:
    """Whether a step names the paper's data: the folder, or a file of a task without one of the page's own."""
    return bool(DATA.search(step.text)) or any(name not in step.files for name in _tables(step))


def run(step: Step, folder: Path, data: Path | None) -> dict[str, Any] | None:
    """Run a block in a folder; return its record, or None if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in step.files.items():
        write_text(folder / name, text)
    for name in () if data is None else _tables(step):
        file = cast(Path, data).resolve() / "tasks" / name
        if file.is_file() and not (folder / name).exists():
            (folder / name).symlink_to(file)
    text = DATA.sub(str(data.resolve()) if data is not None else "DATA", step.text)
    command = ["bash", "-ec", text] if step.language == "sh" else [sys.executable, "-c", text]
    bins, path = Path(sys.executable).parent, os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path])),
    }
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False
    )
    seconds = round(time.perf_counter() - began, 1)
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        log.warning(f"It ended with {done.returncode}, after {seconds:.0f} s. What it printed: {folder / 'output.txt'}")
        return None
    if step.shows is not None and done.stdout.strip() != step.shows.strip():
        log.warning(f"{step.page} shows something else than what was printed: {folder / 'output.txt'}")
        return None
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"page": step.page, "text": step.text, "seconds": seconds, "date": date} | provenance()


def _tables(step: Step) -> list[str]:
    """The task files that commands name as their data, which other commands of the page do not write."""
    named = re.findall(r"--data (\S+\.json)\b", step.text) if step.language == "sh" else []
    return [name for name in dict.fromkeys(named) if not re.search(rf"examples\.\w+ {re.escape(name)}", step.text)]


def _same(entry: Mapping[str, Any], step: Step) -> bool:
    return (entry["page"], entry["text"]) == (step.page, step.text)


if __name__ == "__main__":
    sys.exit(main())
