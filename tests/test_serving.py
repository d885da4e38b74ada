"""Requests with different adapters in common batches: equal to each prompt read alone, whatever else runs."""

import asyncio
import random
import threading
import time
from functools import cache

import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TEXTS, adapters, prompt, same_predictions, sequential

from atv.data.render import Prompt
from atv.errors import ATVError, Unavailable
from atv.serving.batch import Batch, Row
from atv.serving.beginnings import LEAST, CachedBeginnings
from atv.serving.engine import FAILURES, Engine
from atv.serving.requests import Busy, Limits, Request
from atv.serving.sampling import Sampler, Sampling
from atv.serving.text import TextStream, token_bytes

GREEDY = Sampling(max_tokens=6, temperature=0.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_rows_equal_each_prompt_alone(name):
    llm, tokenizer, models = adapters(name)
    every = [None, *models.values()]
    rows = [Row(prompt(tokenizer, text), every[index % len(every)]) for index, text in enumerate(TEXTS)]
    expected = [sequential(llm, row, (), 5) for row in rows]
    batch = Batch(llm, rows, 0)
    for step in range(5):
        tokens = [found[step][0] for found in expected]
        torch.testing.assert_close(
            batch.logits.double(), torch.stack([found[step][1] for found in expected]), rtol=1e-4, atol=1e-4
        )
        batch.step(tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_rows_that_come_and_go_change_no_other_row(name):
    llm, tokenizer, models = adapters(name)
    every = [None, *models.values()]
    beginnings = CachedBeginnings(llm, 2**30)
    draw = random.Random(5)
    batch, done = None, 0
    expected = {}
    for _ in range(12):
        texts = draw.choices(TEXTS, k=draw.randint(0, 2))
        new = [Row(prompt(tokenizer, text), draw.choice(every)) for text in texts]
        for row in new:
            expected[row] = sequential(llm, row, (), 12)
        if new:
            read = Batch(llm, new, 0, beginnings)
            if batch is None or not batch.rows:
                batch = read
            elif batch.joins:
                batch.join(read)
            else:
                assert name == "mistral"  # a sliding window
                batch = read
        if batch is None:
            continue
        for row, logits in zip(batch.rows, batch.logits, strict=True):
            torch.testing.assert_close(logits.double(), expected[row][row.tokens][1], rtol=1e-4, atol=1e-4)
            done += 1
        remain = [index for index, row in enumerate(batch.rows) if draw.random() < 0.8 and row.tokens < 10]
        batch.keep(remain)
        if batch.rows:
            batch.step([expected[row][row.tokens][0] for row in batch.rows])
    assert done > 15


def test_a_scale_of_its_own_and_the_generator_self():
    from conftest import PAPER_FORM, byte_level_tokenizer, make_llm
    from transformers import set_seed

    from atv.config import ATVConfig
    from atv.model import ATVModel

    llm, tokenizer = make_llm(), byte_level_tokenizer()
    options = PAPER_FORM | {"generator": "self", "positions": "answer", "train_generator": None}
    set_seed(4)
    model = ATVModel(llm, ATVConfig(**options), tokenizer=tokenizer).double().eval()
    rows = [Row(prompt(tokenizer, text), model if index % 2 else None) for index, text in enumerate(TEXTS[:5])]
    alone = [model.generate([row.prompt], max_new_tokens=4, do_sample=False) for row in rows if row.model]
    batch = Batch(llm, rows, 0)
    tokens = [[] for _ in rows]
    for _ in range(4):
        chosen = batch.logits.argmax(-1).tolist()
        for own, token in zip(tokens, chosen, strict=True):
            own.append(token)
        batch.step(chosen)
    assert [tokenizer.decode(own) for own in tokens[1::2]] == [text for (text,) in alone]

    llm, tokenizer, models = adapters()
    row = Row(prompt(tokenizer, TEXTS[0]), models["answer"], scale=0.1)
    batch = Batch(llm, [row, Row(prompt(tokenizer, TEXTS[0]), models["answer"])], 0)
    ((_, logits),) = sequential(llm, row, (), 1, scale=0.1)
    torch.testing.assert_close(batch.logits[0].double(), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.logits[0], batch.logits[1], atol=1e-2)


def test_shared_beginnings_are_read_once_and_never_hold_a_steered_token():
    llm, tokenizer, models = adapters()
    text = "Question: the kettle leaks and the lid sticks, yes or no? " * 2
    prompts = [prompt(tokenizer, text + more) for more in ("one", "two two", "three", "three")]
    beginnings = CachedBeginnings(llm, 2**30)
    read = []
    handle = llm.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    for number, asked in enumerate(prompts):
        for model in (models["last"], None, models["last:3"], models["all"]):
            row = Row(asked, model)
            read.clear()
            batch = Batch(llm, [row], 0, beginnings)
            cost = sum(read)
            handle_off = sequential(llm, row, (), 1)
            torch.testing.assert_close(batch.logits[0].double(), handle_off[0][1], rtol=1e-4, atol=1e-4)
            if model is models["all"]:
                assert cost == len(asked.ids)  # all of its tokens are edited: nothing is shared
            elif number >= 2:
                assert cost <= len(asked.ids) - LEAST  # only what is its own
    handle.remove()
    assert beginnings.bytes > 0
    assert CachedBeginnings(llm, 0).of([(asked.ids, len(asked.ids) - 1) for asked in prompts]) == [None] * 4


def test_prompts_of_one_batch_share_their_beginning():
    llm, tokenizer, models = adapters()
    asked = prompt(tokenizer, TEXTS[0] * 3)
    read = []
    handle = llm.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    Batch(llm, [Row(asked, models["last"]) for _ in range(4)], 0, CachedBeginnings(llm, 2**30))
    handle.remove()
    assert sum(read) == len(asked.ids) - 1 + 4


def test_kept_beginnings_stay_within_their_limit():
    llm, tokenizer, _ = adapters()
    ids = prompt(tokenizer, TEXTS[0] * 3).ids
    one = CachedBeginnings(llm, 2**30)
    for _ in range(2):
        one.of([(ids, len(ids))])
    size = one.bytes
    small = CachedBeginnings(llm, size)
    for text in (TEXTS[0] * 3, TEXTS[1] * 3, TEXTS[3] * 3):
        for _ in range(3):
            small.of([(prompt(tokenizer, text).ids[: len(ids)], len(ids))])
            assert small.bytes <= size


@pytest.fixture(scope="module")
def world():
    llm, tokenizer, models = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=4, seconds=60))
    yield engine, models
    engine.close()


