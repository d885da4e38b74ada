"""THE IDEA, second half: task vectors are added inside a frozen LLM while it reads the query's prompt (Eq. 6).

    with steer(llm, AddVectors(sites, vectors, scale, positions), Tracked(len(queries), positions)):
        llm.generate(**inputs)

An `Edit` changes hidden states at its sites; spans (`atv.lm.spans`) say at which tokens of a call. The LLM is not
modified: edits are forward hooks that are removed when the context ends, also by an exception.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from atv.config import Positions
from atv.errors import ATVError
from atv.lm.calls import Calls, around_methods, eager
from atv.lm.hooks import base_llm, edit_outputs, require_eval
from atv.lm.spans import GENERATES, Span, Spans


class Edit(Protocol):
    """A change to the hidden states that some modules of an LLM return."""

    @property
    def sites(self) -> Sequence[nn.Module]:
        """Modules that return hidden states (batch, seq, hidden), in order of execution."""

    @property
    def positions(self) -> Positions:
        """The edited tokens; prompt tokens before them may be read without the edit."""

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Return the edited hidden states (rows, seq, hidden) of `sites[site]`; `hidden` is not modified in place."""


class VectorEdit(Edit, Protocol):
    """An edit that uses each query's task vectors."""

    vectors_per_site: ClassVar[int]
    """Number of vectors per query that each site takes."""
    vectors: Tensor
    """(queries, sites * vectors_per_site, hidden)."""

    def __init__(self, sites: Sequence[nn.Module], vectors: Tensor, scale: float, positions: Positions) -> None: ...


@contextmanager
def steer(llm: nn.Module, edit: Edit, spans: Spans) -> Iterator[None]:
    """Apply `edit` in every call of the LLM inside this context.

    Contexts open in the same thread compose: all of their edits are applied. Each thread and asyncio task has its own
    contexts. A call from one that opened none, while another one steers the LLM, raises ATVError.

    Args:
        llm: the frozen LLM, or a PEFT model around it; set to eval mode.
        edit: the change to apply.
        spans: which tokens to edit: `Known`, `Lengths` or `Tracked`.
    """
    base = base_llm(llm)
    require_eval(llm)

    def edited(call: Mapping[str, Any]) -> AbstractContextManager[None] | None:
        span = spans(call)
        if spans.finished:  # the remaining steps of `generate` run the plain LLM, compiled or not
            calls.pause()
            steps.enter_context(eager.released())
        return None if span is None else edit_outputs(edit.sites, lambda site, hidden: edit(site, hidden, span))

    @contextmanager
    def generating(method: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        try:
            with spans.generating(base, method, arguments):
                yield
        finally:
            steps.close()
            calls.resume()

    steps = ExitStack()
    calls = Calls(base, edited, inner=next(iter(edit.sites), None))
    with eager(), calls.watched(), around_methods(base, GENERATES, generating):
        yield


def add_vectors(hidden: Tensor, vectors: Tensor, where: Tensor, scale: float) -> Tensor:
    """Return `hidden + scale * vectors` where `where` is true (Eq. 6), added in at least float32 and rounded once.

    Args:
        hidden: (batch, seq, hidden), on any device and of any floating dtype; not modified.
        vectors: (batch, hidden), one per row.
        where: (batch, seq) bool.
        scale: lambda.

    Returns:
        (batch, seq, hidden) in the dtype of `hidden`, equal to it wherever `where` is false.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    added = scale * vectors.to(hidden.device, dtype)[:, None] * where.to(hidden.device)[:, :, None]
    return (hidden.to(dtype) + added).to(hidden.dtype)


@dataclass
class AddVectors:
    """Adds each query's vectors, `h + scale * v`. An `Edit`."""

    vectors_per_site: ClassVar[int] = 1
    sites: Sequence[nn.Module]
    vectors: Tensor
    """(queries, sites, hidden). A batch may have several rows per query, grouped by query (templates, beams, returned
    sequences); they share its vectors."""
    scale: float
    """Lambda."""
    positions: Positions

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Return hidden states (rows, seq, hidden) with one site's vectors added; ATVError if the rows do not match."""
        return add_from(span, hidden, rows_of(self.vectors[:, site], hidden, span), self.scale)


EDITS: dict[str, type[VectorEdit]] = {"add": AddVectors}
"""Edits by the name used in a configuration. Register a custom edit before making or loading an adapter with it."""


def rows_of(vectors: Tensor, hidden: Tensor, span: Span) -> Tensor:
    """Repeat vectors (queries, ...) for the rows of a call: (rows, ...)."""
    rows_per_query, rest = divmod(len(hidden), len(vectors))
    if span.where.shape != hidden.shape[:2] or rest:
        raise ATVError(
            f"A layer returned {tuple(hidden.shape[:2])} tokens; the edit mask has {tuple(span.where.shape)} and there "
            f"are {len(vectors)} task vectors. Expected a mask of that shape and a whole number of rows per vector."
        )
    return vectors if rows_per_query == 1 else vectors.repeat_interleave(rows_per_query, dim=0)


def add_from(span: Span, hidden: Tensor, vectors: Tensor, scale: float) -> Tensor:
    """Like `add_vectors` at the tokens of `span`, skipping the columns before the first edited one."""
    start = span.first
    if start == 0:
        return add_vectors(hidden, vectors, span.where, scale)
    edited = hidden.clone()
    edited[:, start:] = add_vectors(hidden[:, start:], vectors, span.where[:, start:], scale)
    return edited


def at_ends(hidden: Tensor, ends: Tensor) -> Tensor:
    """Return the states (rows, hidden) of each row's last prompt token."""
    return hidden[torch.arange(len(hidden), device=hidden.device), ends.to(hidden.device)]
