"""The HTTP server, asked with OpenAI's own client over a real socket."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import openai
import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import SIZES, byte_level_tokenizer, make_llm
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from serving import saved
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv.cli import main
from atv.cli.serve import _address, _named
from atv.serving.app import MOST_BYTES, make_app
from atv.serving.engine import Engine
from atv.serving.forms import Form
from atv.serving.models import NAME, Models
from atv.serving.requests import Limits
from atv.serving.sampling import Likelihood
from atv.serving.why import Reasons
from benchmarks.serving import running

QUERIES = ["the harbour quiet 90", "the harbour leaks 91", "a harbour of another kind", "leaks leaks leaks"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("served"), chat_tokenizer("chatml")
    set_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    llm = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    llm = LlamaForCausalLM.from_pretrained(folder / "llm")
    models = {
        "chats": saved(llm, tokenizer, folder / "chats", "answer", 1),
        "other": saved(llm, tokenizer, folder / "other", "last", 2),
        "template": saved(llm, tokenizer, folder / "template", "last", 3, "template"),
    }
    engine = Engine(llm, tokenizer, Limits(rows=8, waiting=40, seconds=60))
    served = Models("base", tokenizer, engine.load, folder)
    for name in models:
        served.add(name, folder / name)
    with running(make_app(engine, served)) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        yield SimpleNamespace(port=port, client=client, engine=engine, llm=llm, models=models, folder=folder)
    assert not engine.healthy()


def chat(world, model, query, **options):
    options = {"temperature": 0, "max_tokens": 6} | options
    return world.client.chat.completions.create(model=model, messages=[{"role": "user", "content": query}], **options)


def expected(world, name, query, tokens=6):
    if name == "base":
        ids = world.engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=False
        )
        inputs = torch.tensor([ids])
        ends = world.models["chats"]
        from atv.lm.ends import end_ids

        found = world.llm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=end_ids(ends.llm, ends.tokenizer),
        )
        return world.engine.tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)
    (text,) = world.models[name].generate([query], max_new_tokens=tokens, do_sample=False)
    return text


def test_the_models_name_chooses_the_adapter(world):
    names = ["base", "chats", "other", "template"]
    assert [model.id for model in world.client.models.list()] == names
    assert world.client.models.retrieve("chats").model_extra["tasks"] == ["toy"]
    texts = {}
    asked = [(name, query) for name in names for query in QUERIES] * 2
    found = {}

    def ask(number):
        answer = chat(world, *asked[number])
        found[number] = answer.choices[0].message.content
        assert answer.model == asked[number][0]
        assert answer.usage.completion_tokens <= 6

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (name, query) in enumerate(asked):
        texts.setdefault((name, query), expected(world, name, query))
        assert found[number] == texts[name, query]
    assert len(set(texts.values())) > 4


def test_streamed_answers_are_the_whole_ones(world):
    whole = chat(world, "chats", QUERIES[0], max_tokens=12, logprobs=True, top_logprobs=2, n=2)
    streamed = list(
        chat(
            world, "chats", QUERIES[0], max_tokens=12, logprobs=True, top_logprobs=2, n=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    for index in (0, 1):
        parts = [choice for event in streamed for choice in event.choices if choice.index == index]
        text = "".join(part.delta.content or "" for part in parts)
        assert text == whole.choices[index].message.content
        told = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert [entry.token for entry in told] == [entry.token for entry in whole.choices[index].logprobs.content]
        assert parts[-1].finish_reason == whole.choices[index].finish_reason
    assert streamed[-1].usage == whole.usage


def raw(tokens):
    """The bytes of tokens, of which those that are a part of a character are written as bytes."""
    parts = (
        bytes.fromhex(text[6:].replace("\\x", "")) if text.startswith("bytes:") else text.encode() for text in tokens
    )
    return b"".join(parts)


def test_completions_read_the_prompt_as_it_is(world):
    answer = world.client.completions.create(
        model="base", prompt=["the harbour", "leaks"], temperature=0, max_tokens=5, logprobs=1
    )
    tokenizer = world.engine.tokenizer
    for text, choice in zip(["the harbour", "leaks"], answer.choices, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        found = world.llm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        assert choice.text == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert raw(choice.logprobs.tokens).decode(errors="replace") == choice.text
    with pytest.raises(openai.BadRequestError, match="query"):
        world.client.completions.create(model="template", prompt="the harbour", max_tokens=5)
    world.client.completions.create(model="template", prompt="a b", max_tokens=5, extra_body={"query": "a"})


def test_a_seed_gives_the_same_sample_and_a_stop_ends_the_answer(world):
    texts = [chat(world, "other", QUERIES[1], temperature=1.0, seed=3, max_tokens=9) for _ in range(2)]
    first, second = (answer.choices[0].message.content for answer in texts)
    assert first == second
    whole = chat(world, "chats", QUERIES[0], max_tokens=12).choices[0].message.content
    stop = whole[3:5]
    cut = chat(world, "chats", QUERIES[0], max_tokens=12, stop=stop)
    assert cut.choices[0].message.content == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_scale_zero_is_the_plain_llm(world):
    plain = chat(world, "base", QUERIES[0]).choices[0].message.content
    assert chat(world, "chats", QUERIES[0], extra_body={"scale": 0}).choices[0].message.content == plain
    assert chat(world, "chats", QUERIES[0]).choices[0].message.content != plain


def test_adapters_are_replaced_while_requests_run(world):
    client, stop, wrong = world.client, threading.Event(), []
    texts = {expected(world, name, QUERIES[0]) for name in ("chats", "other")}

    def ask():
        while not stop.is_set():
            text = chat(world, "moving", QUERIES[0]).choices[0].message.content
            if text not in texts:
                wrong.append(text)

    client.post("/adapters", body={"name": "moving", "folder": "chats"}, cast_to=object)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        client.post("/adapters", body={"name": "moving", "folder": ["other", "chats"][turn % 2]}, cast_to=object)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    client.delete("/adapters/moving", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        chat(world, "moving", "a")
    for folder in ("../served", "/etc", "", "missing"):
        with pytest.raises(openai.BadRequestError):
            client.post("/adapters", body={"name": "x", "folder": folder}, cast_to=object)


def test_an_answer_is_cancelled_when_its_client_goes_away(world, monkeypatch):
    monkeypatch.setattr(world.engine, "_ends", frozenset())
    handle = world.llm.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    for stream in (True, False):
        before = world.engine.numbers()["cancelled"]
        connection = http.client.HTTPConnection("127.0.0.1", world.port)
        body = {
            "model": "chats",
            "messages": [{"role": "user", "content": "a b"}],
            "max_tokens": 400,
            "stream": stream,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        while not world.engine.numbers()["running"]:
            time.sleep(0.01)
        connection.sock.close()
        deadline = time.monotonic() + 60
        while world.engine.numbers()["running"] and time.monotonic() < deadline:  # counted a moment before it leaves
            time.sleep(0.02)
        assert world.engine.numbers()["cancelled"] == before + 1
        assert not world.engine.numbers()["running"]
    handle.remove()


def test_what_an_adapter_does_is_told(world):
    about = world.client.post("/steer", body={"model": "chats", "query": QUERIES[0]}, cast_to=dict)
    vectors = world.models["chats"].task_vectors([QUERIES[0]])[0] * 0.6
    assert [layer["norm"] for layer in about["layers"]] == pytest.approx(vectors.norm(dim=-1).tolist(), abs=1e-3)


def post(port, path, body, headers=None):
    """Status and JSON of a request with any bytes as its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"content-type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers


