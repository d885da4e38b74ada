"""The gate scales what an ATV adds beyond its common vector where that is unreliable.

It fades out for queries that are far from the training queries. After training, validation rows also choose a strength
of the query's own part for each task.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NEAREST = 3
"""Number of nearest training queries that a query is compared with."""
MOST = 4096
"""Most training queries that are kept."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths of the own part that are tried on validation rows."""


class Gate(nn.Module):
    """Two factors from 1 (keep) to 0 (drop); both are 1 everywhere before they are set.

    **Openness** multiplies all that is not common to all queries. A query's nearness is the mean cosine between its
    state and those of the nearest training queries. States are not centred, since cosines of centred states say little
    if all training queries are of one kind. The gate begins to close at the nearness that a share of the training
    queries fall below (each compared with the others), and is fully closed as far below that point as that point is
    below their median.

    **Strength** multiplies the query's own part. Each task has one, chosen on its validation rows.

    Args:
        state_size: width of the states.
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.register_buffer("references", torch.empty(0, state_size))
        self.register_buffer("limits", torch.zeros(2))
        self.register_buffer("validated", torch.empty(0))
        self.register_buffer("strengths", torch.empty(0))
        self._set: float | None = None

    references: Tensor
    """(kept, state), of norm 1."""
    limits: Tensor
    """(2,), the nearness at which the gate is closed and the one at which it is open."""
    validated: Tensor
    """(validation queries,), their nearness."""
    strengths: Tensor
    """(tasks,)."""

    @torch.no_grad()
    def fit(self, states: Tensor, share: float, valid: Tensor) -> None:
        """Store the training queries' states, and measure how near they and the validation queries are to them.

        Args:
            states: (queries, state), as the generator returns them.
            share: share of the training queries themselves for which the gate begins to close.
            valid: (validation queries, state).
        """
        kept = states.unique(dim=0)
        kept = kept[:: -(-len(kept) // MOST)]
        self.references = nn.functional.normalize(kept, dim=-1)
        near = self.nearness(kept, leave_out=1)
        start, median = near.quantile(share), near.median()
        self.limits = torch.stack([start - (median - start), start])
        self.validated = self.nearness(valid)

    @contextmanager
    def set_to(self, strength: float) -> Iterator[None]:
        """Use the same strength for all queries inside this context."""
        self._set = strength
        try:
            yield
        finally:
            self._set = None

    def nearness(self, states: Tensor, leave_out: int = 0) -> Tensor:
        """Return the mean cosine to the nearest references after the first `leave_out`: (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.references.T  # (batch, kept)
        count = min(NEAREST + leave_out, cosines.shape[1])
        return cosines.topk(count, dim=1).values[:, min(leave_out, count - 1) :].mean(1)

    def openness(self, states: Tensor) -> Tensor:
        """Map states (batch, state), as the generator returns them, to factors (batch,)."""
        if not len(self.references):
            return states.new_ones(len(states))
        closed, opened = self.limits
        share: Tensor = (self.nearness(states) - closed) / (opened - closed).clamp(min=1e-6)
        return share.clamp(0, 1)

    def strength(self, tasks: Tensor) -> Tensor:
        """Map numbers of tasks (batch,) to factors (batch,)."""
        if self._set is not None or not len(self.strengths):
            return self.limits.new_full((len(tasks),), 1.0 if self._set is None else self._set)
        return self.strengths[tasks]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Resize the buffers to the number of saved rows before loading."""
        for name in ("references", "validated", "strengths"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)
