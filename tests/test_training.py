"""Training: it learns, it resumes bit for bit after a kill, it stops before NaN, it keeps the best epoch."""

import itertools
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_generator, make_llm, toy_task
from forks import ended, forked
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file, save_file
from training_runs import break_loss_after, quick, tiny, weights
from transformers import AutoConfig, AutoModel, set_seed

from atv import artifact
from atv.config import ATVConfig, TrainConfig
from atv.data import Example
from atv.data.collate import EncodedRow
from atv.data.task import SPLITS
from atv.errors import ATVError
from atv.files import sha256
from atv.generator import Generator
from atv.lm.prefix_store import PrefixStore
from atv.methods.encoder import EncoderConfig, EncoderModel
from atv.methods.fixed import FixedModel
from atv.methods.full import FullModel
from atv.methods.i2cl import I2CLConfig, I2CLModel
from atv.methods.lora import LoRA
from atv.methods.peft_model import PEFTModel
from atv.methods.prefix_tuning import PrefixTuning
from atv.model import ATVModel
from atv.training import loop as training
from atv.training import record as records
from atv.training import trainer
from atv.training.batches import PADDING, Batches, Rows, training_rows
from atv.training.loop import train
from atv.training.trainer import latest_of_the_best


def test_it_learns_a_toy_task(tmp_path):
    atv, task = tiny(), toy_task(rows=48)
    frozen = {name: p.clone() for name, p in atv.llm.named_parameters()}
    result = train(atv, [task], tmp_path / "out", quick(epochs=30, templates_per_row=3, learning_rate=0.01))
    history = [entry["eval_accuracy"] for entry in result.record["history"] if "eval_accuracy" in entry]
    assert max(history) == 1.0
    assert result.record["finished"]
    assert all(torch.equal(p, frozen[name]) for name, p in atv.llm.named_parameters())
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert result.adapter == tmp_path / "out" / "adapter"


def test_the_first_step_is_adam_with_coupled_decay_written_by_hand(tmp_path, monkeypatch):
    """One step on one batch: m = g, v = g^2 after bias correction, so w - lr * g / (|g| + eps), g with decay in it."""
    # Gradients near zero decide by their sign, which rounding changes: prompts are read as in the batch by hand.
    monkeypatch.setattr("atv.lm.prefix_tree.LEAST", 10**6)
    task, config = toy_task(rows=12), quick(epochs=1, batch_size=4, weight_decay=0.1, generator_learning_rate=1e-3)
    atv = tiny()
    for module in atv.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    before = {name: p.clone() for name, p in atv.named_parameters()}
    rows = Rows([atv.encode_row(row) for row in training_rows(task)], 1)
    batch = atv.collator()([rows[index] for index in Batches(rows, 4, config.seed)])
    gradients = dict(zip(before, torch.autograd.grad(atv(**batch).loss, list(atv.parameters())), strict=True))
    train(atv, [task], tmp_path / "out", config)
    for name, after in atv.named_parameters():
        rate = config.learning_rate if name.startswith("atv.expansion") else 1e-3
        g = gradients[name] + 0.1 * before[name]
        expected = before[name] - rate * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after, expected, atol=2e-5, rtol=0)


def test_bf16_rounds_the_generator_alone_and_only_while_it_is_trained(tmp_path):
    atv, task = tiny(), toy_task()
    batch = atv.collator()([atv.encode_row(row) for row in training_rows(task)])
    query = batch["query_input_ids"], batch["query_attention_mask"]
    exact = atv.eval().generator(*query)
    seen = []
    atv.generator.register_forward_hook(lambda _, inputs, output: seen.append((atv.generator.bf16, output.dtype)))
    train(atv, [task], tmp_path / "out", quick(epochs=1, bf16=True, learning_rate=0.0))
    assert (True, torch.float32) in seen
    assert torch.equal(atv.eval().generator(*query), exact)
    atv.generator.bf16 = True
    difference = (atv.generator(*query) - exact).norm() / exact.norm()
    assert 1e-5 < difference < 0.02


