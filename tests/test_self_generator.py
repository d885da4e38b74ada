"""The LLM as its own generator: states are those of a plain, unsteered call; no weight of it is learned or saved."""

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from refusals import refused
from safetensors.torch import load_file
from test_model import POSITIONS, batch_of, full_pass_loss
from transformers import set_seed

from atv.config import ATVConfig, TrainConfig
from atv.doctor import check_wiring, model_summary
from atv.hooks import base_llm, capture_outputs, decoder_layers
from atv.methods.atv import ATV
from atv.model import ATVModel
from atv.training import train

QUERIES = ["the kettle leaks", "quiet", "a quiet harbour before the first boats came in"]
NAMES = ["llama", "gpt2", "opt", "gemma3", "mistral", "peft", "tuple"]


def made(name="llama", dtype=torch.float64, llm=None, **options):
    llm = llm or make_llm(name, dtype)
    config = ATVConfig(generator="self", **({"scale": 0.3, "layer_path": getattr(llm, "layer_path", None)} | options))
    set_seed(3)
    return ATVModel(llm, config, tokenizer=byte_level_tokenizer()).to(dtype).eval()


@torch.no_grad()
def plain_states(atv, query, layer):
    """(seq, hidden), from an ordinary call of the LLM."""
    ids = torch.tensor([byte_level_tokenizer()(f"Q: {query}\nA:")["input_ids"]])
    return atv.llm(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1][0]


@torch.no_grad()
def state_of(atv, query):
    ids = torch.tensor(atv.generator.encode([query]))
    return atv.generator(ids, torch.ones_like(ids))[0]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tuple"])
def test_the_state_is_that_of_a_plain_call(name):
    for layer in (0, 1):  # a library's last state is behind the final norm
        for pooling in ("last", "mean"):
            atv = made(name, generator_layer=layer, pooling=pooling)
            for query in QUERIES:
                states = plain_states(atv, query, layer)
                expected = states[-1] if pooling == "last" else states.mean(0)
                torch.testing.assert_close(state_of(atv, query), expected)


@pytest.mark.parametrize("name", ["llama", "tuple"])
def test_the_last_layer_is_taken_before_the_final_norm(name):
    atv = made(name, generator_layer=2)
    with torch.no_grad(), capture_outputs(decoder_layers(atv.llm, atv.config.layer_path)[-1:]) as captured:
        atv.llm(input_ids=torch.tensor(atv.generator.encode(QUERIES[:1])))
    torch.testing.assert_close(state_of(atv, QUERIES[0]), captured[0][0, -1])


