"""Grouped attention against the library's own, and the switch to it."""

import pytest
import torch
from conftest import ARCHITECTURES, make_atv
from test_model import batch_of
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atv.attention import grouped, grouped_attention


def inputs(heads, key_heads, new, seq, dtype=torch.float64):
    torch.manual_seed(heads + new)
    query = torch.randn(3, new, heads, 8, dtype=dtype).transpose(1, 2).requires_grad_()
    key, value = (torch.randn(3, key_heads, seq, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads
    return module, query, key, value


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "added", "none"])
def test_it_equals_the_librarys_own_with_its_gradients(heads, key_heads, new, kind):
    module, query, key, value = inputs(heads, key_heads, new, seq=9)
    seen = torch.ones(3, 1, new, 9, dtype=torch.bool).tril(9 - new)
    seen[1, :, :, :4] = False  # padding on the left
    mask = {"bool": seen, "added": torch.where(seen, 0.0, -1e30).double(), "none": None}[kind]
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((o * weight).sum(), (query, key, value)) for o in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_uses_it_on_a_cpu_for_the_tail_alone(name, monkeypatch):
    atv, calls = make_atv(name, positions="last:2"), []

    def counting(*args, **options):
        calls.append(1)
        return grouped_attention(*args, **options)

    monkeypatch.setattr("atv.attention.grouped_attention", counting)
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    atv(**batch_of(atv)).loss.backward()
    assert len(calls) == 3  # one per layer
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former


def test_the_librarys_own_is_put_back_after_an_error():
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with grouped():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is grouped_attention
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former
    with pytest.raises(ZeroDivisionError), grouped():
        _ = 1 / 0
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former


def test_values_may_be_narrower_than_keys():
    module, query, key, _ = inputs(4, 2, 3, seq=9)
    value = torch.randn(3, 2, 9, 5, dtype=torch.float64)
    seen = torch.ones(3, 1, 3, 9, dtype=torch.bool).tril(6)
    ours, _ = grouped_attention(module, query, key, value, seen)
    theirs, _ = sdpa_attention_forward(module, query, key, value, seen)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
