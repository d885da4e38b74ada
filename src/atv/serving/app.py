"""The HTTP server: OpenAI's completions, where the model's name chooses the adapter, and what adapters add to them."""

import asyncio
import hmac
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from atv.errors import ATVError, Unavailable
from atv.progress import log
from atv.serving.completions import Completions, Failed, until_gone
from atv.serving.metrics import Meter
from atv.serving.models import Models, UnknownModel
from atv.serving.page import FILES, file_route
from atv.serving.requests import Busy, Serving
from atv.serving.requests import Request as Asked
from atv.serving.sampling import Sampling
from atv.serving.schemas import MOST_ANSWERS, ChatCompletion, Completion, Load, Steer, explained
from atv.serving.why import Reasons

MOST_BYTES = 2**22
"""Most bytes of a request's body."""
LOCAL = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/health", *FILES)
"""Paths that need no key."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open. A request that is sent at the moment at which the server closes the
connection fails, which happened under load with uvicorn's 5 seconds."""


def problem(
    status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
) -> Response:
    """Return an error in the form of OpenAI's API."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def _host(header: bytes) -> str:
    """Return the host's name in the header Host or Origin."""
    return re.sub(r"^\w+://|:\d*$", "", header.decode("latin-1")).lower()


class _Guard:
    """Refuses requests without the key, or if there is none, to or from another host's name; and bodies too large."""

    def __init__(self, app: Any, key: str | None, hosts: frozenset[str]) -> None:
        self._app, self._key, self._hosts = app, key, hosts

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        if self._key is None:
            host = _host(headers.get(b"host", b""))
            if host not in self._hosts:
                return problem(421, f"The server does not go by the name {host!r}; call it {min(self._hosts)}.")
            origin = headers.get(b"origin")
            if origin is not None and _host(origin) not in self._hosts:
                return problem(403, "A page of another site may not use this server; start it with an API key.")
        elif path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                return problem(401, "The API key is missing or wrong; send it as: Authorization: Bearer KEY.")
        return None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope["path"], dict(scope["headers"]))
        if refused is not None:
            await refused(scope, receive, send)
            return
        whole = bytearray()
        more = scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        while more:  # read before it is parsed, so that no more than the limit is ever held
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            whole += message.get("body", b"")
            more = message.get("more_body", False)
            if len(whole) > MOST_BYTES:
                await problem(413, f"The body has more than {MOST_BYTES} bytes.", connection="close")(
                    scope, receive, send
                )
                return
        body: list[dict[str, Any]] = [{"type": "http.request", "body": bytes(whole), "more_body": False}]

        async def replay() -> Any:
            return body.pop() if body else await receive()

        await self._app(scope, replay, send)


