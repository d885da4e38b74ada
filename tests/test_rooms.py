"""Imports point down only. The rooms are those of CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "atv"
LEVELS = [
    ("floor", {"errors", "files", "processes", "progress", "provenance", "words"}),
    ("ground", {"config"}),
    ("data", {"data"}),
    ("lm", {"lm"}),
    (
        "idea",
        {"adapter", "artifact", "doctor", "expansion", "gate", "generator", "model", "steer", "vectors"}
        | {"vector_cache"},
    ),
    ("training", {"training"}),
    ("methods", {"methods"}),
    ("evaluation", {"evaluation"}),
    ("report", {"report"}),
    ("serving", {"serving", "integrations"}),
    ("paper", {"paper"}),
    ("cli", {"cli", "__main__"}),
]
LEVEL = {room: level for level, (_, rooms) in enumerate(LEVELS) for room in rooms}
# Inside a level nothing imports another room, but for these, each from a later step of the one path to an earlier.
WITHIN = {
    "files": {"errors"},
    "progress": {"processes"},
    "provenance": {"processes"},
    "expansion": {"gate"},
    "adapter": {"artifact", "expansion", "generator"},
    "vectors": {"adapter", "artifact", "expansion", "generator", "vector_cache"},
    "model": {"adapter", "artifact", "expansion", "gate", "generator", "steer", "vector_cache", "vectors"},
    "doctor": {"model", "steer"},
    "__main__": {"cli"},
}
NEVER = {"theory": {"methods", "model"}}  # statements about the paper's formulas, not about this code


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]  # types alone: not imported when the program runs
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert node.level == 0, f"{path}: relative import"
        rooms |= {name.split(".")[1] for name in names if name.startswith("atv.")}
    return {room for room in rooms if room in LEVEL}


FILES = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path):
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        below = LEVEL[other] < LEVEL[room]
        assert other not in NEVER.get(room, set()), f"{path.name} ({room}) imports {other}"
        assert below or other in WITHIN.get(room, set()), f"{path.name} ({room}) imports {other}"


def test_every_file_has_a_room():
    assert {room_of(path) for path in FILES} == set(LEVEL)


def test_reports_and_lists_of_tasks_load_no_torch():
    import subprocess
    import sys

    code = "import sys, atv, atv.report, atv.evaluation.records, atv.cli.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