def test_a_second_call_trains_nothing_and_force_trains_anew(tmp_path):
    task = toy_task()
    train(tiny(), [task], tmp_path / "out", quick())
    before = os.stat(tmp_path / "out" / "adapter" / "expansion.safetensors").st_mtime_ns
    train(tiny(), [task], tmp_path / "out", quick())
    assert os.stat(tmp_path / "out" / "adapter" / "expansion.safetensors").st_mtime_ns == before
    train(tiny(), [task], tmp_path / "out", quick(), force=True)
    assert os.stat(tmp_path / "out" / "adapter" / "expansion.safetensors").st_mtime_ns != before


def test_a_forced_training_that_does_not_end_leaves_no_adapter_of_the_former_one(tmp_path):
    out = tmp_path / "out"
    train(tiny(), [toy_task("first")], out, quick(epochs=1))
    (out / "adapter" / "mine.txt").write_text("x")
    broken = tiny()
    break_loss_after(broken, 1)
    with refused("no adapter to keep"):
        train(broken, [toy_task("second")], out, quick(), force=True)
    assert list(json.loads((out / "train.json").read_text())["settings"]["tasks"]) == ["second"]
    with refused("No adapter at"):
        artifact.locate(out)
    train(tiny(), [toy_task("second")], out, quick())
    assert list(artifact.read(out / "adapter").training["tasks"]) == ["second"]
    assert (out / "adapter" / "mine.txt").read_text() == "x"
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "train.json"]


def test_a_kill_before_the_record_of_a_forced_training_leaves_the_former_training(tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = train(tiny(), [toy_task("first")], out, quick(epochs=1))
    before = weights(out)
    monkeypatch.setattr(records, "write_json", stop)
    with pytest.raises(Stopped):
        train(tiny(), [toy_task("second")], out, quick(), force=True)
    monkeypatch.undo()
    again = train(tiny(), [toy_task("first")], out, quick(epochs=1))
    assert again.record == first.record
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    train(tiny(), [toy_task()], tmp_path / "out", quick())
    with pytest.raises(
        ATVError, match=r"was made with other settings \(train.epochs: 3 there, 4 now\)\. Use another --out, or --force"
    ):
        train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=4))


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ATVError, match="exists and is not a training"):
        train(tiny(), [toy_task()], tmp_path, quick())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def run_forked(out, start, kill_after_checkpoint=False):
    def work():
        set_seed(42)
        train(tiny(), [toy_task(rows=36)], out, quick(epochs=5, generator_start=start))

    child = forked(work)
    if kill_after_checkpoint:
        # The complete checkpoint of the second epoch is there; the third is under way.
        while not list(out.glob("checkpoints/checkpoint-6/complete")) and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return ended(child)


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_killed_and_resumed_the_weights_are_bit_equal(tmp_path, start):
    """Killed in the third of five epochs, after the generator has begun to learn or before."""
    assert run_forked(tmp_path / "whole", start) == 0
    assert run_forked(tmp_path / "killed", start, kill_after_checkpoint=True) == -signal.SIGKILL
    record = json.loads((tmp_path / "killed" / "train.json").read_text())
    assert not record["finished"]
    half = tmp_path / "killed" / "checkpoints" / "checkpoint-999"
    half.mkdir()  # as a kill in the middle of writing leaves it
    assert run_forked(tmp_path / "killed", start) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    histories = [json.loads((tmp_path / n / "train.json").read_text())["history"] for n in ("whole", "killed")]
    losses = [[entry["eval_loss"] for entry in h if "eval_loss" in entry] for h in histories]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5
    seconds = [entry["seconds"] for entry in histories[1]]
    assert seconds == sorted(seconds)  # the time before the kill counts


