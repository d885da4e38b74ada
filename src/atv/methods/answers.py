"""Answers as classes, for methods that answer without the LLM."""

from collections.abc import Sequence

from torch import Tensor

from atv.methods.base import Choice


def choices(scores: Tensor, answers: Sequence[str]) -> list[Choice]:
    """The most likely answer of each row (the first one if tied), with the log-probabilities of all answers.

    Args:
        scores: (rows, answers), before the softmax.
        answers: what each column stands for.
    """
    likely = scores.log_softmax(-1)
    best = scores.argmax(-1).tolist()
    return [
        Choice(answers[column], dict(zip(answers, values, strict=True)))
        for column, values in zip(best, likely.tolist(), strict=True)
    ]