GOOD = {"model": "chats", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
WRONG = [
    ({"model": "nobody"}, 404),
    ({"messages": []}, 400),
    ({"messages": [{"role": "user", "content": ""}]}, 400),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400),
    ({"temperature": float("nan")}, 400),
    ({"temperature": -1}, 400),
    ({"max_tokens": 0}, 400),
    ({"max_tokens": "5"}, 400),
    ({"max_tokens": 10**9}, 400),
    ({"max_tokens": 1000}, 400),
    ({"max_completion_tokens": 2}, 400),
    ({"n": 99}, 400),
    ({"seed": 2**70}, 400),
    ({"stop": [""]}, 400),
    ({"tools": []}, 400),
    ({"presence_penalty": 0.5}, 400),
    ({"top_logprobs": 3}, 400),
    ({"scale": 99}, 400),
    ({"task": "nobody"}, 400),
]


@pytest.mark.parametrize(("change", "status"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_requests_get_an_error_that_says_why(world, change, status):
    found, answer, _ = post(world.port, "/v1/chat/completions", json.dumps(GOOD | change))
    assert found == status, answer
    assert answer["error"]["message"]
    assert next(iter(change)) in json.dumps(answer) or "query is empty" in json.dumps(answer) or status == 404


def test_no_body_is_too_large_and_no_stranger_is_served(world):
    chat(world, "base", QUERIES[0], max_tokens=1)
    assert post(world.port, "/v1/chat/completions", b"x" * (MOST_BYTES + 1))[0] == 413
    assert post(world.port, "/v1/chat/completions", json.dumps(GOOD), {"host": "evil.example"})[0] == 421
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
        assert post(world.port, "/v1/chat/completions", json.dumps(GOOD), {"origin": origin})[0] == 403
    own = {"origin": f"http://127.0.0.1:{world.port}"}  # the server's page
    assert post(world.port, "/v1/chat/completions", json.dumps(GOOD), own)[0] == 200
    assert post(world.port, "/nothing", "{}")[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", world.port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    assert 'atv_requests_total{end="' in text
    assert "atv_engine_running 0" in text
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read()) == {"status": "ok"}


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 8 * 10**5},
        {"prompt": [{}] * 10**6},
        {"prompt": ["a"] * 60, "n": 2},
        {"prompt": "a", "stop": ["a"] * 10**5},
        {"prompt": "a b", "query": "a"},
    ],
    ids=lambda body: str(body)[:20],
)
def test_a_text_is_refused_before_it_is_read(world, body, monkeypatch):
    began = time.monotonic()
    monkeypatch.setattr(Models, "text", None if len(body["prompt"]) > 50 else Models.text)
    status, answer, _ = post(world.port, "/v1/completions", json.dumps({"model": "base", "max_tokens": 1} | body))
    assert status == 400, answer
    assert len(json.dumps(answer)) < 1000
    assert time.monotonic() - began < 20


