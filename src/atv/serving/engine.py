"""The engine: one thread owns one LLM, and answers requests with different adapters in common batches.

Waiting prompts are read together, and their rows join those that are being decoded; a row leaves when its answer ends.
transformers' continuous batching (`generate_batch`) packs the tokens of all requests into one row and tells the layers
nothing of whose they are, so the batches are our own (`atv.serving.batch`).
"""

import asyncio
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn

from atv import artifact
from atv.data.collate import pad_id
from atv.errors import ATVError, Unavailable
from atv.lm.ends import end_ids
from atv.lm.load import context_length
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.model import ATVModel
from atv.progress import log
from atv.serving.batch import Batch, Row
from atv.serving.beginnings import Beginnings, CachedBeginnings
from atv.serving.requests import Busy, Finish, Limits, Piece, Request, check_request, embedded_tokens
from atv.serving.sampling import Likelihood, Sampler
from atv.serving.text import TextStream

T = TypeVar("T")
FAILURES = 8
"""Calls of the LLM that fail, with no step and no answer in between, until an engine is not healthy: more than those of
one request that a client sends again."""


@dataclass(eq=False, kw_only=True)
class _Work(Row):
    """A row of a request and how its answer is made."""

    request: Request
    deliver: Callable[[Piece], None]
    deadline: float
    sampler: Sampler
    text: TextStream
    next: int = 0
    """The token to read next."""
    generated: int = 0
    cancelled: bool = False
    finished: bool = False

    @property
    def most(self) -> int:
        """Number of tokens that its prompt and answer may have, padding between them included."""
        return self.request.tokens + self.padding


