"""The server's page in a real browser, and what it shows of an adapter against loops written by hand."""

import asyncio
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from browser import browser_of
from chat_templates import chat_tokenizer
from conftest import SIZES, byte_level_tokenizer, make_llm, toy_task
from fastapi.testclient import TestClient
from serving import post, saved, sequential
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv.data import Example, Prompt
from atv.errors import ATVError
from atv.methods.fixed import FixedConfig, FixedModel
from atv.serving.app import make_app
from atv.serving.batch import Row
from atv.serving.engine import Engine
from atv.serving.models import Models, Served
from atv.serving.requests import Limits
from atv.serving.why import Reasons
from atv.vectors import ATV
from benchmarks.serving import running

QUERY = "the harbour quiet 90"
BAD = "<img src=x onerror=document.title='bad'> the harbour leaks"
TASK = toy_task(rows=90)
TASK = replace(TASK, train=(Example(BAD, "no"), *TASK.train[1:]))


def state_of(model, query):
    """The generator's state of one query, read alone, of norm 1."""
    ids = torch.tensor(model.generator.encode([query]))
    state = model.generator(ids, torch.ones_like(ids))[0].detach()
    return state / state.norm()


def gated(model):
    """Random weights, and a gate that knows the task's rows."""
    torch.manual_seed(5)
    for weights in model.expansion.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    gate = model.eval().expansion.gate
    train, valid = (torch.stack([state_of(model, row.input) for row in rows]) for rows in (TASK.train, TASK.valid))
    gate.fit([train], 0.05, [valid])
    gate.strengths = torch.full((1,), 0.5)


def two_tasks(model):
    tasks = model.training_summary["tasks"]
    tasks["other"] = tasks["toy"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("page"), chat_tokenizer("chatml")
    set_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    llm = LlamaForCausalLM.from_pretrained(folder / "llm").eval()
    calibrated = {"parametrisation": "calibrated", "gate": 0.05, "train_generator": False}
    models = {
        "gated": saved(llm, tokenizer, folder / "gated", "last", 1, prepare=gated, **calibrated),
        "tasks": saved(llm, tokenizer, folder / "tasks", "answer", 2, prepare=two_tasks),
        "self": saved(llm, tokenizer, folder / "self", "answer", 3, generator="self", train_generator=None),
    }
    fixed = FixedModel(llm, FixedConfig(scale=0.6), tokenizer=tokenizer)
    torch.nn.init.normal_(fixed.expansion.common, std=0.1)
    fixed.training_summary = models["gated"].training_summary
    fixed.save_pretrained(folder / "fixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atv.serving.engine.end_ids", lambda *_: [])  # every answer has all its tokens
        patch.setattr("atv.serving.why.training_tasks", training_tasks)
        engine = Engine(llm, tokenizer, Limits(rows=8))
        served = Models("base", tokenizer, engine.load)
        for name in (*models, "fixed"):
            served.add(name, folder / name)
        with running(make_app(engine, served, training_queries=True)) as port:
            yield SimpleNamespace(
                port=port, engine=engine, llm=llm, models=models, tokenizer=tokenizer, served=served, folder=folder
            )


def training_tasks(folder):
    if folder.name != "gated":
        raise ATVError("/a/file/of/the/server does not exist.")
    return [TASK]


def chat(world, model, query=QUERY, **options):
    body = {"model": model, "messages": [{"role": "user", "content": query}], "max_tokens": 9, "temperature": 0}
    return post(world, "/v1/chat/completions", **body | options)["choices"][0]["message"]["content"]


def prompt(world, query):
    turns = [{"role": "user", "content": query}]
    return Prompt(world.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False), query)


# ---- what is told of an adapter ----


