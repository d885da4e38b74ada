"""Read the documentation: its fenced blocks, links and the commands in it, and run what it shows.

A fence says its language: `python`, `sh`, `json`, `toml`, `yaml`, or `text` for what is no code (a drawing, an
output). A `title="FILE"` makes the block that file, for the blocks after it. `<!-- not run: WHY -->` on the line before
a fence leaves a block out; tests/test_docs.py counts these.
"""

import ast
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from atv.cli import main
from atv.cli.app import app
from atv.cli.commands import TABLES
from atv.cli.config_file import ConfigFile
from atv.data import load_tasks
from atv.methods import METHODS
from atv.methods.settings import check_tables
from atv.paper.profiles import PROFILES
from atv.serving.schemas import Load

ROOT = Path(__file__).parents[1]


def all_commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The commands of a group and of the groups in it, with their names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def named(words: list[str]) -> str:
    """The command that words begin with."""
    return " ".join(words[:2] if words[0] == "paper" else words[:1])


COMMANDS = dict(all_commands(get_command(app)))
"""By their names, those of `atv paper` with both words."""
PARSERS = {"json": json.loads, "yaml": yaml.safe_load}
LANGUAGES = ("python", "sh", "json", "toml", "yaml", "text")
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FENCE = re.compile(r"^(?P<ticks>`{3,})(?P<language>[\w-]*)(?P<about>.*)$")
NEEDS_MORE = {"demo", "paper prepare", "paper reproduce", "paper sweep", "paper theory"}
"""Commands that need a network or minutes: their options are read, nothing is run. Nor is a page of a report drawn:
tests/test_page.py does that."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    run: bool

    def __str__(self) -> str:
        return f"{self.page} line {self.line}"


def pages() -> list[Path]:
    """Everything that a reader finds: the files beside the source, and docs/."""
    return [
        *(ROOT / name for name in ("README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
    ]


def blocks(page: str, markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines = [], markdown.split("\n")
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if fence is None:
            number += 1
            continue
        end = next((i for i in range(number + 1, len(lines)) if lines[i] == fence["ticks"]), None)
        assert end is not None, f"{page} line {number + 1}: the block is never closed"
        title = re.search(r'title="([^"]+)"', fence["about"])
        text = "\n".join(lines[number + 1 : end])
        run = not (number and NOT_RUN.fullmatch(lines[number - 1].strip()))
        found.append(Block(page, number + 1, fence["language"], title[1] if title else None, text, run))
        number = end + 1
    return found


def prose(markdown: str) -> str:
    """A page without its fenced blocks and comments."""
    kept, inside = [], ""
    for line in markdown.split("\n"):
        fence = FENCE.match(line)
        if inside:
            inside = "" if line == inside else inside
        elif fence:
            inside = fence["ticks"]
        else:
            kept.append(line)
    return re.sub(r"<!--.*?-->", "", "\n".join(kept), flags=re.DOTALL)


# ---- running a page ----


def run_page(found: list[Block], shell: bool, monkeypatch: Any) -> None:
    """Run a page's blocks in order, in the current folder; the python ones share their names.

    Args:
        found: the blocks.
        shell: run the commands that are cheap; else only look at their options.
        monkeypatch: pytest's.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    data = set()
    for block in found:
        assert block.language in LANGUAGES, f"{block}: a fence says one of {', '.join(LANGUAGES)}"
        if not block.run:
            continue
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        elif block.language == "sh":
            for command in commands(block.text):
                _check_command(command, block, shell, monkeypatch)
        elif block.language in PARSERS:
            PARSERS[block.language](block.text)
            data |= {Path(block.title).parent} if block.language == "json" and block.title else set()
        elif block.language == "toml":
            _check_toml(block)
    for folder in data:
        load_tasks(data=folder)


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, in words, without comments."""
    lines = text.replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _check_command(words: list[str], block: Block, run: bool, monkeypatch: Any) -> None:
    where = f"{block}: {shlex.join(words)}"
    if words[0] == "make":
        assert set(words[1:]) <= make_targets(), where
    elif words[0] == "atv":
        _check_atv(words[1:], where)
        if run and named(words[1:]) not in NEEDS_MORE and not words[-1].endswith(".html"):
            monkeypatch.setattr(sys, "argv", words)
            code: Any = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            assert not code, f"{where}: exit code {code}"
    elif words[0] == "echo":  # a text given to a command of ours
        assert words[2:4] == ["|", "atv"], where
        _check_atv(words[4:], where)
    elif words[0] == "torchrun":
        _check_atv(words[words.index("atv") + 1 :], where)
    elif "python" in words[:2]:
        _check_python(words, where)
    elif words[:2] == ["pip", "install"]:
        extras = {name for word in words for names in re.findall(r"\[(.+)\]", word) for name in names.split(",")}
        assert extras <= set(project()["optional-dependencies"]), where
    elif words[:2] == ["curl", "localhost:8000/v1/adapters"]:
        Load.model_validate_json(words[words.index("-d") + 1])
    else:
        assert words == ["source", ".venv/bin/activate"], f"{where}: not a command that this test knows"


def _check_python(words: list[str], where: str) -> None:
    """A module of benchmarks or examples, or a script of the soak, with options that it has."""
    if words[:2] == ["PYTHONPATH=tests", "python"]:
        known = set(re.findall(r'"(--[\w-]+)"', (ROOT / words[2]).read_text(encoding="utf-8")))
    else:
        assert words[1] == "-m", where
        known = _benchmark_options(words[2], where)
    assert set(flags(words)) <= known, where


def _check_atv(words: list[str], where: str) -> None:
    """The command line's own parser must accept it."""
    name = named(words)
    assert name in COMMANDS, where
    rest = words[len(name.split()) :]
    if "--config" in rest and not Path(rest[rest.index("--config") + 1]).exists():  # a command that is not run wrote it
        assert any(p.name == "config" for p in COMMANDS[name].params), where
        place = rest.index("--config")
        rest = rest[:place] + rest[place + 2 :]
    try:
        given = COMMANDS[name].make_context(name, rest).params
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__} {error}") from error
    methods = given.get("method") or []
    assert set([methods] if isinstance(methods, str) else methods) <= set(METHODS), where
    assert given.get("profile", "small") in PROFILES, where


