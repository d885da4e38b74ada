"""The mathematics: what is injected, where, and that reading the prefix apart changes nothing."""

from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, make_atv, make_llm, steer_known
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import POSITIONS, ROWS, batch_of, full_pass_loss
from torch import nn

from atv.errors import ATVError
from atv.expansion import PaperExpansion
from atv.lm.hooks import base_llm, capture_outputs
from atv.steer import add_vectors


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_split_pass_has_the_loss_and_every_gradient_of_the_full_pass(name, positions):
    atv = make_atv(name, positions=positions)
    batch = batch_of(atv)
    parameters = list(atv.parameters())
    split = atv(**batch).loss
    full = full_pass_loss(atv, batch)
    assert split.item() == pytest.approx(full.item(), abs=1e-9)
    found, expected = torch.autograd.grad(split, parameters), torch.autograd.grad(full, parameters)
    assert max(g.abs().max().item() for g in expected) > 1e-4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def hand_written_llama(llm, ids, vectors, scale):
    """A two-layer Llama without a library: embeddings, rotary attention, SwiGLU; vectors added after each layer."""
    config, model = llm.config, llm.model

    def norm(x, weight):  # in float32, as the library has it whatever the dtype of the model
        single = x.float()
        return weight * (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)).to(x.dtype)

    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    seq = len(ids)
    frequency = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    angle = torch.arange(seq)[:, None] * frequency  # (seq, width / 2), float32 too

    def rotate(x):  # (seq, heads, width)
        first, second = x[..., : width // 2], x[..., width // 2 :]
        cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = model.embed_tokens.weight[ids]  # (seq, hidden)
    for layer, vector in zip(model.layers, vectors, strict=True):
        y = norm(x, layer.input_layernorm.weight)
        attention = layer.self_attn
        q = rotate((y @ attention.q_proj.weight.T).view(seq, heads, width))
        k = rotate((y @ attention.k_proj.weight.T).view(seq, groups, width))
        v = (y @ attention.v_proj.weight.T).view(seq, groups, width)
        out = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / width**0.5
            scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
            out.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(out, -1) @ attention.o_proj.weight.T
        y = norm(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        x = x + (nn.functional.silu(y @ mlp.gate_proj.weight.T) * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        x = x + scale * vector  # every token: positions "all"
    return norm(x, model.norm.weight) @ llm.lm_head.weight.T


def test_all_equals_a_hand_written_loop():
    atv = make_atv("llama", positions="all")
    llm = atv.llm
    llm.model.layers = llm.model.layers[:2]  # two layers, wired anew
    llm.config.num_hidden_layers = 2
    ids = torch.tensor([5, 9, 30, 77, 12])
    vectors = torch.randn(2, 32, dtype=torch.float64)
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad(), steer_known(llm, list(llm.model.layers), vectors[None], 0.7, everywhere):
        found = llm(ids[None]).logits[0]
    torch.testing.assert_close(found, hand_written_llama(llm, ids, vectors, 0.7), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padded_equals_alone(name, positions):
    atv = make_atv(name, positions=positions)
    rows = [replace(row, renderers=row.renderers[:1]) for row in ROWS]
    together = atv(**batch_of(atv, rows)).loss
    alone = [atv(**batch_of(atv, [row])).loss for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 7), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.data())
def test_vectors_are_added_at_masked_tokens_and_nowhere_else(rows, seq, dtype, data):
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=seq, max_size=seq), min_size=rows,
                                           max_size=rows)))  # fmt: skip
    hidden, vectors = torch.randn(rows, seq, 6).to(dtype), torch.randn(rows, 6)
    before = hidden.clone()
    found = add_vectors(hidden, vectors, mask, 0.01)
    assert torch.equal(hidden, before)
    assert found.dtype == dtype
    for row in range(rows):
        for token in range(seq):
            expected = hidden[row, token].float() + (0.01 * vectors[row] if mask[row, token] else 0)
            assert torch.equal(found[row, token], expected.to(dtype))


def test_a_small_vector_survives_a_large_bfloat16_state_as_well_as_rounding_allows():
    hidden = torch.full((1, 1, 4096), 10.0, dtype=torch.bfloat16)
    vectors = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    exact = hidden.float() + 0.001 * vectors[:, None]
    assert torch.equal(add_vectors(hidden, vectors, torch.ones(1, 1, dtype=torch.bool), 0.001), exact.bfloat16())


def test_the_expansion_is_one_linear_map_reshaped():
    torch.manual_seed(0)
    expansion = PaperExpansion(5, 3, 4)
    state = torch.randn(2, 5)
    expected = (state @ expansion.map.weight.T + expansion.map.bias).reshape(2, 3, 4)
    torch.testing.assert_close(expansion(state), expected)
    low = PaperExpansion(5, 3, 4, rank=2)
    product = low.map[1].weight @ low.map[0].weight
    assert torch.linalg.matrix_rank(product) == 2
    torch.testing.assert_close(low(state), (state @ product.T + low.map[1].bias).reshape(2, 3, 4))


