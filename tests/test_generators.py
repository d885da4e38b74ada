"""Generators of many architectures: what they are saved as, how wide they are and how many tokens they read."""

import json

import pytest
import torch
from conftest import PAPER_FORM, byte_level_tokenizer, make_llm
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, FunnelModel, set_seed

from atv.config import ATVConfig
from atv.data.collate import pad
from atv.generator import Generator
from atv.lm.load import load_encoder
from atv.model import ATVModel

QUERIES = ["the kettle leaks", "a quiet harbour before the first boats"]
IDS = {"vocab_size": 400, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
BART = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    "max_position_embeddings": 64,
}  # fmt: skip
ENCODER_DECODERS = {"t5": T5, "mt5": T5, "umt5": T5, "longt5": T5, "bart": BART, "mbart": BART, "pegasus": BART}


def encoder(kind, **options):
    set_seed(2)
    config = AutoConfig.for_model(kind, **IDS | options)
    model = FunnelModel(config) if kind == "funnel" else AutoModel.from_config(config, dtype=torch.float32)
    for p in model.parameters():  # at their usual size they hardly tell one query from another
        nn.init.normal_(p, std=0.3)
    return model.eval()


def with_generator(model, **options):
    config = ATVConfig(**PAPER_FORM | options)
    generator = Generator(
        model, byte_level_tokenizer(), config.pooling, config.query_template, bool(config.train_generator)
    )
    set_seed(3)
    return ATVModel(make_llm(dtype=torch.float32), config, tokenizer=byte_level_tokenizer(), generator=generator).eval()


def load(path):
    return ATVModel.from_pretrained(path, make_llm(dtype=torch.float32), tokenizer=byte_level_tokenizer())


def test_a_generator_whose_weights_are_drawn_within_bounds_is_saved_and_loaded(tmp_path):
    atv = with_generator(encoder("modernbert", **BERT | {"cls_token_id": 0, "sep_token_id": 2}))
    atv.save_pretrained(tmp_path / "adapter")  # drew without end where drawing was left out
    assert torch.equal(load(tmp_path / "adapter").task_vectors(QUERIES), atv.task_vectors(QUERIES))


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_the_encoder_of_an_encoder_decoder_is_saved_and_loaded(kind, tmp_path):
    atv = with_generator(encoder(kind, **ENCODER_DECODERS[kind]))
    expected = atv.task_vectors(QUERIES)
    atv.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert torch.equal(again.task_vectors(QUERIES), expected)
    assert torch.equal(load(tmp_path / "adapter").task_vectors(QUERIES), expected)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    names = load_file(tmp_path / "adapter" / "generator" / "model.safetensors")
    assert not any(name.startswith("decoder") for name in names)
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(load(tmp_path / "second").task_vectors(QUERIES), expected)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_a_saved_generator_are_refused(damage, tmp_path):
    generator = with_generator(encoder("t5", **T5)).generator
    generator.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(iter(tensors))
    if damage == "missing":
        del tensors[name]
    elif damage == "unexpected":
        tensors["another"] = torch.ones(2)
    else:
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with refused("model.safetensors does not fit"):
        Generator.load_saved(ATVConfig(), tmp_path)


