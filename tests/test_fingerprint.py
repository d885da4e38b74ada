"""Which LLM an adapter is of: layers, PEFT adapters and embeddings count; dtype, quantisation and added rows do not."""

import copy

import pytest
import torch
from conftest import CONFIGS, PAPER_FORM, byte_level_tokenizer, make_generator, make_llm
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from refusals import refused
from transformers import AutoModelForCausalLM, set_seed

from atv.config import ATVConfig
from atv.lm import identity
from atv.methods.lora import LoRA, LoRAConfig
from atv.methods.peft_model import PEFTModel
from atv.model import ATVModel


def saved(llm, path):
    config = ATVConfig(**PAPER_FORM)
    atv = ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config)).eval()
    atv.save_pretrained(path)
    return atv


def load(llm, path):
    return ATVModel.from_pretrained(path, llm, tokenizer=byte_level_tokenizer())


def plain(dtype=torch.float32):
    return make_llm(dtype=dtype)


def adapted(kind="lora", seed=5):
    config = {
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    llm = plain()
    set_seed(seed)
    made = get_peft_model(llm, config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "ia3" in name:
                p.normal_()
    return made


def changed(name):
    """One weight of one layer, as after a fine-tuning."""
    llm = plain()
    with torch.no_grad():
        llm.get_parameter(name).mul_(1.02)
    return llm


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_other_layer_weights_below_equal_embeddings_are_refused(tmp_path, name):
    saved(plain(), tmp_path / "adapter")
    load(plain(), tmp_path / "adapter")
    word = name.replace(".1.", ".*.").replace(".2.", ".*.")
    with refused("was made for", "they differ in weights", word):
        load(changed(name), tmp_path / "adapter")


def test_another_head_is_refused_and_a_resized_one_is_not(tmp_path):
    saved(plain(), tmp_path / "adapter")
    with refused("they differ in language-model head", "an LLM without a name"):
        load(changed("lm_head.weight"), tmp_path / "adapter")
    llm = plain()
    llm.resize_token_embeddings(408)
    load(llm, tmp_path / "adapter")


def test_a_merged_lora_is_another_llm(tmp_path):
    saved(plain(), tmp_path / "adapter")
    with refused("they differ in weights", "self_attn"):
        load(adapted().merge_and_unload(), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix"])
def test_an_active_peft_adapter_counts_and_an_inactive_one_does_not(tmp_path, kind):
    saved(adapted(kind), tmp_path / "with")
    saved(plain(), tmp_path / "without")
    load(adapted(kind), tmp_path / "with")
    with refused("active PEFT adapters (some against none)"):
        load(plain(), tmp_path / "with")
    with refused("active PEFT adapters (none against some)"):
        load(adapted(kind), tmp_path / "without")
    other = adapted(kind, seed=6)
    with refused("active PEFT adapters (some against others)"):
        load(other, tmp_path / "with")
    if kind != "prefix":
        other.base_model.disable_adapter_layers()
        load(other, tmp_path / "without")


def test_an_adapter_of_an_llm_with_lora_counts_without_its_wrapper_too(tmp_path):
    llm = plain()
    saved(llm, tmp_path / "without")
    llm.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with refused("active PEFT adapters (none against some)"):
        load(llm, tmp_path / "without")
    llm.disable_adapters()
    load(llm, tmp_path / "without")


def test_another_strength_of_the_same_lora_is_another_llm(tmp_path):
    llm = adapted()
    saved(llm, tmp_path / "with")
    for module in llm.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with refused("active PEFT adapters (some against others)"):
        load(llm, tmp_path / "with")


@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_of_an_llm_is_the_same_llm(tmp_path, made):
    """Also of weights published in float32, small ones among them, which float16 and bfloat16 round otherwise."""
    set_seed(1)
    published = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.float32)
    with torch.no_grad():
        for p in published.parameters():
            p.mul_(torch.logspace(-7, 0, p.numel()).view_as(p))
    saved(copy.deepcopy(published).to(made), tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        load(copy.deepcopy(published).to(dtype), tmp_path / "adapter")


@pytest.mark.parametrize("rows", [401, 448, 384])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_added_or_cut_off_at_the_end_are_accepted(tmp_path, rows, tied):
    def llm():
        config = copy.deepcopy(CONFIGS["llama"])
        config.tie_word_embeddings = tied
        set_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    atv = saved(llm(), tmp_path / "adapter")
    resized = llm()
    resized.resize_token_embeddings(rows)
    assert resized.config.vocab_size == rows
    again = load(resized, tmp_path / "adapter")
    assert torch.equal(again.task_vectors(["quiet"]), atv.task_vectors(["quiet"]))
    again.save_pretrained(tmp_path / "second")
    load(llm(), tmp_path / "second")
    with torch.no_grad():
        resized.get_input_embeddings().weight[0] += 0.1
    with refused("they differ in embeddings"):
        load(resized, tmp_path / "adapter")


def test_loras_own_adapter_fits_the_plain_llm_and_no_other(tmp_path):
    llm, tokenizer = plain(), byte_level_tokenizer()
    model = PEFTModel(llm, tokenizer, LoRA, LoRAConfig())
    model.save_pretrained(tmp_path / "lora")
    LoRA.load(llm, tokenizer, tmp_path / "lora")
    LoRA.load(plain(), tokenizer, tmp_path / "lora")
    assert identity.describe_llm(llm) == identity.describe_llm(plain())
    with refused("they differ in weights"):
        LoRA.load(changed("model.layers.0.mlp.down_proj.weight"), tokenizer, tmp_path / "lora")


def test_a_frozen_generator_that_is_only_named_must_be_the_same(tmp_path):
    config = ATVConfig(pooling="mean", train_generator=False, generator=str(tmp_path / "generator"))
    source = make_generator(config)
    source.save(tmp_path / "generator")
    atv = ATVModel(plain(), config, tokenizer=source.tokenizer)
    atv.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "generator").exists()
    load(plain(), tmp_path / "adapter")
    with torch.no_grad():
        source.encoder.encoder.layer[1].output.dense.weight.mul_(1.05)
    source.save(tmp_path / "generator")
    with refused("made with a frozen generator named", "now has other weights"):
        load(plain(), tmp_path / "adapter")
    with refused("would load as a different model", "is a different generator"):
        atv.save_pretrained(tmp_path / "second")
    assert not (tmp_path / "second").exists()
