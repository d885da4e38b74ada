"""Convert tokens to tensors, in the layout used throughout the library.

Prompts are padded on the left and answers on the right, so that the last prompt token is in the same column of every
row. Position ids are always explicit. The mask of the tokens that receive a vector is computed only here.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atv.config import Positions
from atv.data.render import Example, Renderer
from atv.data.taught import Taught

IGNORED = -100
"""Label where there is no answer token (the index that torch's cross-entropy ignores)."""


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, padded on `side` ("left" or "right"); return ids and mask, both (batch, seq) int64."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return ids, mask


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return positions (batch, seq) that count attended tokens from 0; padding gets position 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def edit_mask(attention_mask: Tensor, positions: Positions) -> Tensor:
    """Return the mask of the prompt tokens that receive a vector, (batch, seq) bool, for padding on either side."""
    attended = attention_mask.bool()
    if positions.prompt_tokens is None:
        return attended
    from_end = attended.flip(-1).cumsum(-1).flip(-1)  # 1 at the last attended token, 2 at the one before it, ...
    return attended & (from_end <= positions.prompt_tokens)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Return model inputs for encoded prompts: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq)."""
    ids, mask = pad(prompts, pad_id, "left")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}


def like_lengths(rows: Set[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield batches of rows in ascending order of length, with up to `tokens` tokens each, padding included.

    The batches depend only on the set of rows.
    """
    batch: list[tuple[int, ...]] = []
    for row in sorted(rows, key=lambda row: (len(row), row)):
        if batch and (len(batch) + 1) * len(row) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_id(tokenizer: Any) -> int:
    """Return an id for padding; its value does not matter, since padding is always masked."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


@dataclass(frozen=True)
class Row:
    """One training row: an example and its renderers; the prompts share the vector of its query."""

    example: Example
    renderers: tuple[Renderer, ...]
    task: str = ""
    """Name of its task, for methods that learn something per task."""


@dataclass(frozen=True)
class EncodedRow:
    """A `Row` as token ids: the generator's input, and pairs of prompt and answer."""

    query: list[int]
    pairs: list[tuple[list[int], list[int]]]
    judged: int = 1
    """How many of the answer's first tokens must be right for the answer to count as right (`Options.judged`)."""
    task: str = ""
    """Name of its task."""
    answer: str = ""
    """The answer as text."""
    cut: bool = False
    """Whether a query was cut to fit the LLM's context."""
    weight: float = 1.0
    """Factor of its loss in training (`TrainConfig.class_weights`)."""
    taught: Taught | None = None
    """A teacher's answer, which is that of all pairs. None: the answer was given."""


@dataclass
class Collator:
    """Collates encoded rows to the keyword arguments of `ATVModel.forward`.

    The last answer token predicts nothing, so the LLM does not read it: its input is prompt + answer[:-1], and the
    loss uses exactly the logits of the last `labels.shape[1]` columns.
    """

    positions: Positions
    pad_id: int
    query_pad_id: int
    tasks: Mapping[str, int] = field(default_factory=dict)
    """Number of each row's task, if the model needs it."""

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Return the tensors of one batch; each row is expanded to its prompts.

        Returns:
            `query_input_ids`, `query_attention_mask`: (queries, query seq);
            `query_tasks`: (queries,), if there are `tasks`;
            `input_ids`, `attention_mask`, `position_ids`, `edit_mask` (bool): (batch, seq);
            `labels`: (batch, answer), -100 where an answer is shorter.
        """
        queries, query_mask = pad([row.query for row in rows], self.query_pad_id, "right")
        pairs = [pair for row in rows for pair in row.pairs]
        prompt, prompt_mask = pad([prompt for prompt, _ in pairs], self.pad_id, "left")
        labels, answer_mask = pad([answer for _, answer in pairs], IGNORED, "right")  # (batch, answer)
        # An answer token is read if another one follows it: answer_mask[:, 1:], (batch, answer - 1).
        read_mask = answer_mask[:, 1:]
        read = labels[:, :-1].masked_fill(read_mask == 0, self.pad_id)
        attention = torch.cat([prompt_mask, read_mask], dim=1)  # (batch, seq)
        steered = read_mask.bool() & self.positions.answer
        known = {"query_tasks": torch.tensor([self.tasks[row.task] for row in rows])} if self.tasks else {}
        return known | {
            "query_input_ids": queries,
            "query_attention_mask": query_mask,
            "input_ids": torch.cat([prompt, read], dim=1),
            "attention_mask": attention,
            "position_ids": position_ids(attention),
            "edit_mask": torch.cat([edit_mask(prompt_mask, self.positions), steered], dim=1),
            "labels": labels,
        }


def split_by_length(batch: Mapping[str, Tensor], tokens: int) -> list[tuple[float, dict[str, Tensor]]]:
    """Split a batch into parts of answers of like lengths, so that the logits of a part need little memory.

    The mean of the parts' losses, weighted with their shares, is the loss of the batch up to rounding.

    Args:
        batch: from a `Collator`, possibly with further tensors of one value per prompt, and those of `stacked`.
        tokens: most answer tokens of a part, padding included; a row with more is a part of its own.

    Returns:
        Parts, each with its share of the rows; the batch itself if it is small enough.
    """
    labels = batch["labels"]
    if labels.numel() <= tokens:
        return [(1.0, dict(batch))]
    queries = len(batch["query_input_ids"])
    prompts = len(labels) // queries
    lengths = (labels != IGNORED).sum(1).view(queries, prompts).amax(1).clamp(min=1).tolist()
    groups: list[list[int]] = []
    for row in sorted(range(queries), key=lambda row: lengths[row]):
        if groups and (len(groups[-1]) + 1) * prompts * lengths[row] <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    parts = []
    for rows in groups:
        each = [row * prompts + place for row in rows for place in range(prompts)]
        longest = max(lengths[row] for row in rows)
        part = {name: tensor[rows if name.startswith("query_") else each] for name, tensor in batch.items()}
        end = part["input_ids"].shape[1] - (labels.shape[1] - longest)
        start = int(part["attention_mask"].any(0).int().argmax())
        for name in ("input_ids", "attention_mask", "position_ids", "edit_mask"):
            part[name] = part[name][:, start:end]
        for name in ("labels", "soft_ids", "soft_probabilities"):
            if name in part:
                part[name] = part[name][:, :longest]
        parts.append((len(rows) / queries, part))
    return parts
