"""The LLM as its own generator: the state is that of a plain, unsteered call, and of no second one."""

from dataclasses import replace

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, make_llm, pairwise, toy_task
from generation import NEW, generated, recomputed
from losses import POSITIONS, batch_of, full_pass_loss
from refusals import refused
from safetensors.torch import load_file
from transformers import StaticCache, set_seed

from atv import vectors
from atv.config import ATVConfig, TrainConfig
from atv.data import Rendering
from atv.data.collate import pad
from atv.doctor import check_wiring, model_summary
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.hooks import base_llm, decoder_layers
from atv.lm.spans import Tracked
from atv.methods.atv import ATVMethod
from atv.methods.icl_atv import ICLWithATV
from atv.methods.settings import method_settings
from atv.model import ATVModel
from atv.paper.analysis import analyse
from atv.training.loop import train

PROMPTS = ["the kettle leaks and the lid sticks, yes or no?\nA:", "quiet\nA:", "a quiet harbour before the first boats"]
NAMES = ["llama", "gpt2", "opt", "gemma3", "mistral", "peft", "tuple"]


def made(name="llama", dtype=torch.float64, llm=None, **options):
    llm = llm or make_llm(name, dtype)
    config = ATVConfig(generator="self", **(PAPER_FORM | {"layer_path": getattr(llm, "layer_path", None)} | options))
    set_seed(3)
    return ATVModel(llm, config, tokenizer=byte_level_tokenizer()).to(dtype).eval()


@torch.no_grad()
def plain_state(atv, ids, layer):
    """(hidden,), of the last of some token ids, from an ordinary call of the LLM."""
    return atv.llm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0, -1]


def vectors_by_hand(atv, prompts):
    """(prompts, layers, hidden), each prompt read alone by a plain call."""
    read = atv.generator.index
    return torch.stack([atv.expansion(plain_state(atv, ids, read)) for ids in prompts])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tuple"])  # that one gives out no hidden states
def test_vectors_are_those_of_a_plain_calls_state(name):
    for layer in (0, 1):
        atv = made(name, generator_layer=layer)
        ids = atv.tokenizer(PROMPTS)["input_ids"]
        torch.testing.assert_close(atv.task_vectors(PROMPTS), vectors_by_hand(atv, ids).detach())


def test_the_bottom_third_reads_and_the_layers_above_it_are_steered():
    atv = made()
    assert (atv.generator.index, atv.layers) == (0, decoder_layers(atv.llm)[1:])
    assert ATVConfig(generator="self").layer_indices(30) == list(range(10, 30))
    hooks = [len(module._forward_hooks) for module in atv.llm.modules()]
    ran = []
    watch = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(decoder_layers(atv.llm))
    ]
    atv.task_vectors(PROMPTS)
    for handle in watch:
        handle.remove()
    assert ran == [0]
    assert "self: the LLM's own state after decoder layer 0" in model_summary(atv)
    assert [len(module._forward_hooks) for module in atv.llm.modules()] == hooks


def test_a_bfloat16_llm_reads_in_bfloat16_and_the_state_is_float32():
    llm = make_llm(dtype=torch.bfloat16)
    atv = ATVModel(llm, ATVConfig(generator="self"), tokenizer=byte_level_tokenizer()).eval()
    ids = torch.tensor(atv.generator.encode(PROMPTS[:1]))
    expected = plain_state(atv, ids[0].tolist(), 0)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(atv.generator(ids, torch.ones_like(ids))[0], expected.float())


# ---- steering ----