def make_app(
    engine: Serving,
    models: Models,
    *,
    key: str | None = None,
    hosts: Sequence[str] = LOCAL,
    training_queries: bool = False,
) -> FastAPI:
    """Return the server's application.

    Args:
        engine: what answers.
        models: the plain LLM and the adapters.
        key: API key that requests must send. None: none.
        hosts: names by which clients on this machine may call the server, so that no foreign web page can; with a
            key any name will do.
        training_queries: whether /v1/steer shows the training queries nearest to a query.
    """
    reasons = Reasons(engine, training_queries)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        await reasons.close()

    app = FastAPI(title="Adaptive Task Vectors", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(_Guard, key=key, hosts=frozenset(hosts))
    _handle_errors(app)
    routes = _Routes(engine, models, reasons)
    for method, path, route in (
        ("GET", "/health", routes.health),
        ("GET", "/metrics", routes.metrics),
        ("GET", "/v1/models", routes.listed),
        ("GET", "/v1/models/{name:path}", routes.one),
        ("POST", "/v1/chat/completions", routes.chat),
        ("POST", "/v1/completions", routes.complete),
        ("POST", "/v1/steer", routes.steer),
        ("POST", "/v1/adapters", routes.load),
        ("DELETE", "/v1/adapters/{name:path}", routes.remove),
    ):
        app.add_api_route(path, route, methods=[method], response_model=None)
    for path in FILES:
        app.add_api_route(path, file_route(path), methods=["GET"], response_model=None)
    return app


class _Routes:
    """What the server answers, by path."""

    def __init__(self, engine: Serving, models: Models, reasons: Reasons) -> None:
        self.engine, self.models, self.meter, self.reasons = engine, models, Meter(engine), reasons
        self.completions = Completions(engine, models, self.meter)

    async def health(self) -> Response:
        """Say whether requests are being answered."""
        well = self.engine.healthy()
        return JSONResponse({"status": "ok" if well else "down"}, 200 if well else 503)

    async def metrics(self) -> Response:
        """Return the metrics for Prometheus."""
        return Response(generate_latest(self.meter.registry), media_type="text/plain; version=0.0.4")

    async def listed(self) -> Any:
        """List the models."""
        return {"object": "list", "data": [served.describe() for served in self.models]}

    async def one(self, name: str) -> Any:
        """Describe a model."""
        return self.models[name].describe()

    async def chat(self, body: ChatCompletion, request: Request) -> Response:
        """Answer a conversation."""
        served = self.models[body.model]
        turns = [message.turn() for message in body.messages]
        prompt = await asyncio.to_thread(self.models.chat, served, turns, body.task)
        most = body.max_completion_tokens or body.max_tokens
        if body.max_tokens not in (None, most):
            raise ATVError("max_tokens and max_completion_tokens differ; give one of them.")
        return await self.completions.complete(body, served, [prompt], body.told(), most, request, chat=True)

    async def complete(self, body: Completion, request: Request) -> Response:
        """Continue texts."""
        served = self.models[body.model]
        several = body.prompt if isinstance(body.prompt, list) and isinstance(next(iter(body.prompt), 0), str) else [
            body.prompt
        ]  # fmt: skip
        if (answers := len(several) * (body.n or 1)) > MOST_ANSWERS:
            raise ATVError(f"The request asks for {answers} answers; expected at most {MOST_ANSWERS}.")
        if body.query is not None and len(several) > 1:
            raise ATVError(f"query is one text, and prompt has {len(several)}; send a request for each of them.")
        prompts = [await asyncio.to_thread(self.models.text, served, cast(str, each), body.query) for each in several]
        return await self.completions.complete(
            body, served, prompts, body.logprobs, body.max_tokens, request, chat=False
        )

    async def steer(self, body: Steer, request: Request) -> Any:
        """Say what an adapter does for a query."""
        served = self.models[body.model]
        if served.adapter is None:
            raise ATVError(f"{served.name} is the plain LLM: nothing steers it. Name an adapter.")
        if (body.query is None) == (body.messages is None):
            raise ATVError("Give either query or messages.")
        turns = [message.turn() for message in body.messages or ()] or [{"role": "user", "content": body.query or ""}]
        prompt = await asyncio.to_thread(self.models.chat, served, turns, body.task)
        self.engine.check(Asked(prompt, served.adapter, sampling=Sampling(max_tokens=1)))
        return await until_gone(request, self.reasons.explain(served, prompt, body.scale))

    async def load(self, body: Load) -> Any:
        """Load an adapter, or replace one."""
        folder = self.models.allowed(body.folder)
        return (await self.engine.run(lambda: self.models.add(body.name, folder))).describe()

    async def remove(self, name: str) -> Any:
        """Remove an adapter."""
        if self.models.within is None:
            raise ATVError("This server's adapters cannot be changed; start it with --adapters-from DIR to allow it.")
        self.models.remove(name)
        return {"id": name, "object": "model", "deleted": True}


def _handle_errors(app: FastAPI) -> None:
    """Every error is JSON, and no traceback leaves the server."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        param, message = explained(error.errors())
        return problem(400, message, param=param or None)

    @app.exception_handler(ATVError)
    async def refused(_: Request, error: ATVError) -> Response:
        if isinstance(error, Busy):
            return problem(429, str(error), retry_after=str(error.seconds))
        if isinstance(error, Unavailable):
            return problem(503, str(error))
        if isinstance(error, UnknownModel):
            return problem(404, str(error), param="model", code="model_not_found")
        return problem(400, str(error))

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> Response:
        return problem(error.status, str(error))

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error(f"A request failed: {type(error).__name__}: {error}")
        return problem(500, "The request failed for a reason that is not its own; see the server's log.")
