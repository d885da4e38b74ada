"""Answers of a teacher: the frozen LLM with a longer prompt, whose answers a method learns to give without it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Taught(NamedTuple):
    """A teacher's answer to one query, with the teacher's distribution at each of its tokens."""

    ids: list[int]
    """Token ids of the answer, with its end if it ended."""
    likeliest: Tensor
    """(tokens, k) int64: the teacher's likeliest next tokens before each token of the answer."""
    probabilities: Tensor
    """(tokens, k) float32: their probabilities; what is missing to 1 is that of all other tokens together."""


def stacked(rows: Sequence[Taught]) -> dict[str, Tensor]:
    """Return the distributions of several answers, padded on the right, with the probability 0 where there is none.

    Returns:
        `soft_ids` (rows, tokens, k) int64 and `soft_probabilities` (rows, tokens, k) float32.
    """
    tokens, k = max(len(row.ids) for row in rows), rows[0].likeliest.shape[1]
    ids, shares = torch.zeros(len(rows), tokens, k, dtype=torch.long), torch.zeros(len(rows), tokens, k)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)], shares[index, : len(row.ids)] = row.likeliest, row.probabilities
    return {"soft_ids": ids, "soft_probabilities": shares}


def divergence(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a model from its teacher at each token, in nats.

    All tokens outside the teacher's likeliest count as one, so this is a lower bound of the divergence over the whole
    vocabulary, and 0 where both agree on the likeliest tokens.

    Args:
        logits: (..., vocabulary), of the model.
        ids: (..., k), the teacher's likeliest tokens.
        probabilities: (..., k), the teacher's probabilities of them; all 0 where there is no token.

    Returns:
        (...) float32, 0 where there is no token.
    """
    own = logits.float().log_softmax(-1).gather(-1, ids)  # (..., k)
    rest = (1 - own.exp().sum(-1)).clamp(min=1e-7).log()
    left = (1 - probabilities.sum(-1)).clamp(min=0)
    each = torch.special.xlogy(probabilities, probabilities) - probabilities * own
    found: Tensor = each.sum(-1) + torch.special.xlogy(left, left) - left * rest
    return found * (probabilities.sum(-1) > 0)