@pytest.mark.parametrize(("name", "positions", "use_cache"), pairwise(NAMES, POSITIONS, [True, False]))
def test_generation_is_that_of_vectors_made_from_the_prompt_beforehand(name, positions, use_cache):
    atv = made(name, positions=positions, scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    by_hand = [recomputed(atv, prompt, prompt) for prompt in PROMPTS]
    assert generated(atv, PROMPTS, PROMPTS, do_sample=False, use_cache=use_cache) == by_hand
    plain = made(name, positions=positions, scale=0.0)
    assert generated(plain, PROMPTS, PROMPTS, do_sample=False) != by_hand


def passes(atv):
    """Counts calls of the LLM's layers."""
    counts = [0] * len(decoder_layers(atv.llm))
    for index, layer in enumerate(decoder_layers(atv.llm)):
        layer.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    return counts


def test_nothing_is_read_twice():
    atv = made()
    inputs = atv.encode_prompts(PROMPTS)
    counts = passes(atv)
    with torch.no_grad(), atv.steer(PROMPTS):
        atv.llm(**inputs)
    assert counts == [1, 1, 1]
    atv.generate(PROMPTS, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert counts == [1 + NEW] * 3


@pytest.mark.parametrize("positions", ["last", "answer"])
def test_beams_and_returned_sequences_have_the_vectors_of_their_prompt(positions):
    atv = made(positions=positions, scale=1.0)
    base_llm(atv.llm).generation_config.eos_token_id = None
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = generated(atv, PROMPTS, PROMPTS, **options)
    alone = [row for prompt in PROMPTS for row in generated(atv, [prompt], [prompt], **options)]
    assert together == alone
    vectors = atv.task_vectors(PROMPTS)
    inputs = atv.encode_prompts(PROMPTS)
    width = inputs.pop("position_ids").shape[1]
    with atv.steer(PROMPTS, vectors=vectors):
        out = atv.llm.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options)
    assert out[:, width:].tolist() == together


@torch.no_grad()
def test_prompts_padded_on_the_right_and_given_as_embeddings_end_where_their_mask_ends():
    atv = made(positions="last:2")
    encoded = atv.tokenizer(PROMPTS)["input_ids"]
    ids, mask = pad(encoded, 0, "right")
    with atv.steer(PROMPTS):
        found = atv.llm(input_ids=ids, attention_mask=mask).logits
        embedded = atv.llm(inputs_embeds=atv.llm.get_input_embeddings()(ids), attention_mask=mask).logits
    torch.testing.assert_close(found, embedded)
    for row, prompt in enumerate(encoded):
        with atv.steer(["one"], vectors=vectors_by_hand(atv, [prompt])):
            alone = atv.llm(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(found[row, len(prompt) - 1], alone)


def test_a_static_cache_and_a_prompt_after_another_are_read_at_their_ends():
    atv = made(positions="answer", scale=1.0)
    llm = base_llm(atv.llm)
    llm.generation_config.eos_token_id = None
    expected = generated(atv, PROMPTS, PROMPTS, do_sample=False)
    cache = StaticCache(config=llm.config, max_cache_len=80)
    assert generated(atv, PROMPTS, PROMPTS, do_sample=False, past_key_values=cache) == expected
    other = atv.encode_prompts(["of another length"] * 3)
    inputs = atv.encode_prompts(PROMPTS)
    with torch.no_grad(), atv.steer(PROMPTS):
        once = atv.llm(**inputs).logits
        assert not torch.equal(atv.llm(**other).logits[0, -1], once[0, -1])
        assert torch.equal(atv.llm(**inputs).logits, once)


def test_ready_vectors_are_used_as_they_are():
    atv = made()
    inputs = atv.encode_prompts(PROMPTS)
    vectors = atv.task_vectors(["something else"]).expand(3, -1, -1)
    with torch.no_grad():
        with atv.steer(PROMPTS):
            own = atv.llm(**inputs).logits
        with atv.steer(PROMPTS, vectors=vectors):
            given = atv.llm(**inputs).logits
            torch.testing.assert_close(atv.task_vectors(PROMPTS), made().task_vectors(PROMPTS))
        plain = atv.llm(**inputs).logits
        with atv.steer(PROMPTS, scale=0.0):
            assert torch.equal(atv.llm(**inputs).logits, plain)
    assert not torch.allclose(own[:, -1], given[:, -1])


@pytest.mark.parametrize("positions", ["last", "answer", "all"])
def test_a_steered_call_has_no_gradient(positions):
    atv = made(positions=positions)
    with atv.steer(PROMPTS):
        output = atv.llm(**atv.encode_prompts(PROMPTS), use_cache=True)
    assert not output.logits.requires_grad
    assert not any(layer.keys.requires_grad for layer in output.past_key_values.layers)


@pytest.mark.parametrize("break_it", [False, True])
def test_the_doctor_sees_a_state_of_the_wrong_token(monkeypatch, break_it):
    atv = made(dtype=torch.float32)
    if break_it:
        ends = Tracked._ends
        monkeypatch.setattr(Tracked, "_ends", lambda self, place: ends(self, place) - 1)
    failed = [check.name for check in check_wiring(atv) if not check.passed]
    assert failed == (["vectors made in the pass = made beforehand"] if break_it else [])


# ---- training ----


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tuple"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_and_gradients_are_those_of_the_full_pass_and_reach_the_expansion_alone(name, positions):
    atv = made(name, positions=positions).train()
    batch = batch_of(atv)
    assert {key.split(".")[1] for key, _ in atv.named_parameters()} == {"expansion"}
    parameters = list(atv.parameters())
    answers = batch["labels"].shape[1] - 1
    width = batch["input_ids"].shape[1] - answers
    prompts = [
        [i for i, kept in zip(ids[:width].tolist(), mask[:width].tolist(), strict=True) if kept]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    split, full = atv(**batch).loss, full_pass_loss(atv, batch, vectors_by_hand(atv, prompts))
    assert split.item() == pytest.approx(full.item(), abs=1e-9)
    for ours, theirs in zip(torch.autograd.grad(split, parameters), torch.autograd.grad(full, parameters), strict=True):
        assert ours.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert not any(p.requires_grad or p.grad is not None for p in base_llm(atv.llm).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_wiring_is_right(name):
    assert [check for check in check_wiring(made(name, dtype=torch.float32)) if not check.passed] == []


def test_training_learns_without_a_pass_of_its_own(tmp_path, monkeypatch):
    atv = made(dtype=torch.float32, scale=0.5)
    task = replace(toy_task(rows=24), renderer=Rendering("template", ends=False))  # `last` hardly reaches the end
    frozen = {name: p.clone() for name, p in atv.llm.named_parameters()}
    monkeypatch.setattr("atv.training.loop.require_wiring", lambda atv: None)
    monkeypatch.setattr(type(atv.generator), "states", None)  # whoever reads anything apart fails
    result = train(atv, [task], tmp_path / "out", TrainConfig.paper(epochs=12, batch_size=4, learning_rate=5e-3))
    losses = [entry["eval_loss"] for entry in result.record["history"] if "eval_loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in atv.llm.named_parameters())


# ---- measuring ----


def test_measured_with_shared_instructions_it_answers_as_each_prompt_alone(tmp_path):
    """What prompts begin with is read once by the evaluation; behind demonstrations the state is of all of them."""
    task = toy_task()
    atv = made(dtype=torch.float32, scale=1.0)
    atv.save_pretrained(tmp_path / "adapter")
    llm = make_llm(dtype=torch.float32)
    for number, (method, shots) in enumerate(((ATVMethod, None), (ICLWithATV, 2))):
        loaded = method.load(llm, atv.tokenizer, tmp_path / "adapter", shots=shots)
        run = RunWriter(tmp_path / str(number), {})
        evaluate(loaded, [task], ["first_token"], run, variants="first", batch_size=3)
        render = task.training_renderers()[0]
        for row in run.rows:
            prompt = loaded.prompts(task, task.test, render)[row["example"]].ids
            with torch.no_grad(), loaded.atv.steer(["x"], vectors=vectors_by_hand(loaded.atv, [prompt])):
                logits = llm(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert atv.tokenizer.decode([int(logits.argmax())]) == row["outputs"]["first_token"]


def test_its_analysis_is_of_prompts(monkeypatch):
    pytest.importorskip("sklearn")
    atv, task = made(dtype=torch.float32), toy_task()
    asked = []
    monkeypatch.setattr(
        vectors.ATV, "make_vectors", lambda _, texts: asked.extend(texts) or torch.ones(len(texts), 2, 32)
    )
    analyse(atv, [task], rows=6)
    assert len(asked) == len(task.train) + 6  # the one query is the first, whose vectors are kept
    assert all(text.startswith(task.templates[0].split("{")[0]) and text.endswith("A:") for text in asked)


# ---- the artifact ----


def test_a_saved_one_is_its_expansion_alone_and_gives_the_same_vectors(tmp_path):
    atv = made(dtype=torch.float32, generator_layer=1)
    atv.save_pretrained(tmp_path / "adapter")
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["expansion.safetensors"]
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter" / "expansion.safetensors").items()} == {
        "map.weight": (32, 32), "map.bias": (32,),
    }  # fmt: skip
    again = ATVModel.from_pretrained(tmp_path, make_llm(dtype=torch.float32), tokenizer=atv.tokenizer)
    assert again.config == atv.config
    assert torch.equal(again.task_vectors(PROMPTS), atv.task_vectors(PROMPTS))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "A generator (self: the LLM's own state after decoder layer 1) reads the prompt;" in card
    assert "queries=" not in card


# ---- what is refused ----


def test_it_is_never_trained():
    assert ATVConfig(generator="self").train_generator is False
    assert ATVConfig.from_dict(ATVConfig(generator="self").to_dict()) == ATVConfig(generator="self")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"generator": "self", "query_template": "Q: {query}"}, ["query_template is 'Q: {query}'", "Leave", "out"]),
        ({"generator": "self", "generator_layer": -1}, ["generator_layer is -1", "a whole number from 0"]),
        ({"generator": "self", "generator_layer": 1.5}, ["generator_layer is 1.5"]),
        ({"generator_layer": 1}, ["generator_layer is 1", "embedded:minilm-l6", "Leave it out"]),
    ],
)
def test_what_cannot_be_meant_is_refused(options, parts):
    with refused(*parts):
        ATVConfig(**options)


@pytest.mark.parametrize("layers", ["bottom", [0, 2]])
def test_layers_that_are_not_above_the_one_that_is_read_are_refused(layers):
    with refused("layers is", "only layers above layer 0", "layers 0 to 2"):
        made(layers=layers)


@pytest.mark.parametrize("layer", [2, 3])
def test_a_layer_that_leaves_none_to_steer_is_refused(layer):
    with refused(f"read layer {layer}", "layers 0 to 2", "generator_layer"):
        made(generator_layer=layer)


def test_queries_that_are_empty_or_no_list_are_refused():
    atv = made()
    with refused("A query is ''"), atv.steer(["", "x"]):
        pass
    with refused("is a string", "brackets"), atv.steer("one text"):
        pass


def test_its_pooling_is_the_last_token_and_it_reads_prompts_whatever_the_defaults():
    config = method_settings("atv", [{"atv": {"generator": "self"}}], 42).config
    assert (config.pooling, config.reads, config.train_generator) == ("last", "prompt", False)
