"""Grouped and shared attention against the library's own, and the switch to them."""

from threading import Thread

import pytest
import torch
from conftest import ARCHITECTURES, make_atv, make_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import batch_of
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atv.lm.attention import grouped, grouped_attention, shared, shared_attention


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
    if kind == "bool":
        seen[2, :, 0] = False  # a padding token that sees nothing, itself included
    mask = {"bool": seen, "added": torch.where(seen, 0.0, -1e30).double(), "none": None}[kind]
    ours, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((o * weight).sum(), (query, key, value)) for o in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def shared_inputs(batch, key_heads, group, new, columns, dtype):
    """As `inputs`, in rows that begin with the same keys and values, padded behind them by 0, 1, ... columns."""
    torch.manual_seed(new + columns)
    query = torch.randn(batch, new, key_heads * group, 8, dtype=dtype).transpose(1, 2)
    key, value = (
        torch.cat(
            [torch.randn(1, key_heads, columns, 8).expand(batch, -1, -1, -1), torch.randn(batch, key_heads, new, 8)], 2
        ).to(dtype)
        for _ in range(2)
    )
    seen = torch.ones(batch, 1, new, columns + new, dtype=torch.bool).tril(columns)
    for row in range(batch):
        seen[row, :, :, columns : columns + min(row, new - 1)] = False
    module = nn.Module()
    module.num_key_value_groups = group
    return module, query, key, value, seen


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 5),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    new=st.integers(1, 40),
    columns=st.integers(1, 600),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scaling=st.sampled_from([None, 0.3, 3.0]),
)
@torch.no_grad()
def test_what_rows_share_is_read_once_and_nothing_changes(batch, key_heads, group, new, columns, dtype, scaling):
    module, *sides, seen = shared_inputs(batch, key_heads, group, new, columns, dtype)
    ours, _ = shared_attention(columns, module, *sides, seen, scaling=scaling)
    exact, _ = sdpa_attention_forward(module, *(side.double() for side in sides), seen, scaling=scaling)
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, atol=rounding, rtol=rounding)


def test_shared_attention_leaves_to_the_library_what_it_does_not_know(monkeypatch):
    module, *sides, seen = shared_inputs(3, 2, 2, 4, 9, torch.float64)
    unlike = seen.clone()
    unlike[1, :, :, 2] = False
    added = torch.where(seen, torch.randn(seen.shape).double(), -1e30)
    for mask in (unlike, added, None):
        with torch.no_grad():
            ours, _ = shared_attention(9, module, *sides, mask)
            assert torch.equal(ours, sdpa_attention_forward(module, *sides, mask)[0])
    leaves = [side.requires_grad_() for side in sides]
    ours, theirs = shared_attention(9, module, *leaves, seen)[0], sdpa_attention_forward(module, *leaves, seen)[0]
    for a, b in zip(*(torch.autograd.grad(o.sum(), leaves) for o in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_uses_it_on_a_cpu_for_the_tail_alone(name, monkeypatch):
    atv, calls = make_atv(name, positions="last:2"), []

    def counting(*args, **options):
        calls.append(1)
        return grouped_attention(*args, **options)

    monkeypatch.setattr("atv.lm.attention.grouped_attention", counting)
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    atv(**batch_of(atv)).loss.backward()
    assert len(calls) == 3  # one per layer
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former


def test_the_librarys_own_is_put_back_after_an_error():
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for switched in (grouped(), shared(3)):
        with switched:
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not former
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


def test_other_threads_keep_their_attention():
    """`shared` is right for prompts that begin alike, and wrong for all others."""
    llm = make_llm("llama", torch.float32)
    ids = torch.randint(4, 400, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    former, found = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def read():
        with torch.no_grad():
            past = llm(ids[:, :8]).past_key_values
            found.append(llm(ids[:, 8:], attention_mask=mask, past_key_values=past).logits)

    read()
    with shared(8):
        thread = Thread(target=read)
        thread.start()
        thread.join()
        read()
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is former