def test_concurrent_requests_equal_each_alone(world):
    engine, models = world
    every = [None, *models.values()]
    draw = random.Random(3)
    asked = [(draw.choice(TEXTS), draw.choice(every), draw.randint(1, 9)) for _ in range(40)]
    found = {}

    def ask(number):
        text, model, limit = asked[number]
        sampling = Sampling(max_tokens=limit, temperature=0.0, logprobs=2)
        found[number] = engine.answer(Request(prompt(engine.tokenizer, text), model, sampling=sampling))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    for number, (text, model, limit) in enumerate(asked):
        pieces = found[number]
        expected = sequential(engine.llm, Row(prompt(engine.tokenizer, text), model), {3}, limit)
        tokens = [token for token, _ in expected if token != 3]
        assert [told.token for piece in pieces for told in piece.tokens] == tokens
        for told, (token, logits) in zip((t for p in pieces for t in p.tokens), expected, strict=False):
            assert told.logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
            assert [one for one, _ in told.top] == logits.topk(2).indices.tolist()
        assert "".join(piece.text for piece in pieces) == engine.tokenizer.decode(tokens, skip_special_tokens=True)
        assert pieces[-1].finish == ("stop" if expected[-1][0] == 3 else "length")
        assert pieces[-1].generated == len(expected)
    assert engine.numbers()["running"] == engine.numbers()["waiting"] == 0


def test_predictions_equal_those_of_the_model(world):
    engine, models = world
    same_predictions(engine, models["answer"], models["answer"])


def test_predictions_with_more_requests_at_once_than_may_wait():
    llm, tokenizer, models = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=2, waiting=3, seconds=60))
    same_predictions(engine, models["answer"], models["answer"])
    engine.close()


