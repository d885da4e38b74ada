"""A task's options: encoded once, told apart by their tokens, and scored. All judging of tokens is done here.

An option is judged by its tokens up to the first one at which it differs from every other option: its score is the
probability that an answer begins with these. An option that another one continues ("very" next to "very good") differs
where it ends: its score is the probability of its tokens, followed by none with which another option continues. These
events exclude each other, so the scores sum to at most 1, and no option is favoured for being short or long.
"""

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from atv.data import Renderer, Task, shared_beginnings
from atv.data.render import answer_ids
from atv.errors import ATVError
from atv.lm.prefix_tree import common
from atv.progress import log_once

Prefix = tuple[int, ...]
"""Tokens that several options begin with."""


def require_finite(logits: Tensor) -> Tensor:
    """Return logits (..., vocabulary), of any floating-point dtype, unchanged.

    Raises:
        ATVError: one is NaN or the largest one of a row infinite, so that no token is likelier than others.
    """
    if not bool(logits.amax(-1).isfinite().all()):  # a maximum with NaN is NaN
        raise ATVError(
            "The LLM's logits are not finite (NaN or infinite), so it has no answer. Use another dtype of the LLM "
            "(float16 overflows where bfloat16 and float32 do not), or a smaller scale."
        )
    return logits


class _Finite(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        return require_finite(scores)


def refusing_non_finite(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of transformers' `generate` with which each step raises as `require_finite` does."""
    others = options.get("logits_processor") or ()  # after ours, since they may exclude tokens
    return {**options, "logits_processor": LogitsProcessorList([_Finite(), *others])}


@dataclass
class _Fork:
    """A prefix after which options differ."""

    leaves: dict[int, int] = field(default_factory=dict)
    """Next tokens that identify an option, and its number."""
    forks: dict[int, Prefix] = field(default_factory=dict)
    """Next tokens shared by several options, and the prefix after which these differ."""
    ends: int | None = None
    """The option that ends here."""


class Options:
    """Options as token ids, and where each differs from all others.

    Args:
        texts: at least one; all different.
        ids: the tokens of each, as they follow a prompt; not empty.

    Raises:
        ATVError: two options have the same tokens.
    """

    def __init__(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        self.texts = list(texts)
        self.ids = [tuple(row) for row in ids]
        _refuse_equal(self.texts, self.ids)
        ordered = sorted(range(len(self.ids)), key=lambda option: self.ids[option])
        shared: list[Prefix] = [()] * len(self.ids)  # the longest beginning that each shares with another
        self._forks: dict[Prefix, _Fork] = {(): _Fork()}
        for one, other in pairwise(ordered):  # an option shares most with one of its neighbours in order
            both = self.ids[one][: common(self.ids[one], self.ids[other])]
            self._forks.setdefault(both, _Fork())
            for option in (one, other):
                shared[option] = max(shared[option], both, key=len)
        for option, prefix in enumerate(shared):
            if len(prefix) == len(self.ids[option]):
                self._forks[prefix].ends = option
            else:
                self._forks[prefix].leaves[self.ids[option][len(prefix)]] = option
        for prefix in self._forks:
            if prefix:
                before = next(prefix[:end] for end in reversed(range(len(prefix))) if prefix[:end] in self._forks)
                self._forks[before].forks[prefix[len(before)]] = prefix
        self.judged = {text: len(prefix) + 1 for text, prefix in zip(self.texts, shared, strict=True)}
        """Number of tokens that identify each option; one more than it has if another option continues it."""
        self.longest = max(map(len, shared))
        """Tokens of the longest beginning that two options share: the most that are read after a prompt."""
        self.continued: dict[int, Prefix] = {
            fork.ends: (*fork.leaves, *fork.forks) for fork in self._forks.values() if fork.ends is not None
        }
        """Options that others continue, by number, and the tokens with which these continue."""

    @property
    def told_apart(self) -> bool:
        """Whether first tokens tell all options apart, so that the paper's score is defined."""
        return self.longest == 0

    def begins(self, token: int, answer: str) -> bool | None:
        """Whether `token` is the first one of option `answer`; None if first tokens do not tell the options apart."""
        return token == self.ids[self.texts.index(answer)][0] if self.told_apart else None

    def search(self, following: Tensor) -> Generator[Prefix, list[Tensor], int]:
        """Find the option with the highest score (ties: the first), yielding prefixes that must be read.

        Send the result of `Continuation.read` for each yielded prefix. A beginning is at least as likely as its
        continuations, so the likeliest unread prefix is read next until none is as likely as the best option: of
        hundreds of options hardly any are read.

        Args:
            following: log-probabilities (vocabulary,) after the prompt.

        Returns:
            The option's number.
        """
        chosen, best = 0, -math.inf
        unread: list[tuple[float, Prefix, int]] = []  # -log-probability of that many of the prefix's tokens
        prefix: Prefix = ()
        score = 0.0
        while True:
            fork = self._forks[prefix]
            found = _added(score, following, fork.leaves)
            if fork.ends is not None:
                others = following.clone()
                others[[*fork.leaves, *fork.forks]] = -math.inf
                found.append((score + others.logsumexp(-1).item(), fork.ends))
            for value, option in found:
                if value > best or (value == best and option < chosen):
                    chosen, best = option, value
            for value, longer in _added(score, following, fork.forks):
                heappush(unread, (-value, longer, len(prefix) + 1))
            if not unread or not -unread[0][0] >= best:  # nor if it is NaN
                return chosen
            known, prefix, count = heappop(unread)
            read = yield prefix
            score = -known + sum(read[place - 1][prefix[place]].item() for place in range(count, len(prefix)))
            following = read[-1]


def _added(score: float, following: Tensor, tokens: Mapping[int, Any]) -> list[tuple[float, Any]]:
    """Return the score with each token's log-probability added, and the token's value in `tokens`."""
    values = following[list(tokens)].tolist() if tokens else []
    return [(score + value, what) for value, what in zip(values, tokens.values(), strict=True)]


def _refuse_equal(texts: Sequence[str], ids: Sequence[Prefix]) -> None:
    counts = Counter(ids)
    equal = [text for text, row in zip(texts, ids, strict=True) if counts[row] > 1]
    if equal:
        raise ATVError(
            f"{len(equal)} answers have the tokens of another one for this LLM ({', '.join(map(repr, equal[:4]))}), so "
            "they cannot be told apart. Write them differently, or use another LLM."
        )


def task_options(tokenizer: Any, task: Task, render: Renderer) -> Options:
    """Return the options of a task as they follow a renderer's prompts; encoded once per renderer.

    Raises:
        ATVError: an answer of the task is not an option, or two options have the same tokens.
    """
    if missing := sorted({row.output for row in (*task.train, *task.valid, *task.test)} - set(task.options)):
        raise ATVError(
            f"Task {task.name}: the answer {missing[0]!r} is not among its options ({', '.join(task.options)[:200]}); "
            "name every answer that occurs, or leave options out."
        )
    try:
        return encoded_options(tokenizer, render, task.options)
    except ATVError as error:
        raise ATVError(f"Task {task.name}: {error}") from None


def option_ids(tokenizer: Any, task: Task, render: Renderer) -> list[Prefix]:
    """Return the token ids of a task's options after a renderer's prompts, as `findings` needs them."""
    return task_options(tokenizer, task, render).ids


def longest_answer(tokenizer: Any, task: Task, render: Renderer) -> int:
    """Return the number of tokens of a task's longest option after a renderer's prompts."""
    return max(map(len, answer_ids(tokenizer, render, task.options)))


@lru_cache(maxsize=256)
def encoded_options(tokenizer: Any, render: Renderer, texts: tuple[str, ...]) -> Options:
    """Return options as they follow a renderer's prompts; ATVError if two of them have the same tokens."""
    return Options(texts, answer_ids(tokenizer, render, texts))


def training_options(tokenizer: Any, task: Task) -> Options:
    """Return the options of a task as they follow the answer prefix of training, in any template."""
    return task_options(tokenizer, task, task.training_renderers()[0])


def note_shared(tokenizer: Any, tasks: Sequence[Task]) -> None:
    """Log once how answers of the training tasks that begin with the same token are judged."""
    for task in (task for task in tasks if task.chooses):
        options = training_options(tokenizer, task)
        for line in shared_beginnings(task, partial(option_ids, tokenizer, task), task.renderers("first")):
            log_once(line)
        continued = [
            text for text, row in zip(options.texts, options.ids, strict=True) if options.judged[text] > len(row)
        ]
        if continued:
            log_once(
                f"{task.name}: other answers continue {', '.join(map(repr, continued[:4]))}; validation rows with such "
                "an answer count as wrong in the accuracy shown during training, which ignores where an answer ends."
            )


def answers_right(right: Tensor, judged: Tensor) -> Tensor:
    """Return whether all tokens that identify an answer are right; false if the answer has fewer.

    Args:
        right: (..., answer) bool, for each token of an answer.
        judged: (...,) int64, the number of tokens that identify it: `Options.judged`.

    Returns:
        (...,) bool.
    """
    counted = torch.arange(right.shape[-1], device=right.device) < judged[..., None]
    return (right & counted).sum(-1) == judged
