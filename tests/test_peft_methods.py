"""LoRA and prefix-tuning: equal to PEFT's and to formulas, trained alone, and the LLM is left as it was."""

import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from conftest import CONFIGS, GROUPED, SIZES, byte_level_tokenizer, make_llm, toy_task
from peft import PeftModel, get_peft_model_state_dict
from refusals import refused
from rendering import prompt_text
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from atv.config import TrainConfig
from atv.data import Rendering
from atv.data.collate import left_padded
from atv.errors import ATVError
from atv.evaluation.predict import predict
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.files import sha256
from atv.lm.continuation import Continuation
from atv.lm.load import load_llm
from atv.lm.prefix import SharedPrefix, call_llm
from atv.lm.scoring import Options
from atv.methods import METHODS
from atv.methods.lora import LoRA, LoRAConfig, query_and_value
from atv.methods.peft_model import PEFTModel
from atv.methods.prefix_tuning import PrefixConfig, PrefixTuning
from atv.training import loop as training
from atv.training.batches import training_rows

BOTH = pytest.mark.parametrize("method", [LoRA, PrefixTuning])
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]


def make(method, name="llama", dtype=torch.float64, config=None, llm=None):
    """A model whose adapter is strong enough to matter, its dropout off."""
    llm = llm or make_llm(name, dtype)
    set_seed(4)
    model = PEFTModel(llm, byte_level_tokenizer(), method, config or method.config_class()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model


@torch.no_grad()
def read(adapted, prompts, keep=1):
    """Logits (batch, keep, vocabulary) of left-padded prompts."""
    return call_llm(adapted, keep=keep, use_cache=False, **left_padded(prompts, 0)).logits


def bloom():
    set_seed(1)
    sizes = {key: value for key, value in SIZES.items() if key not in ("intermediate_size", "max_position_embeddings")}
    return BloomForCausalLM(BloomConfig(**sizes)).double().eval()


def quick(**options):
    return TrainConfig.paper(
        **({"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "templates_per_row": 1} | options)
    )


def fit(method, out, llm=None, config=None, task=None, **options):
    llm = llm or make_llm(dtype=torch.float32)
    tasks = [task or toy_task()]
    return method.fit(llm, byte_level_tokenizer(), tasks, out, config or method.config_class(), quick(**options))


def answers(method, task, folder):
    run = RunWriter(folder, {})
    evaluate(method, [task], ["first_token"], run, variants="diagonal", batch_size=4)
    return [{**row, "seconds": 0} for row in run.rows]


# ---- what the LLM computes ----


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma3", "opt"])
def test_lora_adds_its_product_to_the_weights(name):
    model = make(LoRA, name, config=LoRAConfig(rank=3, alpha=5))
    by_hand = copy.deepcopy(model.llm)
    with torch.no_grad():
        for (parent, child, _), (_, down, up) in zip(model.adapted.places, model.learned, strict=True):
            place = next(name for name, module in model.llm.named_modules() if module is parent)
            added = 5 / 3 * up["default"].weight @ down["default"].weight  # (out, in)
            weight = by_hand.get_submodule(place).get_submodule(child).weight
            weight += added.T if name == "gpt2" else added  # GPT-2 keeps its weights as (in, out)
        expected = call_llm(by_hand, keep=1, use_cache=False, **left_padded(PROMPTS, 0)).logits
    torch.testing.assert_close(read(model.adapted, PROMPTS), expected)
    assert not torch.allclose(read(model.adapted, PROMPTS), read(model.llm, PROMPTS))


def test_lora_counts_as_the_formula_and_as_peft_do():
    model = make(LoRA, dtype=torch.float32)
    llm = model.llm.config
    hidden, key_value = llm.hidden_size, llm.hidden_size // llm.num_attention_heads * llm.num_key_value_heads
    expected = llm.num_hidden_layers * 8 * ((hidden + hidden) + (hidden + key_value))
    assert sum(p.numel() for p in model.parameters()) == expected
    with model.adapted.inserted():
        assert model.adapted.peft.get_nb_trainable_parameters()[0] == expected
    assert {name for _, name, _ in model.adapted.places} == {"q_proj", "v_proj"}
    assert len(model.adapted.places) == 2 * llm.num_hidden_layers


def test_lora_has_the_papers_settings():
    adapter = make(LoRA).adapted.peft.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (8, 32, 0.05)
    assert LoRA.train_defaults == {"learning_rate": 4e-4}
    assert LoRA.search["learning_rate"][0] == 4e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "gemma3"])
def test_a_prefix_is_what_peft_makes_of_it_for_one_prompt(name):
    model = make(PrefixTuning, name)
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        expected = model.adapted.peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(read(model.adapted, PROMPTS[1:2], keep=8), expected)


@pytest.mark.parametrize(("method", "name"), [*product([LoRA, PrefixTuning], CONFIGS), (PrefixTuning, "bloom")])
def test_a_row_reads_the_same_alone_and_in_a_padded_batch(method, name):
    """Mistral's and Gemma's window is shorter than the prompts, and BLOOM takes no positions."""
    model = make(method, name, llm=bloom() if name == "bloom" else None)
    together = read(model.adapted, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row : row + 1], read(model.adapted, [prompt]))


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize(
    ("name", "window"), [("mistral", 6), ("mistral", 14), ("gemma3", 6), ("gemma3", 14), ("bloom", 0)]
)
def test_what_follows_a_padded_batch_of_prompts_is_what_follows_each_alone(name, window, tokens, monkeypatch):
    """With a window that prompts and virtual tokens exceed, or only the answers; beside calls without a cache."""
    if window:
        monkeypatch.setattr(CONFIGS[name], "sliding_window", window)
    llm = bloom() if name == "bloom" else make_llm(name)
    model = make(PrefixTuning, llm=llm, config=PrefixConfig(virtual_tokens=tokens))
    options = Options(("a", "b"), ((20, 21, 22), (30, 31, 32)))

    def after(ids):
        return read(model.adapted, [ids])[0, -1].log_softmax(-1)

    inputs = left_padded(PROMPTS, 0)
    with torch.no_grad():
        output = call_llm(model.adapted, keep=1, use_cache=True, **inputs)
        behind = Continuation(model.adapted, inputs, output)
        scores, answers = behind.log_likelihoods(options), behind.greedy(8, lambda _: False)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for token in answers[row]:
            assert int(after(ids).argmax()) == token
            ids.append(token)
        for place, option in enumerate(options.ids):
            expected = sum(float(after([*prompt, *option[:step]])[token]) for step, token in enumerate(option))
            assert scores[row, place].item() == pytest.approx(expected, abs=1e-4)