def test_hooks_are_gone_and_weights_unchanged_after_an_exception():
    atv = make_atv()
    before = {name: p.clone() for name, p in atv.llm.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in atv.llm.modules()]
    with pytest.raises(RuntimeError, match="inside"), atv.steer(["a"]):
        raise RuntimeError("inside")
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in atv.llm.modules()] == hooks
    assert all(torch.equal(p, before[name]) for name, p in atv.llm.named_parameters())


def test_the_llm_is_no_submodule_and_stays_in_eval_mode():
    atv = make_atv().train()
    assert not atv.llm.training
    assert atv.generator.training
    names = {name.split(".")[1] for name, _ in atv.named_parameters()}
    assert names == {"generator", "expansion"}
    assert not any(p.requires_grad for p in atv.llm.parameters())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_a_query_has_the_same_vectors_alone_and_in_a_batch(kind, pooling):
    atv = make_atv(kind=kind, pooling=pooling)
    queries = ["the kettle leaks", "quiet", "a quiet harbour before the first boats came in"]
    together = atv.task_vectors(queries)
    assert together.shape == (3, 3, 32)
    for index, query in enumerate(queries):
        torch.testing.assert_close(atv.task_vectors([query])[0], together[index], atol=1e-9, rtol=0)


def test_pooling_is_what_it_says():
    for pooling in ("last", "mean", "cls"):
        atv = make_atv(kind="gpt2", pooling=pooling)
        ids = torch.tensor([atv.generator.encode(["the kettle"])[0]])
        states = atv.generator.encoder(ids).last_hidden_state[0]
        expected = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
        torch.testing.assert_close(atv.generator(ids, torch.ones_like(ids))[0], expected)


def test_a_frozen_generator_takes_no_gradient_and_drops_nothing_out():
    atv = make_atv(train_generator=False).train()
    assert not atv.generator.training
    atv(**batch_of(atv)).loss.backward()
    assert all(p.grad is None for p in atv.generator.parameters())
    assert all(p.grad is not None for p in atv.expansion.parameters())


@pytest.mark.parametrize(("layers", "chosen"), [("all", [0, 1, 2]), ("bottom", [0]), ("top", [2]), ([0, 2], [0, 2])])
def test_only_the_chosen_layers_receive_a_vector(layers, chosen):
    atv = make_atv(layers=layers)
    every = list(base_llm(atv.llm).model.layers)
    assert [every.index(layer) for layer in atv.layers] == chosen
    inputs = atv.encode_prompts(["the kettle leaks"])
    outputs = []
    with torch.no_grad():
        with capture_outputs(every) as plain:
            atv.llm(**inputs)
        with atv.steer(["q"]), capture_outputs(every) as steered:
            atv.llm(**inputs)
    outputs = [not torch.equal(plain[i], steered[i]) for i in range(3)]
    assert outputs == [i >= min(chosen) for i in range(3)]


def test_gradients_agree_with_finite_differences():
    atv = make_atv("gpt2")  # float64 throughout, where Llama normalises in float32
    batch = batch_of(atv)
    weight = atv.expansion.map.weight
    (gradient,) = torch.autograd.grad(atv(**batch).loss, [weight])
    place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[place] += step
            losses.append(atv(**batch).loss.item())
            weight[place] -= step
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(gradient[place].item(), rel=1e-5)


def test_a_wrong_number_of_rows_is_refused():
    atv = make_atv()
    with (
        pytest.raises(ATVError, match="3 rows of prompts and steering was opened with 2 queries"),
        atv.steer(["a", "b"]),
    ):
        atv.llm(**atv.encode_prompts(["x", "y", "z"]))
    with pytest.raises(ATVError, match="one query per prompt"), atv.steer(["a", "b"]):
        atv.llm(**atv.encode_prompts(["x", "y", "z", "w"]))  # four different prompts are no beams of two


def test_float32_generator_steers_a_bfloat16_llm():
    llm = make_llm(dtype=torch.bfloat16)
    assert next(llm.parameters()).dtype == torch.bfloat16
    atv = make_atv(dtype=torch.float32)
    object.__setattr__(atv, "llm", llm)
    object.__setattr__(atv, "layers", list(llm.model.layers))
    loss = atv(**batch_of(atv)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert atv.expansion.map.weight.grad.abs().max() > 0


def test_a_query_longer_than_the_generators_context_is_cut_and_said_once(capsys):
    atv = make_atv(dtype=torch.float32)
    long = "the harbour " * 300
    assert atv.task_vectors([long, "quiet"]).isfinite().all()
    atv.task_vectors([long])
    assert capsys.readouterr().err.count("context of 256 tokens are cut") == 1
    assert len(atv.generator.encode([long])[0]) == 256