def test_the_seconds_are_those_of_a_training_on_its_own(tmp_path, monkeypatch):
    """Prompts that another training has read into the same store count with what they took then."""
    store, task = PrefixStore(), toy_task()
    first = train(tiny(), [task], tmp_path / "first", quick(epochs=1), store=store).record
    monkeypatch.setattr(PrefixStore, "seconds_of", lambda self, prefixes: 1e6)
    again = train(tiny(), [task], tmp_path / "again", quick(epochs=1), store=store).record
    assert 0 < first["history"][-1]["seconds"] <= first["seconds"] < 1000
    assert 1e6 < again["history"][0]["seconds"] <= again["seconds"] < 1e6 + 1000


def test_a_nan_loss_stops_and_keeps_the_last_good_state(tmp_path):
    atv, task = tiny(), toy_task()  # two steps an epoch
    break_loss_after(atv, 3)
    with pytest.raises(ATVError, match="NaN or infinite after step 3 .*holds the best epoch before that"):
        train(atv, [task], tmp_path / "out", quick())
    reference = tiny()
    train(reference, [task], tmp_path / "one", quick(epochs=1))
    kept, expected = weights(tmp_path / "out"), weights(tmp_path / "one")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())


def test_a_nan_loss_in_the_first_epoch_leaves_no_adapter(tmp_path):
    atv = tiny()
    break_loss_after(atv, 1)
    with pytest.raises(ATVError, match="no adapter to keep.*lower --lr or --scale"):
        train(atv, [toy_task()], tmp_path / "out", quick())
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("kept", ["accuracy", "loss"])
@pytest.mark.parametrize("validations", [0, 2])
def test_a_validation_loss_that_is_no_number_stops_and_keeps_the_epochs_before(
    tmp_path, monkeypatch, kept, validations
):
    """As when a row overflows in float16."""
    left, measure = itertools.count(validations, -1), trainer.validation_metrics
    monkeypatch.setattr(
        trainer, "validation_metrics", lambda rows: measure(rows) | ({"loss": math.nan} if next(left) <= 0 else {})
    )
    with refused("The validation loss became NaN", f"after step {2 * validations + 2}") as found:
        train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=4, best_epoch=kept))
    assert ("no adapter to keep" in str(found.value)) == (validations == 0)
    assert (tmp_path / "out" / "adapter").exists() == (validations > 0)
    assert not json.loads((tmp_path / "out" / "train.json").read_text())["finished"]
    if validations:
        assert artifact.read(tmp_path / "out" / "adapter").training["best_step"] in (2, 4)


def test_the_best_epoch_is_kept_not_the_last(tmp_path):
    """At a rate that wrecks the model sooner or later, what is saved has the lowest validation loss of all epochs."""
    atv, task = tiny(), toy_task(rows=27)  # nine validation rows in batches of four
    result = train(atv, [task], tmp_path / "out", quick(epochs=6, learning_rate=0.05, templates_per_row=2))
    losses = [entry["eval_loss"] for entry in result.record["history"] if "eval_loss" in entry]
    assert result.record["best_eval_loss"] == min(losses)
    valid = Rows([atv.encode_row(row) for row in training_rows(task, "valid")], 2)
    with torch.no_grad():
        found = [atv(**atv.collator()([valid[i]])).loss.item() for i in range(len(valid))]
    assert sum(found) / len(found) == pytest.approx(min(losses), rel=1e-4)


def test_checkpoints_hold_safetensors_and_no_llm(tmp_path, monkeypatch):
    monkeypatch.setattr(records.shutil, "rmtree", lambda *a, **k: None)
    train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=1))
    folder = tmp_path / "out" / "checkpoints" / "checkpoint-2"
    assert not (folder / "training_args.bin").exists()
    assert {name.split(".")[1] for name in load_file(folder / "model.safetensors")} == {"generator", "expansion"}


def row(length):
    return EncodedRow([1], [([1] * length, [2]), ([1] * length, [3]), ([1] * length, [4])])


def test_each_epoch_takes_the_next_template_of_every_row():
    rows = Rows([row(1), row(1)], 1)
    seen = []
    for epoch in range(3):
        rows.epoch = epoch
        seen.append([rows[i].pairs[0][1][0] for i in range(2)])
    assert seen == [[2, 3], [3, 4], [4, 2]]
    assert len(Rows([row(1)], 3)[0].pairs) == 3