@BOTH
def test_what_prompts_share_is_read_once_and_changes_nothing(method):
    model = make(method)
    prompts = [[*range(20, 32), *prompt] for prompt in PROMPTS]
    shared = SharedPrefix(model.adapted, prompts, method.edited_tokens)
    assert shared.length == 12
    inputs, past = shared.inputs(prompts, 0)
    own = {name: inputs[name][:, 12:] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        output = call_llm(
            model.adapted, keep=1, attention_mask=inputs["attention_mask"], past_key_values=past, use_cache=True, **own
        )
    torch.testing.assert_close(output.logits, read(model.adapted, prompts))


def test_a_prompt_that_fits_only_without_the_prefix_is_refused():
    model = make(PrefixTuning, config=PrefixConfig(virtual_tokens=250))
    with pytest.raises(ATVError, match="virtual tokens before it are 258 tokens and the LLM's context is 256"):
        read(model.adapted, PROMPTS)


def test_the_prefix_and_a_query_that_is_cut_have_room_together(tmp_path, capsys):
    splits = {split: list(getattr(toy_task(), split)) for split in ("train", "valid", "test")}
    for rows in splits.values():
        rows[3] = rows[3]._replace(input=rows[3].input + " the boats came in" * 90)
    task, llm = replace(toy_task(), **{split: tuple(rows) for split, rows in splits.items()}), make_llm()
    columns = []
    llm.register_forward_pre_hook(
        lambda _, __, inputs: columns.append(inputs["attention_mask"].shape[1]), with_kwargs=True
    )
    adapter = fit(PrefixTuning, tmp_path / "out", llm, PrefixConfig(virtual_tokens=30), task, epochs=1)
    assert 250 < max(columns) <= 256
    columns.clear()
    method = PrefixTuning.load(llm, byte_level_tokenizer(), adapter)
    evaluate(method, [task], ["option_likelihood", "json"], variants="first")
    assert 256 - 24 < max(columns) <= 256
    said = " ".join(capsys.readouterr().err.split())
    for split in ("train", "valid"):
        assert f"{split}: the queries of 1 of 8 rows are cut" in said
    assert "toy: the queries of 1 of 8 test rows are cut" in said
    columns.clear()
    (answer,) = predict(method, [task.test[3].input])
    assert answer["answer"] in task.options
    assert 240 < max(columns) <= 256


# ---- what is trained ----


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@BOTH
def test_the_llm_is_left_as_it_was(method, name, tmp_path):
    llm = make_llm(name, torch.float32)
    names, attributes, before = list(llm.state_dict()), set(vars(llm)), read(llm, PROMPTS)
    modules = {place: id(module) for place, module in llm.named_modules()}
    adapter = fit(method, tmp_path / "out", llm, learning_rate=0.1)
    loaded = method.load(llm, byte_level_tokenizer(), adapter)
    changed = read(loaded.llm, PROMPTS)
    assert torch.equal(read(llm, PROMPTS), before)
    assert not torch.allclose(changed, before)
    assert {place: id(module) for place, module in llm.named_modules()} == modules
    assert (list(llm.state_dict()), set(vars(llm))) == (names, attributes)
    assert not any(p.requires_grad or p.grad is not None for p in llm.parameters())


def test_the_llm_is_left_as_it_was_by_a_call_that_fails():
    model = make(LoRA)
    modules = dict(model.llm.named_modules())
    with pytest.raises(IndexError):
        read(model.adapted, [[10**6]])
    assert dict(model.llm.named_modules()) == modules


@BOTH
def test_a_half_precision_llm_has_a_float32_adapter_that_learns(method):
    model = make(method, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    batch = model.collator()([model.encode_row(row) for row in training_rows(toy_task())[:4]])
    output = model(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@BOTH
def test_a_quantised_llm_is_learned_through_and_left_as_it_was(method, bits, tmp_path):
    wide = LlamaConfig(**GROUPED | {"hidden_size": 64, "intermediate_size": 128})  # bitsandbytes' blocks are of 64
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path), device="cpu", quantization=bits)
    modules = {place: id(module) for place, module in llm.named_modules()}
    model = make(method, llm=llm)  # before the first call without gradient: see hooks.keep_differentiable
    before = read(llm, PROMPTS)
    model(**model.collator()([model.encode_row(training_rows(toy_task())[0])])).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.any() for p in model.parameters())
    assert not torch.equal(read(model.adapted, PROMPTS), before)
    assert torch.equal(read(llm, PROMPTS), before)
    assert {place: id(module) for place, module in llm.named_modules()} == modules


