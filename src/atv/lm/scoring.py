"""A task's options: encoded once, told apart by their tokens, and compared. Whoever judges an answer asks here.

An option is judged by its tokens up to the first one at which it differs from every other: its score is the
probability that an answer begins with these. An option that another one continues ("very" beside "very good") differs
where it ends: its score is the probability of its tokens followed by none with which another option continues. No two
of these beginnings go together, so the scores add up to 1 at most, and none is favoured for being short or long.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from atv.data import TRAIN_PREFIX, Task, Variant, shared_beginnings
from atv.data.collate import encode_answers, position_ids
from atv.errors import ATVError
from atv.lm.prefix import attention_alone, call_llm
from atv.progress import warn_once

Prefix = tuple[int, ...]
"""Tokens that several options begin with."""
Read = Callable[[Sequence[Prefix]], list[list[Tensor]]]
"""A prefix for each row of a batch to log-probabilities (vocabulary,), on the CPU, behind each of its tokens."""


@dataclass
class _Fork:
    """A prefix after which options differ."""

    leaves: dict[int, int] = field(default_factory=dict)
    """Tokens that tell an option apart, and the option."""
    forks: dict[int, Prefix] = field(default_factory=dict)
    """Tokens that several options continue with, and the prefix after which they differ."""
    ends: int | None = None
    """The option that ends here."""


class Options:
    """Options as token ids, and where each of them differs from all others.

    Args:
        texts: at least one; all different.
        ids: the tokens of each, as they follow a prompt; not empty.

    Raises:
        ATVError: two of them are the same tokens.
    """

    def __init__(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
        self.texts = list(texts)
        self.ids = [tuple(row) for row in ids]
        _refuse_equal(self.texts, self.ids)
        ordered = sorted(range(len(self.ids)), key=lambda option: self.ids[option])
        shared: list[Prefix] = [()] * len(self.ids)  # the longest beginning that each shares with another
        self._forks: dict[Prefix, _Fork] = {(): _Fork()}
        for one, other in pairwise(ordered):  # which shares most with one of its neighbours in order
            common = _common(self.ids[one], self.ids[other])
            self._forks.setdefault(common, _Fork())
            for option in (one, other):
                shared[option] = max(shared[option], common, key=len)
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
        """How many tokens tell an option apart; one more than it has if another one continues it."""
        self.longest = max(map(len, shared))
        """Tokens of the longest beginning that two share: how many are read behind a prompt, at most."""

    @property
    def told_apart(self) -> bool:
        """The first token alone tells each option from all others: the paper's score is defined."""
        return self.longest == 0

    def search(self, following: Tensor) -> Generator[Prefix, list[Tensor], int]:
        """Find the option with the highest score, of equal ones the first; yields prefixes that must be read for it.

        A beginning is at least as likely as what continues it, so the likeliest unread prefix is read next, until none
        is as likely as the best option: hardly any of hundreds of options are read.

        Args:
            following: log-probabilities (vocabulary,) of what follows the prompt.

        Returns:
            The option's number. It takes what `Read` gives for each prefix.
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
    """The score with each of the tokens added, and what stands under the token."""
    values = following[list(tokens)].tolist() if tokens else []
    return [(score + value, what) for value, what in zip(values, tokens.values(), strict=True)]


def _common(one: Prefix, other: Prefix) -> Prefix:
    length = min(len(one), len(other))
    return one[: next((place for place in range(length) if one[place] != other[place]), length)]


def _refuse_equal(texts: Sequence[str], ids: Sequence[Prefix]) -> None:
    counts = Counter(ids)
    equal = [text for text, row in zip(texts, ids, strict=True) if counts[row] > 1]
    if equal:
        raise ATVError(
            f"{len(equal)} answers have the tokens of another one for this LLM ({', '.join(map(repr, equal[:4]))}): "
            "nothing that it says tells them apart. Write them differently, or use another LLM."
        )


def task_options(tokenizer: Any, task: Task, variant: Variant) -> Options:
    """The options of a task as they follow its prompts in a variant; encoded once for each answer prefix.

    Raises:
        ATVError: one of its answers is not an option, or two options are the same tokens.
    """
    if missing := sorted({row.output for row in (*task.train, *task.valid, *task.test)} - set(task.options)):
        raise ATVError(
            f"Task {task.name}: the answer {missing[0]!r} is not among its options ({', '.join(task.options)[:200]}); "
            "name every answer that occurs, or leave options out."
        )
    try:
        return _encoded(tokenizer, task.options, variant.answer_prefix)
    except ATVError as error:
        raise ATVError(f"Task {task.name}: {error}") from None


def option_ids(tokenizer: Any, task: Task, variant: Variant) -> list[Prefix]:
    """The token ids of a task's options in a variant: what `tasks.findings` asks for."""
    return task_options(tokenizer, task, variant).ids


