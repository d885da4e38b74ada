"""Serving with vLLM, without vLLM: which rows are edited, what is sent, and what is refused."""

import asyncio
import json
import random
import sys
from contextlib import aclosing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, make_generator, make_llm, toy_task
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from serving import TEXTS, prompt, same_predictions, sequential
from torch import nn
from transformers import set_seed

from atv.cli import main
from atv.config import ATVConfig, Positions
from atv.data.render import Prompt
from atv.errors import ATVError, Unavailable
from atv.model import ATVModel
from atv.serving import vllm, vllm_worker
from atv.serving.app import make_app
from atv.serving.batch import Row
from atv.serving.models import Models
from atv.serving.predict import EngineAnswers
from atv.serving.requests import Busy, Limits, Request
from atv.serving.sampling import Sampling
from atv.serving.steers import Steering
from atv.serving.vllm import VLLMEngine, cache_salt, check_config, likelihood
from atv.serving.vllm_worker import KEY, Steered

POSITIONS = ("last", "last:3", "answer", "all")
LAYERS, HIDDEN = 3, 4


# ---- the worker ----


class Doubling(nn.Module):
    """A decoder layer in vLLM's form: its output is the sum of the two that it returns."""

    def forward(self, hidden, residual):
        return hidden + residual, hidden.clone()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Doubling() for _ in range(LAYERS))

    def forward(self, hidden):
        residual = torch.zeros_like(hidden)
        for layer in self.model.layers:
            hidden, residual = layer(hidden, residual)
        return hidden + residual


def by_hand(hidden, vectors, rows):
    """What the model returns if vectors (layers, hidden) are added to these rows."""
    residual = torch.zeros_like(hidden)
    for layer in range(LAYERS):
        hidden, residual = hidden + residual, hidden
        hidden = hidden.clone()
        for row in rows:
            hidden[row] = hidden[row] + vectors[row][layer]
    return hidden + residual


class Runner:
    """The parts of vLLM's model runner that are used."""

    def __init__(self):
        self.model, self.requests, self.device = Model(), {}, torch.device("cpu")
        self.model_config = SimpleNamespace(get_hidden_size=lambda: HIDDEN)
        self.input_batch, self.query_start_loc = SimpleNamespace(), SimpleNamespace()

    def get_model(self):
        return self.model

    def _model_forward(self, hidden):
        return self.model(hidden)

    def read(self, parts):
        """Run one step: name, tokens done, new tokens and prompt tokens of each request."""
        starts = [0]
        for _, _, new, _ in parts:
            starts.append(starts[-1] + new)
        self.query_start_loc.np = torch.tensor([*starts, 999]).numpy()
        self.input_batch = SimpleNamespace(
            req_ids=[*(name for name, *_ in parts), "gone"],
            num_reqs=len(parts),
            num_computed_tokens_cpu=torch.tensor([done for _, done, _, _ in parts]).numpy(),
            num_prompt_tokens=torch.tensor([length for *_, length in parts]).numpy(),
        )
        hidden = torch.randn(starts[-1], HIDDEN)
        return hidden, self._model_forward(hidden.clone())

    def add(self, name, payload):
        extra = None if payload is None else {KEY: payload}
        params = SimpleNamespace(extra_args=extra)
        self.requests[name] = SimpleNamespace(req_id=name, sampling_params=params)