def test_batches_hold_every_row_once_and_mix_short_rows_with_long_ones():
    """Tasks differ in length: grouped by it, a batch would hold one task alone."""
    lengths = [5] * 100 + [40] * 103
    rows = Rows([row(length) for length in lengths], 1)
    batches = Batches(rows, 16, seed=0)
    order = list(batches)
    assert sorted(order) == list(range(203))
    held = [{lengths[i] for i in order[start : start + 16]} for start in range(0, 203, 16)]
    assert all(len(batch) == 2 for batch in held[:-1])
    rows.epoch = 1
    assert list(batches) != order
    rows.epoch = 0
    assert list(batches) == order
    assert list(Batches(rows, 16, seed=0, fill=True)) == [*order, *[PADDING] * 5]


def test_epochs_are_shuffled_differently_by_the_trainer(tmp_path, monkeypatch):
    """The rows must know their epoch when the sampler is asked, or every epoch would have the same order."""
    epochs = []
    original = Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__", lambda self: epochs.append(self.rows.epoch) or original(self))
    train(tiny(), [toy_task()], tmp_path / "out", quick())
    assert sorted(set(epochs)) == [0, 1, 2]


def test_it_runs_in_a_plain_trainer_too(tmp_path):
    from transformers import Trainer, TrainingArguments

    atv = tiny()
    rows = [atv.encode_row(r) for r in training_rows(toy_task())]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", remove_unused_columns=False, use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = atv.expansion.map.weight.clone()
    Trainer(model=atv, args=arguments, train_dataset=rows, data_collator=atv.collator()).train()
    assert not torch.equal(atv.expansion.map.weight, before)


def test_a_frozen_generator_reads_each_query_once_and_a_trained_one_anew(tmp_path, monkeypatch):
    for trained in (False, True):
        atv, task, read = make_atv(dtype=torch.float32, train_generator=trained), toy_task(rows=24), []
        states = type(atv.generator).states

        def watched(self, ids, mask, states=states, read=read):
            read.extend(tuple(row[:length]) for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True))
            return states(self, ids, mask)

        with monkeypatch.context() as patch:
            patch.setattr("atv.training.loop.require_wiring", lambda atv: None)
            patch.setattr("atv.adapter._require_read_back", lambda *_: None)  # reads queries of its own
            patch.setattr(type(atv.generator), "states", watched)
            train(atv, [task], tmp_path / str(trained), TrainConfig(epochs=3, batch_size=4, generator_start=1 / 3))
        queries = [tuple(ids) for ids in atv.generator.encode([row.input for row in (*task.train, *task.valid)])]
        valid = queries[len(task.train) :]  # are read once more for the temperature of the options
        assert sorted(read) == sorted([*queries, *queries, *queries, *valid] if trained else queries)
        assert atv.generator._read == {}


# ---- what the model holds afterwards ----


def in_memory(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trainables(tmp_path):
    """Every kind of thing that is trained: how one is made, with its first weights."""
    llm, tokenizer, task = make_llm(dtype=torch.float32), byte_level_tokenizer(), toy_task()

    def peft(method):
        return lambda: PEFTModel(llm, tokenizer, method, method.config_class())

    return {
        "atv": tiny,
        "t5": lambda: t5(llm, tokenizer),
        "fixed": lambda: FixedModel(llm, tokenizer=tokenizer),
        "self": lambda: ATVModel(llm, ATVConfig(generator="self", scale=0.5), tokenizer=tokenizer),
        "random": lambda: ATVModel(llm, ATVConfig(generator="random:1x64", scale=0.5), tokenizer=tokenizer),
        "lora": peft(LoRA),
        "prefix": peft(PrefixTuning),
        "full": lambda: FullModel(llm, tokenizer),
        "i2cl": lambda: I2CLModel(llm, I2CLConfig(), tokenizer).read([task], 1),
        "encoder": lambda: encoder(llm, tokenizer, task),
    }


def encoder(llm, tokenizer, *tasks):
    config = EncoderConfig()
    generator = make_generator(config.generator_config())
    answers = {task.name: ["no", "yes"] for task in tasks}
    return EncoderModel(llm, config, tokenizer, answers, generator=generator)


def t5(llm, tokenizer):
    config = ATVConfig(pooling="mean", scale=0.5)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3, "vocab_size": 400}
    model = AutoModel.from_config(AutoConfig.for_model("t5", **sizes))
    generator = Generator(model, tokenizer, config.pooling, config.query_template)
    return ATVModel(llm, config, tokenizer=tokenizer, generator=generator)


