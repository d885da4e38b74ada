"""Why a query is answered as it is: what an adapter's vectors are for it, and how near it is to the training."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from atv.data.render import Prompt
from atv.errors import ATVError
from atv.evaluation.inspect import TrainingQueries, distance, lenses, read_by_generator
from atv.expansion import Expansion
from atv.gate import Gate
from atv.lm.hooks import decoder_layers
from atv.model import ATVModel
from atv.progress import log
from atv.serving.models import Served
from atv.serving.requests import Busy, Serving
from atv.training.record import training_tasks
from atv.vectors import ATV

T = TypeVar("T")
SHARE = 0.05
"""Share of the validation rows that would be called out of domain."""
ENOUGH = 20
"""Fewer validation rows than this set no threshold; the training queries do."""
LEFT_OUT = "Training queries are not shown; start the server with --training-queries to show them to its clients."


@dataclass(frozen=True)
class Domain:
    """Where a query is called out of domain, in nearness to the training queries."""

    threshold: float
    """Nearness that 1 in 20 rows fall below."""
    of: str
    """What the rows are: "validation rows" or "training queries"."""

    @classmethod
    @torch.no_grad()
    def of_gate(cls, gate: Gate, task: int) -> "Domain":
        """Measure it on the rows of a task that a fitted gate contains."""
        validated = gate.validated[gate.validated_tasks == task]
        if len(validated) >= ENOUGH:
            return cls(validated.quantile(SHARE).item(), "validation rows")
        own = gate.reference_tasks == task
        near = gate.nearness(gate.references[own], gate.reference_tasks[own], leave_out=1)
        return cls(near.quantile(SHARE).item(), "training queries")


class Reasons:
    """Explains what adapters do for queries.

    Args:
        engine: all work with an adapter is done in its thread, between steps.
        training: whether to show the nearest training queries. They are read from where the training took them, by the
            first request for each adapter.
    """

    def __init__(self, engine: Serving, training: bool) -> None:
        self._engine, self._training = engine, training
        self._domains: WeakKeyDictionary[Served, dict[int, Domain]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Served, asyncio.Future[TrainingQueries | str]] = WeakKeyDictionary()
        # Reading takes minutes. In asyncio's default threads it would delay other requests.
        self._reader = ThreadPoolExecutor(1, "atv-training-queries")

    async def explain(self, served: Served, prompt: Prompt, factor: float | None) -> dict[str, Any]:
        """Return what an adapter does for a prompt, as JSON values.

        Args:
            served: the adapter.
            prompt: from `Models.chat`.
            factor: factor of the adapter's strength; None: 1.
        """
        found, state = await self._engine.run(lambda: self._looked(served, prompt, factor))
        known = await self._training_queries(served)
        if isinstance(known, str):
            return found | {"nearest": None, "nearest_note": known}
        drawn = f", drawn at random from {known.total}" if known.total > len(known.rows) else ""
        return found | {
            "nearest": [asdict(near) for near in known.nearest(state)],
            "nearest_note": f"Of {len(known.rows)} training queries{drawn}, by the cosine of the generator's states.",
        }

    async def close(self) -> None:
        """Wait for the thread that reads training queries, which ends once the engine is closed."""
        await asyncio.to_thread(self._reader.shutdown, cancel_futures=True)

    # ---- in the engine's thread ----

    @torch.no_grad()
    def _looked(self, served: Served, prompt: Prompt, factor: float | None) -> tuple[dict[str, Any], Tensor]:
        """What an adapter does, without the training queries, and its state of the query, (state,)."""
        atv: ATV = served.adapter.atv
        scale = atv.config.scale * (1.0 if factor is None else factor)
        state = atv.states([read_by_generator(atv, prompt)])  # (1, state)
        vectors = atv.expand(state)  # (1, layers, hidden)
        gate, near = distance(atv, state)
        layers, lens = _layers(served.adapter, prompt, vectors, scale)
        found = {
            "model": served.name,
            "adapter": served.digest,
            "positions": atv.config.positions,
            "scale": scale,
            "query": prompt.query,
            "gate": gate,
            "distance": None if near is None else asdict(near) | self._judged(served, state, near.nearness),
            "layers": layers,
            "lens": lens,
        }
        try:
            json.dumps(found, allow_nan=False)
        except ValueError as error:
            raise ATVError(
                f"For this query and a strength of {scale}, the vectors of {served.name} or the LLM's states are not "
                "finite (NaN or infinite), so they cannot be shown. Send a smaller scale, or start the server with "
                "another --dtype, such as float32."
            ) from error
        return found, state[0]

    def _judged(self, served: Served, state: Tensor, nearness: float) -> dict[str, Any]:
        """Whether a query is out of domain, and by which threshold."""
        expansion = served.adapter.atv.expansion
        assert isinstance(expansion, Expansion)  # there is a distance, and so a gate
        task, domains = int(expansion.nearest_tasks(state).item()), self._domains.setdefault(served, {})
        domain = domains.get(task)
        if domain is None:
            domain = domains[task] = Domain.of_gate(expansion.gate, task)
        return {
            "threshold": domain.threshold,
            "threshold_of": domain.of,
            "out_of_domain": nearness < domain.threshold,
        }

    # ---- training queries ----

    async def _training_queries(self, served: Served) -> TrainingQueries | str:
        """An adapter's training queries, read once, or why there are none."""
        if not self._training:
            return LEFT_OUT
        if not isinstance(served.adapter, ATVModel):
            return "This engine does not read training queries."
        if served not in self._known:
            loop = asyncio.get_running_loop()

            def call(function: Callable[[], T]) -> T:
                while True:
                    try:
                        return asyncio.run_coroutine_threadsafe(self._engine.run(function), loop).result()
                    except Busy:  # the queries are read for all later requests, so wait for a place
                        time.sleep(0.1)

            self._known[served] = loop.run_in_executor(self._reader, _read, served, call)
        return await asyncio.shield(self._known[served])  # a client that goes away does not end it for others


