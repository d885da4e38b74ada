"""LLMs in 8 and 4 bit: steered and trained through, the same adapter on all of them, and what is missing is named."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from conftest import GROUPED, PAPER_FORM, byte_level_tokenizer, make_generator, toy_task
from refusals import refused
from rendering import row_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

import atv.lm.load as models
from atv.config import ATVConfig, TrainConfig
from atv.doctor import check_wiring
from atv.errors import ATVError
from atv.lm.hooks import quantization
from atv.lm.identity import describe_llm
from atv.lm.load import load_llm
from atv.model import ATVModel
from atv.training.loop import train

needs_package = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
BITS = ["8bit", "4bit"]
ROWS = [row_of("the kettle leaks", ("the kettle leaks and the lid sticks\nA:", "is it so?\nA:"), "yes no"),
        row_of("quiet", ("quiet\nA:", "x"), "three")]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama just wide enough for bitsandbytes' blocks of 64."""
    path = tmp_path_factory.mktemp("llm")
    set_seed(1)
    sizes = GROUPED | {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    return str(path)


def make(llm, **options):
    config = ATVConfig(**(PAPER_FORM | {"positions": "last:2"} | options))
    set_seed(3)
    return ATVModel(llm, config, generator=make_generator(config), tokenizer=byte_level_tokenizer()).eval()


def unquantized(llm, plain):
    """`plain` with the weights that the quantised `llm` stands for."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in llm.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dtype not in (torch.uint8, torch.int8):
            continue
        scales = getattr(weight, "SCB", None)
        values = dequantize_4bit(weight.data, weight.quant_state) if scales is None else weight * scales[:, None] / 127
        plain.get_submodule(name).weight.data.copy_(values)
    return plain


@needs_package
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("bits", BITS)
def test_the_wiring_holds(folder, bits, dtype):
    llm = load_llm(folder, dtype=dtype, device="cpu", quantization=bits)
    assert quantization(llm) == bits
    kinds = {name.split(".")[-2]: p.dtype for name, p in llm.named_parameters()}
    assert kinds["q_proj"] == kinds["down_proj"] == (torch.int8 if bits == "8bit" else torch.uint8)
    assert kinds["embed_tokens"] == getattr(torch, dtype)
    checks = check_wiring(make(llm))
    assert [f"{check.name}: {check.found}" for check in checks if not check.passed] == []


@needs_package
@pytest.mark.parametrize("bits", BITS)
def test_loss_and_gradient_are_those_of_the_weights_that_the_bits_stand_for(folder, bits):
    llm = load_llm(folder, dtype="float32", device="cpu", quantization=bits)
    plain = load_llm(folder, dtype="float32", device="cpu")
    results = []
    for atv in (make(llm), make(unquantized(llm, plain))):
        batch = atv.collator()([atv.encode_row(row) for row in ROWS])
        with torch.no_grad():
            atv(**batch)  # what runs first without gradient must not spoil what runs with one
        loss = atv(**batch).loss
        loss.backward()
        results.append((loss, torch.cat([p.grad.flatten() for p in atv.parameters()])))
    (loss, gradient), (expected, of_plain) = results
    if bits == "4bit":
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, of_plain, rtol=1e-3, atol=1e-5)
    else:  # 8 bit rounds the activations as well
        assert loss.item() == pytest.approx(expected.item(), rel=0.1)
        assert torch.cosine_similarity(gradient, of_plain, dim=0) > 0.97
    assert of_plain.abs().max() > 1e-3


@needs_package
def test_an_adapter_says_on_what_it_was_made_and_fits_every_quantization(folder, tmp_path):
    llms = {bits: load_llm(folder, dtype="bfloat16", device="cpu", quantization=bits) for bits in (None, *BITS)}
    make(llms["4bit"]).save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "atv_config.json").read_text())
    assert written["base_llm"]["quantization"] == "4bit"
    prints = [describe_llm(llm)["fingerprint"] for llm in llms.values()]
    assert [len(each["weights"]) for each in prints] == [10, 3, 3]  # with matrices, and norms alone
    for each in prints[1:]:
        assert each["embeddings"] == prints[0]["embeddings"]
        assert each["weights"].items() <= prints[0]["weights"].items()
    found = [ATVModel.from_pretrained(tmp_path / "adapter", llm).task_vectors(["quiet"]) for llm in llms.values()]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_package
def test_a_training_learns_and_is_not_gone_on_with_in_another_quantization(folder, tmp_path):
    task, config = toy_task(), TrainConfig.paper(epochs=2, learning_rate=5e-3, generator_learning_rate=5e-3)
    llm = load_llm(folder, dtype="float32", device="cpu", quantization="4bit")
    history = train(make(llm), [task], tmp_path / "out", config).record["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    other = make(load_llm(folder, dtype="float32", device="cpu"))
    with pytest.raises(ATVError, match="other settings.*quantization: '4bit' there, None now"):
        train(other, [task], tmp_path / "out", config)


def test_an_unknown_quantization_and_a_missing_or_unusable_package_are_named(folder, monkeypatch):
    with pytest.raises(ATVError, match="Unknown quantization '3bit'.*4bit"):
        load_llm(folder, quantization="3bit")
    with monkeypatch.context() as patched:
        patched.setattr(models, "find_spec", lambda name: None)
        with pytest.raises(ATVError, match=r"bitsandbytes, which is not installed.*pip install bitsandbytes"):
            load_llm(folder, quantization="4bit")

    def unusable(*args, **kwargs):
        raise RuntimeError("no library for\nthis device")

    monkeypatch.setattr(models, "find_spec", lambda name: True)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", unusable)
    with refused("the LLM in 8bit on cpu", "no library for this device. Install a bitsandbytes"):
        load_llm(folder, device="cpu", quantization="8bit")
    with refused(f"the LLM {folder!r}: no library for this device. Expected files that belong together"):
        load_llm(folder, device="cpu")


@needs_package
@pytest.mark.parametrize("bits", BITS)
def test_a_file_that_is_quantised_already_is_read_with_its_scales(folder, tmp_path, bits):
    llm = load_llm(folder, dtype="float32", device="cpu", quantization=bits)
    llm.save_pretrained(tmp_path)
    found = load_llm(str(tmp_path), dtype="float32", device="cpu")
    assert quantization(found) == describe_llm(found)["quantization"] == bits
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, llm(ids).logits)
    with refused(tmp_path, "is quantised already", "4bit quantises plain weights"):
        load_llm(str(tmp_path), device="cpu", quantization="4bit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers keeps such weights in FP8 where there is a GPU")
def test_an_fp8_file_is_read_with_its_scales(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    expected, written = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        expected[name] = written[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            written[name] = (weight / scale).to(torch.float8_e4m3fn)
            written[f"{name}_scale_inv"] = scale.repeat(-(-len(weight) // 64), -(-weight.shape[1] // 64))
            expected[name] = written[name].float() * scale
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = load_llm(str(tmp_path), dtype="float32", device="cpu")
    assert quantization(llm) is None  # they are plain numbers again
    torch.testing.assert_close(dict(llm.state_dict()), expected, rtol=2**-7, atol=0)  # by way of bfloat16
