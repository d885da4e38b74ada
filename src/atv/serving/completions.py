"""Answers to completions: several choices at once, whole or streamed, cancelled when the client goes away."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from atv.data.render import Prompt
from atv.errors import ATVError
from atv.serving.forms import Choice, Form
from atv.serving.metrics import Meter
from atv.serving.models import Models, Served
from atv.serving.requests import Busy, Piece, Serving
from atv.serving.requests import Request as Asked
from atv.serving.sampling import Likelihood
from atv.serving.schemas import DEFAULT_TOKENS, Ask

T = TypeVar("T")
Pieces = asyncio.Queue[tuple[int, Piece | Exception]]


class Failed(Exception):
    """An answer that ended without one."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Completions:
    """Makes the answers of completions."""

    def __init__(self, engine: Serving, models: Models, meter: Meter) -> None:
        self.engine, self.models, self.meter = engine, models, meter

    async def complete(
        self,
        body: Ask,
        served: Served,
        prompts: Sequence[Prompt],
        logprobs: int | None,
        most: int | None,
        request: Request,
        *,
        chat: bool,
    ) -> Response:
        """Answer a request: `n` choices for each prompt."""
        scale = None if body.scale is None or served.adapter is None else body.scale * served.adapter.atv.config.scale
        if body.scale is not None and served.adapter is None:
            raise ATVError(f"scale is given, and {served.name} is the plain LLM, which has no vectors.")
        asked = [
            Asked(prompt, served.adapter, scale, body.sampling(choice, logprobs, most or self._room(prompt)))
            for prompt in prompts
            for choice in range(body.n or 1)
        ]
        most_at_once = self.engine.limits.rows + self.engine.limits.waiting
        if len(asked) > most_at_once:
            raise ATVError(
                f"The request asks for {len(asked)} answers, and the server takes {most_at_once} at a time (--rows and "
                "--waiting); ask for fewer."
            )
        for each in asked:
            self.engine.check(each)
        prefix = "chatcmpl" if chat else "cmpl"
        form = Form(
            f"{prefix}-{uuid.uuid4().hex}", served.name, chat, self.models.tokenizer, logprobs is not None,
            sum(len(prompt.ids) for prompt in prompts),
        )  # fmt: skip
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(asked, form, usage)
            first = await until_gone(request, _first(events))  # what is refused at once has a status of its own
            return StreamingResponse(_behind(first, events), media_type="text/event-stream")
        choices = await until_gone(request, self._all(asked, form.model))
        return JSONResponse(form.whole(choices))

    def _room(self, prompt: Prompt) -> int:
        """Return the most tokens of an answer to a request that does not say so."""
        limits = (self.engine.context, self.engine.limits.tokens)
        after = [limit - len(prompt.ids) for limit in limits if limit is not None]
        return max(1, min(DEFAULT_TOKENS, self.engine.limits.answer, *after))

    async def _all(self, asked: Sequence[Asked], model: str) -> list[Choice]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(each, model)) for each in asked]
        return [task.result() for task in tasks]

    async def _one(self, asked: Asked, model: str) -> Choice:
        texts: list[str] = []
        tokens: list[Likelihood] = []
        async for piece in self._pieces(asked, model):
            texts.append(piece.text)
            tokens += piece.tokens
        assert piece.finish is not None
        return Choice("".join(texts), tokens, piece.finish, piece.generated)

    async def _pieces(self, asked: Asked, model: str) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; raise what ended it otherwise."""
        began, end = time.monotonic(), "cancelled"
        try:
            async with aclosing(cast(Any, self.engine.stream(asked))) as pieces:
                async for piece in pieces:
                    if piece.finish is not None:
                        end = piece.finish
                    if piece.finish == "timeout":
                        raise Failed(504, "The answer took too long.")
                    if piece.finish == "error":
                        if isinstance(piece.error, ATVError):
                            raise piece.error
                        raise Failed(500, "The answer failed; see the server's log.")
                    yield piece
        except Busy:
            end = "refused"
            raise
        finally:
            self.meter.requests.labels(model, end).inc()
            self.meter.seconds.labels(model).observe(time.monotonic() - began)

    async def _follow(self, index: int, asked: Asked, model: str, pieces: Pieces) -> None:
        try:
            async for piece in self._pieces(asked, model):
                await pieces.put((index, piece))
        except Exception as error:
            await pieces.put((index, error))

    async def _events(self, asked: Sequence[Asked], form: Form, usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events of all answers, as they come."""
        pieces: Pieces = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(index, each, form.model, pieces)) for index, each in enumerate(asked)]
        try:
            running, generated, begun = len(tasks), 0, set[int]()
            while running:
                index, piece = await pieces.get()
                if isinstance(piece, Exception):
                    if not begun:
                        raise piece
                    yield _event(
                        {"error": {"message": str(piece), "type": "server_error", "param": None, "code": None}}
                    )
                    break
                for part in form.parts(index, piece, first=index not in begun):
                    yield _event(part)
                begun.add(index)
                if piece.finish is not None:
                    running, generated = running - 1, generated + piece.generated
            if usage:
                yield _event(form.head(True) | {"choices": [], "usage": form.usage(generated)})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part, ensure_ascii=False)}\n\n"


async def _first(events: AsyncIterator[str]) -> str:
    return await anext(events)


async def _behind(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(cast(Any, events)):
        yield first
        async for event in events:
            yield event


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await an answer; cancel it when the client goes away."""
    task, gone = asyncio.create_task(work), asyncio.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if not gone.is_set():
            raise
        raise Failed(499, "The client has gone.") from None
    except BaseExceptionGroup as group:  # of the answers to one request: the first that failed
        raise group.exceptions[0] from None
    finally:
        watching.cancel()
        task.cancel()
