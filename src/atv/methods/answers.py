"""Answers as classes: what a method that does not ask the LLM chooses from."""

from collections.abc import Sequence

from torch import Tensor

from atv.methods.base import Choice


def choices(scores: Tensor, answers: Sequence[str], options: Sequence[str]) -> list[Choice]:
    """The likeliest answers, of equal ones the first.

    Args:
        scores: (rows, answers).
        answers: what the columns stand for.
        options: those of the task. If none of them is among `answers` nothing is known of any, and the first is taken.
    """
    own = [column for option in options for column, answer in enumerate(answers) if answer == option]
    best = scores.argmax(-1).tolist()
    among = [answers[own[place]] for place in scores[:, own].argmax(-1).tolist()] if own else [options[0]] * len(best)
    return [Choice(answers[column], option) for column, option in zip(best, among, strict=True)]