def answer_ids(tokenizer: Any, answer: str, variant: Variant) -> Prefix:
    """The token ids of any one answer in a variant, an option of the task or not."""
    return _encoded(tokenizer, (answer,), variant.answer_prefix).ids[0]


@lru_cache(maxsize=256)
def _encoded(tokenizer: Any, texts: tuple[str, ...], answer_prefix: str) -> Options:
    # A prompt's last line alone: what stands before a line break changes no token of an answer after it.
    return Options(texts, encode_answers(tokenizer, f"\n{answer_prefix}", texts)[1])


def training_options(tokenizer: Any, task: Task) -> Options:
    """The options of a task as they follow the one answer prefix of training, in any template."""
    return task_options(tokenizer, task, Variant(0, TRAIN_PREFIX))


def note_shared(tokenizer: Any, tasks: Sequence[Task]) -> None:
    """Tell who trains on tasks, once, how answers that begin with one token are judged."""
    for task in tasks:
        options = training_options(tokenizer, task)
        for line in shared_beginnings(task, partial(option_ids, tokenizer, task), task.variants("first")):
            warn_once(line)
        continued = [
            text for text, row in zip(options.texts, options.ids, strict=True) if options.judged[text] > len(row)
        ]
        if continued:
            warn_once(
                f"{task.name}: other answers continue {', '.join(map(repr, continued[:4]))}; validation rows with such "
                "an answer count as wrong in the accuracy shown while training, which does not see where it ends."
            )


def answers_right(right: Tensor, judged: Tensor) -> Tensor:
    """Whether the tokens that tell an answer apart are all right; never if it has fewer.

    Args:
        right: (..., answer) bool, for each token of an answer.
        judged: (...,) int64, how many tokens tell it apart: `Options.judged`.

    Returns:
        (...,) bool.
    """
    counted = torch.arange(right.shape[-1], device=right.device) < judged[..., None]
    return (right & counted).sum(-1) == judged


def likeliest(options: Sequence[Options], logits: Tensor, read: Read) -> list[str]:
    """The likeliest option of each row of a batch. Where first tokens tell all options apart nothing is read.

    Args:
        options: of each row.
        logits: (batch, vocabulary) float32, on the CPU, of what follows the prompts.
        read: what reads on, from `reader`.
    """
    chosen: dict[int, int] = {}
    searches: dict[int, Generator[Prefix, list[Tensor], int]] = {}
    asked: dict[int, Prefix] = {}

    def go_on(row: int, found: list[Tensor] | None) -> None:
        try:
            asked[row] = next(searches[row]) if found is None else searches[row].send(found)
        except StopIteration as end:
            chosen[row] = end.value
            asked.pop(row, None)

    for row, own in enumerate(options):
        if own.told_apart:
            chosen[row] = int(logits[row, [ids[0] for ids in own.ids]].argmax())
        else:
            searches[row] = own.search(logits[row].log_softmax(-1))
            go_on(row, None)
    while asked:
        found = read([asked.get(row, ()) for row in range(len(options))])
        for row in list(asked):
            go_on(row, found[row])
    return [own.texts[chosen[row]] for row, own in enumerate(options)]


def reader(llm: nn.Module, inputs: Mapping[str, Tensor], output: Any) -> Read:
    """Reads on behind prompts, as the LLM was called with them: steered where it is called inside a steered context.

    A token at a time, as a decoding step does, so that tokens behind the prompt are told from those of the prompt.

    Args:
        llm: what was called.
        inputs: of that call, all columns: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq).
        output: of that call. Its cache of keys and values is used, and is of no use to anybody else then; without one
            the prompts are read again with each token.
    """
    cache: Any = getattr(output, "past_key_values", None)
    rows = len(inputs["input_ids"])
    usable = attention_alone(cache) and all(layer.is_initialized and len(layer.keys) == rows for layer in cache.layers)
    layers = list(cache.layers) if usable else []

    def read(prefixes: Sequence[Prefix]) -> list[list[Tensor]]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found: list[list[Tensor]] = [[] for _ in prefixes]
        if usable:
            cache.layers = [copy.copy(layer) for layer in layers]  # they grow by new tensors: a copy of none
        past = cache if usable else None
        for place in range(max(map(len, prefixes))):
            there = [len(prefix) > place for prefix in prefixes]
            tokens = [prefix[place] if more else 0 for prefix, more in zip(prefixes, there, strict=True)]
            ids = torch.cat([ids, ids.new_tensor(tokens)[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_tensor(there)[:, None]], dim=1)
            new = slice(-1, None) if usable else slice(None)
            step = call_llm(
                llm,
                keep=1,
                input_ids=ids[:, new],
                attention_mask=mask,
                position_ids=position_ids(mask)[:, new],
                past_key_values=past,
                use_cache=usable,
            )
            past = step.past_key_values if usable else None
            following = step.logits[:, -1].float().cpu().log_softmax(-1)  # (batch, vocabulary)
            for row, more in enumerate(there):
                if more:
                    found[row].append(following[row])
        return found

    return read
