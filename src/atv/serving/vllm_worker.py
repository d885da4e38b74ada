"""vLLM's side: a worker that adds vectors of its own to each request, at the request's tokens.

Use it as vLLM's worker class, `--worker-cls atv.serving.vllm_worker.ATVWorker`; `atv.serving.vllm` is the front end. A
request carries its vectors in `SamplingParams.extra_args` (`Steering.payload`), so the state here lives and ends with
vLLM's own state of the request. In each step the worker finds the rows of the edited tokens in vLLM's flat batch; in
each decoder layer a custom op adds the vectors there. Since the op is opaque to torch.compile, compiled graphs stay on.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from atv.config import Positions
from atv.errors import ATVError
from atv.progress import log
from atv.serving.steers import LAYERS, Part, Steering, edited_rows

KEY = "atv"
"""The entry of `extra_args` that a steered request has."""


class Step:
    """What the op adds in the LLM's current forward call.

    Attributes:
        ran: the layers in which the op has ever been executed.
    """

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self._rows: Tensor | None = None

    @contextmanager
    def adding(self, parts: Sequence[tuple[range, Tensor]]) -> Iterator[None]:
        """Inside this context, add to the rows of each part its vectors (layers, hidden), on the LLM's device."""
        if parts:
            device = parts[0][1].device
            self._rows = torch.tensor([row for rows, _ in parts for row in rows], device=device)
            self._of = torch.tensor([part for part, (rows, _) in enumerate(parts) for _ in rows], device=device)
            self._vectors = torch.stack([vectors for _, vectors in parts], dim=1)  # (layers, parts, hidden)
        try:
            yield
        finally:
            self._rows = None

    def add(self, hidden: Tensor, layer: int) -> None:
        """Add one layer's vectors to hidden states (rows, hidden) in place, in float32 and rounded once."""
        self.ran.add(layer)
        if self._rows is not None:
            # The vectors are float32, so the sum is at least that.
            hidden[self._rows] = (hidden[self._rows] + self._vectors[layer, self._of]).to(hidden.dtype)


step = Step()
"""A worker process runs one forward call at a time. The op cannot receive this as an argument: a compiled graph would
then depend on the number of edited rows."""


@torch.library.custom_op("atv::add_vectors", mutates_args=("hidden",))
def add_vectors(hidden: Tensor, layer: int) -> None:
    """Add the current step's vectors of one layer to hidden states (rows, hidden), in place."""
    step.add(hidden, layer)