def make_steering(positions="last", layers=(0, 1, 2)):
    return Steering(torch.randn(len(layers), HIDDEN), tuple(layers), Positions.parse(positions))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_chunked_preempted_and_cached_requests_are_edited_at_their_tokens(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    runner = Runner()
    steered = Steered(runner)
    world = {}
    for index in range(6):
        positions = draw.choice([None, *POSITIONS])
        layers = sorted(draw.sample(range(LAYERS), draw.randint(1, LAYERS)))
        steering = None if positions is None else make_steering(positions, layers)
        runner.add(str(index), None if steering is None else steering.payload())
        length = draw.randint(1, 9)
        world[str(index)] = {"steering": steering, "prompt": length, "text": length, "done": draw.randrange(length)}
    edited = 0
    for _ in range(12):
        parts, vectors, rows, row = [], {}, [], 0
        for name in draw.sample(sorted(world), draw.randint(1, len(world))):
            about = world[name]
            if draw.random() < 0.15:
                about["done"] = draw.randrange(about["text"])  # preempted; a part of it may be cached
            new = draw.randint(1, about["text"] - about["done"])
            parts.append((name, about["done"], new, about["prompt"]))
            for place in range(about["done"], about["done"] + new):
                if about["steering"] is not None:
                    first = {"last": 1, "last:3": 3, "answer": 1, "all": 99}
                    where = about["steering"].positions
                    size = next(size for key, size in first.items() if Positions.parse(key) == where)
                    in_prompt = about["prompt"] - size <= place < about["prompt"]
                    if in_prompt or (where.answer and place >= about["prompt"]):
                        own = torch.zeros(LAYERS, HIDDEN)
                        for vector, layer in zip(about["steering"].vectors, about["steering"].layers, strict=True):
                            own[layer] = vector
                        vectors[row] = own
                        rows.append(row)
                row += 1
            about["done"] += new
            about["text"] += about["done"] == about["text"]  # a new token
        hidden, output = runner.read(parts)
        edited += len(rows)
        torch.testing.assert_close(output, by_hand(hidden, vectors, rows))
        assert steered.counts["rows"] == edited


def test_the_op_adds_in_compiled_graphs_too():
    runner = Runner()
    steered = Steered(runner)
    torch._dynamo.reset()
    runner.model = torch.compile(runner.model, backend="aot_eager", dynamic=True, fullgraph=True)
    vllm_worker.step.ran.clear()
    with refused("layers [0, 1, 2]", "enforce_eager"):
        steered.check_ran()
    runner.add("plain", None)
    steering = make_steering()
    runner.add("steered", steering.payload())
    for lengths in ((3, 5), (4, 2)):
        runner.requests["steered"].__dict__.pop("atv_steering", None)
        hidden, output = runner.read([("plain", 0, lengths[0], 3), ("steered", 0, lengths[1], lengths[1])])
        row = sum(lengths) - 1
        torch.testing.assert_close(output, by_hand(hidden, {row: steering.vectors}, [row]))
    steered.check_ran()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_addition_rounded_once(dtype):
    hidden, steering = torch.randn(5, HIDDEN).to(dtype), make_steering()
    expected = hidden.float()
    expected[2] += steering.vectors[1]
    with vllm_worker.step.adding([(range(2, 3), steering.dense(LAYERS))]):
        torch.ops.atv.add_vectors(hidden, 1)
    assert torch.equal(hidden, expected.to(dtype))
    torch.ops.atv.add_vectors(hidden, 1)  # outside of a step
    assert torch.equal(hidden, expected.to(dtype))


BAD = (
    {"vectors": b"123"},
    {"vectors": "text"},
    {"vectors": torch.full((3, HIDDEN), float("nan")).numpy().tobytes()},
    {"vectors": torch.zeros(3, HIDDEN + 1).numpy().tobytes()},
    {"layers": [0, 1]},
    {"layers": [0, 1, 3]},
    {"layers": [0, 0, 1]},
    {"layers": [2, 1, 0]},
    {"layers": [-1, 0, 1]},
    {"layers": []},
    {"layers": None},
    {"prompt_tokens": 0},
    {"prompt_tokens": "many"},
    {"prompt_tokens": []},
    {"vectors": 10**12},
    {"layers": [0, 1, True]},
    {"layers": [0, 1, 10**30]},
)


@pytest.mark.parametrize("wrong", [*BAD, "text", 3, []], ids=str)
def test_a_malformed_request_runs_unsteered_and_ends_no_other(wrong, caplog):
    runner = Runner()
    steered = Steered(runner)
    payload = make_steering().payload() | wrong if isinstance(wrong, dict) else wrong
    steering = make_steering()
    runner.add("good", steering.payload())
    runner.add("bad", payload)
    for _ in range(2):
        hidden, output = runner.read([("bad", 0, 3, 3), ("good", 0, 4, 4)])
        torch.testing.assert_close(output, by_hand(hidden, {6: steering.vectors}, [6]))
    assert steered.counts["dropped"] == 1
    with pytest.raises(ATVError):
        Steering.of(payload, LAYERS, HIDDEN)


def test_a_runner_or_model_of_another_shape_is_refused():
    runner = Runner()
    del runner.requests
    with refused("Runner has no requests", "VLLM_USE_V2_MODEL_RUNNER=0"):
        Steered(runner)
    runner = Runner()
    runner.model = nn.Linear(1, 1)
    with refused("Linear has no list of decoder layers"):
        Steered(runner)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_worker_has_the_base_class_of_the_platform(monkeypatch, platform):
    class Base:
        def __init__(self, vllm_config):
            self.vllm_config, self.model_runner = vllm_config, Runner()

        def load_model(self):
            self.loaded = True

        def compile_or_warm_up_model(self):
            self.model_runner.model(torch.zeros(1, HIDDEN))
            return 3

    place, name = {"cpu": ("cpu_worker", "CPUWorker"), "gpu": ("gpu_worker", "Worker")}[platform]
    modules = {
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: platform == "cpu")},
        f"vllm.v1.worker.{place}": {name: Base},
    }
    stub(monkeypatch, modules)
    vllm_worker._worker.cache_clear()
    config = SimpleNamespace(additional_config={"own": 1}, compilation_config=SimpleNamespace(mode=3))
    worker = vllm_worker.ATVWorker(config)
    vllm_worker._worker.cache_clear()
    assert isinstance(worker, Base)
    worker.load_model()
    vllm_worker.step.ran.clear()
    assert worker.compile_or_warm_up_model() == 3
    assert worker.atv_counts() == {"rows": 0, "dropped": 0}
    assert config.additional_config.keys() == {"own", "atv"}  # a cache key of its own for compiled graphs


