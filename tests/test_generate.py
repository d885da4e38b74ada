"""Steered generation: cached, uncached, beams, samples, padding, and a user's own generate call."""

from contextlib import nullcontext

import pytest
import torch
from conftest import ARCHITECTURES, make_atv, pairwise, steer_known
from generation import NEW, PROMPTS, QUERIES, generated, recomputed
from refusals import refused
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, GenerationConfig, StaticCache, TextStreamer

from atv.cli.generate import room
from atv.data.collate import edit_mask
from atv.data.render import Prompt
from atv.errors import ATVError
from atv.lm.hooks import base_llm


@pytest.mark.parametrize(
    ("name", "positions", "use_cache"), pairwise(ARCHITECTURES, ["last", "last:3", "answer", "all"], [True, False])
)
def test_a_batch_of_mixed_lengths_equals_each_prompt_recomputed_by_hand(name, positions, use_cache):
    atv = make_atv(name, positions=positions, scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    found = generated(atv, PROMPTS, QUERIES, do_sample=False, use_cache=use_cache)
    assert found == [recomputed(atv, prompt, query) for prompt, query in zip(PROMPTS, QUERIES, strict=True)]


def test_steering_changes_the_answer_and_each_query_steers_its_own_row():
    atv = make_atv()
    base_llm(atv.llm).generation_config.eos_token_id = None
    inputs = atv.encode_prompts(PROMPTS[:1] * 3)
    inputs.pop("position_ids")
    vectors = 3 * torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0))
    with atv.steer(QUERIES, vectors=vectors, scale=5.0):
        steered = atv.llm.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()
    plain = atv.llm.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0).tolist()
    assert len({tuple(row) for row in [*steered, *plain]}) == 4


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
def test_beams_repeat_the_vectors_row_by_row(positions):
    atv = make_atv(positions=positions, scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    options = {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    together = generated(atv, PROMPTS, QUERIES, **options)
    alone = [row for p, q in zip(PROMPTS, QUERIES, strict=True) for row in generated(atv, [p], [q], **options)]
    assert together == alone
    assert together == generated(atv, PROMPTS, QUERIES, use_cache=False, **options)


def test_beam_scores_are_those_of_the_steered_model():
    """The best beam's own log-probability, recomputed by hand, is the score that beam search gave it."""
    atv = make_atv(scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    inputs = atv.encode_prompts(PROMPTS[:1])
    width = inputs.pop("position_ids").shape[1]
    with atv.steer(QUERIES[:1]):
        out = atv.llm.generate(
            **inputs, max_new_tokens=3, min_new_tokens=3, num_beams=4, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    ids = out.sequences
    vectors = atv.task_vectors(QUERIES[:1])
    mask = edit_mask(torch.ones_like(ids), atv.positions)
    mask[:] = False
    mask[:, width - 1] = True
    with torch.no_grad(), steer_known(atv.llm, atv.layers, vectors, 1.0, mask):
        log_probs = atv.llm(ids, use_cache=False).logits[0].log_softmax(-1)
    expected = sum(log_probs[width - 1 + step, ids[0, width + step]].item() for step in range(3))
    assert out.sequences_scores[0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("positions", ["last:2", "answer"])
def test_returned_sequences_share_their_prompts_vector(positions):
    """The logits that each sampled sequence was drawn from, recomputed from whole texts, each read alone."""
    atv = make_atv(scale=1.0, positions=positions)
    base_llm(atv.llm).generation_config.eos_token_id = None
    inputs = atv.encode_prompts(PROMPTS)
    width = inputs.pop("position_ids").shape[1]
    torch.manual_seed(0)
    with atv.steer(QUERIES):
        out = atv.llm.generate(
            **inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=4, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    assert len(out.sequences) == 12
    drawn = torch.stack(out.logits, dim=1)  # (sequences, steps, vocabulary)
    assert len({tuple(row) for row in out.sequences[:4].tolist()}) > 1
    for number, sequence in enumerate(out.sequences):
        query = number // 4
        ids = sequence[width - int(inputs["attention_mask"][query].sum()) :][None]
        prompt = ids.shape[1] - NEW
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, max(0, prompt - (2 if positions == "last:2" else 1)) : prompt] = True
        mask[:, prompt:] = positions == "answer"
        with torch.no_grad(), steer_known(atv.llm, atv.layers, atv.task_vectors([QUERIES[query]]), 1.0, mask):
            logits = atv.llm(ids, use_cache=False).logits[0, prompt - 1 : -1]
        torch.testing.assert_close(drawn[number].to(logits), logits, atol=1e-5, rtol=1e-4)


def test_generate_takes_texts_and_gives_texts(capsys):
    atv = make_atv(scale=1.0)
    texts = atv.generate(PROMPTS, QUERIES, max_new_tokens=4, do_sample=False)
    expected = atv.tokenizer.batch_decode(
        [row[:4] for row in generated(atv, PROMPTS, QUERIES, do_sample=False)], skip_special_tokens=True
    )
    assert texts == expected
    assert len(atv.generate(PROMPTS, num_return_sequences=2, do_sample=True, max_new_tokens=2)) == 6
    streamed = atv.generate(
        PROMPTS[:1], QUERIES[:1], max_new_tokens=4, do_sample=False,
        streamer=TextStreamer(atv.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip
    assert capsys.readouterr().out.strip() == streamed[0].strip()


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}])
def test_logits_that_are_not_finite_are_no_text(options):
    atv = make_atv(dtype=torch.float32)
    base_llm(atv.llm).lm_head.weight.data[3] = torch.nan
    with pytest.raises(ATVError, match="not finite"):
        atv.generate(PROMPTS, QUERIES, max_new_tokens=2, **options)


def test_a_static_cache_gives_the_same_text():
    atv = make_atv(scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    plain = generated(atv, PROMPTS, QUERIES, do_sample=False)
    cache = StaticCache(config=atv.llm.config, max_cache_len=64)
    assert generated(atv, PROMPTS, QUERIES, do_sample=False, past_key_values=cache) == plain


def test_several_calls_in_one_context_each_start_anew():
    atv = make_atv(scale=1.0)
    first, second = PROMPTS[:1], [PROMPTS[0].replace("kettle", "boats")]
    inputs = [atv.encode_prompts(prompts) for prompts in (first, second, first)]
    with atv.steer(QUERIES[:1]), torch.no_grad():
        found = [atv.llm(**each).logits[:, -1] for each in inputs]
    for prompts, logits in zip((first, second, first), found, strict=True):
        with atv.steer(QUERIES[:1]), torch.no_grad():
            torch.testing.assert_close(logits, atv.llm(**atv.encode_prompts(prompts)).logits[:, -1])


def test_a_cache_that_was_filled_before_is_taken_into_account():
    atv = make_atv(scale=1.0)
    inputs = atv.encode_prompts(PROMPTS[:1])
    with torch.no_grad():
        past = atv.llm(inputs["input_ids"][:, :4], use_cache=True).past_key_values
        with atv.steer(QUERIES[:1]):
            found = atv.llm(inputs["input_ids"][:, 4:], past_key_values=past).logits[:, -1]
        with atv.steer(QUERIES[:1]):
            expected = atv.llm(**inputs).logits[:, -1]
    torch.testing.assert_close(found, expected)


def test_right_padded_prompts_are_steered_at_their_last_real_token():
    atv = make_atv(scale=1.0)
    ids = atv.encode_prompts(PROMPTS[:1])["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    with atv.steer(QUERIES[:1]), torch.no_grad():
        found = atv.llm(padded, attention_mask=mask).logits[:, ids.shape[1] - 1]
    with atv.steer(QUERIES[:1]), torch.no_grad():
        torch.testing.assert_close(found, atv.llm(ids).logits[:, -1])


def test_scale_zero_is_the_base_model_bit_for_bit():
    for dtype in (torch.bfloat16, torch.float32):
        atv = make_atv(dtype=dtype, positions="all")
        inputs = atv.encode_prompts(PROMPTS)
        with torch.no_grad():
            plain = atv.llm(**inputs).logits
            with atv.steer(QUERIES, vectors=torch.randn(3, 3, 32), scale=0.0):
                assert torch.equal(atv.llm(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("prompts", "queries", "named"),
    [
        ([], None, "list of prompts"),
        ("text", None, "list of prompts"),
        (["a"], ["a", "b"], "as many queries"),
        (["a"], [" "], "A query is ' '"),
        (["the harbour " * 200], ["a"], "the LLM's context is 256"),
    ],
)
def test_wrong_input_is_named(prompts, queries, named):
    with pytest.raises(ATVError, match=named):
        make_atv(dtype=torch.float32).generate(prompts, queries, max_new_tokens=1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_answer_that_the_context_has_no_room_for_is_refused(name):
    """GPT-2 has no position beyond it, and LLaMA would go on without one that it was trained with."""
    atv = make_atv(name, dtype=torch.float32)
    prompt = Prompt(list(range(5, 255)), "the harbour")
    fits = {"min_new_tokens": 6, "do_sample": False}
    read = []
    with base_llm(atv.llm).register_forward_hook(lambda *_: read.append(1)):
        answers = atv.generate([prompt], max_new_tokens=6, **fits)
    assert len(read) == 6
    assert atv.generate([prompt], max_length=256, **fits) == answers
    asked = GenerationConfig(max_new_tokens=7)
    for options in ({"max_new_tokens": 7}, {"generation_config": asked}):
        with refused("has 250 tokens, max_new_tokens is 7", "the LLM's context is 256"):
            atv.generate(["a", prompt], **options)
    with refused("has 250 tokens, max_length is 257", "the LLM's context is 256"):
        atv.generate([prompt], max_length=257)


def test_the_command_line_asks_for_no_more_than_the_context_leaves(capsys):
    atv = make_atv(dtype=torch.float32)
    short, long, whole = (Prompt([5] * length, "the harbour") for length in (10, 250, 256))
    assert room(atv, [short, long], 6) == 6
    assert capsys.readouterr().err == ""
    assert room(atv, [long, short], 7) == 6
    said = " ".join(capsys.readouterr().err.split())
    assert "Answers end after 6 tokens instead of 7" in said
    assert "the longest prompt has 250, and the LLM's context is 256" in said
    with refused("has 256 tokens and the LLM's context is 256", "none for an answer"):
        room(atv, [short, whole], 1)


class Operations(TorchDispatchMode):
    """The tensor operations of a generation, one list per call of the LLM; each runs to the next call's beginning."""

    def __init__(self, llm, layers):
        super().__init__()
        self.calls, self.hooks = [], []
        self.llm, self.layers = base_llm(llm), layers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.calls:
            self.calls[-1].append(str(function))
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.handles = [
            self.llm.register_forward_pre_hook(lambda *_: self.calls.append([])),
            # When the first layer runs, whatever hooks this call has are there.
            self.layers[0].register_forward_pre_hook(
                lambda *_: self.hooks.append(sum(len(layer._forward_hooks) for layer in self.layers))
            ),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)


def operations(atv, steered, **options):
    inputs = atv.encode_prompts(PROMPTS)
    inputs.pop("position_ids")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    vectors = atv.task_vectors(QUERIES)
    with Operations(atv.llm, atv.layers) as seen, atv.steer(QUERIES, vectors=vectors) if steered else nullcontext():
        atv.llm.generate(**inputs, **options)
    return seen


@pytest.mark.parametrize("positions", ["last", "last:3"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("peft", {}),
        ("gemma3", {}),
        ("llama", {"num_beams": 2}),
        ("llama", {"cache_implementation": "static"}),
    ],
)
def test_a_decoding_step_runs_the_very_operations_of_the_plain_llm(name, positions, options):
    atv = make_atv(name, positions=positions)
    plain, steered = operations(atv, False, **options), operations(atv, True, **options)
    assert len(steered.calls) == 4
    assert steered.calls[0] != plain.calls[0]
    assert len(steered.calls[1]) > 50
    assert steered.calls[1:] == plain.calls[1:]
    assert steered.hooks == [3, 0, 0, 0]


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_a_decoding_step_that_edits_reads_nothing_back_from_the_device(positions):
    atv = make_atv(positions=positions)
    plain, steered = operations(atv, False), operations(atv, True)
    for ours, theirs in zip(steered.calls[1:], plain.calls[1:], strict=True):
        for waits in ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.any.default"):
            assert ours.count(waits) == theirs.count(waits)
        assert len(ours) > len(theirs)


def test_hooks_are_gone_after_an_exception_in_the_middle_of_a_call():
    atv = make_atv()
    modules = list(atv.llm.modules())

    def broken(*_):
        raise error("inside")

    for error in (RuntimeError, KeyboardInterrupt):
        handle = atv.layers[1].register_forward_pre_hook(broken)
        with pytest.raises(error, match="inside"), atv.steer(QUERIES):
            atv.llm(**atv.encode_prompts(PROMPTS))
        handle.remove()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    with atv.steer(QUERIES):
        for error in (RuntimeError, KeyboardInterrupt):
            handle = atv.layers[1].register_forward_pre_hook(broken)
            with pytest.raises(error, match="inside"):
                atv.llm(**atv.encode_prompts(PROMPTS))
            handle.remove()
            hooks = sum(len(layer._forward_hooks) for layer in atv.layers)
            assert hooks == (0 if error is RuntimeError else 3)  # torch tells no hook of an interruption
            after = atv.llm(**atv.encode_prompts(PROMPTS)).logits  # and the next call is steered once all the same
    with atv.steer(QUERIES):
        assert torch.equal(atv.llm(**atv.encode_prompts(PROMPTS)).logits, after)


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
def test_decoding_steps_that_were_compiled_unsteered_are_steered(positions):
    """transformers compiles them by itself on a GPU; torch would run what it compiled whatever hooks there are now."""
    atv = make_atv(positions=positions, scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    expected = generated(atv, PROMPTS, QUERIES, do_sample=False)
    compiled = CompileConfig(backend="eager")
    compiled._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": compiled}
    inputs = atv.encode_prompts(PROMPTS)
    width = inputs.pop("position_ids").shape[1]
    with torch.no_grad():
        plain = atv.llm.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options)
    assert plain[:, width:].tolist() != expected
    for _ in range(2):
        assert generated(atv, PROMPTS, QUERIES, **options) == expected
