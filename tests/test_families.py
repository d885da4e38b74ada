"""Families built in ways of their own, in the sweep's comparison with hooks written by hand (docs/architectures.md)."""

from functools import partial

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, failed, make_generator
from refusals import refused
from sweep_architectures import CACHES, EQUAL, FAMILIES, ROWS, Examination, distance, page, status, tiny_llm
from torch import nn

from atv.config import ATVConfig
from atv.doctor import check_wiring
from atv.lm.hooks import capture_outputs, decoder_layers, edit_outputs
from atv.model import ATVModel


@pytest.mark.parametrize(
    ("family", "at", "cache"),
    [
        ("openai-gpt", "last", "dynamic"),  # layers return lists, and the cache that it is handed is ignored
        ("openai-gpt", "all", "none"),
        ("gemma3n_text", "last:4", "static"),  # (streams, batch, seq, hidden)
        ("gemma3n_text", "answer", "none"),
        ("hy_v4", "all", "dynamic"),  # (batch, seq, streams, hidden)
        ("hy_v4", "last", "static"),
        ("qwen4_exp_text", "answer", "dynamic"),  # (batch, seq, streams * hidden)
        ("qwen4_exp_text", "all", "static"),
    ],
)
def test_it_is_steered_as_by_hooks_written_by_hand(family, at, cache):
    it = Examination(family)
    plain, expected = it.alone(it.answers), it.alone(partial(it.by_hand, at=at))
    assert distance(it.steered(ROWS, at, **CACHES[cache]), expected, plain) < EQUAL


@pytest.mark.parametrize("family", ["openai-gpt", "gemma3n_text"])
def test_the_self_test_passes(family):
    assert failed(check_wiring(Examination(family).atv)) == []


def test_padding_that_sees_no_key_is_trained_as_it_is_read():
    """In RecurrentGemma; its recurrent layers read padding as text, which the self-test finds too."""
    assert failed(check_wiring(Examination("recurrent_gemma").atv)) == ["batch = single", "padded = unpadded"]


def test_layers_that_a_text_does_not_reach_are_refused_by_name():
    """Mllama's layers that look at images are left out where none is given."""
    llm = tiny_llm("mllama")
    config = ATVConfig(**PAPER_FORM)
    atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config)).eval()
    found = {check.name: check.found for check in check_wiring(atv) if not check.passed}
    assert "did not call MllamaCrossAttentionDecoderLayer (3 of" in found["batch = single"]
    with (
        refused("did not call MllamaCrossAttentionDecoderLayer (3 of", "Choose layers without them"),
        capture_outputs(decoder_layers(llm)),
        torch.no_grad(),
    ):
        llm(torch.tensor([[5, 6, 7]]))
    config = ATVConfig(**PAPER_FORM, layers=[0, 1, 2])
    atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config)).eval()
    assert failed(check_wiring(atv)) == []


class Streams(nn.Module):
    """Returns what it is given, as a layer whose configuration says how many residual streams run beside each other."""

    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 5} | config)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("config", "shape", "axis"),
    [
        ({"altup_num_inputs": 2}, (2, 3, 4, 5), 0),
        ({"altup_num_inputs": 2}, (2, 2, 2, 5), 0),
        ({"hc_mult": 2}, (3, 4, 2, 5), 2),
        ({"hc_mult": 2}, (2, 2, 2, 5), 2),
        ({"hc_count": 2}, (3, 4, 10), 2),
    ],
)
def test_each_of_several_streams_is_edited_and_their_mean_is_read(config, shape, axis):
    layer, x = Streams(**config), torch.randn(shape)
    streams = x.view(3, 4, 2, 5) if len(shape) == 3 else x
    seen = []

    def edit(index, hidden):
        seen.append(hidden)
        return hidden + 1

    with capture_outputs([layer]) as before:
        layer(x)
    with edit_outputs([layer], edit):
        assert torch.equal(layer(x), x + 1)
    assert torch.equal(torch.stack(seen, axis), streams)
    assert torch.equal(before[0], streams.mean(axis))
    with edit_outputs([layer], lambda _, hidden: hidden):
        assert layer(x) is x


def test_states_with_more_axes_than_are_known_are_refused():
    layer = Streams()
    with (
        refused("Streams returned states of shape (2, 3, 4, 5)", "expected (batch, seq, hidden)"),
        edit_outputs([layer], lambda _, hidden: hidden),
    ):
        layer(torch.ones(2, 3, 4, 5))


def test_the_page_says_what_was_found_and_counts_the_worst_column():
    results = {
        "good": {"class": "A", "layers": [("found", "")], "doctor": [("passes", "")], "none": [("equal", "")]},
        "bad": {"class": "B", "layers": [("found", "")], "none": [("equal", ""), ("different", "last: a|b")]},
        "other": {"class": "C", "layers": [("others", "other states")], "none": [("equal", "")]},
        "loud": {"class": "D", "layers": [("others", "other states")], "none": [("refused", "by name")]},
    }
    assert [status(result) for result in results.values()] == ["equal", "different", "different", "refused"]
    written = page(results, 60)
    assert "| good | A | found | passes | equal | - | - | equal |" in written
    assert "| bad | no cache | last: a\\|b |" in written
    assert len(FAMILIES) > 150
