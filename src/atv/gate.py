"""The gate scales what an ATV adds beyond its common vector where that is unreliable.

It fades out for queries that are far from the training queries. After training, validation rows also choose a strength
of the query's own part for each task.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NEAREST = 3
"""Number of nearest training queries that a query is compared with."""
MOST = 4096
"""Most training queries that are kept, of all tasks together."""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Strengths of the own part that are tried on validation rows."""


class Gate(nn.Module):
    """Two factors from 1 (keep) to 0 (drop); both are 1 everywhere before they are set.

    **Openness** multiplies all that is not common to all queries. A query's nearness is the mean cosine between its
    state and those of the nearest training queries of its task. States are not centred, since cosines of centred states
    say little if all training queries are of one kind. The gate begins to close at the nearness that a share of the
    task's training queries fall below (each compared with the others), and is fully closed as far below that point as
    that point is below their median. Each task has its own limits, since some tasks' queries are much more alike than
    others'.

    **Strength** multiplies the query's own part. Each task has one, chosen on its validation rows.

    Args:
        state_size: width of the states.
    """

    def __init__(self, state_size: int) -> None:
        super().__init__()
        self.register_buffer("references", torch.empty(0, state_size))
        self.register_buffer("reference_tasks", torch.empty(0, dtype=torch.long))
        self.register_buffer("limits", torch.zeros(1, 2))
        self.register_buffer("validated", torch.empty(0))
        self.register_buffer("validated_tasks", torch.empty(0, dtype=torch.long))
        self.register_buffer("strengths", torch.empty(0))
        self._set: float | None = None

    references: Tensor
    """(kept, state), of norm 1."""
    reference_tasks: Tensor
    """(kept,) int64, the number of each one's task."""
    limits: Tensor
    """(tasks, 2), the nearness at which the gate is closed and the one at which it is open."""
    validated: Tensor
    """(validation queries,), their nearness."""
    validated_tasks: Tensor
    """(validation queries,) int64."""
    strengths: Tensor
    """(tasks,)."""

    @torch.no_grad()
    def fit(self, states: Sequence[Tensor], share: float, valid: Sequence[Tensor]) -> None:
        """Store the training queries' states, and measure how near they and the validation queries are to them.

        Of more than `MOST` distinct queries, only the tasks with more than their share of these are thinned out.

        Args:
            states: for each task (queries, state), as the generator returns them.
            share: share of a task's training queries themselves for which the gate begins to close.
            valid: for each task (validation queries, state).
        """
        distinct = [of_task.unique(dim=0) for of_task in states]
        shares = _shares([len(of_task) for of_task in distinct])
        kept = [
            of_task[torch.arange(share, device=of_task.device) * len(of_task) // share]
            for of_task, share in zip(distinct, shares, strict=True)
        ]
        self.references = nn.functional.normalize(torch.cat(kept), dim=-1)
        self.reference_tasks = _numbers(kept, self.limits.device)
        limits = []
        for task, of_task in enumerate(kept):
            near = self.nearness(of_task, self.reference_tasks[self.reference_tasks == task], leave_out=1)
            start, median = near.quantile(share), near.median()
            limits.append(torch.stack([start - (median - start), start]))
        self.limits = torch.stack(limits)
        self.validated_tasks = _numbers(valid, self.limits.device)
        self.validated = self.nearness(torch.cat(list(valid)), self.validated_tasks)

    @contextmanager
    def set_to(self, strength: float) -> Iterator[None]:
        """Use the same strength for all queries inside this context."""
        self._set = strength
        try:
            yield
        finally:
            self._set = None

    def nearness(self, states: Tensor, tasks: Tensor, leave_out: int = 0) -> Tensor:
        """Return the mean cosine to the nearest references of the same task, after the first `leave_out`.

        Args:
            states: (batch, state), as the generator returns them.
            tasks: numbers of their tasks, (batch,) int64.
            leave_out: 1 for states that are references themselves.

        Returns:
            (batch,).
        """
        cosines = nn.functional.normalize(states, dim=-1) @ self.references.T  # (batch, kept)
        same = self.reference_tasks == tasks[:, None]
        top = cosines.masked_fill(~same, -2.0).topk(min(NEAREST + leave_out, cosines.shape[1]), dim=1).values
        count = same.sum(1, keepdim=True).clamp(max=top.shape[1])  # a task may have fewer references
        place = torch.arange(top.shape[1], device=top.device)
        used = (place < count) & (place >= (count - 1).clamp(max=leave_out))
        return (top * used).sum(1) / used.sum(1)

    def openness(self, states: Tensor, tasks: Tensor) -> Tensor:
        """Map states (batch, state) of queries of these tasks (batch,) to factors (batch,)."""
        if not len(self.references):
            return states.new_ones(len(states))
        closed, opened = self.limits[tasks].unbind(1)
        share: Tensor = (self.nearness(states, tasks) - closed) / (opened - closed).clamp(min=1e-6)
        return share.clamp(0, 1)

    def strength(self, tasks: Tensor) -> Tensor:
        """Map numbers of tasks (batch,) to factors (batch,)."""
        if self._set is not None or not len(self.strengths):
            return self.limits.new_full((len(tasks),), 1.0 if self._set is None else self._set)
        return self.strengths[tasks]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Resize the buffers to the number of saved rows before loading; what does not fit together is an error."""
        width = self.references.shape[1]
        for name in ("references", "reference_tasks", "limits", "validated", "validated_tasks", "strengths"):
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)
        tasks, kept, validated = len(self.limits), len(self.references), len(self.validated)
        expected = {
            "references": (kept, width),
            "reference_tasks": (kept,),
            "limits": (tasks, 2),
            "validated": (validated,),
            "validated_tasks": (validated,),
            "strengths": (tasks if len(self.strengths) else 0,),
        }
        errors: list[str] = others[-1]
        errors += [
            f"size mismatch for {prefix}{name}: {tuple(getattr(self, name).shape)}; expected {shape}."
            for name, shape in expected.items()
            if getattr(self, name).shape != shape
        ]
        for name in ("reference_tasks", "validated_tasks"):
            if ((getattr(self, name) < 0) | (getattr(self, name) >= tasks)).any():
                errors.append(f"{prefix}{name} has numbers that are none of the {tasks} tasks.")


def _shares(counts: Sequence[int]) -> list[int]:
    """Return how many of each task's queries may be kept, at least 1: what small tasks leave is for the larger ones."""
    shares, left = [0] * len(counts), MOST
    for place, task in enumerate(sorted(range(len(counts)), key=counts.__getitem__)):
        shares[task] = max(1, min(counts[task], left // (len(counts) - place)))
        left -= shares[task]
    return shares


def _numbers(by_task: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the number of its task for each row of `by_task`."""
    counts = torch.tensor([len(of_task) for of_task in by_task], device=device)
    return torch.arange(len(by_task), device=device).repeat_interleave(counts)
