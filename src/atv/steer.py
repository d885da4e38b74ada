"""THE IDEA, second half: task vectors are added inside a frozen LLM while it reads the query's prompt (Eq. 6).

    with steer(llm, AddVectors(sites, vectors, scale, positions), Tracked(len(queries), positions)):
        llm.generate(**inputs)

An `Edit` says what happens to hidden states at its sites; spans say to which tokens of a call (`atv.lm.spans`). Nothing
of the LLM is changed: edits are forward hooks that live as long as the context, and an exception ends them too.
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
from atv.lm.hooks import base_llm, edit_outputs
from atv.lm.spans import GENERATES, Span, Spans


class Edit(Protocol):
    """What happens at some modules of an LLM."""

    @property
    def sites(self) -> Sequence[nn.Module]:
        """Modules that return hidden states (batch, seq, hidden), in the order in which they run."""

    @property
    def positions(self) -> Positions:
        """The tokens that it edits; what the prompt holds before them may be read without it."""

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Hidden states (rows, seq, hidden) of `sites[site]` as they shall be; `hidden` is not written to."""


class VectorEdit(Edit, Protocol):
    """An edit made of a query's task vectors."""

    vectors_per_site: ClassVar[int]
    """How many of a query's vectors one site takes."""
    vectors: Tensor
    """(queries, sites * vectors_per_site, hidden)."""

    def __init__(self, sites: Sequence[nn.Module], vectors: Tensor, scale: float, positions: Positions) -> None: ...


@contextmanager
def steer(llm: nn.Module, edit: Edit, spans: Spans) -> Iterator[None]:
    """Apply `edit` in every call of the LLM inside this context.

    Contexts that are open in one thread compose: all of their edits are applied. Each thread and asyncio task has
    contexts of its own, and a call in one that opened none, while another one steers the LLM, is refused.

    Args:
        llm: the frozen LLM, or a PEFT model around it; put into eval mode.
        edit: what happens.
        spans: to which tokens: `Known`, `Lengths` or `Tracked`.
    """
    base = base_llm(llm)
    llm.eval()

    def edited(call: Mapping[str, Any]) -> AbstractContextManager[None] | None:
        span = spans(call)
        if spans.finished:  # until `generate` ends its decoding steps are those of the plain LLM, compiled or not
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
    """`hidden + scale * vectors` at the tokens that `where` names (Eq. 6), added in float32 at least, rounded once.

    Args:
        hidden: (batch, seq, hidden), on any device and of any floating dtype; not written to.
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
    """(queries, sites, hidden). A batch may hold several rows per query, one query after the other (templates, beams,
    returned sequences): they share its vectors."""
    scale: float
    """Lambda."""
    positions: Positions

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Hidden states (rows, seq, hidden) with the vectors of one site added; ATVError if the rows do not fit."""
        return add_from(span, hidden, rows_of(self.vectors[:, site], hidden, span), self.scale)


EDITS: dict[str, type[VectorEdit]] = {"add": AddVectors}
"""Edits by the name that a configuration gives. Add one of your own before an adapter with it is made or loaded."""


def rows_of(vectors: Tensor, hidden: Tensor, span: Span) -> Tensor:
    """Vectors (queries, ...) for the rows of a call, (rows, ...)."""
    rows_per_query, rest = divmod(len(hidden), len(vectors))
    if span.where.shape != hidden.shape[:2] or rest:
        raise ATVError(
            f"A layer returned {tuple(hidden.shape[:2])} tokens; the edit mask has {tuple(span.where.shape)} and there "
            f"are {len(vectors)} task vectors. Expected a mask of that shape and a whole number of rows per vector."
        )
    return vectors.repeat_interleave(rows_per_query, dim=0)


def add_from(span: Span, hidden: Tensor, vectors: Tensor, scale: float) -> Tensor:
    """As `add_vectors` where `span` says, without a look at the columns before the first edited one."""
    start = span.first
    if start == 0:
        return add_vectors(hidden, vectors, span.where, scale)
    edited = hidden.clone()
    edited[:, start:] = add_vectors(hidden[:, start:], vectors, span.where[:, start:], scale)
    return edited


def at_ends(hidden: Tensor, ends: Tensor) -> Tensor:
    """The states (rows, hidden) of each row's last prompt token."""
    return hidden[torch.arange(len(hidden), device=hidden.device), ends.to(hidden.device)]
