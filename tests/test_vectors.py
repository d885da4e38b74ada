"""An ATV without its LLM, edits and sites of one's own, and spans given by lengths."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import ARCHITECTURES, byte_level_tokenizer, make_atv, make_llm, toy_task
from refusals import refused
from torch import nn

from atv.config import ATVConfig, Positions, TrainConfig
from atv.generator import GENERATORS, Constant
from atv.lm.hooks import SITES, attention_and_mlp, decoder_layers
from atv.lm.spans import Known, Lengths
from atv.model import ATVModel
from atv.steer import EDITS, AddVectors, rows_of, steer
from atv.training.loop import train
from atv.vectors import ATV

QUERIES = ["the kettle leaks", "quiet", "one two three"]


# ---- without an LLM ----


@pytest.mark.parametrize("options", [{}, {"parametrisation": "paper"}, {"layers": [0, 2], "expansion_rank": 3}])
def test_loaded_without_its_llm_an_atv_makes_the_same_vectors(tmp_path, options):
    model = make_atv(dtype=torch.float32, **options)
    with torch.no_grad():
        for parameter in model.expansion.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    loaded = ATV.load(tmp_path / "adapter")
    assert not any(isinstance(part, type(model.llm)) for part in loaded.modules())
    assert torch.equal(loaded.task_vectors(QUERIES), model.eval().task_vectors(QUERIES))
    assert loaded.base_llm["num_layers"] == 3
    joined = ATVModel(model.llm, loaded, tokenizer=model.tokenizer)
    assert torch.equal(joined.task_vectors(QUERIES), model.task_vectors(QUERIES))


def test_the_llm_itself_as_generator_needs_the_llm(tmp_path):
    model = ATVModel(make_llm(dtype=torch.float32), ATVConfig(generator="self"), tokenizer=byte_level_tokenizer())
    model.save_pretrained(tmp_path / "adapter")
    with refused("generator of the adapter", "self", "ATVModel.from_pretrained"):
        ATV.load(tmp_path / "adapter")


def test_without_an_llm_given_the_one_that_the_adapter_names_is_loaded(tmp_path):
    make_llm(dtype=torch.float32).save_pretrained(tmp_path / "llm")
    byte_level_tokenizer().save_pretrained(tmp_path / "llm")
    llm = type(make_llm()).from_pretrained(tmp_path / "llm")
    made = make_atv(dtype=torch.float32)
    model = ATVModel(llm, made.config, tokenizer=made.tokenizer, generator=made.generator)
    model.save_pretrained(tmp_path / "adapter")
    loaded = ATVModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.task_vectors(QUERIES), model.task_vectors(QUERIES))
    assert loaded.generate(["the kettle\nA:"], max_new_tokens=3) == model.generate(["the kettle\nA:"], max_new_tokens=3)


# ---- registered by name ----


@dataclass
class RankOne:
    """h + scale * u (w . h): two vectors per site."""

    vectors_per_site: ClassVar[int] = 2
    sites: list
    vectors: torch.Tensor
    scale: float
    positions: Positions

    def __call__(self, site, hidden, span):
        u, w = rows_of(self.vectors[:, 2 * site : 2 * site + 2], hidden, span).unbind(1)  # (rows, hidden) each
        along = (hidden * w[:, None].to(hidden)).sum(-1, keepdim=True)
        return torch.where(span.where[..., None], hidden + self.scale * along * u[:, None].to(hidden), hidden)


def test_an_edit_of_ones_own_is_trained_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(EDITS, "rank-one", RankOne)
    made = make_atv(dtype=torch.float32)
    config = ATVConfig(edit="rank-one", train_generator=False)
    model = ATVModel(make_llm(dtype=torch.float32), config, tokenizer=made.tokenizer, generator=made.generator)
    model.generator.set_trainable(False)
    assert model.task_vectors(QUERIES).shape == (3, 6, 32)
    with torch.no_grad():
        model.expansion.common.normal_()
    result = train(model, [toy_task()], tmp_path / "out", TrainConfig(epochs=1))
    loaded = ATVModel.from_pretrained(result.adapter, make_llm(dtype=torch.float32), tokenizer=made.tokenizer)
    inputs = loaded.encode_prompts(["the kettle\nA:"])
    vectors = loaded.task_vectors(["quiet"])[0]
    hooks = []
    for index, layer in enumerate(loaded.llm.model.layers):

        def hook(_, __, output, index=index):
            hidden = output[0] if isinstance(output, tuple) else output
            edited = hidden.clone()
            u, w = vectors[2 * index], vectors[2 * index + 1]
            edited[0, -1] += loaded.config.scale * (hidden[0, -1] @ w) * u
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        expected = loaded.llm(**inputs).logits
        for each in hooks:
            each.remove()
        with loaded.steer(["quiet"]):
            found = loaded.llm(**inputs).logits
    torch.testing.assert_close(found, expected)
    monkeypatch.delitem(EDITS, "rank-one")
    with refused("Unknown edit 'rank-one'", "add"):
        ATVModel.from_pretrained(result.adapter, make_llm(dtype=torch.float32), tokenizer=made.tokenizer)


@pytest.mark.parametrize("site", ["attention", "mlp"])
def test_attention_and_mlp_are_sites(site):
    llm = make_llm(dtype=torch.float64)
    made = make_atv(dtype=torch.float64)
    model = ATVModel(llm, ATVConfig(site=site), tokenizer=made.tokenizer, generator=made.generator)
    place = {"attention": 0, "mlp": 1}[site]
    assert model.layers == [pair[place] for pair in attention_and_mlp(llm)]
    vectors = torch.randn(1, 3, 32, dtype=torch.float64)
    inputs = model.encode_prompts(["the kettle\nA:"])
    handles = []
    for index, pair in enumerate(attention_and_mlp(llm)):

        def hook(_, __, output, index=index):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, -1] += 0.5 * vectors[0, index]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(pair[place].register_forward_hook(hook))
    with torch.no_grad():
        expected = llm(**inputs).logits
        for each in handles:
            each.remove()
        with model.steer(["q"], vectors=vectors, scale=0.5):
            torch.testing.assert_close(llm(**inputs).logits, expected)


def test_a_site_of_ones_own_and_an_unknown_one(monkeypatch):
    made = make_atv(dtype=torch.float32)
    monkeypatch.setitem(SITES, "every-layer", decoder_layers)
    config = ATVConfig(site="every-layer")
    assert ATVModel(made.llm, config, tokenizer=made.tokenizer, generator=made.generator).layers == made.layers
    with refused("Unknown site 'nowhere'", "attention"):
        ATVModel(made.llm, ATVConfig(site="nowhere"), tokenizer=made.tokenizer, generator=made.generator)


class Length(Constant):
    """The state is the number of letters of a query: nothing is trained."""

    def __init__(self):
        super().__init__()
        self.hidden_size = 1

    def encode(self, queries):
        return [[len(query)] for query in queries]

    def forward(self, input_ids, attention_mask):
        return input_ids[:, :1].float()


def test_a_generator_of_ones_own_is_saved_and_loaded_by_its_name(tmp_path, monkeypatch):
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    with refused("generator is a Length"):
        ATVModel(llm, ATVConfig(generator="constant"), tokenizer=tokenizer, generator=Length()).require_savable()
    monkeypatch.setitem(GENERATORS, "length", Length)
    model = ATVModel(llm, ATVConfig(generator="length", train_generator=False), tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.expansion.parameters():
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert torch.equal(ATV.load(tmp_path).task_vectors(QUERIES), model.eval().task_vectors(QUERIES))


# ---- lengths: whole texts, padded on the right ----


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("positions", ["last", "last:2", "answer", "all"])
@pytest.mark.parametrize("name", ARCHITECTURES[:4])
def test_a_batch_of_whole_texts_is_each_text_alone_with_a_mask_by_hand(name, positions, with_mask):
    llm, torch_ids = make_llm(name), [[5, 6, 7, 8, 9], [9, 8, 7], [4, 5, 6, 7]]
    lengths, at = [3, 2, 3], Positions.parse(positions)
    layers = decoder_layers(llm)
    vectors = torch.randn(3, len(layers), 32, dtype=torch.float64)
    width = max(map(len, torch_ids))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in torch_ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in torch_ids])
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if with_mask else {})
    with torch.no_grad(), steer(llm, AddVectors(layers, vectors, 0.7, at), Lengths(lengths, at)):
        together = llm(**inputs).logits
    for row, (tokens, length) in enumerate(zip(torch_ids, lengths, strict=True)):
        count = length if at.prompt_tokens is None else at.prompt_tokens
        where = [length - count <= column < (len(tokens) if at.answer else length) for column in range(len(tokens))]
        edit = AddVectors(layers, vectors[row : row + 1], 0.7, at)
        with torch.no_grad(), steer(llm, edit, Known(torch.tensor([where]))):
            alone = llm(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(together[row, : len(tokens)], alone)


def test_what_lengths_do_not_fit_is_refused():
    llm, at = make_llm(), Positions.parse("last")
    edit = AddVectors(decoder_layers(llm), torch.randn(1, 3, 32, dtype=torch.float64), 1.0, at)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        for lengths in ([4], [0], [2, 2]):
            with refused("expected one row per prompt"), steer(llm, edit, Lengths(lengths, at)):
                llm(input_ids=ids)
        with refused("padding on the left"), steer(llm, edit, Lengths([2], at)):
            llm(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1]]))
        cache = llm(input_ids=ids, use_cache=True).past_key_values
        with refused("filled cache"), steer(llm, edit, Lengths([2], at)):
            llm(input_ids=ids, past_key_values=cache)
        with refused("generate was called while", "Tracked"), steer(llm, edit, Lengths([2], at)):
            llm.generate(ids, max_new_tokens=2)