@pytest.mark.parametrize("factor", [None, 0.5, 0.0])
def test_the_layers_are_those_of_norm_and_head_and_of_the_llms_own_last_one(world, factor):
    model = world.models["gated"]
    found = post(world, "/v1/steer", model="gated", query=QUERY, scale=factor)
    scale = 0.6 * (1.0 if factor is None else factor)
    vectors = scale * model.task_vectors([QUERY])[0]
    norm, head = world.llm.model.norm, world.llm.lm_head
    with torch.no_grad():
        raised = head(norm(vectors)) - head(norm(torch.zeros_like(vectors)))
    assert found["scale"] == pytest.approx(scale)
    assert [layer["layer"] for layer in found["layers"]] == list(range(len(vectors)))
    for layer, vector, own in zip(found["layers"], vectors, raised, strict=True):
        assert layer["norm"] == pytest.approx(vector.norm().item(), rel=1e-4)
        assert [value for _, value in layer["promoted"]] == pytest.approx(own.topk(5).values.tolist(), rel=1e-4)
        if scale:
            assert layer["promoted"][0][0] == world.tokenizer.decode([own.argmax()])
    for name, steered in (("plain", None), ("steered", model)):
        ((_, logits),) = sequential(world.llm, Row(prompt(world, QUERY), steered), (), 1, scale)
        best = logits.softmax(-1).topk(5)
        told = found["layers"][-1][name]
        assert [text for text, _ in told] == [world.tokenizer.decode([token]) for token in best.indices]
        assert [value for _, value in told] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_distance_threshold_and_nearest_training_queries_are_those_of_a_comparison_with_each(world):
    model = world.models["gated"]
    known = {row: state_of(model, row.input) for row in TASK.train}

    def near(query):
        state = state_of(model, query)
        return sorted(((float(state @ other), row) for row, other in known.items()), key=lambda pair: -pair[0])[:3]

    def nearness(query):
        return sum(cosine for cosine, _ in near(query)) / 3

    threshold = torch.tensor([nearness(row.input) for row in TASK.valid]).quantile(0.05).item()
    seen = set()
    for query in (QUERY, BAD, "zzzz", "12 34 56", TASK.valid[3].input):
        found = post(world, "/v1/steer", model="gated", query=query)
        distance, best = found["distance"], near(query)
        assert distance["nearness"] == pytest.approx(nearness(query), abs=1e-5)
        assert distance["threshold"] == pytest.approx(threshold, abs=1e-5)
        assert distance["threshold_of"] == "validation rows"
        assert distance["out_of_domain"] == (nearness(query) < threshold)
        assert found["gate"] == pytest.approx(distance["share"] * 0.5, abs=1e-5)
        assert [each["cosine"] for each in found["nearest"]] == pytest.approx([cosine for cosine, _ in best], abs=1e-5)
        assert [each["query"] for each in found["nearest"]] == [row.input for _, row in best]
        assert found["nearest_note"].startswith(f"Of {len(TASK.train)} training queries,")
        seen.add(distance["out_of_domain"])
    assert seen == {True, False}


def test_other_adapters_are_told_too_and_paths_of_the_server_are_not(world):
    found = post(world, "/v1/steer", model="fixed", query=QUERY)
    assert (found["gate"], found["distance"]) == (1.0, None)
    assert len({layer["norm"] for layer in found["layers"]}) > 1
    assert found["nearest"] is None
    assert found["nearest_note"] == "The training queries cannot be read; see the server's log."
    found = post(world, "/v1/steer", model="self", query=QUERY)
    (token,) = world.models["self"].generate([prompt(world, QUERY)], max_new_tokens=1, do_sample=False)
    assert found["layers"][-1]["steered"][0][0] == token
    assert [layer["norm"] is None for layer in found["layers"]].count(True) >= 1  # those that the generator reads
    for query in (QUERY, "other words"):
        vectors = 0.6 * world.models["tasks"].task_vectors([query])[0]
        norms = [layer["norm"] for layer in post(world, "/v1/steer", model="tasks", task="toy", query=query)["layers"]]
        assert norms == pytest.approx(vectors.norm(dim=-1).tolist(), rel=1e-4)


def test_an_engine_without_the_llm_and_an_llm_without_a_readable_head_leave_the_norms(world, monkeypatch):
    vectors = 0.6 * world.models["gated"].task_vectors([QUERY])[0]
    norms = pytest.approx(vectors.norm(dim=-1).tolist(), rel=1e-4)
    alone = Served("alone", SimpleNamespace(atv=ATV.load(world.folder / "gated"), layer_numbers=[0, 1, 2]))
    found = asyncio.run(Reasons(world.engine, True).explain(alone, prompt(world, QUERY), None))
    assert [layer["norm"] for layer in found["layers"]] == norms
    assert found["layers"][0]["steered"] == []
    assert "does not show the LLM's layers" in found["lens"]
    assert found["nearest"] is None
    assert found["distance"]["threshold_of"] == "validation rows"

    def refuse(*_):
        raise ATVError("There is no head to read with.")

    monkeypatch.setattr("atv.evaluation.inspect.Readout", refuse)
    found = asyncio.run(Reasons(world.engine, False).explain(world.served["gated"], prompt(world, QUERY), None))
    assert [(layer["layer"], layer["norm"]) for layer in found["layers"]] == [
        (number, pytest.approx(vector.norm().item(), rel=1e-4)) for number, vector in enumerate(vectors)
    ]
    assert found["lens"] == "There is no head to read with."
    assert "--training-queries" in found["nearest_note"]