def test_training_mode_turns_on_loras_dropout_and_never_the_llms():
    model = make(LoRA, "gpt2", config=LoRAConfig(dropout=0.5))
    model.train()
    assert not any(module.training for module in model.llm.modules())
    first, second = read(model.adapted, PROMPTS), read(model.adapted, PROMPTS)
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(read(model.adapted, PROMPTS), read(model.adapted, PROMPTS))


@BOTH
def test_the_loss_is_that_of_the_answers_tokens(method):
    model = make(method)
    row = model.encode_row(training_rows(toy_task())[0])
    losses = []
    for prompt, answer in row.pairs:
        logits = read(model.adapted, [[*prompt, *answer[:-1]]], keep=len(answer))[0]
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(answer)))
    with torch.no_grad():
        output = model(**model.collator()([row]))
    torch.testing.assert_close(output.losses, torch.stack(losses))


@pytest.mark.parametrize(("method", "rate"), [(LoRA, 0.02), (PrefixTuning, 0.5)])
def test_it_learns_a_toy_task(method, rate, tmp_path):
    fit(method, tmp_path / "out", task=toy_task(rows=48), epochs=12, learning_rate=rate)
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert record["finished"]
    assert min(losses) < 0.5 * losses[0]


@BOTH
def test_an_interrupted_training_goes_on_to_the_same_weights(method, tmp_path, monkeypatch):
    whole = fit(method, tmp_path / "whole")

    class Interrupted(training.Progress):
        def on_save(self, args, state, control, **about):
            super().on_save(args, state, control, **about)
            if round(state.epoch) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(method, tmp_path / "parts")
    parts = fit(method, tmp_path / "parts")
    for name, tensor in load_file(whole / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(parts / "adapter_model.safetensors")[name])
    written = (parts / "adapter_model.safetensors").stat().st_mtime_ns
    assert fit(method, tmp_path / "parts") == parts
    assert (parts / "adapter_model.safetensors").stat().st_mtime_ns == written


