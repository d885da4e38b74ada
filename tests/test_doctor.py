"""The wiring self-test: passes on every architecture, and finds what is broken on purpose."""

import pytest
import torch
from conftest import ARCHITECTURES, failed, make_atv
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import atv.lm.spans
import atv.model
import atv.steer
from atv.doctor import check_wiring, require_wiring
from atv.errors import ATVError
from atv.lm import attention, hooks


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
def test_every_architecture_and_position_passes(name, positions):
    checks = check_wiring(make_atv(name, dtype=torch.float32, positions=positions))
    assert len(checks) == 8
    assert failed(checks) == []


def test_bfloat16_passes_too():
    atv = make_atv(dtype=torch.float32)
    llm = atv.llm.bfloat16()
    assert next(llm.parameters()).dtype == torch.bfloat16
    assert failed(check_wiring(atv)) == []


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_site_that_adds_little_to_the_stream_passes_in_bfloat16_too(positions):
    """As the MLPs of small LLMs do: a vector of their own size would drown in the rounding of the stream."""
    atv = make_atv(dtype=torch.float32, positions=positions)
    sites = [mlp for _, mlp in hooks.attention_and_mlp(atv.llm)]
    for site in sites:
        site.down_proj.weight.mul_(0.003)
    atv.llm.bfloat16()
    object.__setattr__(atv, "layers", sites)
    assert failed(check_wiring(atv)) == []


def test_it_leaves_weights_gradients_modes_and_random_state_as_they_were():
    atv = make_atv(dtype=torch.float32).train()
    weights = {name: p.clone() for name, p in atv.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_wiring(atv)
    assert torch.equal(torch.rand(3), expected)
    assert atv.training
    assert atv.generator.training
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in atv.named_parameters())


def nowhere(hidden, vectors, mask, scale):
    return hidden


def detached(hidden, vectors, mask, scale):
    return REAL(hidden, vectors.detach(), mask, scale)


def next_row(hidden, vectors, mask, scale):
    return REAL(hidden, vectors.roll(1, 0), mask, scale)


REAL = atv.steer.add_vectors


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (nowhere, "the tokens that changed are those asked for"),
        (nowhere, "gradient reaches generator and expansion, and no LLM weight"),
        (detached, "gradient reaches generator and expansion, and no LLM weight"),
        (next_row, "batch = single"),
    ],
)
def test_a_broken_injection_is_found_and_named(monkeypatch, broken, named):
    monkeypatch.setattr(atv.steer, "add_vectors", broken)
    assert named in failed(check_wiring(make_atv(dtype=torch.float32, positions="last:2")))


def test_a_vector_on_every_token_is_found(monkeypatch):
    """What the paper's released code does, where the last token was asked for."""
    monkeypatch.setattr(atv.lm.spans, "edit_mask", lambda attended, positions: attended.bool())
    assert "the tokens that changed are those asked for" in failed(check_wiring(make_atv(dtype=torch.float32)))


def test_a_hook_that_loses_the_answers_edit_is_found_by_the_cache_check(monkeypatch):
    from atv.lm.spans import Tracked

    observe = Tracked.__call__

    def prefill_only(self, call):
        span = observe(self, call)
        return None if call["input_ids"].shape[1] == 1 else span

    monkeypatch.setattr(Tracked, "__call__", prefill_only)
    assert "cached = recomputed" in failed(check_wiring(make_atv(dtype=torch.float32, positions="answer")))


def test_an_llm_that_takes_a_gradient_is_found():
    model = make_atv(dtype=torch.float32)
    next(model.llm.parameters()).requires_grad_(True)
    assert failed(check_wiring(model)) == ["gradient reaches generator and expansion, and no LLM weight"]


def test_a_model_that_fails_altogether_is_reported_not_raised(monkeypatch):
    model = make_atv(dtype=torch.float32)
    monkeypatch.setattr(hooks, "_hidden", lambda module, output: 1 / 0)
    checks = check_wiring(model)
    assert len(failed(checks)) >= 4
    assert "ZeroDivisionError" in checks[0].found
    with pytest.raises(ATVError, match="wiring self-test failed.*atv doctor"):
        require_wiring(model)


def test_a_training_pass_that_is_not_the_full_one_is_found(monkeypatch):
    """As with an LLM that ignores a state it has been given: what follows does not know the prompt's beginning."""

    def forgetful(module, query, key, value, mask, **options):
        new = query.shape[2]
        mask = None if mask is None else mask[..., -new:]
        return sdpa_attention_forward(module, query, key[:, :, -new:], value[:, :, -new:], mask, **options)

    monkeypatch.setattr(attention, "grouped_attention", forgetful)
    assert "training step = full pass" in failed(check_wiring(make_atv(dtype=torch.float32)))


def test_a_generator_that_reads_padding_is_found_and_training_with_it_refused():
    """As FNet, which mixes all positions whatever the attention mask says."""
    atv = make_atv(dtype=torch.float32)
    encoder = atv.generator.encoder
    forward = encoder.forward
    encoder.forward = lambda input_ids, attention_mask: forward(input_ids, torch.ones_like(attention_mask))
    assert failed(check_wiring(atv)) == ["vectors of a query in a batch = alone"]
    with pytest.raises(ATVError, match="vectors of a query in a batch = alone: differs by"):
        require_wiring(atv)


def test_an_llm_that_reads_padding_by_itself_is_told_from_a_fault_of_steering():
    atv = make_atv(dtype=torch.float32)
    handle = atv.llm.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}),
        with_kwargs=True,
    )
    found = {check.name: check.found for check in check_wiring(atv) if not check.passed}
    handle.remove()
    assert "the unsteered LLM by" in found["padded = unpadded"]
    assert "the unsteered LLM by" in found["batch = single"]
