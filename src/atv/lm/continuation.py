"""What an LLM says behind prompts: options are scored and answers generated from one pass over the prompts.

Call it where the LLM was called, inside the same steered context: tokens behind the prompt are then steered as the
tokens of an answer.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atv.data.collate import position_ids
from atv.lm.prefix import attention_alone, call_llm
from atv.lm.scoring import Options, Prefix
from atv.lm.spans import continuing

SCORED_TOKENS = 512
"""Option tokens in one call, with the options of all rows; more only if a single option of each row has more."""
CACHED_COLUMNS = 2**15
"""Cached tokens in one such call, where the prompts' keys and values are copied for each option."""


class Continuation:
    """A batch of prompts that an LLM has read.

    Args:
        llm: what was called.
        inputs: of that call, all columns: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq); padded on
            the left.
        output: of that call. Its cache of keys and values is used here and must not be used elsewhere. Without a
            cache, or with one that holds more than keys and values, the prompts are read again with each step.
    """

    def __init__(self, llm: nn.Module, inputs: Mapping[str, Tensor], output: Any) -> None:
        self.llm, self.ids, self.mask = llm, inputs["input_ids"], inputs["attention_mask"]
        self.logits: Tensor = output.logits[:, -1].float().cpu()
        """(batch, vocabulary) float32, on the CPU, of what follows the prompts."""
        cache: Any = getattr(output, "past_key_values", None)
        layers = list(cache.layers) if attention_alone(cache) else []
        kept = all(layer.is_initialized and len(layer.keys) == len(self.ids) for layer in layers)
        self._cache, self._layers = cache, layers if kept else []

    def _fork(self, repeats: int = 1) -> Any:
        """The cache as it was behind the prompts, each row repeated; None without one."""
        if not self._layers:
            return None
        layers = [copy.copy(layer) for layer in self._layers]  # they grow by new tensors: the prompts' own stay
        for layer in layers if repeats > 1 else ():
            layer.keys, layer.values = (side.repeat_interleave(repeats, 0) for side in (layer.keys, layer.values))
        self._cache.layers = layers
        return self._cache

    def _call(self, ids: Tensor, mask: Tensor, past: Any, new: int) -> Any:
        """Read the last `new` columns, or all of them if there is no cache; logits are of the last `new`."""
        columns = slice(-new, None) if past is not None else slice(None)
        return call_llm(
            self.llm,
            keep=new,
            input_ids=ids[:, columns],
            attention_mask=mask,
            position_ids=position_ids(mask)[:, columns],
            past_key_values=past,
            use_cache=past is not None,
        )

    def _steps(self) -> Generator[Tensor, tuple[Sequence[int], Sequence[bool]], None]:
        """Read on by one token in each row at a time; takes tokens, and which rows go on, and yields logits."""
        ids, mask, past = self.ids, self.mask, self._fork()
        logits = self.logits
        while True:
            tokens, there = yield logits
            ids = torch.cat([ids, ids.new_tensor(tokens)[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_tensor(there)[:, None]], dim=1)
            output = self._call(ids, mask, past, 1)
            past = output.past_key_values if past is not None else None
            logits = output.logits[:, -1].float().cpu()

    def read(self, prefixes: Sequence[Prefix]) -> list[list[Tensor]]:
        """A prefix for each row to log-probabilities (vocabulary,), on the CPU, behind each of its tokens."""
        found: list[list[Tensor]] = [[] for _ in prefixes]
        steps = self._steps()
        next(steps)
        for place in range(max(map(len, prefixes))):
            there = [len(prefix) > place for prefix in prefixes]
            tokens = [prefix[place] if more else 0 for prefix, more in zip(prefixes, there, strict=True)]
            following = steps.send((tokens, there)).log_softmax(-1)  # (batch, vocabulary)
            for row, more in enumerate(there):
                if more:
                    found[row].append(following[row])
        return found

    def likeliest(self, options: Sequence[Options]) -> list[str]:
        """The likeliest option of each row by its tokens up to where it differs from the others.

        Where first tokens tell all options apart nothing is read.

        Args:
            options: of each row.
        """
        chosen: dict[int, int] = {}
        searches: dict[int, Generator[Prefix, list[Tensor], int]] = {}
        asked: dict[int, Prefix] = {}

        def advance(row: int, found: list[Tensor] | None) -> None:
            try:
                asked[row] = next(searches[row]) if found is None else searches[row].send(found)
            except StopIteration as end:
                chosen[row] = end.value
                asked.pop(row, None)

        for row, own in enumerate(options):
            if own.told_apart:
                chosen[row] = int(self.logits[row, [ids[0] for ids in own.ids]].argmax())
            else:
                searches[row] = own.search(self.logits[row].log_softmax(-1))
                advance(row, None)
        while asked:
            found = self.read([asked.get(row, ()) for row in range(len(options))])
            for row in list(asked):
                advance(row, found[row])
        return [own.texts[chosen[row]] for row, own in enumerate(options)]

    def log_likelihoods(self, options: Options) -> Tensor:
        """Log-probabilities of whole options: the sum over their tokens, (batch, options) float32, on the CPU.

        An option that others continue ("very" beside "very good") must also end there: the probability that none of
        the tokens follows with which others continue is part of its score. Else it would always be as likely as they
        are together.

        Options of one length are read in one call, several for each row, behind the cached prompts; options of one
        token are not read.
        """
        first = self.logits.log_softmax(-1)
        scores = first[:, [ids[0] for ids in options.ids]]  # (batch, options)
        groups: dict[int, list[int]] = {}
        for number, ids in enumerate(options.ids):
            groups.setdefault(len(ids) - (number not in options.continued), []).append(number)
        groups.pop(0, None)
        rows, width = self.ids.shape
        for length, group in groups.items():
            at_once = min(SCORED_TOKENS // (rows * length), CACHED_COLUMNS // (rows * width)) if self._layers else 1
            at_once = max(1, at_once)
            for start in range(0, len(group), at_once):
                some = group[start : start + at_once]
                scores[:, some] += self._rest(options, some, length)
        return scores

    def _rest(self, options: Options, some: Sequence[int], length: int) -> Tensor:
        """What the tokens after the first add to the scores of some options: (batch, some)."""
        rows = len(self.ids)
        read = self.ids.new_tensor([options.ids[number][:length] for number in some])  # (some, length)
        ids = torch.cat([self.ids.repeat_interleave(len(some), 0), read.repeat(rows, 1)], dim=1)
        mask = torch.cat([self.mask.repeat_interleave(len(some), 0), torch.ones_like(read).repeat(rows, 1)], dim=1)
        with continuing():
            output = self._call(ids, mask, self._fork(len(some)), length)
        following = output.logits.float().log_softmax(-1).unflatten(0, (rows, len(some)))  # (rows, some, length, vocab)
        added = []
        for place, number in enumerate(some):
            later = options.ids[number][1:]
            own = following[:, place, range(len(later)), list(later)].sum(-1)  # (rows,)
            if number in options.continued:
                ends = following[:, place, -1].clone()
                ends[:, list(options.continued[number])] = -torch.inf
                own = own + ends.logsumexp(-1)
            added.append(own)
        return torch.stack(added, dim=1).cpu()

    def greedy(self, limit: int, ended: Callable[[Sequence[int]], bool]) -> list[list[int]]:
        """The likeliest token, and the likeliest after it, and so on.

        Args:
            limit: tokens for each row, at least 1.
            ended: asked with a row's tokens after each; true: no more are needed.

        Returns:
            The tokens of each row, the one at which it ended included.
        """
        steps = self._steps()
        found: list[list[int]] = [[token] for token in next(steps).argmax(-1).tolist()]
        more = [not ended(tokens) for tokens in found]
        while any(more) and max(map(len, found)) < limit:
            logits = steps.send(([tokens[-1] if on else 0 for tokens, on in zip(found, more, strict=True)], more))
            for row, token in enumerate(logits.argmax(-1).tolist()):
                if more[row]:
                    found[row].append(token)
                    more[row] = not ended(found[row])
        return found
