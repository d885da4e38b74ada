"""How much of a teacher's behaviour a method reproduces without the teacher's prompt, on held-out queries."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from atv.data import Task
from atv.data.taught import Taught, divergence
from atv.errors import ATVError
from atv.evaluation.run import reading
from atv.lm.prefix import SharedPrefix
from atv.methods.base import Method
from atv.methods.zero_shot import ZeroShot
from atv.progress import bar

RESAMPLES = 2000
"""Bootstrap draws of the queries for the interval of the recovered share."""


class Agreement(NamedTuple):
    """A model beside its teacher, for each query."""

    divergences: list[float]
    """Kullback-Leibler divergence from the teacher, mean over the answer's tokens, in nats."""
    agreed: list[float]
    """Share of the answer's tokens that are the model's likeliest too."""
    tokens: list[int]
    """Tokens of the prompt."""


@torch.no_grad()
def agreement(method: Method, task: Task, batch_size: int = 16) -> Agreement:
    """Read the teacher's answers to the test queries with a method, and compare the distributions at each token.

    Args:
        method: the method.
        task: from `taught_task`.
        batch_size: prompts per call of the LLM.
    """
    render = next(iter(task.renderers("first", method.reads).values()))
    prompts = method.prompts(task, task.test, render)
    lessons = [task.taught[example] for example in task.test]
    shared = SharedPrefix(method.llm, [prompt.ids for prompt in prompts], method.edited_tokens)
    found: dict[int, tuple[float, float]] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    with bar(f"{method.name} beside the teacher", len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = by_length[start : start + batch_size]
            own = [lessons[index] for index in batch]
            with reading(method, shared, [prompts[index] for index in batch]) as behind:
                first = list(behind.logits)
                after = (
                    behind.read([tuple(lesson.ids[:-1]) for lesson in own]) if max(len(x.ids) for x in own) > 1 else []
                )
            for place, (index, lesson) in enumerate(zip(batch, own, strict=True)):
                found[index] = _compared(torch.stack([first[place], *(after[place] if after else ())]), lesson)
            progress.advance(len(batch))
    divergences, agreed = zip(*(found[index] for index in range(len(prompts))), strict=True)
    return Agreement(list(divergences), list(agreed), [len(prompt.ids) for prompt in prompts])


def _compared(logits: torch.Tensor, lesson: Taught) -> tuple[float, float]:
    away = divergence(logits, lesson.likeliest, lesson.probabilities).mean().item()
    return away, (logits.argmax(-1) == torch.tensor(lesson.ids)).float().mean().item()


def distilled(method: Method, task: Task, llm: nn.Module, batch_size: int = 16) -> dict[str, Any]:
    """Return what a method recovers of its teacher on the test queries, as JSON values.

    Args:
        method: the method.
        task: from `taught_task`.
        llm: the frozen LLM, of which `method.llm` may be an adapted or fine-tuned copy.
        batch_size: prompts per call of the LLM.

    Returns:
        `queries`; `divergence` and `agreement` of the method, and of the plain LLM as `..._without`; `recovered`, the
        share of the plain LLM's divergence that is gone, with `recovered_low` and `recovered_high`, its 95% bootstrap
        interval over queries; `prompt_tokens`, and `prompt_tokens_teacher`, means per query; `divergences` and
        `divergences_without`, one per query, with which other seeds and methods can be compared.

    Raises:
        ATVError: the task has no teacher, or the method does not answer with the LLM.
    """
    if not task.taught:
        raise ATVError(f"{task.name} has no teacher; expected a task from taught_task.")
    if type(method).choose is not Method.choose:
        raise ATVError(
            f"The method {method.name} does not answer with the LLM, and so cannot be compared to a teacher."
        )
    plain = agreement(ZeroShot(llm, method.tokenizer), task, batch_size)
    ours = agreement(method, task, batch_size)
    share, low, high = recovered(ours.divergences, plain.divergences)
    return {
        "queries": len(task.test),
        "divergence": fmean(ours.divergences),
        "divergence_without": fmean(plain.divergences),
        "recovered": share,
        "recovered_low": low,
        "recovered_high": high,
        "agreement": fmean(ours.agreed),
        "agreement_without": fmean(plain.agreed),
        "prompt_tokens": fmean(ours.tokens),
        "prompt_tokens_teacher": task.prepared["teacher"]["prompt_tokens"],
        "divergences": ours.divergences,
        "divergences_without": plain.divergences,
    }


def recovered(ours: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    """Return the share of the plain LLM's divergence from the teacher that is gone, and its 95% bootstrap interval.

    Args:
        ours: divergence of the method, one per query, in nats.
        plain: divergence of the plain LLM, of the same queries.
    """
    draws = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    shares = 1 - np.array(ours)[draws].mean(1) / np.array(plain)[draws].mean(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return 1 - fmean(ours) / fmean(plain), float(low), float(high)
