"""Answers to the rows of a file from an engine, as `atv.evaluation.predict` gives them from a transformers model."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import torch

from atv.data import Prompt
from atv.errors import ATVError
from atv.evaluation.predict import Answer, QueryAnswers
from atv.lm.scoring import Options
from atv.serving.requests import Piece, Request, Serving
from atv.serving.sampling import Likelihood, Sampling
from atv.serving.vllm import SCORED

Branches = dict[tuple[int, ...], list[int]]
"""Beginnings of options, and the tokens with which options go on after each."""


class EngineAnswers(QueryAnswers):
    """Answers queries with an adapter on an engine, as many at a time as the engine takes.

    The options of a task are scored token by token: one request for each beginning that options have, of which only the
    last token is new to the engine.

    Args:
        engine: the engine; nobody else should use it.
        adapter: loaded by the engine.
        training: as for `QueryAnswers`, like the others.
        batch_size: rows whose answers are yielded together.
    """

    def __init__(
        self,
        engine: Serving,
        adapter: Any,
        training: Mapping[str, Any],
        *,
        task: str | None = None,
        template: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(engine.tokenizer, training, adapter.atv.config.reads, task, template, max_new_tokens)
        self._engine, self._adapter, self._batch_size = engine, adapter, batch_size
        self._branches = {} if self.options is None else branches(self.options)
        self._runner = asyncio.Runner()  # vLLM belongs to one event loop
        self._places = asyncio.Semaphore(engine.limits.waiting)

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        after = self.limit if self.options is None else 1 + max(map(len, self._branches))
        limits = (self._engine.context, self._engine.limits.tokens)
        return min(limit for limit in limits if limit is not None) - after

    def ask(self, prompts: Mapping[int, Prompt]) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the answer to each prompt, in batches."""
        waiting = list(prompts)
        while waiting:
            now, waiting = waiting[: self._batch_size], waiting[self._batch_size :]
            yield self._runner.run(self._every(now, prompts))

    async def _every(self, indices: Sequence[int], prompts: Mapping[int, Prompt]) -> list[tuple[int, Answer]]:
        found = await asyncio.gather(*(self._one(prompts[index]) for index in indices))
        return list(zip(indices, found, strict=True))

    async def _one(self, prompt: Prompt) -> Answer:
        if self.options is None:
            stop = () if self.lines else ("\n",)
            pieces = await self._pieces(prompt, Sampling(self.limit, 0.0, stop=stop))
            return Answer("".join(piece.text for piece in pieces).strip())
        scores = await asyncio.gather(*(self._following(prompt, *branch) for branch in self._branches.items()))
        return self.chosen(log_likelihoods(self.options, dict(zip(self._branches, scores, strict=True))))

    async def _following(self, prompt: Prompt, begun: tuple[int, ...], tokens: Sequence[int]) -> dict[int, float]:
        """Return the log-probabilities of tokens after a beginning."""
        parts = [tuple(tokens[start : start + SCORED]) for start in range(0, len(tokens), SCORED)]
        found = await asyncio.gather(*(self._told(prompt, begun, part) for part in parts))
        return {token: value for told in found for token, value in told.scored.items()}

    async def _told(self, prompt: Prompt, begun: tuple[int, ...], tokens: tuple[int, ...]) -> Likelihood:
        pieces = await self._pieces(prompt, Sampling(1, 0.0, scored=tokens), begun)
        return next(told for piece in pieces for told in piece.tokens)

    async def _pieces(self, prompt: Prompt, sampling: Sampling, begun: tuple[int, ...] = ()) -> list[Piece]:
        async with self._places, aclosing(self._stream(prompt, sampling, begun)) as stream:
            pieces = [piece async for piece in stream]
        last = pieces[-1]
        if last.error is not None:
            raise last.error
        if last.finish == "timeout":
            raise ATVError("A row was not answered in time; the command resumes when it is run again.")
        return pieces

    def _stream(self, prompt: Prompt, sampling: Sampling, begun: tuple[int, ...]) -> Any:
        stream: AsyncIterator[Piece] = self._engine.stream(Request(prompt, self._adapter, None, sampling, begun))
        return stream


def branches(options: Options) -> Branches:
    """Return what has to be scored: after each beginning of an option, the tokens that follow it in an option."""
    found: Branches = {}
    for ids in options.ids:
        for place, token in enumerate(ids):
            after = found.setdefault(tuple(ids[:place]), [])
            if token not in after:
                after.append(token)
    return found


def log_likelihoods(options: Options, following: Mapping[tuple[int, ...], Mapping[int, float]]) -> list[float]:
    """Return log-probabilities of whole options, as `Continuation.log_likelihoods` does.

    Args:
        options: the options.
        following: log-probabilities of the tokens of `branches`, after each beginning.
    """
    values = []
    for number, ids in enumerate(options.ids):
        value = sum(following[tuple(ids[:place])][token] for place, token in enumerate(ids))
        if number in options.continued:
            further = torch.tensor([following[tuple(ids)][token] for token in options.continued[number]])
            value += float(torch.log1p(-further.double().exp().sum().clamp(max=1)))
        values.append(value)
    return values