KINDS = ["atv", "t5", "fixed", "self", "random", "lora", "prefix", "full", "i2cl", "encoder"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_run_twice_leaves_the_trained_weights_twice(tmp_path, kind):
    make = trainables(tmp_path)[kind]
    held = []
    for seed in (1, 2, 3):
        set_seed(seed)
        model = make()
        first = in_memory(model)
        train(model, [toy_task()], tmp_path / "out", quick(epochs=1, learning_rate=0.02))
        held.append(in_memory(model))
        assert not model.training
        assert model.training_summary["tasks"].keys() == {"toy"}
        assert any(not torch.equal(tensor, held[-1][name]) for name, tensor in first.items())
    for again in held[1:]:
        assert again.keys() == held[0].keys()
        assert all(torch.equal(tensor, held[0][name]) for name, tensor in again.items())


def test_an_interrupted_and_a_broken_training_leave_the_saved_weights_too(tmp_path):
    atv = tiny()
    break_loss_after(atv, 3)
    with pytest.raises(ATVError, match="holds the best epoch before that"):
        train(atv, [toy_task()], tmp_path / "out", quick())
    saved = ATVModel.from_pretrained(tmp_path / "out", make_llm(dtype=torch.float32), tokenizer=atv.tokenizer)
    assert all(torch.equal(tensor, atv.state_dict()[name]) for name, tensor in in_memory(saved).items())
    resumed = tiny()
    train(resumed, [toy_task()], tmp_path / "out", quick())
    saved = ATVModel.from_pretrained(tmp_path / "out", make_llm(dtype=torch.float32), tokenizer=atv.tokenizer)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in in_memory(saved).items())


def test_a_finished_training_of_another_llm_with_the_same_name_is_refused(tmp_path):
    train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=1))
    atv = tiny()
    with torch.no_grad():
        atv.llm.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ATVError, match="they differ in weights"):
        train(atv, [toy_task()], tmp_path / "out", quick(epochs=1))


@pytest.mark.parametrize("kind", ["atv", "lora", "full"])
def test_what_a_folder_gives_back_is_compared_with_what_was_trained(tmp_path, kind, monkeypatch):
    model = trainables(tmp_path)[kind]()
    save = model.save_pretrained

    def save_another(path):
        save(path)
        file = next(Path(path).glob("*.safetensors"))
        save_file({name: tensor * 1.1 for name, tensor in load_file(file).items()}, file)
        about = json.loads((path / "atv_config.json").read_text())
        about["sha256"][file.name] = sha256(file)
        (path / "atv_config.json").write_text(json.dumps(about))

    monkeypatch.setattr(model, "save_pretrained", save_another)
    with pytest.raises(ATVError, match="does not hold the weights that were saved there"):
        train(model, [toy_task()], tmp_path / "out", quick(epochs=1))
    assert not json.loads((tmp_path / "out" / "train.json").read_text())["finished"]


