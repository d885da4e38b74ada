"""A batch of prompts, each with its own adapter or none, read and decoded together in one LLM.

Rows may come and go between steps: `join` adds the rows of another batch, `keep` drops rows. Every row gets the edits
of its own adapter at its own tokens, and unsteered rows pass through unchanged.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from atv.config import Positions
from atv.data.collate import left_padded, position_ids
from atv.data.render import Prompt
from atv.lm.hooks import base_llm, edit_outputs, input_device
from atv.lm.prefix import as_cache, attention_alone, call_llm, full_sides
from atv.lm.spans import Span
from atv.model import ATVModel, ReadAndSteer
from atv.serving.beginnings import CachedBeginnings, Sides, right_aligned
from atv.steer import AddVectors, Edit


@dataclass(eq=False)
class Row:
    """A prompt in a batch."""

    prompt: Prompt
    model: ATVModel | None = None
    """The adapter that steers it; None: the plain LLM."""
    scale: float | None = None
    """Strength of its vectors; None: the adapter's own."""
    tokens: int = 0
    """Number of answer tokens read so far."""
    vectors: Tensor | None = None
    """(vectors, hidden), while later steps need them."""
    room: float = math.inf
    """Most columns of padding that a known beginning may put into its text."""
    padding: int = 0
    """Columns of padding between its known beginning and its other tokens."""

    @property
    def positions(self) -> Positions | None:
        """The edited tokens; None: none."""
        return None if self.model is None else self.model.positions

    @property
    def clean(self) -> int:
        """Number of tokens at the beginning that no edit can change, without the last one, whose logits are needed."""
        edited = 1 if self.positions is None else self.positions.prompt_tokens
        return 0 if edited is None else max(0, len(self.prompt.ids) - max(1, edited))


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a call that one edit changes."""

    rows: Tensor
    """(part,) their indices in the call, in ascending order."""
    edit: Edit
    span: Span
    """Of these rows alone."""

    @property
    def adds(self) -> bool:
        """Whether the edit adds a vector to the only token of each row."""
        own = type(self.edit) is AddVectors and len(self.edit.vectors) == len(self.rows)
        return own and self.span.where.shape[1] == 1 and bool(self.span.where.all())

    @cached_property
    def first(self) -> int:
        """The first column that the edit gets: adding needs no states of others, another edit may read them."""
        return self.span.first if type(self.edit) is AddVectors else 0

    @cached_property
    def given(self) -> Span:
        """The span of the columns that the edit gets."""
        return self.span.edited if self.first else self.span


class Mixed:
    """Applies several edits, each to its own rows, to the outputs of all their sites.

    Args:
        llm: the LLM, which gives the order of the sites.
        parts: the edits; rows in none of them are not changed.
    """

    def __init__(self, llm: nn.Module, parts: Sequence[Part]) -> None:
        at: dict[nn.Module, list[tuple[Part, int]]] = {}
        for part in parts:
            for site, module in enumerate(part.edit.sites):
                at.setdefault(module, []).append((part, site))
        self.sites = list(at) if len(parts) == 1 else [module for module in base_llm(llm).modules() if module in at]
        self._parts = [at[module] for module in self.sites]
        self._adds = all(part.adds for part in parts)
        self._sums: Sequence[Tensor] = ()  # of each site, (rows, 1, hidden), made in the first call

    def __call__(self, site: int, hidden: Tensor) -> Tensor:
        """Return hidden states (rows, seq, hidden) with the edits of all parts at this site."""
        if self._adds:
            self._sums = self._sums or self._added(len(hidden), torch.promote_types(hidden.dtype, torch.float32))
            return (hidden + self._sums[site].to(hidden.device)).to(hidden.dtype)
        edited = hidden
        for part, own in self._parts[site]:
            rows = part.rows.to(hidden.device)
            given = hidden[:, part.first :] if len(rows) == len(hidden) else hidden[rows, part.first :]
            changed = part.edit(own, given, part.given)
            if changed is given:
                continue
            if changed.shape == hidden.shape:
                return changed
            edited = hidden.clone() if edited is hidden else edited  # once for all parts: prompts are long
            edited[rows, part.first :] = changed
        return edited

    def _added(self, rows: int, dtype: torch.dtype) -> Sequence[Tensor]:
        """What a decoding step adds to each row: (rows, 1, hidden) for each site, one addition for all parts."""
        places: dict[Part, list[tuple[int, int]]] = {}
        for site, parts in enumerate(self._parts):
            for part, own in parts:
                places.setdefault(part, []).append((site, own))
        vectors = [cast(AddVectors, part.edit).vectors for part in places]
        sums = vectors[0].new_zeros(len(self.sites), rows, 1, vectors[0].shape[2], dtype=dtype)
        for (part, found), given in zip(places.items(), vectors, strict=True):
            sites, own = torch.tensor(found, device=given.device).T
            added = cast(AddVectors, part.edit).scale * given[:, own].to(dtype)
            sums[sites[:, None], part.rows.to(sums.device), 0] = added.transpose(0, 1).to(sums.device)
        return sums.unbind()


class Batch:
    """Rows of one LLM, which reads them to the same column.

    Args:
        llm: the frozen LLM, in eval mode.
        rows: at least one, none of which has been read.
        pad_id: token id of padding.
        beginnings: known keys and values of the prompts' beginnings.

    Attributes:
        rows: the rows, in the order of the tensors.
        logits: (rows, vocabulary) float32, on the CPU: the logits after the last column.
    """

    @torch.no_grad()
    def __init__(
        self, llm: nn.Module, rows: Sequence[Row], pad_id: int, beginnings: CachedBeginnings | None = None
    ) -> None:
        self._llm, self.rows = llm, list(rows)
        known = _known(rows, beginnings)
        sides, width = right_aligned(known)
        counts = [each[0][0].shape[2] if each else 0 for each in known]
        own = left_padded([row.prompt.ids[count:] for row, count in zip(rows, counts, strict=True)], pad_id)
        device = input_device(llm)
        # The columns of a row: padding, its known beginning, padding, its other tokens.
        before = torch.arange(width) >= width - torch.tensor(counts)[:, None]  # (rows, width)
        self._mask = torch.cat([before.long(), own["attention_mask"]], dim=1).to(device)
        self._ids = torch.nn.functional.pad(own["input_ids"], (width, 0), value=pad_id).to(device)
        self._read(self._ids.shape[1] - width, as_cache(sides) if width else None)

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> None:
        """Read one more token of each row."""
        self._ids = torch.cat([self._ids, self._ids.new_tensor(tokens)[:, None]], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        for row in self.rows:
            row.tokens += 1
        self._read(self._ids.shape[1] if self._cache is None else 1, self._cache)

    def _read(self, new: int, cache: Any) -> None:
        """Read the last `new` columns after those in the cache."""
        with self._steered(new):
            output = call_llm(
                self._llm,
                keep=1,
                input_ids=self._ids[:, -new:],
                attention_mask=self._mask,
                position_ids=position_ids(self._mask)[:, -new:],
                past_key_values=cache,
                use_cache=True,
            )
        found = getattr(output, "past_key_values", None)
        # Without keys and values alone, all columns are read at each step: slower, but right.
        self._cache = found if attention_alone(found) else None
        self.logits: Tensor = output.logits[:, -1].float().cpu()

    def _steered(self, new: int) -> AbstractContextManager[None]:
        """The context in which the last `new` columns are read with the rows' edits."""
        # A row's tokens end at the last column, so the place of each in its text follows from the row's length.
        lengths = self._mask.new_tensor([len(row.prompt.ids) for row in self.rows])[:, None]
        read = lengths + self._mask.new_tensor([row.tokens for row in self.rows])[:, None]
        place = read - torch.arange(new, 0, -1, device=read.device)  # (rows, new)
        there = self._mask[:, -new:].bool()
        groups: dict[tuple[int, float | None], list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.model is not None and (new > row.tokens or row.model.positions.answer):
                groups.setdefault((id(row.model), row.scale), []).append(index)
        parts = []
        for indices in groups.values():
            rows, first = torch.tensor(indices, device=place.device), self.rows[indices[0]]
            length, at, positions = lengths[rows], place[rows], first.positions
            assert first.model is not None
            assert positions is not None
            edited = 0 if positions.prompt_tokens is None else length - positions.prompt_tokens
            where = there[rows] & (at >= edited) & (positions.answer | (at < length))
            if not bool(where.any()):
                continue
            ends = length[:, 0] - read[rows, 0] - 1  # counted from the last column
            begins = bool((-ends <= new).all())
            parts.append(Part(rows, self._edit(indices, begins), Span(where, ends if begins else None)))
        if not parts:
            return nullcontext()
        mixed = Mixed(self._llm, parts)
        return edit_outputs(mixed.sites, mixed)  # not `steer`, which would look for the edited tokens again

    def _edit(self, indices: Sequence[int], begins: bool) -> Edit:
        """Return the edit of rows with one adapter and scale, whose prompts end in this call or (`begins`) did not."""
        rows = [self.rows[index] for index in indices]
        model, scale = rows[0].model, rows[0].scale
        assert model is not None
        if begins and rows[0].vectors is None:
            made = model.own_vectors([row.prompt.query for row in rows])
            if made is not None:
                for row, vectors in zip(rows, made, strict=True):
                    row.vectors = vectors
        vectors = [row.vectors for row in rows if row.vectors is not None]
        edit = model.edit(torch.stack(vectors) if vectors else None, scale)
        return _Keeping(edit, rows) if isinstance(edit, ReadAndSteer) else edit

    # ---- rows that come and go ----

    @property
    def joins(self) -> bool:
        """Whether rows of other batches can be added: keys and values of all columns, and no sliding window."""
        return self._sides() is not None

    def _sides(self) -> list[tuple[Tensor, Tensor]] | None:
        sides = full_sides(self._cache, self._ids.shape[1])
        slides = any(layer.is_sliding for layer in getattr(self._cache, "layers", ()))
        return None if slides else sides

    def join(self, other: Self) -> None:
        """Add the rows of another batch, which must not be used again; both must have `joins`."""
        pairs = [(batch, batch._sides()) for batch in (self, other)]
        width = max(batch._ids.shape[1] for batch, _ in pairs)
        padded = [
            [torch.nn.functional.pad(side, (0, 0, width - side.shape[2], 0)) for pair in sides or () for side in pair]
            for _, sides in pairs
        ]
        together = [torch.cat(both) for both in zip(*padded, strict=True)]
        ids, mask = (
            torch.cat(
                [
                    torch.nn.functional.pad(each, (width - each.shape[1], 0))
                    for each in (getattr(b, name) for b, _ in pairs)
                ]
            )
            for name in ("_ids", "_mask")
        )
        self.logits = torch.cat([self.logits, other.logits])
        # Nothing fails from here on: this batch is as it was, or has all rows.
        self._cache = as_cache(zip(together[::2], together[1::2], strict=True))
        self._ids, self._mask = ids, mask
        self.rows += other.rows

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order, and drop columns that are padding in all of them."""
        if list(indices) == list(range(len(self.rows))):
            return
        chosen = torch.tensor(indices, dtype=torch.long)  # on the CPU, since layers may be on several devices
        self.rows, self.logits = [self.rows[index] for index in indices], self.logits[list(indices)]
        self._ids, self._mask = self._ids[chosen], self._mask[chosen]
        if not indices or self._cache is None:
            return
        self._cache.batch_select_indices(chosen)
        sides = self._sides()
        unused = int(self._mask.any(0).long().argmax())
        if sides is not None and unused:
            self._ids, self._mask = self._ids[:, unused:], self._mask[:, unused:]
            self._cache = as_cache((keys[:, :, unused:], values[:, :, unused:]) for keys, values in sides)


def _known(rows: Sequence[Row], beginnings: CachedBeginnings | None) -> list[Sides | None]:
    """Return the cached beginnings of the rows' prompts and set each row's padding; no beginnings if one has no room.

    The other tokens of all rows begin in one column, so that those after a short known beginning may be far from it.
    """
    found: list[Sides | None] = [None] * len(rows)
    if beginnings is not None:
        found = beginnings.of([(row.prompt.ids, row.clean) for row in rows])
    others = [
        len(row.prompt.ids) - (sides[0][0].shape[2] if sides else 0) for row, sides in zip(rows, found, strict=True)
    ]
    for row, sides, count in zip(rows, found, others, strict=True):
        row.padding = max(others) - count if sides else 0
    if all(row.padding <= row.room for row in rows):
        return found
    for row in rows:
        row.padding = 0
    return [None] * len(rows)


class _Keeping:
    """The edit of the generator `self`, which gives its rows the vectors that it makes while their prompts are read."""

    def __init__(self, edit: ReadAndSteer, rows: Sequence[Row]) -> None:
        self._edit, self._rows = edit, rows
        self.sites, self.positions = edit.sites, edit.positions

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        found = self._edit(site, hidden, span)
        if site == 0 and span.ends is not None:
            for row, vectors in zip(self._rows, self._edit.edit.vectors, strict=True):
                row.vectors = vectors
        return found
