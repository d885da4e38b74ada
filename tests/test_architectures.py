"""LLMs that are built in other ways: what is kept of them, shared or split off must change nothing, or not be done."""

import pytest
import torch
from conftest import PAPER_FORM, SIZES, byte_level_tokenizer, make_generator
from losses import batch_of, full_pass_loss
from shared_prompts import PROMPTS, logits
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    FalconH1Config,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    MptConfig,
    set_seed,
)

from atv.config import ATVConfig
from atv.data.collate import left_padded
from atv.lm.prefix import SharedPrefix, call_llm
from atv.lm.prefix_store import PrefixStore
from atv.model import ATVModel

GROUPED = SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    "falcon": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2, alibi=False),
    "falcon-alibi": FalconConfig(**SIZES, alibi=True, multi_query=False),
    "mpt": MptConfig(
        **{key: SIZES[key] for key in ("vocab_size", "initializer_range")}, d_model=32, n_heads=4, n_layers=3
    ),
    "gpt-neo": GPTNeoConfig(
        **{key: SIZES[key] for key in SIZES if key not in ("num_hidden_layers", "num_attention_heads")},
        num_layers=3,
        num_heads=4,
        window_size=6,
        attention_types=[[["global", "local", "local"], 1]],
    ),
    "deepseek": DeepseekV3Config(
        **GROUPED | {"num_key_value_heads": 4},
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=6,
        first_k_dense_replace=3,
    ),
    "jamba": JambaConfig(
        **GROUPED, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4
    ),
    "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False),
    "mamba": MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=3, state_size=4, initializer_range=0.4),
    "falcon-h1": FalconH1Config(
        **GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, head_dim=8
    ),
}


def made(name, positions):
    set_seed(1)
    llm = AutoModelForCausalLM.from_config(CONFIGS[name]).float().eval()
    config = ATVConfig(**PAPER_FORM, positions=positions)
    set_seed(3)
    return ATVModel(llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config)).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("positions", ["last", "last:3"])
def test_training_with_and_without_a_store_has_the_loss_of_the_full_pass(name, positions):
    atv = made(name, positions)
    batch = batch_of(atv)
    full = full_pass_loss(atv, batch)
    expected = torch.autograd.grad(full, atv.expansion.map.weight)[0]
    store = PrefixStore()
    edited = atv.positions.prompt_tokens
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    store.fill(atv.llm, [row[:-edited].tolist() for row in rows], lambda count: None)
    for read in (atv.read_prefix, store.read):
        atv.read_prefix = read
        loss = atv(**batch).loss
        assert loss.item() == pytest.approx(full.item(), abs=2e-4)
        found = torch.autograd.grad(loss, atv.expansion.map.weight)[0]
        assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_shared_changes_no_logit(name):
    atv = made(name, "last")
    ids = [atv.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    shared = SharedPrefix(atv.llm, ids, 1)
    with torch.no_grad():
        ours, theirs = (
            logits(atv.llm, shared, ids),
            call_llm(atv.llm, keep=1, use_cache=False, **left_padded(ids, 0)).logits,
        )
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
