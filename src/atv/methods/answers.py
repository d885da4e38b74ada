"""Answers as classes: what a method that does not ask the LLM chooses from."""

from collections.abc import Sequence

from torch import Tensor

from atv.methods.base import Choice


def choices(scores: Tensor, answers: Sequence[str]) -> list[Choice]:
    """The likeliest answers, of equal ones the first, with the log-probabilities of all.

    Args:
        scores: (rows, answers), before the softmax.
        answers: what the columns stand for.
    """
    likely = scores.log_softmax(-1)
    best = scores.argmax(-1).tolist()
    return [
        Choice(answers[column], dict(zip(answers, values, strict=True)))
        for column, values in zip(best, likely.tolist(), strict=True)
    ]