@pytest.mark.parametrize(("kind", "sizes"), [("bert", BERT), ("t5", T5)])
def test_a_generator_by_name_that_lacks_weights_is_refused_but_not_for_a_pooler_or_a_decoder(kind, sizes, tmp_path):
    model = encoder(kind, **sizes)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    unused = {name for name in whole if name.startswith(("pooler", "decoder"))}
    assert unused
    save_file({name: t for name, t in whole.items() if name not in unused}, file, metadata={"format": "pt"})
    load_encoder(str(tmp_path))
    lost = next(name for name in whole if "layer.1" in name or "block.1" in name if name not in unused)
    save_file({name: t for name, t in whole.items() if name != lost}, file, metadata={"format": "pt"})
    with refused(f"lacks 1 weights of a {type(model).__name__} ({lost}"):
        load_encoder(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with refused("Cannot load the generator"):
        load_encoder(str(tmp_path))


ROBERTA = (BERT, 62)
OFFSETS = {
    "bert": (BERT, 64),
    "roberta": ROBERTA,
    "roberta-prelayernorm": ROBERTA,
    "xlm-roberta": ROBERTA,
    "xlm-roberta-xl": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "mpnet": ROBERTA,
    "esm": (BERT | {"position_embedding_type": "absolute"}, 62),
    "longformer": (BERT | {"attention_window": 16}, 62),
    "bart": (BART, 64),
    "led": ({**BART, "max_encoder_position_embeddings": 64, "attention_window": 16}, 64),
    "opt": (BERT | {"ffn_dim": 32, "word_embed_proj_dim": 24}, 64),
    "mpt": ({"d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 64}, 64),
    "gpt2": ({"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 64}, 64),
    "distilbert": ({"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 32, "max_position_embeddings": 64}, 64),
    "xlnet": ({"d_model": 24, "n_head": 3, "n_layer": 2, "d_inner": 32}, None),
    "t5": (T5, None),
    "albert": (BERT | {"embedding_size": 16}, 64),
    "funnel": ({"d_model": 24, "n_head": 3, "d_head": 8, "d_inner": 32, "block_sizes": [1, 1, 1]}, None),
}


@pytest.mark.parametrize("kind", OFFSETS)
def test_a_query_longer_than_the_context_is_cut_to_what_the_generator_reads(kind, tmp_path):
    sizes, context = OFFSETS[kind]
    generator = with_generator(encoder(kind, **sizes)).generator
    assert generator.context == context
    assert generator.hidden_size == 24
    ids = torch.tensor(generator.encode(["the kettle leaks " * 40]))
    assert ids.shape[1] == (context or ids.shape[1])
    assert ids.shape[1] >= 62
    with torch.no_grad():
        assert generator(ids, torch.ones_like(ids)).isfinite().all()
    generator.save(tmp_path)
    state = torch.get_rng_state()
    again = Generator.load_saved(ATVConfig(pooling="mean"), tmp_path).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again.encoder) is type(generator.encoder)
    with torch.no_grad():
        assert torch.equal(again(ids, torch.ones_like(ids)), generator(ids, torch.ones_like(ids)))


def test_the_width_is_that_of_the_states_whatever_the_configuration_calls_it():
    class Projected(nn.Module):
        """As a Gemma embedding model, whose states are wider than its layers."""

        def __init__(self):
            super().__init__()
            self.inner, self.out = encoder("bert", **BERT), nn.Linear(24, 40)
            self.config, self.name_or_path = self.inner.config, "projected"

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.last_hidden_state = self.out(output.last_hidden_state)
            return output

    atv = with_generator(Projected())
    assert atv.generator.hidden_size == 40
    assert atv.task_vectors(QUERIES).shape == (2, 3, 32)


def test_a_model_that_reads_no_text_is_refused_by_name():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    model = AutoModel.from_config(AutoConfig.for_model("vit", **sizes))
    with refused("The generator 'ViTModel' cannot read a text", "Expected a model that takes token ids"):
        Generator(model, byte_level_tokenizer(), "mean", "{query}")


def test_states_that_are_read_ahead_have_no_dropout():
    generator = with_generator(encoder("bert", **BERT, hidden_dropout_prob=0.5)).generator.train()
    generator.waits = True
    encoded = generator.encode(QUERIES)
    with generator.read_ahead(set(map(tuple, encoded))):
        assert generator.training
        assert generator.encoder.training
        ahead = torch.stack([generator(*pad([ids], 1, "right"))[0] for ids in encoded])
    alone = torch.stack([generator.eval()(*pad([ids], 1, "right"))[0] for ids in encoded])
    torch.testing.assert_close(ahead, alone, atol=1e-4, rtol=1e-4)