def test_sampling_depends_on_the_seed_alone(world):
    engine, models = world
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=7, top_p=0.9)
    request = Request(prompt(engine.tokenizer, TEXTS[0]), models["last"], sampling=sampling)
    alone = "".join(piece.text for piece in engine.answer(request))
    found = []
    threads = [
        threading.Thread(target=lambda r=r: found.append((r, engine.answer(r))))
        for r in [request, Request(prompt(engine.tokenizer, TEXTS[1]), None, sampling=GREEDY), request]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = {"".join(piece.text for piece in pieces) for asked, pieces in found if asked is request}
    assert texts == {alone}


def test_a_failing_request_fails_alone(world):
    engine, models = world
    bad = Request(Prompt([5, 6], "   "), models["last"], sampling=GREEDY)  # the generator refuses an empty query
    good = Request(prompt(engine.tokenizer, TEXTS[0]), models["last"], sampling=GREEDY)
    pieces = {}
    threads = [
        threading.Thread(target=lambda n=n, r=r: pieces.update({n: engine.answer(r)}))
        for n, r in enumerate([good, bad, good, bad])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pieces[n][-1].finish for n in range(4)] in (["length", "error"] * 2, ["stop", "error"] * 2)
    assert isinstance(pieces[1][-1].error, ATVError)
    assert engine.healthy()


def test_a_row_whose_token_cannot_be_chosen_fails_alone(world, monkeypatch):
    engine, models = world
    choose = Sampler.choose
    nan = Sampling(max_tokens=4, temperature=0.5, top_p=0.123)
    monkeypatch.setattr(
        Sampler,
        "choose",
        lambda self, logits: choose(self, logits * float("nan") if self._sampling is nan else logits),
    )
    good = Request(prompt(engine.tokenizer, TEXTS[0]), models["last"], sampling=GREEDY)
    expected = "".join(piece.text for piece in engine.answer(good))
    pieces = {}
    threads = [
        threading.Thread(target=lambda n=n, r=r: pieces.update({n: engine.answer(r)}))
        for n, r in enumerate([good, Request(good.prompt, models["last"], sampling=nan), good])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "not finite" in str(pieces[1][-1].error)
    assert ["".join(piece.text for piece in pieces[n]) for n in (0, 2)] == [expected] * 2
    assert engine.healthy()


@pytest.mark.parametrize("part", ["keep", "join", "step"])
def test_a_batch_that_fails_ends_its_requests_and_the_engine_goes_on(part, monkeypatch):
    llm, tokenizer, models = adapters()
    monkeypatch.setattr("atv.serving.engine.end_ids", lambda *_: [])
    engine = Engine(llm, tokenizer, Limits(rows=4, seconds=60))
    asked = [
        Request(prompt(tokenizer, text), models["answer"], sampling=Sampling(max_tokens=limit, temperature=0.0))
        for text, limit in zip(TEXTS, (4, 40, 60), strict=False)
    ]
    working, failing = getattr(Batch, part), True

    def broken(self, given):
        if failing and list(getattr(given, "rows", given)):  # dropping all rows works
            raise RuntimeError("out of memory")
        return working(self, given)

    monkeypatch.setattr(Batch, part, broken)
    found = {}
    threads = [
        threading.Thread(target=lambda n=n, r=r: found.update({n: engine.answer(r)})) for n, r in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(timeout=60)
    assert "error" in {pieces[-1].finish for pieces in found.values()}
    assert len(found) == len(asked)
    failing = False
    expected = models["answer"].generate([asked[0].prompt], max_new_tokens=4, do_sample=False, eos_token_id=[])
    assert "".join(piece.text for piece in engine.answer(asked[0])) == expected[0]
    engine.close()
    assert engine.numbers()["running"] == 0


def test_no_client_waits_for_an_engine_that_has_stopped(monkeypatch):
    llm, tokenizer, _ = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=4, seconds=60))

    def broken():
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(engine, "_admitted", broken)
    asked = Request(prompt(tokenizer, TEXTS[0]), sampling=GREEDY)
    pieces = engine.answer(asked)
    assert pieces[-1].finish == "error"
    assert "has stopped" in str(pieces[-1].error)
    assert isinstance(pieces[-1].error, Unavailable)
    assert not engine.healthy()
    with pytest.raises(Unavailable, match="closed"):
        engine.submit(asked, print)
    engine.close()


@pytest.mark.parametrize("part", ["__init__", "step"])
def test_an_engine_whose_llm_fails_call_after_call_is_not_healthy_until_one_succeeds(part, monkeypatch):
    llm, tokenizer, models = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=4, seconds=60))
    asked = Request(prompt(tokenizer, TEXTS[0]), sampling=Sampling(max_tokens=3, temperature=0.0))
    bad = Request(Prompt([5, 6], "   "), models["last"], sampling=GREEDY)  # fails for a reason of its own

    def broken(*_):
        raise RuntimeError("device-side assert triggered")

    for _ in range(FAILURES):
        assert engine.answer(bad)[-1].error is not None
    assert engine.healthy()
    with monkeypatch.context() as patch:
        patch.setattr(Batch, part, broken)
        for _ in range(FAILURES):
            assert engine.healthy()
            assert isinstance(engine.answer(asked)[-1].error, RuntimeError)
        assert not engine.healthy()
    assert engine.answer(asked)[-1].error is None
    assert engine.healthy()
    engine.close()


