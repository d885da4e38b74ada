"""The gate scales a query's own part of its vectors down where that part is unreliable.

After training, validation rows choose a strength of the own part for each task. A query has that of the validation rows
that are most like it. The own part also fades out for queries that are far from the training queries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NEAREST = 3
"""Number of nearest training queries that a query is compared with."""
MOST = 4096
"""Most training queries, and most validation rows, that are kept."""
LIKE_IT = 16
"""Number of nearest validation rows whose strengths are averaged for a query."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths of the own part that are tried on validation rows."""


class Gate(nn.Module):
    """A factor from 1 (keep the query's own part) to 0 (drop it); 1 everywhere before `fit` and `judge`.

    A query's nearness is the mean cosine between its state and those of the nearest training queries. States are not
    centred, since cosines of centred states say little if all training queries are of one kind. The gate begins to
    close at the nearness that a share of the training queries fall below (each compared with the others), and is
    fully closed as far below that point as that point is below their median.

    Where it is open, it is the mean strength of the nearest validation rows, by the same measure.

    Args:
        state_size: width of the states.
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.register_buffer("references", torch.empty(0, state_size))
        self.register_buffer("limits", torch.zeros(2))
        self.register_buffer("judged", torch.empty(0, state_size))
        self.register_buffer("strengths", torch.empty(0))
        self._set: float | None = None

    references: Tensor
    """(kept, state), of norm 1."""
    judged: Tensor
    """(validation rows, state), of norm 1."""
    strengths: Tensor
    """(validation rows,), the best strength for the task of each."""
    limits: Tensor
    """(2,), the nearness at which the gate is closed and the one at which it is open."""

    @torch.no_grad()
    def fit(self, states: Tensor, share: float) -> None:
        """Store the training queries' states and measure how near they are to each other.

        Args:
            states: (queries, state), as the generator returns them.
            share: share of the training queries themselves for which the gate begins to close.
        """
        kept = states.unique(dim=0)
        kept = kept[:: -(-len(kept) // MOST)]
        self.references = nn.functional.normalize(kept, dim=-1)
        near = self.nearness(kept, leave_out=1)
        start, median = near.quantile(share), near.median()
        self.limits = torch.stack([start - (median - start), start])

    @contextmanager
    def set_to(self, share: float) -> Iterator[None]:
        """Use the same value for all queries inside this context."""
        self._set = share
        try:
            yield
        finally:
            self._set = None

    @torch.no_grad()
    def judge(self, states: Tensor, strengths: Tensor) -> None:
        """Store the best strengths of validation rows.

        Args:
            states: (rows, state), as the generator returns them.
            strengths: (rows,), from 0 to 1.
        """
        every = -(-len(states) // MOST)
        self.judged = nn.functional.normalize(states[::every], dim=-1)
        self.strengths = strengths[::every].to(states)

    def strength(self, states: Tensor) -> Tensor:
        """Return the mean strength of the nearest validation rows: (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.judged.T  # (batch, rows)
        return self.strengths[cosines.topk(min(LIKE_IT, len(self.strengths)), dim=1).indices].mean(1)

    def nearness(self, states: Tensor, leave_out: int = 0) -> Tensor:
        """Return the mean cosine to the nearest references after the first `leave_out`: (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.references.T  # (batch, kept)
        count = min(NEAREST + leave_out, cosines.shape[1])
        return cosines.topk(count, dim=1).values[:, min(leave_out, count - 1) :].mean(1)

    def forward(self, states: Tensor) -> Tensor:
        """Map states (batch, state), as the generator returns them, to factors (batch,)."""
        share = states.new_ones(len(states))
        if self._set is not None:
            return share * self._set
        if len(self.references):
            closed, opened = self.limits
            share = ((self.nearness(states) - closed) / (opened - closed).clamp(min=1e-6)).clamp(0, 1)
        return share * self.strength(states) if len(self.strengths) else share

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Resize the buffers to the number of saved rows before loading."""
        for name in ("references", "judged", "strengths"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)