def _read(served: Served, call: Callable[[Callable[[], Any]], Any]) -> TrainingQueries | str:
    assert served.folder is not None  # of an adapter
    try:
        return TrainingQueries(served.adapter, training_tasks(served.folder), call)
    except Exception as error:
        kind = "" if isinstance(error, ATVError) else f"{type(error).__name__}: "
        log.warning(f"The training queries of {served.name} cannot be read: {kind}{error}")
        return "The training queries cannot be read; see the server's log."  # which names files of the server


def _layers(adapter: Any, prompt: Prompt, vectors: Tensor, scale: float) -> tuple[list[dict[str, Any]], str]:
    """The lens of each layer; of an engine whose LLM cannot be read, the norms of the vectors alone."""
    lens = "This engine does not show the LLM's layers."
    if isinstance(adapter, ATVModel):
        found, lens = lenses(adapter, prompt, vectors, scale=scale)
        if found:
            return [
                _layer(each.layer, each.norm, each.stream, each.alone_tokens, each.plain_tokens, each.steered_tokens)
                for each in found
            ], lens
        numbers = adapter.config.layer_indices(len(decoder_layers(adapter.llm, adapter.config.layer_path)))
    else:
        numbers = getattr(adapter, "layer_numbers", list(range(vectors.shape[1])))
    norms = (scale * vectors[0]).norm(dim=-1).tolist()
    return [_layer(number, norm) for number, norm in zip(numbers, norms, strict=True)], lens


def _layer(
    layer: int,
    norm: float | None,
    stream: float | None = None,
    promoted: Sequence[Any] = (),
    plain: Sequence[Any] = (),
    steered: Sequence[Any] = (),
) -> dict[str, Any]:
    return {
        "layer": layer,
        "norm": norm,
        "stream": stream,
        "promoted": list(promoted),
        "plain": list(plain),
        "steered": list(steered),
    }