class Decoded(Protocol):
    """Rows that an LLM has read and decodes together."""

    rows: list[Row]
    logits: Tensor
    """(rows, vocabulary) float32 on the CPU, after each row's last token."""

    @property
    def joins(self) -> bool:
        """Whether rows of other batches can be added."""

    def step(self, tokens: Sequence[int]) -> None:
        """Read one more token of each row."""

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order."""

    def join(self, other: Any) -> None:
        """Add the rows of another batch, which must not be used again."""


class BatchEngine(ABC):
    """Answers requests in the order in which they come, as many together as fit, in a thread of its own.

    `submit`, `stream`, `answer` and `run` may be called from any thread or event loop. A subclass says what reads the
    prompts: it makes its LLM ready and then calls this constructor.

    Args:
        tokenizer: the LLM's.
        ends: tokens that end an answer.
        context: most tokens of a text that the LLM reads; None: any.
        vocabulary: number of the LLM's embeddings of tokens, which may be fewer or more than the tokenizer's tokens.
        beginnings: known beginnings of prompts.
        limits: what it takes on.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Iterable[int],
        context: int | None,
        vocabulary: int,
        beginnings: Beginnings[Any],
        limits: Limits,
    ) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.context, self._ends, self._beginnings = context, frozenset(ends), beginnings
        self._vocabulary = vocabulary
        self._wake = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._batches: list[Decoded] = []
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._open = 0  # requests that have not ended, also those that are just being read
        self._failures = 0  # calls of the LLM that failed since a step or an answer succeeded
        self._pace = 1.0  # seconds per finished request, smoothed
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="atv-engine", daemon=True)
        self._thread.start()

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Load an adapter for this engine's LLM; call it through `run` once there are requests.

        Raises:
            ATVError: it is not an adapter, is for another LLM, or cannot be served.
        """

    @abstractmethod
    def _read(self, rows: Sequence[Row]) -> Decoded:
        """Read prompts; called in the engine's thread."""

    def _held(self, rows: Sequence[_Work]) -> int:
        """Return for how many tokens rows need memory, if they are decoded together until they end."""
        return sum(work.most for work in rows)

    # ---- from any thread ----

    def check(self, request: Request) -> None:
        """Raise ATVError if a request can never be answered."""
        rooms = {"the LLM's context": self.context, "the server's limit": self.limits.tokens}
        check_request(request, self.limits.answer, rooms, self._vocabulary)

    def submit(self, request: Request, deliver: Callable[[Piece], None]) -> Callable[[], None]:
        """Queue a request.

        Args:
            request: what to answer.
            deliver: called with each piece, in the engine's thread; it must return at once and not raise.

        Returns:
            A function that cancels the request.

        Raises:
            Busy: too many requests are waiting.
            Unavailable: the engine is closed.
            ATVError: the request can never be answered.
        """
        self.check(request)
        work = _Work(
            prompt=request.prompt,
            model=request.model,
            scale=request.scale,
            request=request,
            deliver=deliver,
            deadline=time.monotonic() + self.limits.seconds,
            sampler=Sampler(request.sampling),
            text=TextStream(self.tokenizer, request.sampling.stop),
        )
        with self._wake:
            self._require_room(self._open - self.limits.rows)
            self._open += 1
            self._waiting.append(work)
            self._counts["prompt_tokens"] += len(request.prompt.ids)
            self._wake.notify()

        def cancel() -> None:
            work.cancelled = True

        return cancel

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; closing the iterator cancels the request. Raises as `submit`."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def deliver(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        cancel = self.submit(request, deliver)
        try:
            while True:
                piece = await pieces.get()
                yield piece
                if piece.finish is not None:
                    return
        finally:
            cancel()

    def answer(self, request: Request) -> list[Piece]:
        """Return all pieces of an answer; blocks until it is finished. Raises as `submit`."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self.submit(request, pieces.put)
        found = [pieces.get()]
        while found[-1].finish is None:
            found.append(pieces.get())
        return found

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function in the engine's thread between two steps, and return its result or raise its exception.

        It is not called if the caller is cancelled before its turn.

        Raises:
            Busy: too many calls are waiting.
            Unavailable: the engine is closed.
        """
        future: Future[T] = Future()
        with self._wake:
            self._require_room(len(self._calls))
            self._calls.append((future, function))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _require_room(self, waiting: int) -> None:
        """Raise an error if the engine is closed or `waiting` requests are all that may wait."""
        if self._closing:
            raise Unavailable("The engine is closed.")
        if waiting >= self.limits.waiting:
            self._counts["refused"] += 1
            raise Busy(waiting, max(1, round(self._pace * waiting)))

    def numbers(self) -> dict[str, float]:
        """Return counters and gauges by name."""
        return {
            "waiting": len(self._waiting),
            "running": sum(len(batch.rows) for batch in self._batches),
            "kept_bytes": self._beginnings.bytes,
            "reused_tokens": self._beginnings.reused_tokens,
            **{
                name: self._counts[name]
                for name in ("prompt_tokens", "answer_tokens", "refused", "stop", "length", "timeout", "cancelled")
            },
            "error": self._counts["error"],
        }

    def healthy(self) -> bool:
        """Whether the engine's thread is alive, and the last calls of the LLM did not all fail."""
        return self._thread.is_alive() and not self._closing and self._failures < FAILURES

    def close(self) -> None:
        """Stop after the current step; unfinished requests end with an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- in the engine's thread ----

    def _loop(self) -> None:
        error = Unavailable("The server is shutting down.")
        try:
            while self._turn():
                pass
        except Exception as unexpected:  # or clients would wait for ever for a thread that has ended
            log.error(f"The engine stopped: {type(unexpected).__name__}: {unexpected}")
            error = Unavailable("The engine has stopped; see the server's log.")
        with self._wake:
            self._closing = True
        for work in [*self._waiting, *(row for batch in self._batches for row in batch.rows)]:
            self._finish(cast(_Work, work), "error", error)
        for future, _ in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._waiting.clear()
        self._calls.clear()
        self._batches.clear()

    def _turn(self) -> bool:
        """Do what there is to do, a call, new prompts and one step of each batch; return False once closed."""
        with self._wake:
            while not (self._waiting or self._calls or self._batches or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            call = self._calls.popleft() if self._calls else None  # one, so that answers go on between them
            new = self._admitted()
        if call is not None:
            _call(*call)
        if new:
            self._begin(new)
        for batch in list(self._batches):
            self._step(batch)
        return True

    def _admitted(self) -> list[_Work]:
        """Take the requests that are read next, and end those that need no answer any more."""
        now = time.monotonic()
        for work in [work for work in self._waiting if work.cancelled or work.deadline < now]:
            self._waiting.remove(work)
            self._finish(work, "cancelled" if work.cancelled else "timeout")
        running = [cast(_Work, row) for batch in self._batches for row in batch.rows]
        new: list[_Work] = []
        longest = 0
        while self._waiting and len(running) + len(new) < self.limits.rows:
            work = self._waiting[0]
            longest = max(longest, len(work.prompt.ids))
            if self._held([*running, *new, work]) > self.limits.tokens:
                break
            if new and longest * (len(new) + 1) > self.limits.prefill:
                break
            new.append(self._waiting.popleft())
        for work in new:  # as many columns as each row may have
            work.room = self.limits.tokens // (len(running) + len(new)) - work.most
        return new

    def _begin(self, new: list[_Work]) -> None:
        """Read prompts. If that fails, each is read alone, so that a request fails for its own reasons only."""
        try:
            batch = self._read(new)
        except Exception as error:
            if len(new) > 1:
                for work in new:
                    self._begin([work])
            else:
                self._count_failure(error)
                self._finish(new[0], "error", error)
            return
        try:
            self._choose(batch)
            other = next((other for other in self._batches if other.joins), None) if batch.joins else None
            if batch.rows and other is not None:
                other.join(batch)
            elif batch.rows:
                self._batches.append(batch)
        except Exception as error:
            self._fail(batch, error)

    def _step(self, batch: Decoded) -> None:
        try:
            batch.step([cast(_Work, row).next for row in batch.rows])
            self._failures = 0
            self._choose(batch)
        except Exception as error:
            self._count_failure(error)
            self._fail(batch, error)
        if not batch.rows:
            self._batches.remove(batch)

    def _count_failure(self, error: Exception) -> None:
        """Count a call of the LLM that failed, unless it did for a reason of its request."""
        if isinstance(error, ATVError) and not isinstance(error, Unavailable):
            return
        self._failures += 1
        if self._failures == FAILURES:
            log.error(
                f"{FAILURES} calls of the LLM in a row failed, the last one with {type(error).__name__}: {error} "
                "The server says in /health that it is down until a call succeeds; if none does, start it again."
            )

    def _fail(self, batch: Decoded, error: Exception) -> None:
        for row in batch.rows:
            self._finish(cast(_Work, row), "error", error)
        batch.keep([])

    def _choose(self, batch: Decoded) -> None:
        """Choose the next token of each row, and drop the rows that end."""
        now, remain = time.monotonic(), []
        for index, (row, logits) in enumerate(zip(batch.rows, batch.logits, strict=True)):
            work = cast(_Work, row)
            if work.cancelled or work.deadline < now:
                self._finish(work, "cancelled" if work.cancelled else "timeout")
                continue
            try:
                self._extend(work, logits)
            except Exception as error:  # a row fails for its own reasons only
                self._finish(work, "error", error)
            if not work.finished:
                remain.append(index)
        batch.keep(remain)

    def _extend(self, work: _Work, logits: Tensor) -> None:
        """Choose a row's next token and deliver what it adds to the answer, which may end with it."""
        remaining = work.request.begun[work.tokens :]
        if remaining:
            work.next = remaining[0]
            return
        work.next = work.sampler.choose(logits)
        work.generated += 1
        self._counts["answer_tokens"] += 1
        told = work.sampler.told(logits, work.next)
        tokens = () if told is None else (told,)
        if work.next in self._ends:
            self._finish(work, "stop", tokens=tokens if work.request.sampling.scored else ())
            return
        text = work.text.push(work.next)
        if work.text.stopped or work.generated >= work.request.sampling.max_tokens:
            self._finish(work, "stop" if work.text.stopped else "length", text=text, tokens=tokens)
        elif text or tokens:
            self._deliver(work, Piece(text, tokens, None, work.generated))

    def _finish(
        self,
        work: _Work,
        why: Finish,
        error: Exception | None = None,
        text: str = "",
        tokens: tuple[Likelihood, ...] = (),
    ) -> None:
        if work.finished:
            return
        rest = "" if why == "error" else work.text.finish()
        work.finished = True
        with self._wake:
            self._open -= 1
        now = time.monotonic()
        self._pace, self._last = 0.9 * self._pace + 0.1 * min(now - self._last, 10.0), now
        self._counts[why] += 1
        if why in ("stop", "length"):
            self._failures = 0
        if error is not None and not isinstance(error, ATVError):
            log.error(f"A request failed: {type(error).__name__}: {error}")
        self._deliver(work, Piece(text + rest, tokens, why, work.generated, error))

    def _deliver(self, work: _Work, piece: Piece) -> None:
        try:
            work.deliver(piece)
        except Exception:  # its receiver is gone, such as a closed event loop
            work.cancelled = True


