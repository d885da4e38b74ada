"""The server under load: requests with two adapters in turn beside the same requests without one, over HTTP.

Every answer is compared with the one that the LLM gives to its prompt alone: the transformers model with hooks or, with
another `--engine`, that engine asked one request at a time. Prompts whose answers end early are left out, so that both
sides decode equally many tokens.
"""

import argparse
import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import psutil
import torch
import uvicorn

from atv.data.render import Prompt
from atv.lm.ends import end_ids
from atv.model import ATVModel
from atv.progress import bar
from atv.serving.app import KEEP_ALIVE, make_app
from atv.serving.engine import Engine
from atv.serving.models import Models, Served
from atv.serving.requests import Limits, Serving
from benchmarks.common import SEED, Figure, Record, options_of, parser, ratio
from benchmarks.subjects import make_atv, pairs_of, small_llm, small_name

PLAIN, STEERED = "unsteered", "two adapters in turn"
CLIENTS, NEW_TOKENS, PROMPTS = (1, 4, 16), 16, 24
DRAWN = 120
"""Prompts that are tried until there are so many with long answers."""
BASE = "llm"
SCALES: dict[str, float] = {"last": 8.0, "answer": 4.0}
"""By positions of the two adapters, whose weights are random: so strong that most answers change."""
AIMS = {"transformers": 0.9, "vllm": 0.95, "llamacpp": 0.9}
"""Least share of the unsteered requests per second."""
TITLES = {"transformers": "", "vllm": ", vLLM", "llamacpp": ", llama.cpp"}


class Asked(NamedTuple):
    """A request."""

    body: bytes
    name: str
    """Of the model."""
    prompt: Prompt


class Case(NamedTuple):
    """A request and the answer that is expected."""

    body: bytes
    expected: str


class Seen(NamedTuple):
    """A client's answers."""

    seconds: list[float]
    wrong: int
    lost: int


class Load(NamedTuple):
    """What all clients saw in one round."""

    clients: list[Seen]
    seconds: float
    """Until the last answer."""

    @property
    def each(self) -> float:
        """Seconds per answer."""
        return self.seconds / max(1, sum(len(one.seconds) for one in self.clients))


