"""Calls that used to run unsteered or steered elsewhere: other ways in, other threads, compiled code, other caches."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch
from conftest import GROUPED, PAPER_FORM, byte_level_tokenizer, make_atv, make_generator, make_llm, steer_known
from generation import NEW, PROMPTS, QUERIES, generated, recomputed
from refusals import refused
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    Phi3Config,
    Qwen2Config,
    StaticCache,
    set_seed,
)

from atv import unsteered
from atv.config import ATVConfig
from atv.lm.spans import Tracked, continuing
from atv.model import ATVModel

RECURRENT = {
    "mamba": MambaConfig(
        vocab_size=400, hidden_size=32, state_size=4, num_hidden_layers=3, initializer_range=0.4, time_step_rank=4
    ),
    "mamba2": Mamba2Config(
        vocab_size=400, hidden_size=32, state_size=4, num_hidden_layers=3, num_heads=8, head_dim=8, n_groups=2,
        initializer_range=0.4, chunk_size=8,
    ),
    "falcon_mamba": FalconMambaConfig(
        vocab_size=400, hidden_size=32, state_size=4, num_hidden_layers=3, initializer_range=0.4, time_step_rank=4
    ),
}  # fmt: skip


def atv_on(llm, **options):
    config = ATVConfig(**(PAPER_FORM | {"scale": 1.0} | options))
    llm.generation_config.eos_token_id = None
    set_seed(3)
    atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config))
    return atv.to(torch.float64).eval()


def from_config(config, **options):
    set_seed(1)
    return atv_on(AutoModelForCausalLM.from_config(config).to(torch.float64).eval(), **options)


def hooks_left(llm):
    return [module for module in llm.modules() if module._forward_hooks or module._forward_pre_hooks]


def logits(call):
    with torch.no_grad():
        return call().logits[:, -1]


# ---- ways into the LLM ----


def test_a_compiled_llm_is_steered_as_it_is_written():
    llm = make_llm()
    compiled = torch.compile(llm, backend="eager")
    atv = atv_on(compiled)
    inputs = atv.encode_prompts(PROMPTS)
    with torch.no_grad():
        plain = compiled(**inputs).logits[:, -1]  # compiled now, without a hook
    with atv.steer(QUERIES):
        steered = logits(lambda: compiled(**inputs))
        assert torch.equal(steered, logits(lambda: llm(**inputs)))
    assert not torch.allclose(steered, plain)
    assert torch.equal(logits(lambda: compiled(**inputs)), plain)
    assert generated(atv, PROMPTS, QUERIES, do_sample=False) == generated(
        atv_on(make_llm()), PROMPTS, QUERIES, do_sample=False
    )


@pytest.mark.exhaustive
def test_an_llm_compiled_in_place_or_inside_a_function_is_steered():
    expected = atv_on(make_llm())
    inputs = expected.encode_prompts(PROMPTS)
    with expected.steer(QUERIES):
        steered = logits(lambda: expected.llm(**inputs))
    llm = make_llm()
    llm.compile(backend="eager")
    atv = atv_on(llm)
    function = torch.compile(lambda inputs: atv.llm(**inputs), backend="eager")
    for call in (lambda: llm(**inputs), lambda: function(inputs)):
        plain = logits(call)
        with atv.steer(QUERIES):
            torch.testing.assert_close(logits(call), steered)
        torch.testing.assert_close(logits(call), plain)
    loss = atv(**atv.collator()([expected.encode_row(row) for row in rows()])).loss
    torch.testing.assert_close(loss, expected(**expected.collator()([expected.encode_row(row) for row in rows()])).loss)


def rows():
    from rendering import row_of

    return [row_of(query, (prompt,), "yes") for query, prompt in zip(QUERIES, PROMPTS, strict=True)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("positions", ["last", "answer"])
def test_an_llm_compiled_in_place_generates_steered(positions):
    expected = generated(atv_on(make_llm(), positions=positions), PROMPTS, QUERIES, do_sample=False)
    atv = atv_on(make_llm(), positions=positions)
    atv.llm.compile(backend="eager")
    inputs = atv.encode_prompts(PROMPTS)
    del inputs["position_ids"]
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    plain = atv.llm.generate(**inputs, **how)[:, -NEW:].tolist()  # compiled now, without a hook
    assert generated(atv, PROMPTS, QUERIES, do_sample=False) == expected != plain
    assert atv.llm.generate(**inputs, **how)[:, -NEW:].tolist() == plain


@pytest.mark.parametrize("positions", ["last", "answer"])
def test_decoding_steps_compiled_inside_a_context_are_plain_after_it(positions):
    from transformers import CompileConfig

    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": compiled}
    atv, other = (atv_on(make_llm(), positions=positions) for _ in range(2))
    steered = generated(other, PROMPTS, QUERIES, do_sample=False)
    assert generated(atv, PROMPTS, QUERIES, **options) == steered
    inputs = atv.encode_prompts(PROMPTS)
    width = inputs.pop("position_ids").shape[1]
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    plain = [atv.llm.generate(**inputs, **how, **options)[:, width:].tolist() for _ in range(2)]
    expected = other.llm.generate(**inputs, **how, do_sample=False)[:, width:].tolist()
    assert plain == [expected, expected] != [steered, steered]
    assert generated(atv, PROMPTS, QUERIES, **options) == steered


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "peft"])
def test_a_way_past_the_llm_into_its_layers_is_refused(name):
    from atv.lm.hooks import base_llm

    atv = make_atv(name)
    llm, inputs = base_llm(atv.llm), atv.encode_prompts(PROMPTS)
    with atv.steer(QUERIES), torch.no_grad():
        for way in (llm.forward, llm.base_model):
            with refused(type(llm).__name__, "llm.forward", "llm(...)", "atv.unsteered()"):
                way(**inputs)
        with unsteered():
            plain = [way(**inputs)[0] for way in (llm.forward, llm.base_model)]
    with torch.no_grad():
        assert torch.equal(plain[0], llm(**inputs).logits)
        assert torch.equal(plain[1], llm.base_model(**inputs)[0])
    assert not hooks_left(llm)


def test_an_llm_put_into_training_mode_answers_as_in_eval_mode():
    from conftest import SIZES
    from transformers import GPT2Config

    def llm():
        set_seed(1)
        made = AutoModelForCausalLM.from_config(GPT2Config(**SIZES, resid_pdrop=0.5, embd_pdrop=0.5)).double().eval()
        return atv_on(made)

    atv = llm()
    expected, loss = generated(atv, PROMPTS, QUERIES, do_sample=False), atv(**atv.collator()(encoded(atv))).loss
    atv = llm()
    atv.llm.train()
    assert generated(atv, PROMPTS, QUERIES, do_sample=False) == expected
    atv.llm.transformer.h[1].train()
    assert torch.equal(atv(**atv.collator()(encoded(atv))).loss, loss)


def encoded(atv):
    return [atv.encode_row(row) for row in rows()]


# ---- caches ----


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("positions", ["last", "answer"])
def test_a_recurrent_cache_gives_the_answer_of_no_cache(name, positions):
    atv = from_config(RECURRENT[name], positions=positions)
    expected = [recomputed(atv, prompt, query) for prompt, query in zip(PROMPTS, QUERIES, strict=True)]
    for prompt, query, tokens in zip(PROMPTS, QUERIES, expected, strict=True):
        assert generated(atv, [prompt], [query], do_sample=False) == [tokens]
        assert generated(atv, [prompt], [query], do_sample=False, use_cache=False) == [tokens]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_cache_in_a_loop_by_hand(name):
    atv = from_config(RECURRENT[name])
    ids = atv.encode_prompts(PROMPTS[:1])["input_ids"]
    found = []
    with atv.steer(QUERIES[:1]), torch.no_grad():
        output = atv.llm(ids, use_cache=True)
        for _ in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            found.append(token.item())
            output = atv.llm(token, cache_params=output.cache_params, use_cache=True)
    assert found == recomputed(atv, PROMPTS[0], QUERIES[0])


WINDOWED = {
    "mistral": None,
    "phi3": Phi3Config(**GROUPED, sliding_window=6),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma3": None,
}


@pytest.mark.parametrize(
    ("name", "positions"),
    [("mistral", "all"), ("mistral", "last:12"), ("phi3", "last:12"), ("qwen2", "answer"), ("gemma3", "all")],
)
def test_a_static_cache_edits_what_a_dynamic_one_edits_beyond_a_window_too(name, positions):
    config = WINDOWED[name]
    atv = from_config(config, positions=positions) if config else atv_on(make_llm(name), positions=positions)
    found = generated(atv, PROMPTS, QUERIES, do_sample=False, cache_implementation="static")
    assert found == generated(atv, PROMPTS, QUERIES, do_sample=False)
    cache = StaticCache(config=atv.llm.config, max_cache_len=64)
    assert generated(atv, PROMPTS, QUERIES, do_sample=False, past_key_values=cache) == found


@pytest.mark.parametrize("start", [0, 3, 9])
@pytest.mark.parametrize("window", [4, 16])
@pytest.mark.parametrize("positions", ["last:2", "all"])
def test_padding_is_read_off_masks_of_every_shape(start, window, positions):
    """A call of 7 tokens after `start`, against the 2-D mask, of keys that are all, a window's or a static cache's."""
    from atv.config import Positions

    width, total = 7, start + 7
    attention = torch.ones(2, total, dtype=torch.long)
    attention[0, start : start + 2] = 0
    attention[1, total - 3 :] = 0
    queries, keys = torch.arange(start, total)[:, None], torch.arange(total)[None]
    seen = (keys <= queries) & (keys > queries - window) & attention.bool()[:, None]
    static = torch.nn.functional.pad(seen, (0, 5))
    tail = seen[:, :, max(0, start - window + 1) :]
    masks = [
        attention[:, -width:], seen[:, None], tail[:, None], static[:, None], seen,
        torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None],
        {"sliding_attention": tail[:, None], "full_attention": seen[:, None]}, {"sliding_attention": tail[:, None]},
    ]  # fmt: skip

    class Cache:
        def get_seq_length(self):
            return start

    def mask_of(attention_mask):
        call = {"input_ids": torch.zeros(2, width), "attention_mask": attention_mask, "past_key_values": Cache()}
        return Tracked(2, Positions.parse(positions))(call).where

    expected = mask_of(attention)
    assert expected.sum() == (4 if positions == "last:2" else 9)
    for mask in masks:
        assert torch.equal(mask_of(mask), expected)


# ---- turns and calls that nothing tells apart ----


@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
def test_another_turn_with_the_cache_kept_is_steered_at_its_own_end(positions):
    atv = atv_on(make_llm(), positions=positions)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ids, turn = (atv.encode_prompts([text])["input_ids"] for text in PROMPTS[:2])
    with atv.steer(QUERIES[:1]):
        first = atv.llm.generate(ids, return_dict_in_generate=True, **options)
        so_far = torch.cat([first.sequences, turn], dim=1)
        found = atv.llm.generate(so_far, past_key_values=first.past_key_values, **options)[0, so_far.shape[1] :]
    vectors = atv.task_vectors(QUERIES[:1])
    width, asked = ids.shape[1], so_far.shape[1]
    expected = []

    for step in range(3):
        text = torch.cat([so_far[0], torch.tensor(expected, dtype=torch.long)])[None]
        mask = torch.zeros(text.shape, dtype=torch.bool)
        count = {"last": 1, "last:3": 3, "answer": 1}.get(positions)
        for end in (width, asked):  # the prompt of each turn; the first answer's last token belongs to the second turn
            mask[0, 0 if count is None else end - count : end] = True
        if atv.positions.answer:
            mask[0, width : width + 2] = True
            mask[0, asked : asked + step] = True
        with torch.no_grad(), steer_known(atv.llm, atv.layers, vectors, 1.0, mask):
            expected.append(atv.llm(text, use_cache=False).logits[0, -1].argmax().item())
    assert found.tolist() == expected


def test_several_tokens_after_a_cached_prompt_are_refused_unless_they_are_said_to_answer_it():
    atv = atv_on(make_llm())
    ids, more = (atv.encode_prompts([text])["input_ids"] for text in PROMPTS[:2])
    with atv.steer(QUERIES[:1]), torch.no_grad():
        whole = atv.llm(ids).logits
        both = atv.llm(torch.cat([ids, more], dim=1), use_cache=False).logits[:, -1]
        past = atv.llm(ids, use_cache=True).past_key_values
        with refused("tokens after a cached prompt", "new context", "continuing()"):
            atv.llm(more, past_key_values=past)
        with continuing():
            torch.testing.assert_close(atv.llm(more, past_key_values=past).logits[:, -1], both)
    with atv.steer(QUERIES[:1]):
        torch.testing.assert_close(logits(lambda: atv.llm(torch.cat([ids], dim=1))), whole[:, -1])


@pytest.mark.parametrize(
    ("option", "value"), [("guidance_scale", 1.5), ("prefill_chunk_size", 4), ("prompt_lookup_num_tokens", 3)]
)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_generation_that_cannot_be_followed_is_refused_before_it_begins(option, value, positions):
    atv = make_atv(positions=positions)
    inputs = atv.encode_prompts(PROMPTS[:1])
    del inputs["position_ids"]
    called = []
    handle = atv.llm.register_forward_pre_hook(lambda *_: called.append(1))
    config = atv.llm.generation_config
    with refused(option, "Leave it out"):
        atv.generate(PROMPTS, QUERIES, max_new_tokens=2, **{option: value})
    with atv.steer(QUERIES[:1]):
        with refused(option, "Leave it out"):
            atv.llm.generate(**inputs, max_new_tokens=2, **{option: value})
        setattr(config, option, value)
        with refused(option, "Leave it out"):
            atv.llm.generate(**inputs, max_new_tokens=2)
        setattr(config, option, 1 if option == "guidance_scale" else None)
        assert not called
        atv.llm.generate(**inputs, max_new_tokens=2, pad_token_id=0)
    assert called
    handle.remove()
    assert "generate" not in vars(atv.llm)


def test_batches_that_transformers_packs_are_refused():
    atv = make_atv(dtype=torch.float32)
    ids = atv.encode_prompts(PROMPTS[:1])["input_ids"].tolist()
    with atv.steer(QUERIES[:1]):
        for call in (lambda: atv.llm.generate_batch(ids), lambda: atv.llm.init_continuous_batching()):
            with refused("packs the tokens", "generate"):
                call()
    assert not hooks_left(atv.llm)


# ---- threads and tasks ----


@pytest.mark.parametrize("positions", ["last", "answer"])
def test_threads_that_generate_on_one_llm_each_get_their_own_answer(positions):
    atv = make_atv(positions=positions, scale=1.0, dtype=torch.float32)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    work = [(prompt, query, scale) for prompt in PROMPTS for query in QUERIES for scale in (0.5, 1.5)]

    def answer(job):
        prompt, query, scale = job
        with atv.steer([query], scale=scale):
            first = atv.llm(**atv.encode_prompts([prompt])).logits[0, -1].tolist()
        return first, atv.generate([prompt], [query], **options)

    with torch.no_grad():
        expected = [answer(job) for job in work]
    assert len({str(first) for first, _ in expected}) == len(work)

    def in_a_thread(job):
        with torch.no_grad():
            return answer(job)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(in_a_thread, work)) == expected
    assert not hooks_left(atv.llm)
    assert "generate" not in vars(atv.llm)


def test_a_thread_that_opened_no_context_is_refused_and_can_say_what_it_wants():
    """The thread of a streamer may be meant to be steered, one that compares with the plain LLM not to be."""
    atv = make_atv(scale=1.0)
    inputs = atv.encode_prompts(PROMPTS)
    plain = logits(lambda: atv.llm(**inputs))
    found = {}

    def run(name, call):
        try:
            found[name] = logits(call)
        except Exception as error:
            found[name] = error

    def plainly():
        with unsteered():
            return atv.llm(**inputs)

    with atv.steer(QUERIES):
        steered = logits(lambda: atv.llm(**inputs))
        threads = [
            Thread(target=run, args=("stranger", lambda: atv.llm(**inputs))),
            Thread(target=run, args=("plain", plainly)),
            Thread(target=contextvars.copy_context().run, args=(run, "steered", lambda: atv.llm(**inputs))),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    with refused("thread or task that opened no steering", "copy_context", "atv.unsteered()"):
        raise found["stranger"]
    assert torch.equal(found["plain"], plain)
    assert torch.equal(found["steered"], steered)


def test_a_context_that_closes_in_one_thread_leaves_another_ones_call_alone():
    atv = make_atv(scale=1.0)
    inputs = atv.encode_prompts(PROMPTS)
    with atv.steer(QUERIES):
        expected = logits(lambda: atv.llm(**inputs))
    inside, go = Event(), Event()

    def wait(*_):
        inside.set()
        go.wait(10)

    handle = atv.layers[1].register_forward_pre_hook(wait)
    found = []

    def steered():
        with atv.steer(QUERIES):
            found.append(logits(lambda: atv.llm(**inputs)))

    thread = Thread(target=steered)
    thread.start()
    inside.wait(10)
    with atv.steer(QUERIES[::-1]):
        go.set()
        found.append(logits(lambda: atv.llm(**inputs)))
    thread.join()
    handle.remove()
    assert sum(torch.equal(each, expected) for each in found) == 1
    assert not hooks_left(atv.llm)


def test_tasks_of_one_event_loop_are_steered_by_their_own_context_alone():
    atv = make_atv(scale=1.0)
    inputs = atv.encode_prompts(PROMPTS)

    def alone(queries):
        with atv.steer(queries):
            return logits(lambda: atv.llm(**inputs))

    async def task(queries):
        with atv.steer(queries):
            await asyncio.sleep(0.01)
            found = logits(lambda: atv.llm(**inputs))
            await asyncio.sleep(0.01)
        return found

    async def both():
        return await asyncio.gather(task(QUERIES), task(QUERIES[::-1]))

    for found, queries in zip(asyncio.run(both()), (QUERIES, QUERIES[::-1]), strict=True):
        assert torch.equal(found, alone(queries))
