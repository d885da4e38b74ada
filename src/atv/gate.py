"""The gate: how much of its own part a query's vectors get, so that an ATV does not guess where it knows nothing.

It asks two things of a query. Is it near the training queries? And of the validation rows that are like it: did their
own part make the right answer likelier than the common vector alone does?
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NEAREST = 3
"""Training queries that a query is compared with."""
MOST = 4096
"""Training queries that are kept, and validation rows."""
LIKE_IT = 16
"""Validation rows that a query is judged by."""


class Gate(nn.Module):
    """From 1, where the query's own part is of use, to 0, where it is not; before `fit` and `judge` 1 everywhere.

    A query's nearness is the mean cosine between its state and those of the nearest training queries: of states as they
    come, since a cosine of centred ones tells little where all training queries are of one kind. The gate begins
    to close at the nearness that a share of the training queries fall below (each compared with the others), and is
    closed as far below that as that is below their median.

    It is closed as well where the own part did harm to the validation rows that are nearest by the same measure: where
    it made the right answer less likely on average.

    Args:
        state_size: width of the states.
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.register_buffer("references", torch.empty(0, state_size))
        self.register_buffer("limits", torch.zeros(2))
        self.register_buffer("judged", torch.empty(0, state_size))
        self.register_buffer("gains", torch.empty(0))
        self._set: float | None = None

    references: Tensor
    """(kept, state), of norm 1."""
    judged: Tensor
    """(validation rows, state), of norm 1."""
    gains: Tensor
    """(validation rows,), by how much the own part raised the probability of the right answer."""
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

    @contextmanager
    def set_to(self, share: float) -> Iterator[None]:
        """The same share for all queries while the context lasts, whatever it knows of them."""
        self._set = share
        try:
            yield
        finally:
            self._set = None

    @torch.no_grad()
    def judge(self, states: Tensor, gains: Tensor) -> None:
        """Keep what the own part did to validation rows.

        Args:
            states: (rows, state), as the generator gives them.
            gains: (rows,), the probability of the right answer with the own part less that without it.
        """
        every = -(-len(states) // MOST)
        self.judged = nn.functional.normalize(states[::every], dim=-1)
        self.gains = gains[::every].to(states)

    def gain(self, states: Tensor) -> Tensor:
        """Mean gain of the validation rows that are nearest, (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.judged.T  # (batch, rows)
        return self.gains[cosines.topk(min(LIKE_IT, len(self.gains)), dim=1).indices].mean(1)

    def nearness(self, states: Tensor, leave_out: int = 0) -> Tensor:
        """Mean cosine to the nearest references but for the `leave_out` very nearest: (batch, state) to (batch,)."""
        cosines = nn.functional.normalize(states, dim=-1) @ self.references.T  # (batch, kept)
        count = min(NEAREST + leave_out, cosines.shape[1])
        return cosines.topk(count, dim=1).values[:, min(leave_out, count - 1) :].mean(1)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, state), as the generator gives them, to (batch,)."""
        share = states.new_ones(len(states))
        if self._set is not None:
            return share * self._set
        if len(self.references):
            closed, opened = self.limits
            share = ((self.nearness(states) - closed) / (opened - closed).clamp(min=1e-6)).clamp(0, 1)
        if len(self.gains):
            share = share * (self.gain(states) >= 0)
        return share

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """How many rows it knows is known from the file."""
        for name in ("references", "judged", "gains"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)