def main(argv: Sequence[str] | None = None) -> Path:
    """Serve, and let 1, 4 and 16 clients ask as fast as they are answered."""
    given = _parse(argv)
    options = options_of(given, "benchmarks.serving", argv)
    seconds = 0.3 if options.tiny else given.seconds
    llm, tokenizer = small_llm(options)
    adapters = {
        name: make_atv(options, llm, tokenizer, positions=name, scale=scale).eval() for name, scale in SCALES.items()
    }
    for atv in adapters.values():
        atv.vector_cache.limit = 0
    tokens = 24 if options.tiny else 110
    sides = {side: _requests(side, tokenizer, list(adapters), tokens, options.tiny) for side in (PLAIN, STEERED)}
    record = Record(
        "serving" if given.engine == "transformers" else f"serving_{given.engine}",
        "The server under load" + TITLES[given.engine],
        options,
        llm=small_name(options),
        generator="MiniLM",
        **{"prompt tokens": tokens, "answer tokens": NEW_TOKENS, "seconds per side and round": seconds},
    )
    engine = _engine(given.engine, llm, tokenizer, given.gguf)
    models = Models(BASE, tokenizer, engine.load)
    with TemporaryDirectory() as folder:
        for name, atv in adapters.items():
            _serve(models, name, atv, None if given.engine == "transformers" else Path(folder) / name)
    with running(make_app(engine, models)) as port, ExitStack() as stack:
        with bar("expected", 2 * PROMPTS) as waiting:
            here = adapters if given.engine == "transformers" else None
            cases = {side: _cases(port, requests, here, waiting.advance) for side, requests in sides.items()}
        differing = _differing(port, cases[STEERED])
        shown = stack.enter_context(bar("serving", len(CLIENTS) * 2 * options.rounds))
        _ask(port, [*cases[PLAIN], *cases[STEERED]], max(CLIENTS), min(seconds, 30.0))
        before, every = _memory(), list[Seen]()
        rates: dict[str, dict[Any, Figure]] = {PLAIN: {}, STEERED: {}}
        for clients in CLIENTS:
            found: dict[str, list[Load]] = {PLAIN: [], STEERED: []}
            after = []
            for _ in range(options.rounds):
                for side, rounds in found.items():
                    rounds.append(_ask(port, cases[side], clients, seconds))
                    shown.advance()
                after.append(_memory())
            for side, figure in _measure(record, clients, found, AIMS[given.engine]).items():
                rates[side][clients] = figure
            record.measure(f"{clients} clients: growth of memory after the first round", "MiB", after[-1] - after[0])
            every += [one for rounds in found.values() for load in rounds for one in load.clients]
        grown = _memory() - before
    record.measure(
        f"of {PROMPTS} answers of adapters, other than the unsteered one", "", differing, ("at least", PROMPTS // 2)
    )
    record.measure("answers compared", "", sum(len(one.seconds) for one in every))
    record.measure("wrong answers", "", sum(one.wrong for one in every), ("at most", 0))
    record.measure("lost requests", "", sum(one.lost for one in every), ("at most", 0))
    record.measure("growth of memory during the load", "MiB", grown)
    record.plot("Requests per second", "clients", "requests/s", rates, kind="bars")
    return record.finish()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parse = parser("benchmarks.serving", __doc__)
    parse.add_argument("--seconds", type=float, default=20.0, help="of each side in each round")
    parse.add_argument("--engine", choices=tuple(TITLES), default="transformers")
    parse.add_argument("--gguf", type=Path, help="the file of SmolLM2-135M that llama.cpp serves")
    given = parse.parse_args(argv)
    if (given.engine == "llamacpp") != (given.gguf is not None):
        parse.error("--gguf and --engine llamacpp need each other.")
    if given.tiny and given.engine != "transformers":
        parse.error("--tiny is for --engine transformers; the others load SmolLM2-135M from its files.")
    return given


def _serve(models: Models, name: str, atv: ATVModel, folder: Path | None) -> None:
    """Serve an adapter as it is, or from a folder for an engine that loads it itself; its vectors are not cached."""
    if folder is None:
        models.put(Served(name, atv))
    else:
        atv.save_pretrained(folder)
        models.add(name, folder).adapter.atv.vector_cache.limit = 0


def _measure(record: Record, clients: int, found: dict[str, list[Load]], aim: float) -> dict[str, Figure]:
    """Record the figures of a number of clients; return requests per second of each side."""
    each = {side: [load.each for load in rounds] for side, rounds in found.items()}
    rates = {}
    for side, rounds in found.items():
        rates[side] = Figure.of([1 / value for value in each[side]])
        record.measure(f"{clients} clients, {side}", "requests/s", rates[side])
        every = [value for load in rounds for one in load.clients for value in one.seconds]
        marks = quantiles(every, n=20) if len(every) > 1 else [0.0] * 19
        record.measure(f"{clients} clients, {side}: median", "ms", 1000 * marks[9])
        record.measure(f"{clients} clients, {side}: 95th percentile", "ms", 1000 * marks[18])
    record.keep(f"{clients} clients, ", each)
    what = f"{clients} clients, requests/s, steered / unsteered"
    record.measure(what, "x", ratio(each[PLAIN], each[STEERED]), ("at least", aim))
    return rates


def _memory() -> float:
    """MiB of this process and of an engine's own."""
    this = psutil.Process()
    return float(sum(one.memory_info().rss for one in (this, *this.children(recursive=True)))) / 2**20


def _engine(name: str, llm: Any, tokenizer: Any, gguf: Path | None) -> Serving:
    if name == "transformers":
        return Engine(llm, tokenizer, Limits())
    if name == "vllm":
        from atv.serving.vllm import VLLMEngine

        return VLLMEngine(
            llm.name_or_path, Limits(), dtype="float32", options={"max_model_len": 512, "kv_cache_memory_bytes": 2**29}
        )
    from atv.serving.llamacpp import LlamaCppEngine

    # With keys and values in float16, likeliest tokens that are as good as equal change with what else is in a batch.
    return LlamaCppEngine(cast(Path, gguf), llm.name_or_path, Limits(tokens=2**13), options={"cache_type": "f32"})


def _requests(side: str, tokenizer: Any, adapters: Sequence[str], tokens: int, tiny: bool) -> list[Asked]:
    """Return requests to the plain LLM or to the adapters in turn."""
    found = []
    names = itertools.cycle([BASE] if side == PLAIN else adapters)
    for (query, pairs), name in zip(pairs_of(tokenizer, PROMPTS if tiny else DRAWN, tokens, 1), names, strict=False):
        ids = pairs[0][0]
        body: dict[str, Any] = {"model": name, "prompt": ids, "temperature": 0, "max_tokens": NEW_TOKENS}
        body |= {} if name == BASE else {"query": query}
        found.append(Asked(json.dumps(body).encode(), name, Prompt(ids, query)))
    return found


def _cases(
    port: int, requests: Sequence[Asked], adapters: dict[str, ATVModel] | None, advance: Callable[[], None]
) -> list[Case]:
    """Return requests with long answers; those of adapters that are given are made by transformers with hooks."""
    found: list[Case] = []
    for asked in requests:
        text, ended = _answer(port, asked.body)
        if not ended or len(requests) <= PROMPTS:
            found.append(Case(asked.body, text if adapters is None else _alone(adapters, asked)))
            advance()
        if len(found) == PROMPTS:
            break
    return found


def _differing(port: int, cases: Sequence[Case]) -> int:
    """Return how many answers differ from the plain LLM's: equal ones would not show that vectors are added."""
    plain = [json.loads(case.body) | {"model": BASE} for case in cases]
    for body in plain:
        del body["query"]
    answers = [_answer(port, json.dumps(body).encode())[0] for body in plain]
    return sum(answer != case.expected for answer, case in zip(answers, cases, strict=True))


@torch.no_grad()
def _alone(adapters: dict[str, ATVModel], asked: Asked) -> str:
    """Return the answer of the transformers model to a prompt alone."""
    atv = adapters.get(asked.name) or next(iter(adapters.values()))
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    if asked.name in adapters:
        (text,) = atv.generate([asked.prompt], **how)
        return text
    inputs = torch.tensor([asked.prompt.ids])
    how |= {"pad_token_id": 0, "eos_token_id": end_ids(atv.llm, atv.tokenizer)}
    answer = cast(Any, atv.llm).generate(inputs, attention_mask=torch.ones_like(inputs), **how)
    return str(atv.tokenizer.decode(answer[0, len(asked.prompt.ids) :], skip_special_tokens=True))


def _answer(port: int, body: bytes, connection: http.client.HTTPConnection | None = None) -> tuple[str, bool]:
    """Return the server's answer, and whether it ended before its last token."""
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    (found,) = json.loads(connection.getresponse().read())["choices"]
    return str(found["text"]), found["finish_reason"] != "length"


def _ask(port: int, cases: Sequence[Case], clients: int, seconds: float) -> Load:
    """Let some clients ask for some seconds, each the next request as soon as the former is answered."""
    seen = [Seen([], 0, 0)] * clients
    start = time.perf_counter()
    until = start + seconds

    def client(number: int) -> None:
        draw = random.Random(f"{SEED} {number}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        took, wrong, lost = [], 0, 0
        while time.perf_counter() < until:
            case, began = draw.choice(cases), time.perf_counter()
            try:
                text, _ = _answer(port, case.body, connection)
            except (OSError, http.client.HTTPException, KeyError, ValueError):
                lost += 1
                connection.close()
                continue
            took.append(time.perf_counter() - began)
            wrong += text != case.expected
        connection.close()
        seen[number] = Seen(took, wrong, lost)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(seen, time.perf_counter() - start)


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Serve an application in a thread, at a free port of 127.0.0.1, which is returned."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