@pytest.mark.parametrize("trained", [False, True])
def test_by_default_it_is_adamw_with_a_falling_rate_and_clipped_gradients_as_a_loop_by_hand(tmp_path, trained):
    """A trained generator begins to learn halfway, with a falling rate of its own."""
    task = toy_task(rows=27)
    config = TrainConfig(
        epochs=8,
        batch_size=4,
        learning_rate=0.02,
        generator_learning_rate=0.001,
        weight_decay=0.1,
        adaptive_dropout=0.0,
        state_dropout=0.0,
        patience=8,
    )
    options = {"parametrisation": "calibrated", "train_generator": trained}
    atv, by_hand = tiny(**options), tiny(**options)
    rows = Rows([by_hand.encode_row(row) for row in training_rows(task)], 1)
    by_hand.calibrate(rows.rows)
    steps, read = 8 * 3, set(by_hand.generator.parameters())
    learned = [p for p in by_hand.parameters() if p.requires_grad]
    assert any(p in read for p in learned) == trained
    means, squares, done = [0.0] * len(learned), [0.0] * len(learned), [0] * len(learned)
    validated = []
    for rows.epoch in range(8):
        order = list(Batches(rows, 4, config.seed))
        for start in range(0, 9, 4):
            loss = by_hand(**by_hand.collator()([rows[i] for i in order[start : start + 4]])).loss
            step = max(done)
            now = [place for place, p in enumerate(learned) if p not in read or step >= 12]
            gradients = torch.autograd.grad(loss, [learned[place] for place in now], materialize_grads=True)
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            share = 1 / 2 if step == 0 else (steps - step) / (steps - 1)  # one step of warming up
            with torch.no_grad():
                for place, g in zip(now, gradients, strict=True):
                    p = learned[place]
                    rate = share * (0.02 if p.shape == (3, 32) else 3 * 0.02 / 24)  # b, and W of a state of 24 numbers
                    rate = 0.001 * (24 - step) / 12 if p in read else rate
                    done[place] += 1
                    g = g * min(1.0, 1.0 / norm.item())
                    means[place] = 0.9 * means[place] + 0.1 * g
                    squares[place] = 0.999 * squares[place] + 0.001 * g * g
                    p -= rate * 0.1 * p
                    p -= (
                        rate
                        * (means[place] / (1 - 0.9 ** done[place]))
                        / ((squares[place] / (1 - 0.999 ** done[place])).sqrt() + 1e-8)
                    )
        validated.append({name: p.clone() for name, p in by_hand.named_parameters()})
    result = train(atv, [task], tmp_path / "out", config)
    kept = validated[result.record["best_step"] // 3 - 1]
    for name, p in atv.named_parameters():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding, scaled up by Adam
            torch.testing.assert_close(p, kept[name], atol=2e-5, rtol=1e-3)
    assert (atv.expansion.map.weight.abs().max() > 0.01).item()


@pytest.mark.parametrize("start", [0.0, 0.5, 0.99])
def test_a_training_of_one_step_ends_whenever_the_generator_would_begin(tmp_path, start):
    config = TrainConfig(epochs=1, batch_size=100, generator_start=start)
    model = tiny(parametrisation="calibrated", train_generator=True)
    assert train(model, [toy_task()], tmp_path / "out", config).record["finished"]


@pytest.mark.parametrize("kept", ["accuracy", "loss"])
def test_the_epoch_is_kept_that_the_configuration_asks_for(tmp_path, kept):
    config = quick(epochs=6, learning_rate=0.05, best_epoch=kept)
    record = train(tiny(), [toy_task(rows=27)], tmp_path / "out", config).record
    validated = [entry for entry in record["history"] if "eval_loss" in entry]
    if kept == "loss":
        best = min(validated, key=lambda entry: entry["eval_loss"])
    else:  # nine validation rows
        highest = max(entry["eval_accuracy"] for entry in validated)
        least = highest - math.sqrt(highest * (1 - highest) / 9)
        best = [entry for entry in validated if entry["eval_accuracy"] >= least][-1]
    assert (record["best_step"], record["best_eval_accuracy"]) == (best["step"], best["eval_accuracy"])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_the_last_epoch_is_kept_that_is_not_worse_than_the_best_by_a_standard_error(right):
    """Epoch by epoch, as training asks, and by what is known in the end."""
    found = [count / 30 for count in right]
    choices = [latest_of_the_best(found[: epoch + 1], 30) for epoch in range(len(found))]
    error = np.std([1] * max(right) + [0] * (30 - max(right))) / np.sqrt(30)
    expected = max(epoch for epoch, accuracy in enumerate(found) if accuracy >= max(found) - error)
    assert choices.index(max(choices)) == expected


@pytest.mark.parametrize(("start", "epochs"), [(0.0, 3), (0.5, 7)])
def test_it_stops_when_the_last_epochs_are_worse_than_the_one_that_is_kept(
    tmp_path, capsys, monkeypatch, start, epochs
):
    """Counted from the epoch in which the generator begins to learn: before that it had no chance to be better."""
    accuracies = iter([1.0] + [0.0] * 8)
    monkeypatch.setattr(trainer, "validation_metrics", lambda rows: {"loss": 1.0, "accuracy": next(accuracies)})
    config = quick(epochs=9, best_epoch="accuracy", patience=2, generator_start=start)
    record = train(tiny(), [toy_task()], tmp_path / "out", config).record
    assert len([entry for entry in record["history"] if "eval_loss" in entry]) == epochs
    assert record["finished"]
    assert "The last 2 epochs are worse than the one that is kept" in capsys.readouterr().err


def test_epochs_that_are_as_good_as_the_best_do_not_stop_it(tmp_path):
    config = quick(epochs=6, learning_rate=0.0, best_epoch="accuracy", patience=2)
    record = train(tiny(), [toy_task()], tmp_path / "out", config).record
    assert record["best_step"] == record["history"][-1]["step"] == 6 * 2


def test_too_few_validation_rows_to_choose_by_are_said(tmp_path, capsys):
    train(tiny(), [toy_task()], tmp_path / "out", quick(epochs=1))
    assert "8 validation rows: accuracy on them has a standard error of about 18 points" in capsys.readouterr().err


class Stopped(Exception):
    """As a kill."""


def stopped_after_its_last_checkpoint(out, monkeypatch):
    """Leaves a best epoch that is not the last one: the second of four."""
    measure, validated = trainer.validation_metrics, []

    class Interrupted(training.Progress):
        def on_save(self, args, state, control, **about):
            super().on_save(args, state, control, **about)
            if round(state.epoch) == 4:
                raise Stopped

    def best_is_the_second(rows):
        validated.append(rows)
        return measure(rows) | {"loss": float(len(validated) != 2)}

    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Interrupted)
        patch.setattr(trainer, "validation_metrics", best_is_the_second)
        with pytest.raises(Stopped):
            train(tiny(), [toy_task(rows=27)], out, quick(epochs=4))


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_training_whose_folder_was_moved_finds_its_best_epoch_there(tmp_path, monkeypatch, move):
    stopped_after_its_last_checkpoint(tmp_path / "first", monkeypatch)
    move(tmp_path / "first", tmp_path / "second")
    checkpoints = {path.name for path in (tmp_path / "second" / "checkpoints").iterdir()}
    assert len(checkpoints) == 2  # the best and the last
    best = min(checkpoints, key=lambda name: int(name.split("-")[1]))
    expected = load_file(tmp_path / "second" / "checkpoints" / best / "model.safetensors")
    if move is shutil.copytree:  # what is still at the former place counts no more
        shutil.rmtree(tmp_path / "first" / "checkpoints" / best)
        (tmp_path / "first" / "checkpoints" / best).mkdir()
    atv = tiny()
    result = train(atv, [toy_task(rows=27)], tmp_path / "second", quick(epochs=4))
    assert result.record["best_step"] == int(best.split("-")[1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in in_memory(atv).items())


def test_a_best_epoch_that_is_gone_is_refused(tmp_path, monkeypatch):
    stopped_after_its_last_checkpoint(tmp_path / "out", monkeypatch)
    best = min((tmp_path / "out" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(best)
    with pytest.raises(ATVError, match=f"{best.name}.*is missing.*--force"):
        train(tiny(), [toy_task(rows=27)], tmp_path / "out", quick(epochs=4))


def test_killed_after_its_last_step_the_gate_reads_the_trained_generator(tmp_path, monkeypatch):
    """Its states before training were read ahead, and no step of the resumed training discards them."""

    def run(out):
        set_seed(42)
        epochs = itertools.count()  # the last epoch is kept
        atv = tiny(parametrisation="calibrated", train_generator=True)
        config = TrainConfig(epochs=4, batch_size=4, generator_start=0.5, generator_learning_rate=5e-3)
        train(atv, [toy_task()], out, config, metric=lambda _: next(epochs))
        return atv

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", stop)
        with pytest.raises(Stopped):
            run(tmp_path / "killed")
    monkeypatch.setattr(trainer.ATVTrainer, "training_step", lambda *_: pytest.fail("trained on"))
    resumed = run(tmp_path / "killed")
    assert resumed.training_summary == whole.training_summary
    expected = in_memory(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in in_memory(resumed).items())


def stop(*_, **__):
    raise Stopped


def test_killed_after_it_stopped_early_it_trains_no_further(tmp_path, monkeypatch):
    class Interrupted(training.Progress):
        def on_save(self, args, state, control, **about):
            super().on_save(args, state, control, **about)
            if control.should_training_stop:
                raise Stopped

    def run(out):
        set_seed(42)
        scores = itertools.count(step=-1)  # the first epoch is kept
        return train(tiny(), [toy_task()], out, quick(epochs=6, patience=2), metric=lambda _: next(scores)).record

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", Interrupted)
        with pytest.raises(Stopped):
            run(tmp_path / "killed")
    monkeypatch.setattr(trainer.ATVTrainer, "training_step", lambda *_: pytest.fail("trained on"))
    resumed = run(tmp_path / "killed")
    assert [entry["epoch"] for entry in resumed["history"] if "eval_loss" in entry] == [1, 2, 3]
    for key in ("best_step", "best_eval_loss", "finished"):
        assert resumed[key] == whole[key]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "killed").items())


# ---- several tasks ----


def test_tasks_with_other_numbers_of_templates_share_a_step_only_if_it_reads_as_many_of_each(tmp_path):
    fewer = replace(toy_task("fewer", rows=30), templates=toy_task().templates[:2])
    tasks = [toy_task(rows=33), replace(fewer, **{split: moved(getattr(fewer, split)) for split in SPLITS})]
    with refused("templates_per_row is 3", "toy: 3, fewer: 2", "Set templates_per_row to 2"):
        train(tiny(), tasks, tmp_path / "out", quick(templates_per_row=3))
    assert not (tmp_path / "out").exists()
    assert train(tiny(), tasks, tmp_path / "out", quick(epochs=1, templates_per_row=2)).record["finished"]
    llm, tokenizer = make_llm(dtype=torch.float32), byte_level_tokenizer()
    alone = encoder(llm, tokenizer, *tasks)  # reads no template
    assert train(alone, tasks, tmp_path / "encoder", quick(epochs=1, templates_per_row=3)).record["finished"]


def moved(rows):
    return tuple(Example(f"elsewhere, {row.input}", row.output) for row in rows)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_task_of_several_that_has_no_row_left_is_refused_before_it_is_trained(tmp_path, split):
    """In the gate of a calibrated ATV it would be missing after the last epoch."""
    texts = toy_task("texts")
    rows = tuple(row._replace(output="leaks " * 300) for row in getattr(texts, split))
    model = make_atv(dtype=torch.float32, parametrisation="calibrated", train_generator=False)
    with refused(f"All 8 {split} rows are too long", "in the task texts"):
        train(model, [toy_task(), replace(texts, **{split: rows}, options=())], tmp_path, quick())
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_trained_parameter_is_refused(tmp_path):
    model = FullModel(make_llm(dtype=torch.float32), byte_level_tokenizer())
    model.requires_grad_(False)
    with refused("No gradient reaches the trained parameters"):
        train(model, [toy_task()], tmp_path / "out", quick())