# ---- what is saved ----


@BOTH
def test_a_saved_adapter_answers_the_same_and_peft_reads_it(method, tmp_path):
    model = make(method, dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    assert not {path.suffix for path in (tmp_path / "adapter").iterdir()} - {".json", ".safetensors", ".md"}
    expected = read(model.adapted, PROMPTS[:1])
    loaded = method.load(make_llm(dtype=torch.float32), byte_level_tokenizer(), tmp_path / "adapter")
    assert torch.equal(read(loaded.llm, PROMPTS[:1]), expected)
    assert loaded.describe()["config"] == method.config_class().to_dict()
    by_peft = PeftModel.from_pretrained(make_llm(dtype=torch.float32), tmp_path / "adapter").eval()
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(by_peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:], expected)


@BOTH
def test_evaluation_asks_through_the_adapter(method, tmp_path):
    task = replace(toy_task(rows=30), renderer=Rendering("template", ends=False))  # first tokens alone are judged
    adapter = fit(method, tmp_path / "out", task=task, epochs=10, learning_rate=0.05 if method is LoRA else 0.5)
    loaded = METHODS[method.name].load(make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)
    rows = answers(loaded, task, tmp_path / "run")
    alone = METHODS["zero-shot"].load(make_llm(dtype=torch.float32), loaded.tokenizer, None)
    assert not any(row["scores"]["first_token"] for row in answers(alone, task, tmp_path / "alone"))
    assert sum(row["scores"]["first_token"] for row in rows) > 0.2 * len(rows)
    for row in rows:
        text = prompt_text(task, task.test[row["example"]].input, row["template"], row["answer_prefix"])
        likeliest = read(loaded.llm, [loaded.tokenizer(text)["input_ids"]])[0, -1].argmax()
        assert row["outputs"]["first_token"] == loaded.tokenizer.decode([likeliest])
    (asked,) = loaded.describe()["training"]["tasks"].items()
    assert asked == ("toy", task.asking() | {key: asked[1][key] for key in ("answer_tokens", "temperature")})


@BOTH
def test_an_adapter_of_another_llm_or_method_and_a_damaged_one_are_refused(method, tmp_path):
    tokenizer, folder = byte_level_tokenizer(), tmp_path / "adapter"
    make(method, dtype=torch.float32).save_pretrained(folder)
    other = PrefixTuning if method is LoRA else LoRA
    with pytest.raises(ATVError, match=f"adapter of the method {method.name}; expected one of the method {other.name}"):
        other.load(make_llm(dtype=torch.float32), tokenizer, folder)
    with pytest.raises(ATVError, match=r"they differ in model_type llama against gpt2"):
        method.load(make_llm("gpt2", torch.float32), tokenizer, folder)
    with pytest.raises(ATVError, match=f"method {method.name} needs an adapter"):
        method.load(make_llm(dtype=torch.float32), tokenizer, None)
    weights, about = folder / "adapter_model.safetensors", folder / "atv_config.json"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    with pytest.raises(ATVError, match="altered or truncated"):
        method.load(make_llm(dtype=torch.float32), tokenizer, folder)
    written = json.loads(about.read_text())
    about.write_text(json.dumps(written | {"sha256": {weights.name: sha256(weights)}}))
    with pytest.raises(ATVError, match="does not fit: other names or shapes"):
        method.load(make_llm(dtype=torch.float32), tokenizer, folder)