class Engine(BatchEngine):
    """A `BatchEngine` on a transformers model.

    Args:
        llm: the frozen LLM; nobody else may call it while the engine runs.
        tokenizer: the LLM's.
        limits: what it takes on.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any, limits: Limits | None = None) -> None:
        self.llm, limits = llm.eval(), limits or Limits()
        self._pad, self._shared = pad_id(tokenizer), CachedBeginnings(llm, limits.kept)
        ends, context = end_ids(llm, tokenizer), context_length(llm)
        super().__init__(tokenizer, ends, context, embedded_tokens(llm), self._shared, limits)

    def load(self, folder: Path) -> ATVModel:
        """Load an adapter for this engine's LLM; call it through `run` once there are requests.

        Raises:
            ATVError: it is not an adapter, is for another LLM, or its method changes more than hidden states.
        """
        saved = artifact.read(folder)
        method = METHODS.get(saved.method)
        if method is None or not issubclass(method, ATVMethod):
            raise ATVError(
                f"{folder} is an adapter of the method {saved.method}, which cannot be served: expected atv or fixed, "
                "whose vectors differ from row to row of a batch."
            )
        return method.model_class.from_pretrained(folder, self.llm, tokenizer=self.tokenizer)

    def _read(self, rows: Sequence[Row]) -> Batch:
        return Batch(self.llm, rows, self._pad, self._shared)

    def _held(self, rows: Sequence[_Work]) -> int:
        return len(rows) * max(work.most for work in rows)  # all are padded to the longest


def _call(future: "Future[Any]", function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