def test_training_queries_are_read_one_after_another_beside_the_loops_own_threads(world, monkeypatch):
    go, reading = threading.Event(), []

    def slow(folder):
        reading.append(folder.name)
        assert go.wait(10)
        return training_tasks(folder)

    monkeypatch.setattr("atv.serving.why.training_tasks", slow)
    reasons = Reasons(world.engine, True)

    async def both():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        asked = [
            asyncio.create_task(reasons.explain(world.served[name], prompt(world, QUERY), None))
            for name in ("gated", "fixed")
        ]
        while not reading:
            await asyncio.sleep(0.01)
        await asyncio.wait_for(asyncio.to_thread(time.sleep, 0), 5)  # as a prompt is made
        await asyncio.sleep(0.05)
        assert len(reading) == 1
        go.set()
        return await asyncio.gather(*asked)

    try:
        gated, fixed = asyncio.run(both())
    finally:
        go.set()
    assert gated["nearest_note"].startswith(f"Of {len(TASK.train)} training queries,")
    assert fixed["nearest_note"] == "The training queries cannot be read; see the server's log."


def test_training_queries_that_fail_in_any_way_are_said_to(world, monkeypatch, caplog):
    monkeypatch.setattr("atv.serving.why.training_tasks", lambda _: {}["secret"])
    reasons = Reasons(world.engine, True)

    async def twice():
        found = [await reasons.explain(world.served["gated"], prompt(world, QUERY), None) for _ in range(2)]
        await reasons.close()
        return found

    for found in asyncio.run(twice()):
        assert found["nearest"] is None
        assert found["nearest_note"] == "The training queries cannot be read; see the server's log."
    assert "The training queries of gated cannot be read: KeyError: 'secret'" in caplog.text


def test_reading_training_queries_ends_with_the_engine_and_the_server(world, monkeypatch):
    engine = Engine(world.llm, world.tokenizer, Limits(rows=2))
    models, reading = Models("base", world.tokenizer, engine.load), threading.Event()
    models.add("gated", world.folder / "gated")

    def read(adapter, tasks, call):
        while True:
            call(lambda: None)
            reading.set()

    async def stopped():
        reasons = Reasons(engine, True)
        asked = asyncio.create_task(reasons.explain(models["gated"], prompt(world, QUERY), None))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        engine.close()
        await asyncio.wait_for(reasons.close(), 20)
        return await asked

    with monkeypatch.context() as patch:
        patch.setattr("atv.serving.why.TrainingQueries", read)
        assert asyncio.run(stopped())["nearest"] is None

    before = set(threading.enumerate())
    engine = Engine(world.llm, world.tokenizer, Limits(rows=2))
    app = make_app(engine, models, training_queries=True)
    with TestClient(app, base_url="http://localhost") as client:
        assert client.post("/v1/steer", json={"model": "gated", "query": QUERY}).json()["nearest"]
        assert any("training-queries" in thread.name for thread in set(threading.enumerate()) - before)
    assert not any("training-queries" in thread.name for thread in set(threading.enumerate()) - before)


def test_looking_changes_no_answer_that_is_being_decoded(world):
    alone = {name: chat(world, name, max_tokens=15) for name in ("gated", "self", "base")}
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: chat(world, name, max_tokens=15)}))
        for name in alone
    ]
    for thread in threads:
        thread.start()
    looked = 0
    while any(thread.is_alive() for thread in threads) or not looked:
        post(world, "/v1/steer", model=("gated", "self")[looked % 2], query=f"{QUERY} {looked}")
        looked += 1
    assert found == alone


# ---- the page ----