def _check_toml(block: Block) -> None:
    """Accepted by what reads it: options of commands and settings of methods, in a table for each."""
    tomllib.loads(block.text)
    if block.title is None:
        return
    file = ConfigFile(Path(block.title), TABLES.values())
    check_tables(file.tables, file.file)
    for table in file.found:
        name = table.replace(".", " ")
        COMMANDS[name].make_context(name, ["--config", block.title])


def flags(words: list[str]) -> list[str]:
    """The options among words."""
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@cache
def make_targets() -> set[str]:
    """What `make` can be asked for."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@cache
def project() -> dict[str, Any]:
    """The project's table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _benchmark_options(module: str, where: str) -> set[str]:
    file = ROOT / f"{module.replace('.', '/')}.py"
    assert file.is_file(), where
    text = file.read_text(encoding="utf-8") + (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
    return {*re.findall(r'add_argument\("(--[\w-]+)"', text), "--help"}


# ---- what prose says ----


def wrong_mentions(page: str, markdown: str) -> list[str]:
    """Inline code that names a command, an option, a make target or a test that is not there."""
    return [f"{page}: `{code}`" for code in re.findall(r"`([^`]+)`", prose(markdown)) if not _is_there(code)]


def _is_there(code: str) -> bool:
    words = code.split()
    if words[:1] == ["make"] and len(words) == 2:
        return words[1] in make_targets()
    if words[:1] == ["atv"] and len(words) > 1 and re.match("[a-z]", words[1]):
        if words[1:] == ["paper"]:
            return True
        known = COMMANDS.get(named(words[1:]))
        return known is not None and set(flags(words)) <= {"--help", *(flag for p in known.params for flag in p.opts)}
    test = re.fullmatch(r"(test_\w+\.py)::(\w+)", code)
    return test is None or test[2] in tests_in(test[1])


@cache
def tests_in(file: str) -> set[str]:
    """Names of the tests in a file of tests/."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "name")}


# ---- links ----


def wrong_links(path: Path, markdown: str) -> list[str]:
    """Relative links of a page to a file or heading that is not there; other hosts are not asked."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(markdown)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        # The reference is made of docstrings when the site is built, which checks anchors into it.
        made = "docs/api/" in file.as_posix()
        if not file.exists() or (anchor and not made and anchor not in anchors(file)):
            wrong.append(f"{path.relative_to(ROOT)}: {target}")
    return wrong


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings that are the same on the site and on a code host."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(file.read_text(encoding="utf-8")), re.M):
        text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        on_site, on_host = re.sub(r"[-\s]+", "-", text), re.sub(r"\s", "-", text)
        found |= {on_site} if on_site == on_host else set()
    return found
