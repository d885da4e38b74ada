"""Full fine-tuning: a copy of the LLM learns, by the steps of a plain loop; the LLM is left bit for bit as it was."""

import copy
import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from refusals import refused
from safetensors.torch import load_file, save_file

from atv.config import TrainConfig
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.files import sha256
from atv.methods import METHODS
from atv.methods.full import Full, FullConfig, FullModel
from atv.training import loop as training
from atv.training.batches import training_rows

NAMES = pytest.mark.parametrize("name", ["llama", "gpt2"])  # the second ties its head to its embeddings


def quick(**options):
    quicker = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "templates_per_row": 1}
    return TrainConfig.paper(**(quicker | options))


def fit(out, llm=None, task=None, **options):
    llm = llm or make_llm(dtype=torch.float32)
    return Full.fit(llm, byte_level_tokenizer(), [task or toy_task()], out, FullConfig(), quick(**options))


@torch.no_grad()
def read(llm):
    return llm(input_ids=torch.tensor([[5, 9, 30, 77, 12]])).logits


def plain_loss(llm, rows):
    """Mean over a row's answer tokens, then over rows: one unpadded call of the LLM for each row."""
    losses = []
    for prompt, answer in (pair for row in rows for pair in row.pairs[:1]):
        logits = llm(input_ids=torch.tensor([prompt + answer])).logits[0]
        predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-predicted[range(len(answer)), answer].mean())
    return torch.stack(losses).mean()


def first_template(model, task):
    """The training rows, each with the template whose turn it is in the first epoch."""
    rows = [model.encode_row(row) for row in training_rows(task)]
    for index, row in enumerate(rows):
        row.pairs[:] = [row.pairs[index % len(row.pairs)]]
    return rows


def bits(llm):
    return {name: p.clone() for name, p in llm.state_dict().items()}


@NAMES
def test_before_training_its_loss_is_the_llms_own(name):
    llm = make_llm(name)
    model = FullModel(llm, byte_level_tokenizer()).eval()
    rows = first_template(model, toy_task())
    loss = model(**model.collator()(rows)).loss
    assert loss.item() == pytest.approx(plain_loss(llm, rows).item(), abs=1e-9)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in llm.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_first_step_is_that_of_a_plain_loop(tmp_path):
    """All training rows are one batch, so that their order decides rounding alone."""
    llm, task = make_llm(dtype=torch.float32), toy_task(rows=12)
    by_hand = copy.deepcopy(llm).requires_grad_(True)
    rows = first_template(FullModel(llm, byte_level_tokenizer()), task)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3, weight_decay=0.1)
    plain_loss(by_hand, rows).backward()
    optimizer.step()
    adapter = fit(tmp_path, llm, task, epochs=1, weight_decay=0.1)
    tuned = Full.load(llm, byte_level_tokenizer(), adapter).llm
    for (name, ours), theirs in zip(tuned.named_parameters(), by_hand.parameters(), strict=True):
        assert not torch.equal(ours, llm.get_parameter(name))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@NAMES
def test_the_llm_is_left_bit_for_bit_as_it_was(name, tmp_path):
    llm = make_llm(name, torch.float32)
    before, answer, modules = bits(llm), read(llm), {place: id(module) for place, module in llm.named_modules()}
    method = Full.load(llm, byte_level_tokenizer(), fit(tmp_path, llm, learning_rate=0.01))
    assert not torch.allclose(read(method.llm), answer)
    assert all(torch.equal(value, before[key]) for key, value in llm.state_dict().items())
    assert torch.equal(read(llm), answer)
    assert {place: id(module) for place, module in llm.named_modules()} == modules
    assert not any(p.requires_grad or p.grad is not None for p in llm.parameters())
    assert not set(map(id, method.llm.parameters())) & set(map(id, llm.parameters()))