def stub(monkeypatch, modules):
    for path, names in modules.items():
        parts = path.split(".")
        for size in range(1, len(parts) + 1):
            parent = ".".join(parts[:size])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for name, value in names.items():
            monkeypatch.setattr(sys.modules[path], name, value, raising=False)


# ---- the front end ----


def test_the_salt_differs_wherever_tokens_are_edited_differently():
    torch.manual_seed(0)
    vectors = torch.randn(2, HIDDEN)
    given = {
        (tuple(layers), positions, scale): Steering(scale * vectors, tuple(layers), Positions.parse(positions))
        for layers in ([0, 1], [0, 2])
        for positions in POSITIONS
        for scale in (1.0, 2.0)
    }
    salts = {(about, length): cache_salt(given[about], length) for about in given for length in (5, 6)}
    for (one, first), salt in salts.items():
        for (other, second), another in salts.items():
            # With `all` every token is edited, however long the prompt is.
            alike = one == other and (first == second or one[1] == "all")
            assert (salt == another) == alike
    again = Steering(vectors.clone(), (0, 1), Positions.parse("last"))
    assert cache_salt(again, 5) == salts[((0, 1), "last", 1.0), 5]


class FakeLLM:
    """Answers as vLLM would, with hooks written by hand on a transformers model."""

    def __init__(self, llm):
        self.llm, self.model_config, self.errored = llm, SimpleNamespace(max_model_len=64), False
        self.salts, self.aborted, self.slow, self.fails = [], 0, 0.0, None

    async def generate(self, prompt, params, name):
        if self.fails is not None:
            raise self.fails
        self.salts.append(prompt.get("cache_salt"))
        ids, finished = list(prompt["prompt_token_ids"]), False
        steering = None
        if params.extra_args is not None:
            payload = params.extra_args[KEY]
            steering = Steering.of(payload, len(self.llm.model.layers), self.llm.config.hidden_size)
        length, waiting = (steering and steering.prompt) or len(ids), []
        try:
            for step in range(params.max_tokens):
                await asyncio.sleep(self.slow)
                logits = self.read(ids, length, steering)
                token = int(logits.argmax())
                ids.append(token)
                reason = "stop" if token in params.stop_token_ids else None
                reason = reason or ("length" if step == params.max_tokens - 1 else None)
                waiting.append((token, logits.log_softmax(-1)))
                assert params.logprob_token_ids is None or len(params.logprob_token_ids) == params.logprobs
                if step % 2 and reason is None:
                    continue  # outputs may have several tokens
                finished = reason is not None
                yield SimpleNamespace(outputs=[self.output(waiting, params, reason)])
                waiting = []
                if finished:
                    return
        finally:
            self.aborted += not finished

    def output(self, waiting, params, reason):
        entries, count = [], params.logprobs
        for token, row in waiting:
            order = row.argsort(descending=True).tolist()
            kept = {*(params.logprob_token_ids or order[: count or 0]), token}
            entries.append(
                {each: SimpleNamespace(logprob=float(row[each]), rank=order.index(each) + 1) for each in kept}
            )
        tokens = [token for token, _ in waiting]
        return SimpleNamespace(token_ids=tokens, logprobs=None if count is None else entries, finish_reason=reason)

    @torch.no_grad()
    def read(self, ids, length, steering):
        handles = []
        if steering is not None:
            kept = steering.positions.prompt_tokens
            first = 0 if kept is None else length - kept
            end = len(ids) if steering.positions.answer else length
            where = torch.zeros(len(ids), 1)
            where[max(0, first) : end] = 1
            for vector, layer in zip(steering.vectors, steering.layers, strict=True):
                module = self.llm.model.layers[layer]
                add = lambda _, __, output, vector=vector: output + where * vector  # noqa: E731
                handles.append(module.register_forward_hook(add))
        logits = self.llm(torch.tensor([ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits

    def shutdown(self):
        self.errored = True


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved LLM, adapters of it by their positions, and their folders."""
    folder = tmp_path_factory.mktemp("vllm")
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    llm.name_or_path = llm.config._name_or_path = str(folder / "llm")
    models = {}
    for number, (positions, layers) in enumerate(zip(POSITIONS, ("all", "0,2", "top", "bottom"), strict=True)):
        config = ATVConfig(**PAPER_FORM | {"positions": positions, "layers": layers, "scale": 0.5})
        set_seed(10 + number)
        model = ATVModel(llm, config, tokenizer=tokenizer, generator=make_generator(config)).eval()
        model.save_pretrained(folder / positions)
        models[positions] = model
    return SimpleNamespace(folder=folder, llm=llm, tokenizer=tokenizer, models=models)


@pytest.fixture
def engine(world, monkeypatch):
    fake = FakeLLM(world.llm)
    monkeypatch.setattr(vllm, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm, "_start", lambda arguments: fake)
    stub(
        monkeypatch,
        {
            "vllm": {"SamplingParams": SimpleNamespace},
            "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=1)},
        },
    )
    return VLLMEngine(str(world.folder / "llm"), Limits(rows=4, waiting=1, answer=16, tokens=32))


def ask(engine, *requests):
    """The pieces of answers that are made at the same time."""

    async def one(request):
        return [piece async for piece in engine.stream(request)]

    async def every():
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(every())


@pytest.mark.parametrize("positions", POSITIONS)
def test_predictions_equal_those_of_the_model(world, engine, positions):
    same_predictions(engine, engine.load(world.folder / positions), world.models[positions])
    assert len(set(engine._llm.salts)) <= 5  # what an answer begins with does not change how its prompt is cached


def test_answers_equal_each_prompt_alone(world, engine):
    adapters = [None, *(engine.load(world.folder / name) for name in POSITIONS)]
    models = [None, *world.models.values()]
    ends = set(engine._ends)
    requests, expected = [], []
    for index, text in enumerate(TEXTS[:5]):
        scale = 0.3 if index == 2 else None
        row = Row(prompt(world.tokenizer, text), models[index])
        expected.append(sequential(world.llm, row, ends, 6, scale))
        sampling = Sampling(max_tokens=6, temperature=0.0, logprobs=2)
        requests.append(Request(row.prompt, adapters[index], scale, sampling))
    for pieces, steps in zip(ask(engine, *requests), expected, strict=True):
        kept = [token for token, _ in steps if token not in ends]
        told = [each for piece in pieces for each in piece.tokens]
        assert [each.token for each in told] == kept
        assert "".join(piece.text for piece in pieces) == world.tokenizer.decode(kept, skip_special_tokens=True)
        assert pieces[-1].generated == len(steps)
        assert pieces[-1].finish == ("stop" if len(kept) < len(steps) else "length")
        for each, (_, logits) in zip(told, steps, strict=False):
            values, tokens = logits.log_softmax(-1).topk(2)
            assert [token for token, _ in each.top] == tokens.tolist()
            assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)
            assert each.logprob == pytest.approx(float(values[0]), abs=1e-4)
    assert engine._llm.salts[0] is None
    assert len(set(engine._llm.salts)) == 5
    numbers = engine.numbers()
    assert numbers["running"] == numbers["waiting"] == numbers["error"] == 0
    assert numbers["answer_tokens"] == sum(map(len, expected))


def test_a_stop_sequence_ends_the_request_in_vllm_too(world, engine):
    asked = prompt(world.tokenizer, TEXTS[0])
    sampling = {"max_tokens": 12, "temperature": 0.0}
    [whole] = ask(engine, Request(asked, sampling=Sampling(**sampling)))
    text = "".join(piece.text for piece in whole)
    stop = text[3:5]
    [pieces] = ask(engine, Request(asked, sampling=Sampling(stop=(stop,), **sampling)))
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert pieces[-1].finish == "stop"
    assert engine._llm.aborted == 1


def test_cancelled_late_failing_and_refused_requests_end(world, engine, monkeypatch):
    request = Request(prompt(world.tokenizer, TEXTS[0]), sampling=Sampling(max_tokens=16, temperature=0.0))

    async def cancelled():
        async with aclosing(engine.stream(request)) as pieces:
            async for piece in pieces:
                assert piece.finish is None
                break

    asyncio.run(cancelled())
    assert (engine._llm.aborted, engine.numbers()["cancelled"], engine.numbers()["running"]) == (1, 1, 0)

    engine._llm.slow = 0.3
    monkeypatch.setattr(vllm, "time", SimpleNamespace(monotonic=__import__("time").monotonic))
    object.__setattr__(engine.limits, "seconds", 0.1)
    [pieces] = ask(engine, request)
    assert pieces[-1].finish == "timeout"
    object.__setattr__(engine.limits, "seconds", 60.0)

    async def crowd():
        async def one():
            try:
                return [piece async for piece in engine.stream(request)]
            except Busy as busy:
                return busy

        tasks = [asyncio.create_task(one()) for _ in range(6)]
        await asyncio.sleep(0.05)
        engine._llm.slow = 0
        return await asyncio.gather(*tasks)

    found = asyncio.run(crowd())
    assert [isinstance(each, Busy) for each in found] == [False] * 5 + [True]
    assert found[5].seconds >= 1

    engine._llm.fails = RuntimeError("dead")
    [pieces] = ask(engine, request)
    assert pieces[-1].finish == "error"
    assert str(pieces[-1].error) == "dead"
    assert engine.healthy()
    engine._llm.errored = True
    with pytest.raises(Unavailable, match="has stopped"):
        ask(engine, request)
    engine.close()
    assert not engine.healthy()
    with pytest.raises(Unavailable, match="closed"):
        ask(engine, request)


def test_what_can_never_be_answered_is_refused(world, engine):
    with refused("max_tokens is 17", "at most 16"):
        engine.check(Request(Prompt([1], "a"), sampling=Sampling(max_tokens=17)))
    with refused("60 tokens", "max_tokens is 5", "context is 64"):
        engine.check(Request(Prompt([1] * 60, "a"), sampling=Sampling(max_tokens=5)))
    with refused("token id 400", "0 to 399"):
        engine.check(Request(Prompt([1, 400], "a"), sampling=Sampling(max_tokens=5)))
    adapter = engine.load(world.folder / "last")
    with torch.no_grad():
        next(adapter.atv.expansion.parameters()).fill_(float("inf"))
    adapter.atv.vector_cache.limit = 0
    [pieces] = ask(engine, Request(Prompt([1, 2], "a"), adapter, None, Sampling(max_tokens=2)))
    assert isinstance(pieces[-1].error, ATVError)
    assert "finite" in str(pieces[-1].error)
    assert engine._llm.salts == []  # nothing has been submitted


def test_adapters_that_vllm_cannot_serve_are_refused(world, engine, tmp_path):
    for name, options, words in (
        ("self", {"generator": "self"}, ("generator", "self")),
        ("site", PAPER_FORM | {"site": "mlp"}, ("site 'mlp'", "'layer'")),
    ):
        config = ATVConfig(**options)
        generator = None if name == "self" else make_generator(config)
        model = ATVModel(world.llm, config, tokenizer=world.tokenizer, generator=generator)
        model.save_pretrained(tmp_path / name)
        with refused(*words, "--engine transformers"):
            engine.load(tmp_path / name)
    config_file = tmp_path / "site" / "atv_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"method": "lora"}))
    with refused("method lora", "atv or fixed"):
        engine.load(tmp_path / "site")
    with torch.no_grad():
        world.llm.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    try:
        config = ATVConfig(**PAPER_FORM)
        other = ATVModel(world.llm, config, tokenizer=world.tokenizer, generator=make_generator(config))
        other.save_pretrained(tmp_path / "other")
    finally:
        with torch.no_grad():
            world.llm.model.layers[1].mlp.up_proj.weight.div_(1.5)
    with refused("mlp.up_proj.weight"):
        engine.load(tmp_path / "other")


def good():
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name="NONE")),
        **{"use_v2_model_runner": False, "speculative_config": None, "lora_config": None, "kv_transfer_config": None},
    )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("use_v2_model_runner", True, "V2 model runner"),
        ("parallel_config.tensor_parallel_size", 2, "tensor parallelism"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("speculative_config", object(), "speculative decoding"),
        ("lora_config", object(), "LoRA"),
        ("compilation_config.cudagraph_mode.name", "FULL", "CUDA graphs"),
        ("kv_transfer_config", object(), "transfer of keys and values"),
    ],
)
def test_configurations_that_are_not_tested_are_refused(path, value, words):
    config = good()
    check_config(config)
    *parts, last = path.split(".")
    place = config
    for part in parts:
        place = getattr(place, part)
    setattr(place, last, value)
    with refused(words, "not been tested"):
        check_config(config)


def test_a_long_prompt_has_an_answer_of_what_vllms_context_leaves(world, engine, monkeypatch):
    monkeypatch.setattr(engine, "_ends", frozenset())
    prompts, found = {40: 16, 60: 4}, {}
    app = make_app(engine, Models("base", world.tokenizer, engine.load))
    with TestClient(app, base_url="http://localhost") as client:
        for length in prompts:
            asked = {"model": "base", "prompt": [5] * length, "temperature": 0}
            found[length] = client.post("/v1/completions", json=asked).json()["usage"]["completion_tokens"]
    assert found == prompts
    adapter = engine.load(world.folder / "last")
    answers = EngineAnswers(engine, adapter, {"tasks": {"toy": toy_task().asking()}}, max_new_tokens=8)
    assert answers.room == 64 - 1 - max(map(len, answers._branches))


def test_a_missing_vllm_and_another_version_are_refused(monkeypatch):
    with refused(f"vllm {vllm.TESTED}", "not installed", "pip install"):
        VLLMEngine("anything")
    monkeypatch.setattr(vllm, "version", lambda name: "0.31.9+cpu")
    with refused("vLLM 0.31.9+cpu is installed", vllm.TESTED):
        VLLMEngine("anything")
    monkeypatch.setattr(vllm, "version", lambda name: f"{vllm.TESTED}+cpu")
    with refused("model, worker_cls", "leave them out"):
        VLLMEngine("anything", options={"worker_cls": "x", "model": "y", "max_model_len": 3})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--engine", "vllm"), "not installed"),
        (("--engine", "vllm", "--device", "cpu"), "--device is for --engine transformers"),
        (("--engine", "vllm", "--quantization", "4bit"), "--quantization is for"),
        (("--engine", "vllm", "--tokens", "9"), "--tokens is for"),
        (("--engine", "vllm", "--shared-memory", "0.1"), "--shared-memory is for"),
        (("--engine", "vllm", "--training-queries"), "--training-queries is for --engine transformers"),
        (("--engine", "vllm", "--engine-options", "{"), "not JSON"),
        (("--engine", "vllm", "--engine-options", "[1]"), "expected an object"),
        (("--engine-options", "{}"), "is for --engine vllm and llamacpp"),
        (("--engine", "llamacpp"), "--gguf FILE"),
        (("--gguf", "llm.gguf"), "--gguf is for --engine llamacpp"),
        (("--engine", "llamacpp", "--gguf", "llm.gguf", "--dtype", "float16"), "--dtype is for"),
        (("--engine", "llamacpp", "--gguf", "llm.gguf", "--engine-options", '{"n_ctx": 1}'), "n_ctx"),
        (("--engine", "llamacpp", "--gguf", "llm.gguf"), "llama-cpp-python"),
    ],
)
def test_the_command_line_says_what_is_missing_and_what_does_not_apply(monkeypatch, capsys, options, words):
    monkeypatch.setattr(sys, "argv", ["atv", "serve", "--llm", "an-llm", "--port", "0", *options])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


def test_predictions_name_a_missing_gguf_file(world, monkeypatch, capsys):
    options = ["--adapter", str(world.folder / "told"), "--engine", "llamacpp", "--gguf", "none.gguf", "--out", "o.csv"]
    world.models["last"].training_summary = {"tasks": {"toy": toy_task().asking()}}
    world.models["last"].save_pretrained(world.folder / "told")
    monkeypatch.setattr(sys, "argv", ["atv", "predict", "rows.csv", *options])
    with pytest.raises(SystemExit):
        main()
    assert "The GGUF file none.gguf does not exist." in capsys.readouterr().err


def test_ties_and_the_chosen_token_are_told_once():
    entry = SimpleNamespace
    every = {5: entry(logprob=-3.0, rank=9), 1: entry(logprob=-0.5, rank=1), 2: entry(logprob=-1.0, rank=2)}
    assert likelihood(5, every, 2).top == [(1, -0.5), (2, -1.0)]
    assert likelihood(5, every, 0).top == []
    assert Path(vllm.__file__).exists()
