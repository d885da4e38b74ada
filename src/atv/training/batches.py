"""What a training step reads: encoded rows, which templates they are asked with, and in which order."""

import random
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from torch.utils.data import Dataset, Sampler

from atv.data import Task
from atv.data.collate import IGNORED, EncodedRow, Row

PADDING = -1
"""Stands in an order of row numbers for a row that counts for nothing."""


class Rows(Dataset[EncodedRow]):
    """Encoded training rows; with fewer templates per row than there are, each epoch takes the next ones in turn."""

    def __init__(self, rows: Sequence[EncodedRow], templates_per_row: int | None = None) -> None:
        self.rows = rows
        self.templates_per_row = templates_per_row
        self.epoch = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        """The row with the prompts that are its turn in this epoch; for `PADDING` a row without an answer."""
        if index == PADDING:
            row = self[0]
            return replace(row, pairs=[(prompt, [IGNORED]) for prompt, _ in row.pairs])
        row = self.rows[index]
        count = len(row.pairs)
        if self.templates_per_row is None or self.templates_per_row >= count:
            return row
        first = index + self.epoch * self.templates_per_row
        return replace(row, pairs=[row.pairs[(first + step) % count] for step in range(self.templates_per_row)])

    def of_epochs(self, epochs: int) -> Iterator[EncodedRow]:
        """The rows with the prompts that are asked in the first `epochs` epochs, as often as they are."""
        asked = copy(self)
        for asked.epoch in range(epochs):
            yield from (asked[index] for index in range(len(self)))


def training_rows(task: Task, split: str = "train", reads: str = "query") -> list[Row]:
    """A split's rows with every template and the answer prefix of training; `reads` as `Task.renderers` takes it."""
    renderers = task.training_renderers(reads)
    return [Row(example, renderers, task.name) for example in getattr(task, split)]


class Batches(Sampler[int]):
    """A new shuffle of all rows each epoch; it depends on the seed and `rows.epoch` alone.

    Rows are not grouped by length, though that would save padding: tasks differ in length, so that such a batch would
    hold one task alone, and each step would undo for the others what the step before it had learned.

    Args:
        rows: what is put in order.
        batch_size: rows per optimiser step.
        seed: of the shuffles.
        fill: make the last batch full with `PADDING`, so that it splits among processes as every other does.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, fill: bool = False) -> None:
        self.rows, self.seed = rows, seed
        self.padding = [PADDING] * (-len(rows) % batch_size if fill else 0)

    def __len__(self) -> int:
        """Number of rows, with those that fill the last batch."""
        return len(self.rows) + len(self.padding)

    def __iter__(self) -> Iterator[int]:
        """Row numbers in this epoch's order; the batch that is not full comes last."""
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {self.rows.epoch}").shuffle(order)
        return iter(order + self.padding)