def test_calls_have_a_limit_and_a_cancelled_one_is_not_made():
    llm, tokenizer, _ = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=4, waiting=2, seconds=60))
    started, go, made = threading.Event(), threading.Event(), []

    def held():
        started.set()
        return go.wait(60)

    async def calls():
        first = asyncio.create_task(engine.run(held))
        while not started.is_set():
            await asyncio.sleep(0.01)
        second = asyncio.create_task(engine.run(lambda: made.append("second")))
        third = asyncio.create_task(engine.run(lambda: made.append("third")))
        await asyncio.sleep(0)  # both are queued
        with pytest.raises(Busy):
            await engine.run(lambda: made.append("fourth"))
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        go.set()
        await third
        return await first

    assert asyncio.run(calls())
    assert made == ["third"]
    assert engine.healthy()
    engine.close()


def test_rows_that_are_decoded_together_stay_within_the_limit_padding_included():
    llm, tokenizer, _ = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=16, tokens=400, seconds=60))
    held, step = [], Batch.step

    def seen(self, tokens):
        step(self, tokens)
        held.append((self._ids.numel(), len(self.rows)))

    Batch.step, pieces = seen, {}
    try:
        sizes = [180, *[8] * 12]
        asked = [
            Request(Prompt([5] * size, "a b"), sampling=Sampling(max_tokens=12, temperature=0.0)) for size in sizes
        ]
        threads = [
            threading.Thread(target=lambda n=n, r=r: pieces.update({n: engine.answer(r)})) for n, r in enumerate(asked)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        Batch.step = step
    engine.close()
    assert {each[-1].finish for each in pieces.values()} <= {"stop", "length"}
    assert max(count for count, _ in held) <= 400
    assert max(rows for _, rows in held) > 4


@pytest.mark.parametrize(("limit", "columns"), [(420, 181), (800, 180)])
def test_known_beginnings_beside_other_prompts_stay_within_the_limit(limit, columns, monkeypatch):
    """Between a known beginning and a row's other tokens there is padding, if another row has more of these."""
    monkeypatch.setattr("atv.serving.engine.end_ids", lambda *_: [])
    llm, tokenizer, _ = adapters()
    engine = Engine(llm, tokenizer, Limits(rows=4, tokens=limit, seconds=60))
    shared, sampling = [5, 6, 7, 8] * 45, Sampling(max_tokens=8, temperature=0.0, logprobs=0)
    for own in (9, 10):
        engine.answer(Request(Prompt([*shared, own], "a b"), sampling=sampling))
    held, read, step = [], [], Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, tokens: (step(self, tokens), held.append(self._ids.numel())))
    llm.model.embed_tokens.register_forward_hook(lambda _, args, __: read.append(tuple(args[0].shape)))
    started, together = threading.Event(), threading.Event()
    waiting = threading.Thread(target=lambda: asyncio.run(engine.run(lambda: (started.set(), together.wait(60)))))
    waiting.start()
    assert started.wait(60)
    prompts, found = [Prompt([*shared, 11], "a b"), Prompt([12, 13] * 90, "a b")], [[], []]
    for asked, pieces in zip(prompts, found, strict=True):
        engine.submit(Request(asked, sampling=sampling), pieces.append)
    together.set()
    waiting.join()
    while not all(pieces and pieces[-1].finish for pieces in found):
        time.sleep(0.01)
    engine.close()
    assert read[0] == (2, columns)  # both prompts at once: the second one whole, of the first what is not known
    assert max(held) <= limit
    for asked, pieces in zip(prompts, found, strict=True):
        expected = [token for token, _ in sequential(llm, Row(asked), (), 8)]
        assert [told.token for piece in pieces for told in piece.tokens] == expected


def test_cancelled_and_late_requests_end_and_free_their_place(monkeypatch):
    llm, tokenizer, models = adapters()
    monkeypatch.setattr("atv.serving.engine.end_ids", lambda *_: [])
    handle = llm.register_forward_pre_hook(lambda *_: time.sleep(0.04))
    engine = Engine(llm, tokenizer, Limits(rows=1, waiting=2, seconds=4))
    asked = Request(prompt(tokenizer, TEXTS[0]), models["last"], sampling=Sampling(max_tokens=150, temperature=0.0))
    first, second = [], []
    cancel = engine.submit(asked, first.append)
    while engine.numbers()["running"] == 0:
        assert not first
        time.sleep(0.01)
    engine.submit(asked, second.append)
    engine.submit(asked, [].append)
    with pytest.raises(Busy) as refused:
        engine.submit(asked, [].append)
    assert refused.value.seconds >= 1
    cancel()
    deadline = time.monotonic() + 60
    while not (second and second[-1].finish) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first[-1].finish == "cancelled"
    assert second[-1].finish == "timeout"
    third = []
    engine.submit(asked, third.append)
    engine.close()
    assert third[-1].finish in ("error", "cancelled", "timeout")
    with pytest.raises(ATVError, match="closed"):
        engine.submit(asked, third.append)
    handle.remove()


