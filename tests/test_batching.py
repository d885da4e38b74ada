"""Tokens to tensors: padding, positions, labels."""

import pytest
import torch
from conftest import make_atv
from hypothesis import given
from hypothesis import strategies as st
from rendering import row_of

from atv.config import Positions
from atv.data.collate import (
    IGNORED,
    Collator,
    EncodedRow,
    edit_mask,
    pad,
    position_ids,
)
from atv.errors import ATVError


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(["left", "right"]), st.integers(1, 12))
def test_edited_positions_are_the_last_k_real_tokens_on_either_side_of_padding(lengths, side, count):
    _, mask = pad([[7] * length for length in lengths], 0, side)
    found = edit_mask(mask, Positions(count, False))
    width = max(lengths)
    for row, length in enumerate(lengths):
        real = range(width - length, width) if side == "left" else range(length)
        assert found[row].nonzero().flatten().tolist() == list(real)[-count:]
    assert torch.equal(edit_mask(mask, Positions(None, True)), mask.bool())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_position_ids_count_real_tokens_from_zero(lengths):
    _, mask = pad([[7] * length for length in lengths], 0, "left")
    found = position_ids(mask)
    for row, length in enumerate(lengths):
        assert found[row, -length:].tolist() == list(range(length))


@pytest.mark.parametrize("positions", ["last", "last:2", "answer", "all"])
def test_a_collated_batch_written_out(positions):
    rows = [
        EncodedRow([1, 2], [([5, 6, 7], [11, 12]), ([8], [11, 12])]),
        EncodedRow([3], [([9, 9], [13])]),
    ]
    batch = Collator(Positions.parse(positions), 0, 4)(rows)
    assert batch["query_input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["query_attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 11], [0, 0, 8, 11], [0, 9, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[11, 12], [11, 12], [13, IGNORED]]
    expected = {
        "last": [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]],
        "last:2": [[0, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 0]],
        "answer": [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]],
        "all": [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 0]],
    }
    assert batch["edit_mask"].int().tolist() == expected[positions]


def test_a_prompt_whose_template_is_longer_than_the_context_is_refused_with_both_numbers():
    atv = make_atv(dtype=torch.float32)
    with pytest.raises(ATVError, match=r"has \d+ tokens and there is room for 25\d"):
        atv.encode_row(row_of("q", ("the harbour " * 200,), "yes"))
