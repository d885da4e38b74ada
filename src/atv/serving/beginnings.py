"""Beginnings that prompts share, such as a chat's system prompt, read once and kept for later requests.

Only tokens before the first edited one are kept. Their keys and values are those of the unsteered LLM, so requests with
different adapters, and without one, share them.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from atv.data.collate import left_padded
from atv.lm.hooks import input_device
from atv.lm.prefix import counts_positions, full_sides, read_prefix
from atv.lm.prefix_tree import common

LEAST = 16
"""Fewer shared tokens than this are not worth a call of the LLM."""
RECENT = 64
"""Number of recent prompts that a new one is compared with."""
MOST = 64
"""Most beginnings that are kept."""

State = TypeVar("State")
Sides = list[tuple[Tensor, Tensor]]
"""Each layer's keys and values, (1, heads, seq, head width)."""


class Kept(NamedTuple, Generic[State]):
    """A beginning that was read."""

    ids: tuple[int, ...]
    state: State
    """Its keys and values, in the form that the engine has them."""


class Beginnings(ABC, Generic[State]):
    """Beginnings that occurred in at least two prompts.

    Args:
        limit: most bytes of keys and values that are kept; the least recently used beginning is dropped first.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._recent: deque[tuple[int, ...]] = deque(maxlen=RECENT)
        self._kept: list[Kept[State]] = []  # the least recently used first
        self.reused_tokens = 0
        """Number of prompt tokens that were not read again."""

    @property
    def bytes(self) -> int:
        """Memory of what is kept."""
        return sum(self._bytes(kept.state) for kept in self._kept)

    def of(self, prompts: Sequence[tuple[Sequence[int], int]]) -> list[State | None]:
        """Return the known state of each prompt's beginning, reading those that have become common.

        Args:
            prompts: token ids, and the number of tokens at their beginning that no edit can change.
        """
        if not self._limit:
            return [None] * len(prompts)
        found: list[State | None] = []
        try:
            for ids, clean in prompts:
                found.append(self._of(tuple(ids), clean, prompts))
        except BaseException:
            for state in found:
                if state is not None:
                    self._drop(state)
            raise
        self._recent.extend(tuple(ids) for ids, _ in prompts)
        while self.bytes > self._limit or len(self._kept) > MOST:
            self._drop(self._kept.pop(0).state)
        return found

    def _of(self, ids: tuple[int, ...], clean: int, beside: Sequence[tuple[Sequence[int], int]]) -> State | None:
        if clean < LEAST:
            return None
        others = [*self._recent, *(tuple(other) for other, _ in beside)]
        others.remove(ids)  # itself, among those beside it
        common = min(clean, max((_common(ids, other) for other in others), default=0))
        lengths = [min(clean, _common(ids, kept.ids)) for kept in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        known = 0 if best is None else lengths[best]
        if common >= known + LEAST:
            state = self._read(ids[:common])
            if state is None:
                self._limit = 0
                return None
            shorter = [kept for kept in self._kept if kept.ids == ids[:common][: len(kept.ids)]]
            for kept in shorter:
                self._kept.remove(kept)
                self._drop(kept.state)
            used, known = Kept(ids[:common], state), common
        elif best is not None and known >= LEAST:
            used = self._kept.pop(best)
            self.reused_tokens += known
        else:
            return None
        self._kept.append(used)
        return self._take(used, known)

    @abstractmethod
    def _read(self, ids: tuple[int, ...]) -> State | None:
        """Read a beginning. None: this LLM has more than keys and values, and none can be kept."""

    @abstractmethod
    def _take(self, kept: Kept[State], count: int) -> State:
        """Return the state of the first `count` tokens, which must outlive `kept`."""

    @abstractmethod
    def _bytes(self, state: State) -> int:
        """Return its memory."""

    @abstractmethod
    def _drop(self, state: State) -> None:
        """Free its memory."""


class CachedBeginnings(Beginnings[Sides]):
    """Beginnings as keys and values of a transformers model.

    An LLM with a sliding window, without `position_ids`, or with a state other than keys and values keeps none.

    Args:
        llm: the frozen LLM.
        limit: most bytes of keys and values that are kept.
    """

    def __init__(self, llm: nn.Module, limit: int) -> None:
        super().__init__(limit if counts_positions(llm) else 0)
        self._llm = llm

    def _read(self, ids: tuple[int, ...]) -> Sides | None:
        device = input_device(self._llm)
        inputs = {name: value.to(device) for name, value in left_padded([ids], 0).items()}
        cache = read_prefix(self._llm, **inputs)
        sides = full_sides(cache, len(ids))
        slides = any(layer.is_sliding for layer in getattr(cache, "layers", ()))
        return None if slides else sides

    def _take(self, kept: Kept[Sides], count: int) -> Sides:
        return [(keys[:, :, :count], values[:, :, :count]) for keys, values in kept.state]

    def _bytes(self, state: Sides) -> int:
        return sum(side.nbytes for pair in state for side in pair)

    def _drop(self, state: Sides) -> None:
        del state


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of equal tokens at the beginning."""
    return common(one, other) if one[:LEAST] == other[:LEAST] else 0


def right_aligned(rows: Sequence[Sides | None]) -> tuple[Sides, int]:
    """Return the rows' keys and values as a batch, zeros where a row has fewer, and its number of columns.

    Args:
        rows: each row's layers; None: it has no known beginning.
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
