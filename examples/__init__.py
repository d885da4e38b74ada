"""Examples: data sets, and for each one the commands that train on it and measure the result (docs/examples.md)."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = {"test": 60, "valid": 40}
"""Rows of the splits of a prompt distillation, whose queries have no answers by which `atv` could stratify a draw."""


def write_lines(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write(rows: Sequence[Row], **prompts: str) -> None:
    """Write the file that the command line names.

    Args:
        rows: written as JSON lines; if there are system prompts, as JSON with the splits train, valid and test.
        prompts: system prompts by name, each written to a text file beside it: NAME.txt.
    """
    file = Path(sys.argv[1])
    if not prompts:
        write_lines(file, rows)
        return
    left, splits = random.Random(7).sample(list(rows), len(rows)), {}
    for split, count in SPLITS.items():
        splits[split], left = left[:count], left[count:]
    file.write_text(json.dumps({"train": left} | splits, ensure_ascii=False, indent=1), encoding="utf-8")
    for name, prompt in prompts.items():
        file.with_name(f"{name}.txt").write_text(prompt + "\n", encoding="utf-8")