def test_a_request_without_a_length_gets_what_fits(world):
    answer = world.client.completions.create(model="base", prompt=[5] * 400, temperature=0)
    assert answer.usage.completion_tokens <= 112
    assert answer.choices[0].finish_reason in ("stop", "length")
    both = world.client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "a"}], max_tokens=3, max_completion_tokens=3, temperature=0
    )
    assert both.usage.completion_tokens <= 3


def test_log_probabilities_name_the_bytes_of_parts_of_characters(world):
    tokenizer = world.engine.tokenizer
    form = Form("id", "base", False, tokenizer, True, 1)
    ids = tokenizer("déjà 港", add_special_tokens=False)["input_ids"]
    told = [Likelihood(token, -1.0, [(token, -1.0), (ids[0], -2.0)]) for token in ids]
    found = form._likelihoods(0, told)
    assert raw(found["tokens"]).decode() == "déjà 港"
    assert any(text.startswith("bytes:") for text in found["tokens"])
    before = [raw(found["tokens"][:place]) for place in range(len(ids))]
    assert found["text_offset"] == [len(text.decode(errors="ignore")) for text in before]
    assert found["top_logprobs"][0] == {found["tokens"][0]: -1.0}
    chat = Form("id", "base", True, tokenizer, True, 1)._likelihoods(0, told)
    assert [bytes(entry["bytes"]) for entry in chat["content"]] == [raw([text]) for text in found["tokens"]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs"),
    *("top_logprobs", "scale", "task", "query", "name", "folder", "stream_options", "echo"),
)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/steer", "/v1/adapters")


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PATHS),
    st.binary(max_size=30)
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5).map(lambda fields: json.dumps(GOOD | fields).encode())
    | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_no_malformed_body_harms_the_server(world, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    assert answer.status in (200, 400, 404), text
    if answer.status != 200:
        error = json.loads(text)["error"]
        assert error["message"]
        assert "Traceback" not in error["message"]
    assert world.engine.healthy()


def test_a_key_is_asked_for(world):
    with running(make_app(_Idle(), Models("base", world.engine.tokenizer, world.engine.load), key="secret")) as port:
        assert post(port, "/v1/steer", "{}")[0] == 401
        assert post(port, "/v1/steer", "{}", {"authorization": "Bearer wrong"})[0] == 401
        status, answer, _ = post(
            port, "/v1/adapters", '{"name": "a", "folder": "b"}', {"authorization": "Bearer secret"}
        )
        assert status == 400
        assert "--adapters-from" in answer["error"]["message"]


def test_a_full_queue_says_when_to_come_back(world):
    from atv.serving.requests import Busy

    class Full(_Idle):
        def stream(self, request):
            raise Busy(7, 3)

    with running(make_app(Full(), Models("base", world.engine.tokenizer, world.engine.load))) as port:
        for stream in (False, True):
            status, answer, headers = post(
                port, "/v1/completions", json.dumps({"model": "base", "prompt": "a", "stream": stream})
            )
            assert status == 429, answer
            assert headers["retry-after"] == "3"


def test_what_an_engine_that_has_stopped_is_asked_is_the_servers_error(world, monkeypatch):
    engine = Engine(world.llm, world.engine.tokenizer, Limits(rows=2))
    models = Models("base", engine.tokenizer, engine.load, world.folder)
    models.add("chats", world.folder / "chats")
    asked = [
        ("/v1/chat/completions", GOOD, "has stopped"),
        *(("/v1/chat/completions", GOOD | {"stream": stream, "n": 2}, "closed") for stream in (False, True)),
        ("/v1/steer", {"model": "chats", "query": "a"}, "closed"),
        ("/v1/adapters", {"name": "more", "folder": "other"}, "closed"),
    ]
    monkeypatch.setattr(engine, "_admitted", lambda: 1 / 0)
    with TestClient(make_app(engine, models), base_url="http://localhost") as client:
        for path, body, words in asked:
            answer = client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error"), answer.text
            assert words in answer.json()["error"]["message"]
        assert client.get("/health").status_code == 503


def test_one_request_has_as_many_answers_as_the_server_takes_at_a_time(world):
    engine = Engine(world.llm, world.engine.tokenizer, Limits(rows=2, waiting=1, seconds=60))
    texts = {}
    with TestClient(
        make_app(engine, Models("base", engine.tokenizer, engine.load)), base_url="http://localhost"
    ) as client:
        for stream in (False, True):
            for n, status in ((3, 200), (4, 400), (3, 200)):
                body = GOOD | {"model": "base", "n": n, "stream": stream}
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.status_code == status, answer.text
                texts[status] = answer.text
        assert "asks for 4 answers, and the server takes 3" in texts[400]
        two = {"model": "base", "prompt": ["a", "b"], "n": 2, "max_tokens": 1}
        assert client.post("/v1/completions", json=two).status_code == 400
    assert engine.numbers()["refused"] == engine._open == 0


def test_token_ids_are_those_of_the_tokenizer_and_of_the_llm(world):
    """Either may have more than the other: added tokens, or embeddings for none."""
    tokens = len(world.engine.tokenizer)
    assert tokens == world.llm.config.vocab_size
    small = LlamaForCausalLM(LlamaConfig(**(SIZES | {"vocab_size": tokens - 3}))).eval()
    engine = Engine(small, world.engine.tokenizer, Limits(rows=2))
    app = make_app(engine, Models("base", engine.tokenizer, engine.load))
    with TestClient(app, base_url="http://localhost") as client:
        for token, status in ((tokens - 4, 200), (tokens - 3, 400), (tokens, 400), (-1, 400)):
            asked = {"model": "base", "prompt": [5, token], "max_tokens": 1}
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == status, answer.text
        assert engine.healthy()


def test_one_query_for_several_prompts_is_refused(world):
    asked = {"model": "template", "query": "a", "max_tokens": 1}
    for prompt, status in ((["a b", "c d"], 400), (["a b"], 200)):
        found, answer, _ = post(world.port, "/v1/completions", json.dumps(asked | {"prompt": prompt}))
        assert found == status, answer
        assert status == 200 or "query is one text, and prompt has 2" in answer["error"]["message"]


def test_an_adapters_name_and_folder_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    for adapter, split in {
        "runs/lr=0.1": ("lr=0.1", "runs/lr=0.1"),
        "~/runs/lr=0.1": ("lr=0.1", f"{tmp_path}/runs/lr=0.1"),
        "fast=runs/lr=0.1": ("fast", "runs/lr=0.1"),
        "fast=~/runs/lr=0.1": ("fast", f"{tmp_path}/runs/lr=0.1"),
        "fast=someone/on-the-hub": ("fast", "someone/on-the-hub"),
        "runs/other": ("other", "runs/other"),
    }.items():
        assert _named(adapter) == split
        assert NAME.fullmatch(split[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_address_that_is_told_can_be_opened(host):
    address = urlsplit(_address(host, 8000))
    assert (address.hostname, address.port) == (host, 8000)


HALF = "hi \ud83d"


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/chat/completions", "messages.0.content", GOOD | {"messages": [{"role": "user", "content": HALF}]}),
        (
            "/v1/chat/completions",
            "0.text",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        ),
        ("/v1/chat/completions", "stop", GOOD | {"stop": HALF}),
        ("/v1/chat/completions", "stop", GOOD | {"stop": ["a", HALF]}),
        ("/v1/chat/completions", "task", GOOD | {"task": HALF}),
        ("/v1/chat/completions", "model", GOOD | {"model": HALF}),
        ("/v1/completions", "prompt", {"prompt": HALF}),
        ("/v1/completions", "prompt", {"prompt": ["a", HALF]}),
        ("/v1/completions", "query", {"prompt": "a", "query": HALF}),
        ("/v1/steer", "query", {"query": HALF}),
        ("/v1/adapters", "folder", {"name": "x", "folder": HALF}),
    ],
)
def test_a_text_that_is_cut_inside_a_character_is_refused_by_its_fields_name(world, path, field, body):
    given = body if "name" in body else {"model": "chats"} | body
    status, answer, _ = post(world.port, path, json.dumps(given))
    assert status == 400, answer
    assert field in answer["error"]["message"]
    assert "surrogate" in answer["error"]["message"]
    assert field in answer["error"]["param"]


@pytest.mark.parametrize("folder", ["a\0b", "a" * 5000, "missing", "loop/a"])
def test_a_folder_that_cannot_be_read_is_refused(world, folder):
    if not (world.folder / "loop").is_symlink():
        (world.folder / "loop").symlink_to("loop")
    status, answer, _ = post(world.port, "/v1/adapters", json.dumps({"name": "x", "folder": folder}))
    assert status == 400, answer
    assert "cannot be read: " in answer["error"]["message"]
    assert str(world.folder) not in answer["error"]["message"]


def test_vectors_that_are_not_finite_are_told_as_such(world, tmp_path):
    def huge(model):
        with torch.no_grad():
            for weights in model.expansion.parameters():
                weights.mul_(1e36)

    saved(world.llm, world.engine.tokenizer, tmp_path / "huge", "answer", 1, prepare=huge)
    models = Models("base", world.engine.tokenizer, world.engine.load)
    models.add("huge", tmp_path / "huge")
    explained = Reasons(world.engine, False).explain(
        models["huge"], models.chat(models["huge"], [{"role": "user", "content": "the harbour"}]), 10.0
    )
    with refused("not finite", "huge", "smaller scale", "--dtype"):
        asyncio.run(explained)


class _Idle:
    """An engine that answers nothing."""

    context, limits = None, Limits()

    def check(self, request):
        pass

    def numbers(self):
        return {}

    def healthy(self):
        return True

    async def run(self, function):
        await asyncio.sleep(0)
        return function()

    def close(self):
        pass


def test_the_command_serves_the_llm_of_a_folder_by_the_folders_name(tmp_path, monkeypatch):
    """Its path is nobody else's business."""
    make_llm().save_pretrained(tmp_path / "my-llm")
    byte_level_tokenizer().save_pretrained(tmp_path / "my-llm")
    told = []

    def run(server, sockets):
        with TestClient(server.config.app, base_url="http://localhost") as client:
            told.extend(model["id"] for model in client.get("/v1/models").json()["data"])
        sockets[0].close()

    monkeypatch.setattr("uvicorn.Server.run", run)
    monkeypatch.setattr("sys.argv", ["atv", "serve", "--llm", str(tmp_path / "my-llm"), "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert told == ["my-llm"]
