"""Prompts as a tree of shared beginnings, each of which the LLM needs to read only once.

Templates that begin with the input, system prompts and demonstrations all make prompts that begin alike. A piece is
what a prompt, or a beginning that several prompts share, adds to the piece before it.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import groupby

Ids = tuple[int, ...]
LEAST = 8
"""Fewer shared tokens than this are not worth a piece of their own."""
COPIED = 4
"""What comes before a batch's pieces is copied for each of them, which bounds the batch as well."""


def tree(prompts: Set[Ids], least: int | None = None) -> dict[Ids, int]:
    """Return the pieces of prompts: the tokens up to a piece's end, and the number of tokens before its start.

    Those before its start are a piece, too, unless there are none. Every prompt is the end of a piece. The pieces
    depend only on the set of prompts.

    Args:
        prompts: token ids, none empty.
        least: fewer shared tokens than this are read again with each prompt; by default `LEAST`.
    """
    least = LEAST if least is None else least
    starts: dict[Ids, int] = {}
    groups = [(sorted(prompts), 0)] if prompts else []
    while groups:
        group, start = groups.pop()
        same = common(group[0], group[-1])  # of the first and the last in order, and so of all
        if len(group) > 1 and same - start >= least:
            starts[group[0][:same]] = start
            start = same
        if len(group[0]) == same and start < same:  # ends where the others go on
            starts[group[0]] = start
        longer = group[len(group[0]) == same :]
        groups += [(list(part), start) for _, part in groupby(longer, key=lambda ids: ids[same])]
    return starts


def pieces_of(ids: Ids, starts: Mapping[Ids, int]) -> list[Ids]:
    """Return the pieces of a prompt or piece, the first one first, each as the tokens up to its end."""
    found = [ids]
    while (start := starts[found[-1]]) > 0:
        found.append(ids[:start])
    return found[::-1]


def batches(starts: Mapping[Ids, int], tokens: int) -> Iterator[list[Ids]]:
    """Yield pieces in batches to read together, each after the piece before it; they depend only on `starts`.

    Pieces that follow those of one batch come right after it, so that what does not fit in memory are whole prompts.

    Args:
        starts: from `tree`.
        tokens: most new tokens in a batch, padding included; with the tokens before them, `COPIED` times as many.
    """
    after: dict[Ids, list[Ids]] = {}
    for ids, start in starts.items():
        after.setdefault(ids[:start], []).append(ids)
    for first in _like_lengths(after.get((), []), starts, tokens):
        level = first
        yield first
        while level := [ids for before in level for ids in after.get(before, [])]:
            yield from _like_lengths(level, starts, tokens)


def _like_lengths(pieces: list[Ids], starts: Mapping[Ids, int], tokens: int) -> Iterator[list[Ids]]:
    """Yield batches of pieces of like lengths."""
    batch: list[Ids] = []
    before = 0
    for ids in sorted(pieces, key=lambda ids: (len(ids) - starts[ids], starts[ids], ids)):
        size, longest = len(batch) + 1, max(before, starts[ids])
        new = len(ids) - starts[ids]
        if batch and (size * new > tokens or size * (new + longest) > COPIED * tokens):
            yield batch
            batch, longest = [], starts[ids]
        batch.append(ids)
        before = longest
    if batch:
        yield batch


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
