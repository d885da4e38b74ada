"""Continue prompts that an LLM has read: score options and generate answers from one prefill.

Use it inside the steered context in which the LLM was called: tokens after the prompt are then steered as answer
tokens.
"""

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atv.data.collate import position_ids
from atv.lm.prefix import attention_alone, call_llm
from atv.lm.scoring import Options, Prefix, require_finite
from atv.lm.spans import continuing

SCORED_TOKENS = 512
"""Most option tokens per call, over all rows; exceeded only if one option per row has more."""
CACHED_COLUMNS = 2**15
"""Most cached tokens per such call, in which the prompts' keys and values are copied for each option."""


class Continuation:
    """A batch of prompts that an LLM has read.

    Args:
        llm: the LLM that was called.
        inputs: inputs of that call, all columns: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq);
            padded on the left.
        output: output of that call. Its cache of keys and values is used here and must not be used elsewhere. Without
            a cache, or with one that contains more than keys and values, the prompts are read again at each step.

    Raises:
        ATVError: logits are not finite, here or in what is read later.
    """

    def __init__(self, llm: nn.Module, inputs: Mapping[str, Tensor], output: Any) -> None:
        self.llm, self.ids, self.mask = llm, inputs["input_ids"], inputs["attention_mask"]
        self.logits: Tensor = require_finite(output.logits[:, -1].float().cpu())
        """Logits after the prompts: (batch, vocabulary) float32, on the CPU."""
        cache: Any = getattr(output, "past_key_values", None)
        layers = list(cache.layers) if attention_alone(cache) else []
        kept = all(layer.is_initialized and len(layer.keys) == len(self.ids) for layer in layers)
        self._cache, self._layers = cache, layers if kept else []

    def _fork(self, repeats: int = 1) -> Any:
        """Return the cache as it was after the prompts, with each row repeated; None without a cache."""
        if not self._layers:
            return None
        layers = [copy.copy(layer) for layer in self._layers]  # they grow by replacing tensors, so the originals stay
        for layer in layers if repeats > 1 else ():
            layer.keys, layer.values = (side.repeat_interleave(repeats, 0) for side in (layer.keys, layer.values))
        self._cache.layers = layers
        return self._cache

    def _call(self, ids: Tensor, mask: Tensor, past: Any, new: int) -> Any:
        """Read the last `new` columns, or all of them without a cache; return logits of the last `new`."""
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
        """Read one more token per row and step: receive the tokens and which rows continue, yield logits."""
        ids, mask, past = self.ids, self.mask, self._fork()
        logits = self.logits
        while True:
            tokens, there = yield logits
            ids = torch.cat([ids, ids.new_tensor(tokens)[:, None]], dim=1)
            mask = torch.cat([mask, mask.new_tensor(there)[:, None]], dim=1)
            output = self._call(ids, mask, past, 1)
            past = output.past_key_values if past is not None else None
            logits = output.logits[:, -1].float().cpu()
            require_finite(logits[list(there)])

    def read(self, prefixes: Sequence[Prefix]) -> list[list[Tensor]]:
        """Return log-probabilities (vocabulary,), on the CPU, after each token of each row's prefix."""
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
        """Return the likeliest option of each row, judged by its tokens up to where it differs from the others.

        If first tokens tell all options apart, nothing is read.

        Args:
            options: the options of each row.
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
        """Return log-probabilities of whole options, summed over their tokens: (batch, options) float32, on the CPU.

        An option that others continue ("very" next to "very good") must also end there: its score includes the
        probability that none of the tokens follows with which others continue. Otherwise it would always be at least
        as likely as all of them together.

        Options of the same length are read in one call, several per row, after the cached prompts; options of one token
        are not read.
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
        """Return what the tokens after the first add to the scores of some options: (batch, some)."""
        rows = len(self.ids)
        read = self.ids.new_tensor([options.ids[number][:length] for number in some])  # (some, length)
        ids = torch.cat([self.ids.repeat_interleave(len(some), 0), read.repeat(rows, 1)], dim=1)
        mask = torch.cat([self.mask.repeat_interleave(len(some), 0), torch.ones_like(read).repeat(rows, 1)], dim=1)
        with continuing():
            output = self._call(ids, mask, self._fork(len(some)), length)
        following = (
            require_finite(output.logits.float()).log_softmax(-1).unflatten(0, (rows, len(some)))
        )  # (rows, some, length, vocab)
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

    def greedy(
        self,
        limit: int,
        ended: Callable[[Sequence[int]], bool],
        see: Callable[[Tensor], None] | None = None,
    ) -> list[list[int]]:
        """Decode greedily.

        Args:
            limit: most tokens per row, at least 1.
            ended: called with a row's tokens after each new one; true ends the row.
            see: called with the logits of each step, (batch, vocabulary); those of a row that has ended mean nothing.

        Returns:
            The tokens of each row, including the one at which it ended.
        """
        steps = self._steps()
        logits = next(steps)
        if see is not None:
            see(logits)
        found: list[list[int]] = [[token] for token in logits.argmax(-1).tolist()]
        more = [not ended(tokens) for tokens in found]
        while any(more) and max(map(len, found)) < limit:
            logits = steps.send(([tokens[-1] if on else 0 for tokens, on in zip(found, more, strict=True)], more))
            if see is not None:
                see(logits)
            for row, token in enumerate(logits.argmax(-1).tolist()):
                if more[row]:
                    found[row].append(token)
                    more[row] = not ended(found[row])
        return found
