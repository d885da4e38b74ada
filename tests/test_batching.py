"""Tokens to tensors: padding, positions, labels."""

from dataclasses import replace

import pytest
import torch
from conftest import make_atv, toy_task
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from rendering import encode_pair, encode_prompt, row_of

from atv.config import Positions
from atv.data.collate import (
    IGNORED,
    Collator,
    EncodedRow,
    edit_mask,
    pad,
    position_ids,
)
from atv.data.render import Example
from atv.training.batches import training_rows


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


def test_a_prompt_whose_query_cannot_be_cut_is_refused_with_both_numbers():
    atv = make_atv(dtype=torch.float32)
    row = row_of("q", ("the harbour " * 200,), "yes")
    ids, answer = row.renderers[0].prompt(atv.tokenizer, row.example).ids, encode_pair(atv.tokenizer, "q", "yes")[1]
    with refused(f"has {len(ids)} tokens", f"room for {256 - len(answer)}"):
        atv.encode_row(row)
    with refused(f"has {len(ids)} tokens", "the LLM's context is 256"):
        atv.encode_prompts(["the harbour " * 200])


@pytest.mark.parametrize("query", ["the harbour leaks " * 100, "x" * 900, "leaks " * 40 + "é" * 300])
def test_a_training_query_that_is_too_long_is_cut_at_its_end(query):
    """The prompt is that of a beginning of the query; what stands around it and the answer stay whole."""
    atv = make_atv(dtype=torch.float32)
    task = replace(toy_task(), train=(Example(query, "yes"),), templates=("Say: {input}!",))
    (row,) = training_rows(task)
    made = atv.encode_row(row)
    ((ids, answer),) = made.pairs
    assert made.cut
    assert answer == encode_pair(atv.tokenizer, "Say: x!\nA:", "yes")[1]
    assert 256 - 10 < len(ids) + len(answer) <= 256
    kept = atv.tokenizer.decode(ids).removeprefix("Say: ").removesuffix("!\nA:")
    assert query.startswith(kept)
    assert ids == encode_prompt(atv.tokenizer, f"Say: {kept}!\nA:")
    assert made.query == atv.generator.encode([kept])[0]
    short = atv.encode_row(replace(row, example=Example("x", "yes")))
    assert not short.cut
