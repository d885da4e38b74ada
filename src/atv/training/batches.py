"""The data of a training step: encoded rows, their templates, and their order."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from torch.utils.data import Dataset, Sampler

from atv.data import Task
from atv.data.collate import IGNORED, EncodedRow, Row
from atv.data.taught import Taught
from atv.progress import log_once

FEW_OPTIONS = 20
"""With more options than this, unequal frequencies are the rule."""
IMBALANCED = 5
"""From this ratio of the frequencies of two answers on, the rare one may hardly be learned."""
PADDING = -1
"""Row number of a padding row, which does not count."""


class Rows(Dataset[EncodedRow]):
    """Encoded training rows; with fewer templates per row than there are, epochs use the next ones in turn."""

    def __init__(self, rows: Sequence[EncodedRow], templates_per_row: int | None = None) -> None:
        self.rows = rows
        self.templates_per_row = templates_per_row
        self.epoch = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        """Return the row with its prompts for this epoch; for `PADDING`, a row without an answer."""
        if index == PADDING:
            row = self[0]
            lesson = row.taught
            taught = None if lesson is None else Taught([], lesson.likeliest[:0], lesson.probabilities[:0])
            return replace(row, pairs=[(prompt, [IGNORED]) for prompt, _ in row.pairs], taught=taught)
        row = self.rows[index]
        count = len(row.pairs)
        if self.templates_per_row is None or self.templates_per_row >= count:
            return row
        first = index + self.epoch * self.templates_per_row
        return replace(row, pairs=[row.pairs[(first + step) % count] for step in range(self.templates_per_row)])

    def of_epochs(self, epochs: int) -> Iterator[EncodedRow]:
        """Yield the rows of each of the first `epochs` epochs, with their prompts."""
        asked = copy(self)
        for asked.epoch in range(epochs):
            yield from (asked[index] for index in range(len(self)))


def balanced_weights(answers: Sequence[str]) -> dict[str, float]:
    """Return the weight of each answer: rows / (answers x rows with it), so that the mean over all rows is 1."""
    counts = Counter(answers)
    return {answer: len(answers) / (len(counts) * count) for answer, count in counts.items()}


def note_imbalance(task: Task) -> None:
    """Log a warning if a task with few options, and no teacher, has training answers of very different frequency."""
    counts = Counter(row.output for row in task.train).most_common()
    (most, often), (least, rarely) = counts[0], counts[-1]
    if not task.taught and len(task.options) <= FEW_OPTIONS and often > IMBALANCED * rarely:
        log_once(
            f"{task.name}: {often} training rows have the answer {most!r} and {rarely} have {least!r}. If rare answers "
            "matter as much as frequent ones, train with --class-weights balanced."
        )


def training_rows(task: Task, split: str = "train", reads: str = "query") -> list[Row]:
    """Return a split's rows with every template and the answer prefix of training; `reads` as in `Task.renderers`."""
    renderers = task.training_renderers(reads)
    return [Row(example, renderers, task.name) for example in getattr(task, split)]


class Batches(Sampler[int]):
    """Shuffles all rows each epoch, depending only on the seed and `rows.epoch`.

    Rows are not grouped by length, although that would save padding: tasks differ in length, so a batch would contain a
    single task, and each step would undo what the previous one learned for the others.

    Args:
        rows: the rows to shuffle.
        batch_size: rows per optimiser step.
        seed: seed of the shuffles.
        fill: fill the last batch with `PADDING`, so that it can be split among processes like the others.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int, fill: bool = False) -> None:
        self.rows, self.seed = rows, seed
        self.padding = [PADDING] * (-len(rows) % batch_size if fill else 0)

    def __len__(self) -> int:
        """Number of rows, including those that fill the last batch."""
        return len(self.rows) + len(self.padding)

    def __iter__(self) -> Iterator[int]:
        """Iterate over row numbers in this epoch's order; an incomplete batch comes last."""
        order = list(range(len(self.rows)))
        random.Random(f"{self.seed} {self.rows.epoch}").shuffle(order)
        return iter(order + self.padding)
