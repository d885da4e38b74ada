"""How models are loaded, without loading one."""

import json

import pytest
import torch
from refusals import refused
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