def test_a_bfloat16_llm_is_trained_in_float32_and_saved_in_bfloat16(tmp_path):
    """A step of 1e-4 is below bfloat16's rounding of most of these weights; eight of them are not lost in float32."""
    llm = make_llm(dtype=torch.bfloat16)
    model = FullModel(llm, byte_level_tokenizer())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    moved, save = [], model.save_pretrained

    def look(path):
        moved.append((model.tuned.model.layers[0].mlp.up_proj.weight - llm.model.layers[0].mlp.up_proj.weight).abs())
        save(path)

    model.save_pretrained = look
    result = training.train(model, [toy_task()], tmp_path, quick(epochs=4, learning_rate=1e-4))
    assert moved[0].median() > 2e-4
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())  # what is saved is what it has
    method = Full.load(llm, byte_level_tokenizer(), result.adapter)
    assert {p.dtype for p in method.llm.parameters()} == {torch.bfloat16}
    assert torch.equal(read(method.llm), read(model.tuned.bfloat16().eval()))
    assert {t.dtype for t in load_file(result.adapter / "model.safetensors").values()} == {torch.bfloat16}


def test_only_the_copys_dropout_is_on_in_training():
    model = FullModel(make_llm("gpt2"), byte_level_tokenizer()).train()
    batch = model.collator()(first_template(model, toy_task())[:2])
    assert model.tuned.training
    assert not model.llm.training
    assert model(**batch).loss != model(**batch).loss
    assert not model.eval().tuned.training
    assert model(**batch).loss == model(**batch).loss


@NAMES
def test_a_saved_one_answers_the_same_and_tied_weights_are_kept_once(name, tmp_path):
    model = FullModel(make_llm(name, torch.float32), byte_level_tokenizer()).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.llm.parameters())
    llm = make_llm(name, torch.float32)
    loaded = Full.load(llm, byte_level_tokenizer(), tmp_path)
    assert torch.equal(read(loaded.llm), read(model.tuned))
    assert not torch.allclose(read(llm), read(loaded.llm))


def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole")

    class Interrupted(training.Progress):
        def on_save(self, args, state, control, **about):
            super().on_save(args, state, control, **about)
            if round(state.epoch) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "parts")
    parts = load_file(fit(tmp_path / "parts") / "model.safetensors")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, parts[name])


def test_it_learns_and_evaluation_asks_the_copy(tmp_path):
    task = toy_task(rows=48)
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    adapter = fit(tmp_path / "out", llm, task, epochs=4, templates_per_row=3, learning_rate=5e-3)
    method = METHODS["full"].load(llm, tokenizer, adapter)
    shares = []
    for number, which in enumerate((method, METHODS["zero-shot"].load(llm, tokenizer, None))):
        run = RunWriter(tmp_path / f"run-{number}", {})
        evaluate(which, [task], ["first_token"], run, variants="first", batch_size=4)
        shares.append(sum(row["scores"]["first_token"] for row in run.rows) / len(run.rows))
    assert shares[0] > 0.9
    assert shares[1] < 0.1
    assert method.describe()["training"]["train"]["learning_rate"] == 5e-3


# ---- what is refused ----


def test_an_adapter_of_another_llm_or_method_and_a_damaged_one_are_refused(tmp_path):
    llm, tokenizer, folder = make_llm(dtype=torch.float32), byte_level_tokenizer(), tmp_path / "adapter"
    FullModel(llm, tokenizer).save_pretrained(folder)
    with refused("adapter of the method full", "expected one of the method lora"):
        METHODS["lora"].load(llm, tokenizer, folder)
    with refused("they differ in model_type llama against gpt2"):
        Full.load(make_llm("gpt2", torch.float32), tokenizer, folder)
    with refused("The method full needs an adapter"):
        Full.load(llm, tokenizer, None)
    weights, about = folder / "model.safetensors", folder / "atv_config.json"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    with refused("altered or truncated"):
        Full.load(llm, tokenizer, folder)
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": {weights.name: sha256(weights)}}))
    with refused("does not fit: other names or shapes"):
        Full.load(llm, tokenizer, folder)


def quantised(llm):
    llm.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return llm


def spread(llm):
    llm.model.layers[2].to("meta")
    return llm


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("llama", quantised, ["The LLM is in 4bit", "leave --quantization out"]),
        ("llama", spread, ["spread over cpu, meta", "on one device"]),
        ("peft", lambda llm: llm, ["has a PEFT adapter", "give the plain LLM"]),
    ],
)
def test_an_llm_whose_weights_cannot_be_trained_is_refused(name, change, parts):
    llm = change(make_llm(name, torch.float32))
    with refused(*parts):
        FullModel(llm, byte_level_tokenizer())
