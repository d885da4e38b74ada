"""Texts to tensors: the seam between prompt and answer, padding, positions, labels."""

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from atv.config import Positions
from atv.data.collate import (
    IGNORED,
    Collator,
    EncodedRow,
    Row,
    edit_mask,
    encode_pair,
    encode_prompt,
    pad,
    position_ids,
)
from atv.errors import ATVError

TOKENIZERS = {"byte-level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
WORDS = st.text(alphabet="abcdeilnopqrstuvy ,.?", min_size=1, max_size=30).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=WORDS, answer=st.sampled_from(["positive", "negative", "yes", "no", "A", "True", "the answer is two"]))
def test_prompt_and_answer_ids_read_as_prompt_space_answer(kind, prompt, answer):
    tokenizer = TOKENIZERS[kind]
    prompt = f"{prompt.strip()}\nA:"
    prompt_ids, answer_ids = encode_pair(tokenizer, prompt, answer)
    assert prompt_ids == encode_prompt(tokenizer, prompt)
    assert answer_ids
    assert tokenizer.decode(prompt_ids + answer_ids) == tokenizer.decode(tokenizer(f"{prompt} {answer}")["input_ids"])


def test_a_sentencepiece_answer_has_one_space_where_encoding_it_alone_would_give_two():
    tokenizer = TOKENIZERS["sentencepiece"]
    _, answer = encode_pair(tokenizer, "is it?\nA:", "positive")
    together = tokenizer("is it?\nA: positive")["input_ids"]
    assert together[-len(answer) :] == answer
    assert tokenizer.convert_ids_to_tokens(answer)[0].count("▁") == 1


class MergingTokenizer:
    """Greedy longest match over a vocabulary in which one token reaches over the seam between prompt and answer."""

    vocabulary = ("X y", "X", " y", " ", "y", "a", ":", "\n")
    eos_token_id = None

    def __call__(self, text):
        ids = []
        while text:
            token = next(token for token in self.vocabulary if text.startswith(token))
            ids.append(self.vocabulary.index(token))
            text = text[len(token) :]
        return {"input_ids": ids}


def test_a_token_that_reaches_over_the_seam_is_not_cut():
    tokenizer = MergingTokenizer()
    assert tokenizer("X y")["input_ids"] == [0]  # the whole text is one token
    prompt, answer = encode_pair(tokenizer, "X", "y")
    assert [tokenizer.vocabulary[i] for i in prompt] == ["X"]
    assert [tokenizer.vocabulary[i] for i in answer] == [" y"]


class ClosingTokenizer(MergingTokenizer):
    """One that puts an end token after every text."""

    eos_token_id = 99

    def __call__(self, text):
        return {"input_ids": [*super().__call__(text)["input_ids"], 99]}


def test_an_end_token_after_the_text_is_left_out():
    assert encode_prompt(ClosingTokenizer(), "a:") == encode_prompt(MergingTokenizer(), "a:")
    assert 99 not in encode_pair(ClosingTokenizer(), "a:", "y")[1]


@pytest.mark.parametrize(("prompt", "answer"), [("", "y"), ("a", " ")])
def test_an_empty_prompt_or_answer_is_refused(prompt, answer):
    with pytest.raises(ATVError, match="expected both to have text"):
        encode_pair(MergingTokenizer(), prompt, answer)


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


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers():
    atv = make_atv(dtype=torch.float32)
    with pytest.raises(ATVError, match=r"has \d+ tokens and the LLM's context is 256"):
        atv.encode_row(Row("q", ("the harbour " * 200,), "yes"))
