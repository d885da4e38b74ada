"""The gate: how near a query is to those of the training, so that an ATV does not guess far from them."""

from typing import Any

import torch
from torch import Tensor, nn

NEAREST = 3
"""Training queries that a query is compared with."""
MOST = 4096
"""Training queries that are kept."""


class Gate(nn.Module):
    """From 1, among the training queries, to 0, far from all of them; before `fit` it is 1 everywhere.

    A query's nearness is the mean cosine between its state and those of the nearest training queries: of states as they
    come, since a cosine of centred ones tells little where all training queries are of one kind. The gate begins
    to close at the nearness that a share of the training queries fall below (each compared with the others), and is
    closed as far below that as that is below their median.

    Args:
        state_size: width of the states.
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.register_buffer("references", torch.empty(0, state_size))
        self.register_buffer("limits", torch.zeros(2))

    references: Tensor
    """(kept, state), of norm 1."""
    limits: Tensor
    """(2,), the nearness at which it is closed, and at which it is open."""

    @torch.no_grad()
    def fit(self, states: Tensor, share: float) -> None:
        """Keep training queries and see how near they are to each other.

        Args:
            states: (queries, state), as the generator gives them.
            share: of the training queries themselves for which it begins to close.
        """
        kept = states.unique(dim=0)
        kept = kept[:: -(-len(kept) // MOST)]
        self.references = nn.functional.normalize(kept, dim=-1)
        near = self.nearness(kept, leave_out=1)
        start, median = near.quantile(share), near.median()
        self.limits = torch.stack([start - (median - start), start])

    def nearness(self, states: Tensor, leave_out: int = 0) -> Tensor:
        """Mean cosine to the nearest references but for the `leave_out` very nearest: (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.references.T  # (batch, kept)
        count = min(NEAREST + leave_out, cosines.shape[1])
        return cosines.topk(count, dim=1).values[:, min(leave_out, count - 1) :].mean(1)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, state), as the generator gives them, to (batch,)."""
        if not len(self.references):
            return states.new_ones(len(states))
        closed, opened = self.limits
        share: Tensor = (self.nearness(states) - closed) / (opened - closed).clamp(min=1e-6)
        return share.clamp(0, 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """How many references there are is known from the file."""
        saved = state_dict.get(f"{prefix}references")
        if saved is not None:
            self.references = self.references.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *others)
