"""Every decoder-only family of the installed transformers, steered and compared with hooks written by hand.

`make sweep` builds each family's LLM tiny and random, steers it at every kind of position with every kind of cache, and
writes what it found to docs/architectures.md, which says how. It is no test of the gate: it takes several minutes.
"""

import argparse
import inspect
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from conftest import byte_level_tokenizer, make_generator
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from atv import __version__
from atv.config import ATVConfig, Positions
from atv.data.collate import pad
from atv.doctor import check_wiring
from atv.errors import ATVError
from atv.lm.hooks import capture_outputs
from atv.model import ATVModel

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
POSITIONS = ("last", "last:4", "answer", "all")
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
LENGTHS = (13, 6, 2)
ROWS = list(range(len(LENGTHS)))
NEW = 4
EQUAL = 0.01  # of what steering changes; float32 rounding stays far below it

# ---- tiny configurations: what a size is called in transformers, and how small it is here ----

LAYERS = 4
TINY = (
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks"),
    (LAYERS, "encoder_layers num_encoder_layers"),
    (1, "first_k_dense_replace num_dense_layers num_nextn_predict_layers"),
    (1, "n_group topk_group n_groups mamba_n_groups mamba_ngroups num_expert_group"),
    (32, "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size"),
    (32, "word_embed_proj_dim lru_width backbone_hidden_size adapter_in_dim adapter_out_dim adapter_input_size"),
    (48, "intermediate_size moe_intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size n_inner dff"),
    (48, "dim_ff d_inner shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    (48, "moe_shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads"),
    (4, "linear_num_heads index_n_heads zero_expert_num mamba_d_state state_size ssm_state_size time_step_rank"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts moe_num_primary_experts mamba_dt_rank"),
    (4, "laurel_rank adapter_rank q_lora_rank gated_norm_rank hc_lowrank d_rel num_centroids"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads hc_mult hc_count"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (8, "head_dim attention_head_dim swa_head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim d_head"),
    (8, "dim_head index_head_dim kv_channels rotary_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (8, "mamba_d_head mamba_head_dim mamba_headdim mamba_n_heads mamba_num_heads kv_lora_rank o_lora_rank"),
    (8, "hidden_size_per_layer_input router_hidden_size"),
    (64, "mamba_d_ssm attention_hidden_size"),
    (6, "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size"),
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length"),
    (400, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
)  # fmt: skip
SIZES = {name: size for size, names in TINY for name in names.split()} | {
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.4, "is_decoder": True,
}  # fmt: skip
SPECIAL = {  # what a configuration needs beside, by its model type
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False, "hash_seed": 1},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
PATHS = {"longcat_flash": "model.layers"}
"""Where structure alone does not decide which layers are meant, and the user names them."""


def shrunk(config, part="text_config"):
    """The same kind of configuration with tiny sizes; lists of layer types hold each type that the default has."""
    kind, known, chosen = type(config), config.to_dict(), {}
    for name in dict.fromkeys([*known, *inspect.signature(kind.__init__).parameters, *vars(kind)]):
        value = known.get(name)
        if name in SIZES and not isinstance(getattr(kind, name, None), property):
            chosen[name] = SIZES[name]
        elif "layer" in name and isinstance(value, list) and value and isinstance(value[0], str):
            kinds = list(dict.fromkeys(value))
            chosen[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
        elif name in config.sub_configs and getattr(config, name, None) is not None:
            chosen[name] = shrunk(getattr(config, name), name).to_dict()
        if part != "text_config" and name in TINY[0][1].split():  # not as many as the LLM has
            chosen[name] = 2
    if "kv_lora_rank" in known:  # latent attention has as many key heads as heads
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    return kind(**chosen | SPECIAL.get(config.model_type, {}))


def tiny_llm(family):
    """A tiny random LLM of a family, in float32."""
    set_seed(1)
    llm = AutoModelForCausalLM.from_config(shrunk(CONFIG_MAPPING[family]()))
    llm = llm.float().eval()
    for module in llm.modules():  # a padding token of zeros would hide where it is attended to
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx].normal_(std=SIZES["initializer_range"])
    llm.generation_config.eos_token_id = None
    return llm


# ---- the reference: hooks written by hand, which count calls ----


@contextmanager
def by_hand(llm, layers, vectors, lengths, positions):
    """Add `vectors` (rows, layers, hidden) in one call of `generate`, whose prompts end at the same column."""
    count = {"last": 1, "last:4": 4, "answer": 1, "all": 99}[positions]
    width, calls, handles = max(lengths), [], []

    def edited(row, column):
        if column >= width:
            return positions in ("answer", "all")
        return column >= width - min(count, lengths[row])

    def add(index, _, __, output):
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        added = vectors[:, index, None]  # (rows, 1, hidden)
        where_from = hidden.shape[:2]
        assert hidden.dim() == 4 or len(hidden) == len(lengths), "states are not (batch, seq, hidden)"
        if hidden.dim() == 4 and len(hidden) != len(lengths):  # (streams, rows, columns, hidden)
            where_from = hidden.shape[1:3]
        elif hidden.dim() == 4:  # (rows, columns, streams, hidden)
            added = added[:, :, None]
        elif hidden.shape[-1] != added.shape[-1]:  # (rows, columns, streams * hidden)
            added = added.repeat(1, 1, hidden.shape[-1] // added.shape[-1])
        rows, columns = where_from
        end = width + len(calls) - 1  # each call of `generate` after the first has read one token more
        where = torch.tensor([[edited(row, end - columns + at) for at in range(columns)] for row in range(rows)])
        hidden = hidden + where.view(rows, columns, *[1] * (added.dim() - 2)) * added
        if isinstance(output, torch.Tensor):
            return hidden
        return (
            type(output)([hidden, *output[1:]])
            if type(output) in (tuple, list)
            else output._replace(hidden_states=hidden)
        )

    handles.append(llm.register_forward_pre_hook(lambda *_: calls.append(1)))
    handles += [layer.register_forward_hook(partial(add, index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- the comparison ----


class Examination:
    """One family: what it answers unsteered, steered by hand and steered by us."""

    def __init__(self, family):
        self.llm = tiny_llm(family)
        config = ATVConfig(pooling="mean", scale=1.0, layer_path=PATHS.get(family))
        self.atv = ATVModel(self.llm, config, tokenizer=byte_level_tokenizer(), generator=make_generator(config))
        self.atv = self.atv.float().eval()
        self.prompts = [torch.randint(5, 380, (length,)) for length in LENGTHS]
        with capture_outputs(self.atv.layers) as states:
            self.answers([0], use_cache=False)
        sizes = torch.stack([states[index].float().norm(dim=-1).mean() for index in range(len(states))])
        self.vectors = torch.randn(len(LENGTHS), len(states), self.atv.expansion.shape[1])
        self.vectors *= 0.3 * sizes[None, :, None] / self.vectors.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def reports_its_layers(self):
        """Whether the layers that were found return the states that the LLM itself reports, but for the last one."""
        found = []

        def keep(_, __, output):
            found.append(output if isinstance(output, torch.Tensor) else output[0])

        handles = [layer.register_forward_hook(keep) for layer in self.atv.layers[:-1]]
        told = self.llm(self.prompts[0][None], output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        return all(
            any(ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4) for theirs in told)
            for ours in found
        )

    @torch.no_grad()
    def answers(self, rows, **options):
        """Logits (rows, new, vocabulary) and tokens (rows, new) of greedy decoding."""
        ids, mask = pad([self.prompts[row].tolist() for row in rows], 0, "left")
        made = self.llm.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(made.logits, 1).float(), made.sequences[:, -NEW:]

    def by_hand(self, rows, at, **options):
        lengths = [len(self.prompts[row]) for row in rows]
        with by_hand(self.llm, self.atv.layers, self.vectors[rows], lengths, at):
            return self.answers(rows, **options)

    def steered(self, rows, at, **options):
        self.atv.positions = Positions.parse(at)
        with self.atv.steer(["query"] * len(rows), vectors=self.vectors[rows], scale=1.0):
            return self.answers(rows, **options)

    def alone(self, answer, **options):
        """Of each prompt alone, without a cache unless `options` say otherwise."""
        each = [answer([row], **options or {"use_cache": False}) for row in ROWS]
        return tuple(torch.cat(side) for side in zip(*each, strict=True))

    def reference(self):
        """Unsteered answers, and those steered by hand at each of the positions."""
        expected = {}
        for at in POSITIONS:
            try:
                expected[at] = self.alone(partial(self.by_hand, at=at))
            except AssertionError:  # no hook can be written: then it must be refused
                logits, tokens = self.alone(self.answers)
                expected[at] = (2 * logits, tokens)
        return self.alone(self.answers), expected


def distance(found, expected, unsteered):
    """The largest difference as a share of what steering changes; tokens that follow another choice do not count."""
    same = (found[1] == expected[1]).cumprod(1).bool()
    comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1)
    changed = (expected[0] - unsteered[0])[:, 0].abs().amax()
    away = (found[0] - expected[0]).abs().amax(-1)[comparable].amax()
    return (away / changed).nan_to_num(torch.inf, torch.inf).item()


def words(error):
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ATVError) else f"{type(error).__name__}: {text[:160]}"


def examine(family):
    """Each column of the table: {column: [(verdict, words)]}."""
    result = {"class": FAMILIES[family]}
    try:
        it = Examination(family)
    except ATVError as error:
        return result | {"layers": [("refused", words(error))]}
    except Exception as error:
        return result | {"layers": [("not built", words(error))]}
    try:
        found = ("found", "") if it.reports_its_layers() else ("others", "the LLM reports other states than these")
    except Exception as error:
        found = ("found", f"asked for its states, the LLM itself says: {words(error)}")
    result["layers"] = [found]
    failed = [check for check in check_wiring(it.atv) if not check.passed]
    plain, expected = it.reference()
    if distance(it.answers(ROWS, use_cache=False), plain, expected["last"]) > EQUAL:
        result["padding"] = [("itself", "padding changes the answers of the LLM itself; compared without padding")]
        it.prompts = [torch.randint(5, 380, (LENGTHS[0],)) for _ in ROWS]
        plain, expected = it.reference()
    for name, options in CACHES.items():
        try:
            unsteered = it.answers(ROWS, **options)
        except Exception as error:
            result[name] = [("itself", f"the LLM itself has no such cache: {words(error)}")]
            continue
        found = {}
        for at in POSITIONS:
            found.setdefault(verdict(it, at, options, unsteered, plain, expected[at]), []).append(at)
        result[name] = [
            (kind, why if len(at) == len(POSITIONS) or not why else f"{', '.join(at)}: {why}")
            for (kind, why), at in found.items()
        ]
    return result | {"doctor": [diagnosis(failed, result)]}


OWN = {"batch = single", "padded = unpadded", "cached = recomputed", "training step = full pass"}
"""Checks of doctor that an LLM fails by itself if padding or a cache changes its answers."""


def diagnosis(failed, result):
    """Of doctor's checks: (verdict, words); those that found the same are told together."""
    alike = {}
    for check in failed:
        alike.setdefault(re.sub(r"\d[\d.e+-]*", "N", check.found), []).append(check)
    told = "; ".join(f"{', '.join(check.name for check in checks)}: {checks[0].found}" for checks in alike.values())
    itself = any(kind == "itself" for name in ("padding", *CACHES) for kind, _ in result.get(name, []))
    if failed and itself and {check.name for check in failed} <= OWN:
        return "itself", told
    return ("refused", told) if failed else ("passes", "")


def verdict(it, at, options, unsteered, plain, expected):
    """Of one kind of positions with one kind of cache: (verdict, words)."""
    try:
        ours = it.steered(ROWS, at, **options)
    except ATVError as error:
        return "refused", words(error)
    except Exception as error:
        return "fails", words(error)
    away = distance(ours, expected, plain)
    if away < EQUAL:
        return "equal", ""
    if distance(unsteered, plain, expected) > EQUAL:  # nor is the LLM with this cache what it is without
        hooks = it.by_hand(ROWS, at, **options)
        if distance(ours, hooks, unsteered) < EQUAL:
            return "itself", "this cache changes the answers of the LLM itself; equal to hooks in the same call"
        if distance(it.alone(partial(it.steered, at=at), **options), expected, plain) < EQUAL:
            return "itself", "this cache mixes the rows of a batch in the LLM itself; equal with one prompt alone"
    return "different", f"by {away:.0e} of what steering changes"


def _worker(pipe, family):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of this process
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        pipe.send(examine(family))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        pipe.send({"class": FAMILIES[family], "layers": [("fails", f"{words(error)} ({where})")]})


def sweep(families, jobs, seconds):
    """Examine each family in a process of its own; yields (family, result)."""
    context = get_context("fork")  # transformers is imported once
    waiting, running = list(families), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(theirs, family))
            process.start()
            theirs.close()
            running[family] = (process, ours, time.monotonic())
        for family, (process, pipe, since) in list(running.items()):
            late = time.monotonic() - since > seconds
            if not (pipe.poll(0.05) or late or not process.is_alive()):
                continue
            try:
                result = pipe.recv() if pipe.poll() else None
            except EOFError:
                result = None
            process.kill()
            process.join()
            if result is None:
                why = f"no answer within {seconds} s" if late else f"exit code {process.exitcode}"
                result = {"class": FAMILIES[family], "layers": [("fails", why)]}
            del running[family]
            yield family, result


# ---- the page ----

COLUMNS = {
    "layers": "layers",
    "doctor": "doctor",
    "padding": "padding",
    "dynamic": "dynamic cache",
    "static": "static cache",
    "none": "no cache",
}
SHORT = {"itself": "LLM itself", "others": "refused"}
MEANING = {
    "equal": "equal to hand-written hooks, in every column",
    "itself": "equal, except where padding or a cache changes the unsteered LLM's own answers, or it has no such cache",
    "refused": "refused in at least one column, with an error that says why",
    "not built": "not built: not a language model on its own, or broken in transformers",
    "different": "**different from hand-written hooks, without an error**",
    "fails": "**an error that does not help the user**",
}
WORST = ("fails", "different", "refused", "itself", "not built")
HEAD = """\
# Architectures

<!-- Written by `make sweep`. -->

Every family that transformers {transformers} loads as a causal language model, as a tiny random LLM in float32
(torch {torch}, adaptive-task-vectors {atv}). `make sweep` builds and compares them all and writes this page,
in about {minutes:.0f} minutes on two CPU cores. `python tests/sweep_architectures.py llama mamba` prints the rows
of these two.

Each LLM is steered at the positions `last`, `last:4`, `answer` and `all` in greedy `generate` calls of {new}
new tokens, with a dynamic cache, a static one and none, on three prompts of {lengths} tokens padded on the
left; attention windows are 6 tokens wide. The logits of every step are compared with those of hand-written hooks,
with each prompt alone and the whole text read again at every step. The tolerance is {equal:.0%} of the change that
steering makes. The layers' outputs are compared with the hidden states that the LLM itself reports, and the
checks of `atv doctor` are run.

`LLM itself`: padding changes the answers of the unsteered LLM, and it is compared without padding; or a cache
changes them, and it is compared with hooks in the same call; or it has no such cache. Doctor cannot distinguish
this from a steering error and refuses to train such an LLM.

If an LLM has several parallel residual streams (AltUp in Gemma 3n, hyper-connections in DeepSeek V4, HY V4 and
Qwen 4), each vector is added to each of them.

| families | |
|---|---|
{counts}

| family | class | {titles} |
|---|---|{rule}
{rows}

## What was found

| family | column | |
|---|---|---|
{remarks}
"""


def status(result):
    """What the family counts as: the worst of its columns."""
    kinds = {kind for name in COLUMNS for kind, _ in result.get(name, [])}
    if {"others", "equal"} <= kinds:  # steered at something that is not the residual stream
        return "different"
    return next((kind for kind in WORST if kind in kinds), "equal")


def page(results, seconds):
    """The page of the documentation."""
    counts = Counter(map(status, results.values()))
    rows, remarks = [], []
    for family, result in sorted(results.items()):
        cells = []
        for name, title in COLUMNS.items():
            found = result.get(name, [("equal", "")] if name == "padding" and "none" in result else [])
            cells.append(", ".join(dict.fromkeys(SHORT.get(kind, kind) for kind, _ in found)) or "-")
            for why in (why for _, why in found if why):
                escaped = re.sub(r"([|<*_])", r"\\\1", why)
                remarks.append(f"| {family} | {title} | {escaped} |")
        rows.append(f"| {family} | {result['class']} | {' | '.join(cells)} |")
    return HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        atv=__version__,
        minutes=seconds / 60,
        new=NEW,
        lengths=", ".join(map(str, LENGTHS)),
        equal=EQUAL,
        counts="\n".join(f"| {counts[kind]} | {meaning} |" for kind, meaning in MEANING.items() if counts[kind]),
        titles=" | ".join(COLUMNS.values()),
        rule="---|" * len(COLUMNS),
        rows="\n".join(rows),
        remarks="\n".join(remarks),
    )


def main():
    """Sweep over all families and write the page, or over those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", help="all, unless named; then no page is written")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="families at a time")
    parser.add_argument("--seconds", type=int, default=120, help="for one family")
    options = parser.parse_args()
    families = options.families or list(FAMILIES)
    results, began = {}, time.monotonic()
    for family, result in sweep(families, options.jobs, options.seconds):
        results[family] = result
        found = {name: ", ".join(" ".join(each).strip() for each in result[name]) for name in COLUMNS if name in result}
        cells = " | ".join(f"{name}: {what}" for name, what in found.items())
        print(f"[{len(results)}/{len(families)}] {family}: {status(result)} | {cells}", flush=True)  # noqa: T201
    print(dict(Counter(map(status, results.values()))))  # noqa: T201
    if not options.families:
        PAGE.write_text(page(results, time.monotonic() - began), encoding="utf-8")


if __name__ == "__main__":
    main()