def test_the_middle_is_the_default_and_the_layers_behind_it_are_not_run():
    atv = made()
    hooks = [len(module._forward_hooks) for module in atv.llm.modules()]
    with capture_outputs(decoder_layers(atv.llm)) as ran:
        atv.task_vectors(QUERIES)
    assert sorted(ran) == [0, 1]
    assert "self: the LLM's own state after decoder layer 1" in model_summary(atv)
    assert [len(module._forward_hooks) for module in atv.llm.modules()] == hooks
    torch.testing.assert_close(state_of(atv, QUERIES[0]), plain_states(atv, QUERIES[0], 1)[-1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_query_has_the_same_vectors_alone_and_in_a_padded_batch(name, pooling):
    atv = made(name, pooling=pooling)
    together = atv.task_vectors(QUERIES)
    for index, query in enumerate(QUERIES):
        torch.testing.assert_close(made(name, pooling=pooling).task_vectors([query])[0], together[index])


def test_a_bfloat16_llm_reads_in_bfloat16_and_the_state_is_float32():
    llm = make_llm(dtype=torch.bfloat16)
    atv = ATVModel(llm, ATVConfig(generator="self"), tokenizer=byte_level_tokenizer()).eval()
    expected = plain_states(atv, QUERIES[0], 1)[-1]
    assert expected.dtype == torch.bfloat16
    assert torch.equal(state_of(atv, QUERIES[0]), expected.float())


# ---- steering ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_steered_llm_still_reads_queries_unsteered(name, positions):
    atv = made(name, dtype=torch.float32, positions=positions)
    expected = made(name, dtype=torch.float32, positions=positions).task_vectors(QUERIES)
    inputs = atv.encode_prompts([f"{query}\nA:" for query in QUERIES])
    atv.vector_cache.limit = 0
    with torch.no_grad():
        with atv.steer(QUERIES):
            once = atv.llm(**inputs).logits
        with atv.steer(QUERIES):
            assert torch.equal(atv.task_vectors(QUERIES), expected)
            assert torch.equal(atv.llm(**inputs).logits, once)
            torch.testing.assert_close(atv.task_vectors(["of another length"]), atv.task_vectors(["of another length"]))
            with atv.steer(QUERIES[::-1]):
                pass
            assert torch.equal(atv.llm(**inputs).logits, once)
        assert not torch.equal(atv.llm(**inputs).logits, once)


def test_a_generation_that_makes_other_vectors_between_its_steps_is_the_same():
    atv = made(dtype=torch.float32, positions="answer")
    prompts = [f"{query}\nA:" for query in QUERIES]
    expected = atv.generate(prompts, QUERIES, max_new_tokens=5, do_sample=False)

    def meanwhile(_, scores):
        atv.task_vectors([f"a new one {len(atv.vector_cache)}"])
        return scores

    assert atv.generate(prompts, QUERIES, max_new_tokens=5, do_sample=False, logits_processor=[meanwhile]) == expected
    assert len(atv.vector_cache) == 3 + 5


# ---- training ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_loss_and_gradients_are_those_of_the_full_pass_and_reach_the_expansion_alone(name, positions):
    atv = made(name, positions=positions).train()
    batch = batch_of(atv)
    assert {key.split(".")[0] for key, _ in atv.named_parameters()} == {"expansion"}
    parameters = list(atv.parameters())
    split, full = atv(**batch).loss, full_pass_loss(atv, batch)
    assert split.item() == pytest.approx(full.item(), abs=1e-9)
    for ours, theirs in zip(torch.autograd.grad(split, parameters), torch.autograd.grad(full, parameters), strict=True):
        assert ours.abs().max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    assert not any(p.requires_grad or p.grad is not None for p in base_llm(atv.llm).parameters())


def test_no_dropout_of_the_llm_reaches_a_state():
    atv = made("gpt2").train()
    assert atv.llm.config.resid_pdrop > 0
    batch = batch_of(atv)
    states = [atv.generator(batch["query_input_ids"], batch["query_attention_mask"]) for _ in range(2)]
    assert torch.equal(*states)


@pytest.mark.parametrize("name", NAMES)
def test_the_wiring_is_right(name):
    assert [check for check in check_wiring(made(name, dtype=torch.float32)) if not check.passed] == []


def test_training_reads_each_query_once_and_learns(tmp_path, monkeypatch):
    atv, task = made(dtype=torch.float32, scale=0.5), toy_task(rows=24)
    frozen = {name: p.clone() for name, p in atv.llm.named_parameters()}
    read = []
    states = type(atv.generator).states

    def watched(self, ids, mask):
        read.extend(tuple(row[:length]) for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True))
        return states(self, ids, mask)

    with monkeypatch.context() as patch:
        patch.setattr("atv.training.require_wiring", lambda atv: None)
        patch.setattr(type(atv.generator), "states", watched)
        result = train(atv, [task], tmp_path / "out", TrainConfig(epochs=4, batch_size=4, learning_rate=5e-3))
    queries = {row.input for row in (*task.train, *task.valid)}
    assert sorted(read) == sorted(tuple(ids) for ids in atv.generator.encode(sorted(queries)))
    losses = [entry["eval_loss"] for entry in result.record["history"] if "eval_loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in atv.llm.named_parameters())
    assert atv.generator._read == {}


def test_a_trained_generator_is_read_anew_in_each_step(tmp_path):
    from conftest import make_atv

    atv = make_atv(dtype=torch.float32)
    batch = batch_of(atv)
    queries = {tuple(row[:length]) for row, length in zip(batch["query_input_ids"].tolist(),
               batch["query_attention_mask"].sum(1).tolist(), strict=True)}  # fmt: skip
    with atv.generator.read_ahead(queries):
        atv(**batch).loss.backward()
    assert all(p.grad is not None for p in atv.generator.parameters())


# ---- the artifact ----


def test_a_saved_one_is_its_expansion_alone_and_gives_the_same_vectors(tmp_path):
    atv = made(dtype=torch.float32, generator_layer=0, pooling="mean")
    atv.save_pretrained(tmp_path / "adapter")
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["expansion.safetensors"]
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter" / "expansion.safetensors").items()} == {
        "map.weight": (3 * 32, 32), "map.bias": (3 * 32,),
    }  # fmt: skip
    again = ATVModel.from_pretrained(make_llm(dtype=torch.float32), tmp_path, tokenizer=atv.tokenizer)
    assert again.config == atv.config
    assert torch.equal(again.task_vectors(QUERIES), atv.task_vectors(QUERIES))
    assert (
        "A generator (self: the LLM's own state after decoder layer 0) reads"
        in (tmp_path / "adapter" / "README.md").read_text()
    )
    method = ATV.load(make_llm(dtype=torch.float32), atv.tokenizer, tmp_path)
    with torch.no_grad(), method.steer(None, toy_task().test[:1]):
        assert method.llm(**atv.encode_prompts(["x"])).logits.isfinite().all()


# ---- what is refused ----


def test_it_is_never_trained():
    assert ATVConfig(generator="self").train_generator is False
    assert ATVConfig.from_dict(ATVConfig(generator="self").to_dict()) == ATVConfig(generator="self")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"generator": "self", "pooling": "cls"}, ["pooling is 'cls'", "Expected last or mean"]),
        ({"generator": "self", "generator_layer": -1}, ["generator_layer is -1", "a whole number from 0"]),
        ({"generator": "self", "generator_layer": 1.5}, ["generator_layer is 1.5"]),
        ({"generator_layer": 1}, ["generator_layer is 1", "openai-community/gpt2", "leave it out"]),
    ],
)
def test_what_cannot_be_meant_is_refused(options, parts):
    with refused(*parts):
        ATVConfig(**options)


def test_a_layer_that_the_llm_does_not_have_is_refused():
    with refused("generator_layer is 3", "layers 0 to 2"):
        made(generator_layer=3)