class Parts(HTMLParser):
    """The elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_files_need_no_other_host_no_inline_code_and_every_field_has_a_label(world):
    for path in ("/", "/page.css", "/page.js"):
        with urllib.request.urlopen(f"http://127.0.0.1:{world.port}{path}") as answer:
            text, headers = answer.read().decode(), answer.headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in text
        if path == "/":
            parts = Parts(text).found
    assert all("src" in attrs for tag, attrs in parts if tag == "script")
    assert not any(tag == "style" for tag, _ in parts)
    assert not any(name == "style" or name.startswith("on") for _, attrs in parts for name in attrs)
    labels = {attrs["for"] for tag, attrs in parts if tag == "label"}
    assert labels == {attrs["id"] for tag, attrs in parts if tag in ("input", "select", "textarea")}


@pytest.fixture(scope="module")
def browser():
    with pytest.importorskip("playwright.sync_api").sync_playwright() as playwright:
        browser = browser_of(playwright)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, world):
    """Opens the page; what the console said and the addresses of requests."""
    said, asked = [], []

    def open_page(port=world.port):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        return page

    yield open_page, said, asked
    for context in browser.contexts:
        context.close()


def ended(page):
    page.wait_for_selector("#stop", state="hidden")
    return page.locator(".column:visible .text").all_text_contents()


def until(page, condition):
    """Wait for a condition; the page's policy forbids `wait_for_function`, which evaluates text inside the page."""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def shown(page, text):
    return page.evaluate("text => text.trimStart()", text)


def active(page):
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def test_by_keyboard_alone_a_question_is_asked_and_the_answers_are_those_of_the_api(opened, world, tmp_path):
    open_page, said, asked = opened
    page = open_page()
    page.wait_for_selector(".column:visible")
    page.keyboard.press("Tab")
    assert active(page) == "skip"
    page.keyboard.press("Tab")
    assert active(page) == "question"
    page.keyboard.type(QUERY)
    order = []
    while not order or order[-1] != "ask":
        page.keyboard.press("Tab")
        order.append(active(page))
        if order[-1] == "tokens":
            page.keyboard.press("Control+a")
            page.keyboard.type("9")
        elif order[-1] == "task-2":
            page.keyboard.type("other")  # chooses the option
        elif order[-1] == "scale":
            page.keyboard.press("Control+a")
            page.keyboard.type("2.5")
    assert order == ["adapter-1", "adapter-2", "task-2", "scale", "tokens", "temperature", "ask"]
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.text').textContent")
    texts = ended(page)
    expected = [
        chat(world, "base"),
        chat(world, "gated", scale=2.5),
        chat(world, "tasks", scale=2.5, task="other"),
    ]
    assert texts == [shown(page, text) for text in expected]
    assert len(set(texts)) == 3
    assert page.locator(".column h2").all_text_contents() == ["Plain LLM", "gated", "tasks · other"]
    assert all("Cut at 9 tokens after" in text for text in page.locator(".state").all_text_contents())
    heard = page.locator("#said").text_content()
    assert all(" ".join(text.split()) in " ".join(heard.split()) for text in texts)

    why = page.locator(".why")
    assert not why.nth(0).is_visible()
    about = post(world, "/v1/steer", model="gated", query=QUERY, scale=2.5)
    text = why.nth(1).inner_text()
    assert f"Nearness to the training queries: {about['distance']['nearness']:.2f}" in text
    assert ("Out of domain" in text) == about["distance"]["out_of_domain"]
    assert [each["query"] in text for each in about["nearest"]] == [True] * 3
    norms = why.nth(1).locator("table").first.locator("td:nth-child(2)").all_text_contents()
    assert norms == [f"{layer['norm']:.2f}" for layer in reversed(about["layers"])]
    widths = [float(bar.get_attribute("width")) for bar in why.nth(1).locator(".bar rect").all()]
    most = max(layer["norm"] for layer in about["layers"])
    assert widths == pytest.approx([100 * layer["norm"] / most for layer in reversed(about["layers"])])
    assert "has no gate" in why.nth(2).inner_text()
    assert "see the server's log" in why.nth(2).inner_text()

    page.locator("#question").fill(BAD)
    page.keyboard.press("Control+Enter")
    ended(page)
    assert BAD in why.nth(1).inner_text()
    assert page.title() == "Adaptive Task Vectors"
    assert page.locator("main img").count() == 0
    assert said == []
    assert {request.url.split("/")[2] for request in asked if not request.url.startswith("data:")} == {
        f"127.0.0.1:{world.port}"
    }
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None
    with page.expect_event("requestfailed") as refusal:
        page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    assert refusal.value.failure == "csp"