def test_a_loaded_adapter_has_the_weights_of_the_file(tmp_path):
    model = make(LoRA, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = LoRA.load(make_llm(dtype=torch.float32), byte_level_tokenizer(), tmp_path).model
    for mine, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with loaded.adapted.inserted():
        stored = get_peft_model_state_dict(loaded.adapted.peft, save_embedding_layers=False)
    assert sorted(stored) == sorted(load_file(tmp_path / "adapter_model.safetensors"))


# ---- what is refused ----


@BOTH
def test_an_llm_with_an_adapter_in_it_is_refused(method):
    with pytest.raises(ATVError, match="has a PEFT adapter already"):
        PEFTModel(make_llm("peft"), byte_level_tokenizer(), method, method.config_class())


def test_targets_are_named_where_peft_knows_none():
    llm = make_llm()
    llm.config.model_type = "unheard-of"
    with pytest.raises(ATVError, match=r"architecture unheard-of; name them with targets\. .*q_proj.*v_proj"):
        make(LoRA, llm=llm)
    assert len(make(LoRA, llm=llm, config=LoRAConfig(targets=["o_proj"])).adapted.places) == 3
    with pytest.raises(ATVError, match="PEFT refuses these targets: .*nothing_like_it"):
        make(LoRA, llm=llm, config=LoRAConfig(targets=["nothing_like_it"]))
    assert list(vars(llm)).count("peft_config") == 0


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "embed_tokens"]])
def test_an_embedding_is_no_target(tmp_path, targets):
    """PEFT's matrices of it have other names and would stay as they are."""
    llm = make_llm(dtype=torch.float32)
    with refused("targets includes embed_tokens", "the type Embedding", "Leave it out"):
        fit(LoRA, tmp_path / "out", llm, LoRAConfig(targets=targets))
    assert not (tmp_path / "out").exists()
    assert not any("lora" in name for name, _ in llm.named_modules())
    fit(LoRA, tmp_path / "out", llm, LoRAConfig(targets=["q_proj", "lm_head"]), epochs=1)
    learned = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert sum("lora_B" in name and bool(value.any()) for name, value in learned.items()) == 4


@pytest.mark.parametrize(
    ("kind", "names"),
    [*((kind, ["q_proj", "v_proj"]) for kind in ("llama", "phi", "nemotron_h")), ("gpt2", ["c_attn"])],
)
def test_only_query_and_value_are_taken_of_what_peft_names(kind, names):
    llm = make_llm()
    llm.config.model_type = kind
    assert query_and_value(llm) == names


def test_the_key_is_never_taken_for_the_query():
    llm = make_llm()
    llm.config.model_type = "rwkv"  # PEFT: key, value, receptance, output
    with pytest.raises(ATVError, match="name them with targets"):
        query_and_value(llm)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LoRAConfig, {"rank": 0}, "rank is 0"),
        (LoRAConfig, {"alpha": 0}, "alpha is 0"),
        (LoRAConfig, {"dropout": 1}, "dropout is 1"),
        (LoRAConfig, {"targets": []}, r"targets is \[\]"),
        (LoRAConfig, {"targets": "q_proj"}, "targets is 'q_proj'"),
        (PrefixConfig, {"virtual_tokens": 0}, "virtual_tokens is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(config, options, message):
    with pytest.raises(ATVError, match=message):
        config(**options)


@BOTH
def test_a_model_card_names_no_local_path(method, tmp_path):
    llm = make_llm(dtype=torch.float32)
    for name, shown in (("/home/me/models/llama", False), ("me/llama", True)):
        llm.name_or_path = llm.config._name_or_path = name
        make(method, llm=llm).save_pretrained(tmp_path / "adapter")
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert "/home/me" not in card
        assert ("base_model: me/llama" in card) == shown
