"""Beginnings that prompts share, such as a chat's system prompt, read once and kept for later requests.

Only tokens before the first edited one are kept. Their keys and values are those of the unsteered LLM, so requests with
different adapters, and without one, share them.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atv.data.collate import left_padded
from atv.lm.hooks import input_device
from atv.lm.prefix import counts_positions, full_sides, read_prefix

LEAST = 16
"""Fewer shared tokens than this are not worth a call of the LLM."""
RECENT = 64
"""Number of recent prompts that a new one is compared with."""

Sides = list[tuple[Tensor, Tensor]]
"""Each layer's keys and values, (1, heads, seq, head width)."""


class Kept(NamedTuple):
    """A beginning that was read."""

    ids: tuple[int, ...]
    sides: Sides


class Beginnings:
    """Keys and values of beginnings that occurred in at least two prompts.

    An LLM with a sliding window, without `position_ids`, or with a state other than keys and values keeps none.

    Args:
        llm: the frozen LLM.
        limit: most bytes of keys and values that are kept; the least recently used beginning is dropped first.
    """

    def __init__(self, llm: nn.Module, limit: int) -> None:
        self._llm, self._limit = llm, limit if counts_positions(llm) else 0
        self._recent: deque[tuple[int, ...]] = deque(maxlen=RECENT)
        self._kept: list[Kept] = []  # the least recently used first
        self.reused_tokens = 0
        """Number of prompt tokens that were not read again."""

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(side.nbytes for kept in self._kept for pair in kept.sides for side in pair)

    def of(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[Sides]:
        """Return the known keys and values of each prompt's beginning, reading those that have become common.

        Args:
            prompts: token ids, and the number of tokens at their beginning that no edit can change.

        Returns:
            For each prompt its layers' keys and values, possibly of 0 layers.
        """
        found = [self._of(tuple(ids), clean, prompts) for ids, clean in prompts] if self._limit else [[]] * len(prompts)
        self._recent.extend(tuple(ids) for ids, _ in prompts)
        while self.bytes > self._limit:
            self._kept.pop(0)
        return found

    def _of(self, ids: tuple[int, ...], clean: int, beside: Sequence[tuple[Sequence[int], int]]) -> Sides:
        if clean < LEAST:
            return []
        others = [*self._recent, *(tuple(other) for other, _ in beside)]
        others.remove(ids)  # itself, among those beside it
        common = min(clean, max((_common(ids, other) for other in others), default=0))
        lengths = [min(clean, _common(ids, kept.ids)) for kept in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        known = 0 if best is None else lengths[best]
        if common >= known + LEAST:
            kept = self._read(ids[:common])
            if kept is None:
                return []
            known = common
        elif best is not None and known >= LEAST:
            kept = self._kept.pop(best)
            self.reused_tokens += known
        else:
            return []
        self._kept.append(kept)
        return [(keys[:, :, :known], values[:, :, :known]) for keys, values in kept.sides]

    def _read(self, ids: tuple[int, ...]) -> Kept | None:
        device = input_device(self._llm)
        inputs = {name: value.to(device) for name, value in left_padded([ids], 0).items()}
        cache = read_prefix(self._llm, **inputs)
        sides = full_sides(cache, len(ids))
        if sides is None or any(layer.is_sliding for layer in cache.layers):
            self._limit = 0  # this LLM's cache contains something else
            return None
        self._kept = [kept for kept in self._kept if kept.ids != ids[: len(kept.ids)]]
        return Kept(ids, sides)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    if one[:LEAST] != other[:LEAST]:
        return 0
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))


def right_aligned(rows: Sequence[Sides]) -> tuple[Sides, int]:
    """Return the rows' keys and values as a batch, zeros where a row has fewer, and its number of columns.

    Args:
        rows: each row's layers, possibly of 0 layers.
    """
    width = max((sides[0][0].shape[2] for sides in rows if sides), default=0)
    if not width:
        return [], 0
    like = next(sides for sides in rows if sides)
    return (
        [
            tuple(  # type: ignore[misc]
                torch.cat(
                    [_padded(sides[layer][side] if sides else like[layer][side][:, :, :0], width) for sides in rows]
                )
                for side in (0, 1)
            )
            for layer in range(len(like))
        ],
        width,
    )


def _padded(side: Tensor, width: int) -> Tensor:
    return nn.functional.pad(side, (0, 0, width - side.shape[2], 0))