class Steered:
    """vLLM's model runner, whose forward calls are steered by the requests in them.

    It uses private attributes of the runner, which differ between versions of vLLM; those that are used are looked up
    here, so that a version without them fails when it starts.

    Args:
        runner: vLLM's V1 model runner, with its model loaded and not compiled yet.

    Attributes:
        counts: `rows`: edited rows so far, of one layer; `dropped`: requests whose payload was refused, and which run
            unsteered, because an exception would end the engine for all requests.
    """

    def __init__(self, runner: Any) -> None:
        self._runner, self.counts = runner, Counter[str](rows=0, dropped=0)
        missing = [
            name
            for name in ("_model_forward", "input_batch", "query_start_loc", "requests", "model_config", "device")
            if not hasattr(runner, name)
        ]
        if missing:
            raise ATVError(
                f"vLLM's {type(runner).__module__}.{type(runner).__name__} has no {', '.join(missing)}: it cannot be "
                "steered. Expected the V1 model runner of the tested version; set VLLM_USE_V2_MODEL_RUNNER=0."
            )
        layers = decoder_layers(runner.get_model())
        self.num_layers, self.hidden_size = len(layers), int(runner.model_config.get_hidden_size())
        for number, layer in enumerate(layers):
            layer.register_forward_hook(_hook(number))
        forward = runner._model_forward

        def steered(*args: Any, **kwargs: Any) -> Any:
            with step.adding(self._parts()):
                return forward(*args, **kwargs)

        runner._model_forward = steered

    def _parts(self) -> list[tuple[range, Tensor]]:
        """The rows and vectors of the requests that are edited in the current step."""
        runner, found = self._runner, []
        batch, starts = runner.input_batch, runner.query_start_loc.np
        for index, request in enumerate(batch.req_ids[: batch.num_reqs]):
            state = runner.requests[request]
            steering = self._steering(state)
            if steering is None:
                continue
            start, end = int(starts[index]), int(starts[index + 1])
            positions, vectors, prompt = steering
            done = int(batch.num_computed_tokens_cpu[index])
            # What vLLM calls the prompt may include the beginning of the answer.
            length = int(batch.num_prompt_tokens[index]) if prompt is None else prompt
            rows = edited_rows(Part(start, end - start, done, length), positions)
            if rows:
                found.append((rows, vectors))
                self.counts["rows"] += len(rows)
        return found

    def _steering(self, state: Any) -> tuple[Positions, Tensor, int | None] | None:
        """A request's positions, vectors (layers, hidden) and tokens of the prompt; None: it is not steered.

        They are kept with it.
        """
        if not hasattr(state, "atv_steering"):
            state.atv_steering = None
            extra = getattr(state.sampling_params, "extra_args", None)
            if isinstance(extra, Mapping) and KEY in extra:
                try:
                    steering = Steering.of(extra[KEY], self.num_layers, self.hidden_size)
                    vectors = steering.dense(self.num_layers).to(self._runner.device)
                    state.atv_steering = steering.positions, vectors, steering.prompt
                except Exception as error:  # whatever it is, it must not end the engine
                    self.counts["dropped"] += 1
                    log.error(f"The request {state.req_id} runs unsteered: {error}")
        return state.atv_steering  # type: ignore[no-any-return]

    def check_ran(self) -> None:
        """Raise ATVError if the model has been run or compiled without the op in one of its layers."""
        if missing := sorted({*range(self.num_layers)} - step.ran):
            raise ATVError(
                f"vLLM runs the layers {missing} without adding vectors: its compiled graph has been made without "
                "them. Empty vLLM's compilation cache (VLLM_DISABLE_COMPILE_CACHE=1), or set enforce_eager."
            )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model as vLLM builds it; ATVError if it is built in another way."""
    try:
        return list(cast(nn.ModuleList, model.get_submodule(LAYERS)))
    except (AttributeError, TypeError) as error:
        raise ATVError(
            f"vLLM's {type(model).__name__} has no list of decoder layers called {LAYERS}; it cannot be steered."
        ) from error


def _hook(number: int) -> Any:
    def add(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        # (hidden, residual): the layer's output is their sum, so adding to one of them changes it.
        torch.ops.atv.add_vectors(output[0] if isinstance(output, tuple) else output, number)

    return add


@cache
def _worker() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        from vllm.v1.worker.gpu_worker import Worker as Base

    class ATVWorker(Base):  # type: ignore[misc]
        """vLLM's worker for this platform, steered."""

        def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            # vLLM caches compiled graphs by its configuration, which does not show the hooks: without this entry it
            # would run a graph that a plain vLLM has compiled, and the other way round.
            vllm_config.additional_config = {**(vllm_config.additional_config or {}), "atv": "steered"}
            super().__init__(vllm_config, *args, **kwargs)

        def load_model(self, *args: Any, **kwargs: Any) -> None:
            """Load the model and install the hooks, before anything is compiled."""
            super().load_model(*args, **kwargs)
            self.steered = Steered(self.model_runner)

        def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> Any:
            """Compile the model, and check that what has been compiled is steered."""
            found = super().compile_or_warm_up_model(*args, **kwargs)
            if self.vllm_config.compilation_config.mode != 0:  # 0: not compiled, so hooks cannot be left out
                self.steered.check_ran()
            return found

        def atv_counts(self) -> dict[str, int]:
            """Return the number of edited rows and of dropped requests so far."""
            return dict(self.steered.counts)

    return ATVWorker


def __getattr__(name: str) -> Any:
    """Define `ATVWorker` when vLLM asks for it: its base class depends on the platform."""
    if name == "ATVWorker":
        return _worker()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