def test_answers_are_stopped_one_by_one_and_all_and_leave_the_engine(opened, world):
    open_page, said, _ = opened
    page = open_page()
    page.wait_for_selector(".column:visible")
    page.fill("#question", QUERY)
    page.fill("#tokens", "300")
    handle = world.llm.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    try:
        before = world.engine.numbers()["cancelled"]
        page.keyboard.press("Control+Enter")
        until(page, "[...document.querySelectorAll('.text')].every((one) => one.textContent)")
        assert page.locator(".text").first.get_attribute("aria-busy") == "true"
        stop = page.get_by_role("button", name="Stop gated")
        stop.focus()
        page.keyboard.press("Enter")
        stop.wait_for(state="hidden")
        assert page.locator(".state").nth(1).text_content().startswith("Stopped after")
        assert active(page) == "column-1"
        assert page.get_by_role("button", name="Stop Plain LLM").is_visible()
        page.locator("#ask").focus()
        page.keyboard.press("Tab")
        assert active(page) == "stop"
        page.keyboard.press("Enter")
        texts = ended(page)
        assert active(page) == "ask"
        assert all(texts)
        page.keyboard.press("Control+Enter")  # again, stopped by the other key
        until(page, "document.querySelector('.text').textContent")
        page.keyboard.press("Escape")
        ended(page)
        deadline = time.monotonic() + 10
        while world.engine.numbers()["cancelled"] < before + 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert world.engine.numbers()["cancelled"] == before + 6
    finally:
        handle.remove()
    assert said == []


def test_errors_of_the_api_are_text(opened, world):
    open_page, _, _ = opened
    page = open_page()
    page.wait_for_selector(".column:visible")
    page.fill("#question", QUERY)
    page.fill("#tokens", "100000")
    page.keyboard.press("Control+Enter")
    assert ended(page) == ["max_tokens is 100000; expected at most 1024."] * 3
    page.fill("#temperature", "3")
    page.fill("#tokens", "2")
    page.keyboard.press("Control+Enter")  # the browser's own check
    assert active(page) == "temperature"
    page.fill("#temperature", "0")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('.text').textContent.includes('reached')")
    assert ended(page) == ["The server cannot be reached."] * 3


def test_it_fits_a_phone_in_the_dark_and_in_the_light(opened, world, tmp_path):
    open_page, said, _ = opened
    grounds = {}
    page = open_page()
    page.wait_for_selector(".column:visible")
    page.fill("#question", QUERY)
    page.fill("#tokens", "5")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('.text').textContent")
    ended(page)
    for theme, width in (("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=theme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        lefts = {round(box.bounding_box()["x"]) for box in page.locator(".column:visible").all()}
        assert len(lefts) == (3 if width == 1280 else 1)
        assert len(page.screenshot(path=tmp_path / f"{theme}-{width}.png", full_page=True)) > 20_000
        grounds[theme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]
    assert said == []


def test_a_key_is_asked_for_and_an_llm_without_chat_template_continues_the_text(opened):
    open_page, _, _ = opened
    llm, tokenizer = make_llm("llama", torch.float32), byte_level_tokenizer()
    engine = Engine(llm, tokenizer)
    with running(make_app(engine, Models("base", tokenizer, engine.load), key="secret")) as port:
        page = open_page(port)
        page.wait_for_selector("#access", state="visible")
        assert active(page) == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#problem", state="visible")
        assert "API key is missing or wrong" in page.text_content("#problem")
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#access", state="hidden")
        assert not page.locator("#problem").is_visible()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        assert active(page) == "question"
        assert page.locator(".column:visible").count() == 1
        assert "no chat template" in page.locator(".about").first.text_content()
        page.keyboard.type("one two three")
        page.fill("#tokens", "4")
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelector('.state').textContent.includes('after')")
        body = {"model": "base", "prompt": "one two three", "max_tokens": 4, "temperature": 0}
        text = post(SimpleNamespace(port=port), "/v1/completions", "secret", **body)["choices"][0]["text"]
        assert ended(page) == [shown(page, text)]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(SimpleNamespace(port=port), "/v1/completions", **body)