def test_what_can_never_be_answered_is_refused(world):
    engine, _ = world
    asked = prompt(engine.tokenizer, TEXTS[0])
    with pytest.raises(ATVError, match="context is 256"):
        engine.submit(Request(asked, sampling=Sampling(max_tokens=250)), print)
    with pytest.raises(ATVError, match="at most 1024"):
        engine.submit(Request(asked, sampling=Sampling(max_tokens=5000)), print)
    for ids, begun in (([5, 400], ()), ([5], (-1,))):
        with pytest.raises(ATVError, match=r"token id (400|-1); the LLM's are 0 to 399"):
            engine.submit(Request(Prompt(ids, "a"), sampling=GREEDY, begun=begun), print)
    for options in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": ("",)}, {"logprobs": 99}):
        with pytest.raises(ATVError, match=next(iter(options))):
            Sampling(**options)


def test_samples_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=1))
        counts = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(2000)]), minlength=4) / 2000
        chances = (logits / temperature).softmax(-1)
        if top_p < 1:
            chances = torch.tensor([float(chances[0]), float(chances[1]), 0.0, 0.0])  # 0.64 + 0.24 >= 0.8
            chances = chances / chances.sum()
        torch.testing.assert_close(counts.float(), chances.float(), atol=0.05, rtol=0)
    for temperature in (0, 1e-308, 1e-3):
        assert Sampler(Sampling(temperature=temperature)).choose(logits.flip(0)) == 3
    masked = torch.tensor([float("-inf"), 1.0])
    assert Sampler(Sampling()).choose(masked) == 1
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ATVError, match="not finite"):
            Sampler(Sampling(temperature=0)).choose(torch.tensor([1.0, wrong]))


ENDINGS = st.lists(st.text(min_size=1, max_size=4), max_size=3)
SPACED = st.lists(st.sampled_from(["yes", " no", " .", " ,", " ?"]), max_size=20).map("".join)


def cleaning_tokenizer():
    """A tokenizer that decodes " ." to "." and the like unless it is told not to."""
    from conftest import sentencepiece_tokenizer

    tokenizer = sentencepiece_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode(tokenizer("yes . no")["input_ids"], skip_special_tokens=True) == "yes. no"
    return tokenizer


@cache
def tokenizers():
    from conftest import byte_level_tokenizer

    return [byte_level_tokenizer(), cleaning_tokenizer()]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | SPACED, ENDINGS, st.booleans())
def test_streamed_text_is_the_whole_text_up_to_a_stop_sequence(text, stop, cleans):
    tokenizer = tokenizers()[cleans]
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stream, shown = TextStream(tokenizer, stop), []
    for token in ids:
        shown.append(stream.push(token))
        if stream.stopped:
            break
    shown.append(stream.finish())
    places = [place for place in (whole.find(each) for each in stop) if place >= 0]
    assert "".join(shown) == (whole[: min(places)] if places else whole)
    assert stream.stopped == bool(places)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_bytes_of_tokens_add_up_to_the_text(kind):
    from chat_templates import chat_tokenizer
    from conftest import byte_level_tokenizer

    text = "The harbour, déjà vu: 港口 🚢!"
    if kind == "byte-level":
        tokenizer = byte_level_tokenizer()
        parts = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
        assert sum("\N{REPLACEMENT CHARACTER}" in part for part in parts) > 3  # parts of characters
    else:
        tokenizer = sentencepiece_tokenizer()
        text = " " + text  # which it writes before a text
    ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == text
    special = chat_tokenizer("chatml")
    assert token_bytes(special, special.eos_token_id).decode() == special.eos_token


def sentencepiece_tokenizer():
    """A tokenizer of Llama 2's kind: words begin with a mark, and unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"Theharbou",
        "▁The",
        "▁h",
        "r,",
        "ar",
        "bo",
    ]
    every = {piece: number for number, piece in enumerate(dict.fromkeys(vocabulary))}
    inner = Tokenizer(models.BPE(every, [("a", "r"), ("b", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
