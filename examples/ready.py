"""Make the ready adapters of a release: train, measure on test rows, write the model card, pack (docs/examples.md).

`python -m examples.ready FOLDER`. Each adapter becomes FOLDER/NAME.tar.gz. After an interruption, the same command
resumes. Further options, such as --llm, go to each training.
"""

import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from atv import artifact
from atv.cli.output import print_lines
from atv.errors import ATVError
from examples import Row, house_style, tickets, write_lines
from examples.distil import atv

LARGEST = 30 * 10**6
"""Bytes of a packed adapter."""


class Ready(NamedTuple):
    """An adapter to make."""

    rows: Callable[[], Sequence[Row]] | None
    """Its data; None: the built-in task of its name."""
    train: str
    """Options of the training."""
    eval: str
    """Options of the evaluation."""


ADAPTERS = {
    "sentiment": Ready(None, "--epochs 4", ""),
    "house_style": Ready(
        house_style.rows,
        "--positions answer --train-rows 160 --valid-rows 20 --epochs 4",
        "--metric exact_match --metric token_f1",
    ),
    "tickets": Ready(tickets.rows, "--positions answer --train-rows 100 --valid-rows 40 --epochs 5", ""),
}


def make(name: str, folder: Path, further: Sequence[str] = ()) -> Path:
    """Make one adapter and return its archive.

    Args:
        name: one of `ADAPTERS`.
        folder: folder of the archives; work in progress is in its subfolder `work`.
        further: options for the training.

    Raises:
        ATVError: the archive is larger than `LARGEST`.
    """
    ready, work = ADAPTERS[name], folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    if ready.rows is None:
        asked = ["--task", name]
    else:
        asked = ["--data", work / f"{name}.jsonl"]
        write_lines(work / f"{name}.jsonl", ready.rows())
    run, results = work / name, work / f"{name}-test"
    atv("train", *asked, *ready.train.split(), *further, "--out", run)
    atv("eval", *asked, *ready.eval.split(), "--adapter", run, "--out", results)
    atv("card", run, "--results", results, "--license", "apache-2.0", "--language", "en")
    archive = folder / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(artifact.locate(run), arcname=name)
    if (size := archive.stat().st_size) > LARGEST:
        raise ATVError(
            f"{archive} has {size:,} bytes; expected at most {LARGEST:,}. Train it with --expansion-rank 64."
        )
    return archive


if __name__ == "__main__":
    for each in ADAPTERS:
        made = make(each, Path(sys.argv[1]), sys.argv[2:])
        print_lines([f"{made}: {made.stat().st_size / 1e6:.1f} MB"])
