"""How models are loaded, and what is refused."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from atv.lm.load import (
    load_context_length,
    load_encoder,
    load_llm,
    load_saved_encoder,
    load_tokenizer,
    new_model,
    parse_dtype,
)


@pytest.mark.parametrize(
    ("gpu", "cpu_has_it", "device", "expected"),
    [
        (False, False, None, torch.float32),
        (False, True, None, torch.bfloat16),
        (True, False, None, torch.bfloat16),
        (True, False, "auto", torch.bfloat16),
        (True, False, "cpu", torch.float32),
        (False, False, "cuda:1", torch.bfloat16),
    ],
)
def test_the_default_dtype_is_one_that_the_device_is_fast_with(monkeypatch, gpu, cpu_has_it, device, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: cpu_has_it)
    assert parse_dtype("auto", device) == expected
    assert parse_dtype("float16", device) == torch.float16


@pytest.mark.parametrize("load", [load_llm, load_encoder, load_tokenizer, load_context_length, load_saved_encoder])
def test_code_that_comes_with_a_model_is_refused_without_a_question(tmp_path, monkeypatch, load):
    """transformers asks on the terminal whether to run it unless it is told."""
    classes = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoModelForCausalLM": "mine.Model"}
    for name, about in (
        ("config.json", {"model_type": "mine", "auto_map": classes}),
        ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}}),
    ):
        (tmp_path / name).write_text(json.dumps(about))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    with refused("Cannot load", "custom code"):
        load(tmp_path if load is load_saved_encoder else str(tmp_path))
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_a_model_is_not_built_by_code_that_its_configuration_names(monkeypatch):
    class Mine(PreTrainedConfig):
        model_type = "mine"

    monkeypatch.setattr("builtins.input", lambda question: pytest.fail(question))
    with refused("Cannot build a model from a Mine", "custom code"):
        new_model(Mine(auto_map={"AutoModel": "someone/else--mine.Model"}))


@pytest.fixture
def saved(tmp_path):
    """The folder of an LLM, and a function that changes its config.json."""
    make_llm("llama", torch.float32).save_pretrained(tmp_path)

    def change(**options):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | options))

    return str(tmp_path), change


def test_an_llm_whose_files_hold_more_than_it_reads_is_refused(saved, tmp_path):
    """transformers would leave the rest out and say so in a log line."""
    folder, change = saved
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    mask = {"model.layers.0.attn.masked_bias": torch.tensor(-1e9)}  # a constant in files of older versions
    save_file(weights | mask, file, metadata={"format": "pt"})
    load_llm(folder, device="cpu")
    scale = {"model.layers.1.mlp.up_proj.weight_scale": torch.tensor(0.1)}
    save_file(weights | scale, file, metadata={"format": "pt"})
    with refused(folder, "hold 1 tensors that a LlamaForCausalLM", *scale):
        load_llm(folder, device="cpu")
    save_file(weights, file, metadata={"format": "pt"})
    change(num_hidden_layers=2)
    with refused(folder, "hold 9 tensors", "model.layers.2.input_layernorm.weight"):
        load_llm(folder, device="cpu")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"hidden_size": 64}, ["has the shape (400, 32)", "config.json (400, 64)"]),
        ({"vocab_size": 500}, ["has the shape (400, 32)", "config.json (500, 32)"]),
        ({"vocab_size": "x"}, ["'vocab_size' expected int"]),
        ({"num_attention_heads": 5}, ["not a multiple of the number of attention heads (5)"]),
        ({"attn_implementation": "flash_attention_2"}, ["FlashAttention2"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ"]),
        ({"quantization_config": {"quant_method": "nope"}}, ["quantised with nope"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="more may be installed where there is a GPU")
def test_an_llm_whose_files_do_not_belong_together_is_refused(saved, options, parts):
    folder, change = saved
    change(**options)
    with refused(folder, *parts):
        load_llm(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"dtype": "floaty", "model_type": "llama"}'),
        ("config.json", "[]"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_in_a_damaged_folder_is_refused(tmp_path, name, text):
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # the class of the tokenizer is that of the LLM
    (tmp_path / name).write_text(text)
    with refused("Cannot load the tokenizer of", tmp_path):
        load_tokenizer(str(tmp_path))
