"""I2CL against its definition written by hand: context vectors, injection, whose vectors a query takes."""

import json
import random
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import CONFIGS, byte_level_tokenizer, make_llm, toy_task
from refusals import refused
from rendering import encode_pair, prompt_text
from torch import nn

from atv.config import Positions, TrainConfig
from atv.data import Example, Prompt, Task, Template
from atv.data.render import fitting
from atv.errors import ATVError
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate, steered
from atv.lm.hooks import attention_and_mlp, base_llm
from atv.lm.spans import Span, Tracked
from atv.methods import METHODS
from atv.methods.i2cl import I2CL, I2CLConfig, I2CLModel
from atv.steer import steer
from atv.training.batches import training_rows

NAMES = [*CONFIGS, "peft"]
PARTS = {  # attention and MLP of the first layer, named by hand
    "gpt2": ("transformer.h.0.attn", "transformer.h.0.mlp"),
    "gpt_neox": ("gpt_neox.layers.0.attention", "gpt_neox.layers.0.mlp"),
    "opt": ("model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc2"),
}


def parts_by_hand(name, llm):
    first = PARTS.get(name, ("model.layers.0.self_attn", "model.layers.0.mlp"))
    return [
        [base_llm(llm).get_submodule(part.replace(".0.", f".{layer}.")) for part in first]
        for layer in range(base_llm(llm).config.num_hidden_layers)
    ]


def other_task():
    ends = [("four", "True"), ("five", "False")]
    examples = [Example(f"two and two are {ends[i % 2][0]} {i}", ends[i % 2][1]) for i in range(24)]
    templates = ("{input} True or False?", "Is it so: {input}", "{input}")
    return Task("sums", templates, tuple(examples[:8]), tuple(examples[8:16]), tuple(examples[16:]))


TASKS = [toy_task(), other_task()]


def made(name="llama", dtype=torch.float64, **options):
    """With coefficients that differ in every place."""
    config = I2CLConfig(**{"demonstrations": 5, "noise": 0.0} | options)
    model = I2CLModel(make_llm(name, dtype), config, byte_level_tokenizer()).read(TASKS, seed=7)
    torch.manual_seed(4)
    with torch.no_grad():
        model.coefficients += 0.5 * torch.randn_like(model.coefficients)
    return model.eval()


def batch_of(model, rows):
    return model.collator()([model.encode_row(row) for row in rows])


def rows_of(*counts):
    return [row for task, count in zip(TASKS, counts, strict=True) for row in training_rows(task)[:count]]


@pytest.mark.parametrize("name", NAMES)
def test_context_vectors_are_the_mean_of_last_token_outputs_over_demonstrations_read_alone(name):
    model = made(name)
    for index, task in enumerate(TASKS):
        shown = random.Random(f"7 {task.name}").sample(task.train, 5)
        sums = torch.zeros(3, 2, 32, dtype=torch.float64)
        for turn, example in enumerate(shown):
            asked = prompt_text(task, example.input, turn % len(task.templates))
            prompt, answer = encode_pair(model.tokenizer, asked, example.output)
            got = {}

            def keep(place, _, __, output, got=got):
                got[place] = (output[0] if isinstance(output, tuple) else output).reshape(-1, 32)[-1]

            with ExitStack() as hooks, torch.no_grad():
                for layer, pair in enumerate(parts_by_hand(name, model.llm)):
                    for part, module in enumerate(pair):
                        hooks.callback(module.register_forward_hook(partial(keep, (layer, part))).remove)
                model.llm(torch.tensor([prompt + answer]))
            for place, value in got.items():
                sums[place] += value
        torch.testing.assert_close(model.contexts[index].double(), sums / 5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_injection_equals_hooks_written_by_hand(name):
    model = made(name)
    (row,) = rows_of(0, 1)
    row = replace(row, renderers=row.renderers[:1])
    batch = batch_of(model, [row])
    with ExitStack() as hooks, torch.no_grad():
        for layer, pair in enumerate(parts_by_hand(name, model.llm)):
            for part, module in enumerate(pair):
                share, own = model.coefficients[layer, part].double()
                added = share * model.contexts[1, layer, part].double()

                def change(_, __, output, own=own, added=added):
                    if isinstance(output, tuple):
                        return (own * output[0] + added, *output[1:])
                    return own * output + added

                hooks.callback(module.register_forward_hook(change).remove)
        logits = model.llm(batch["input_ids"]).logits[0]
    labels = batch["labels"][0]
    expected = nn.functional.cross_entropy(logits[-len(labels) :], labels)
    found = model(**batch)
    torch.testing.assert_close(found.loss, expected, atol=1e-9, rtol=0)
    plain = nn.functional.cross_entropy(model.llm(batch["input_ids"]).logits[0, -len(labels) :], labels)
    assert abs(plain - expected) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_of_several_tasks_equals_its_rows_alone(name):
    model, rows = made(name), rows_of(2, 1)
    together = model(**batch_of(model, rows)).losses
    alone = torch.cat([model(**batch_of(model, [row])).losses for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_context_and_with_the_whole_own_output_it_is_the_plain_llm_bit_for_bit(dtype):
    model = I2CLModel(make_llm(dtype=dtype), I2CLConfig(initial_context=0.0), byte_level_tokenizer()).read(TASKS, 7)
    inputs = model.eval().encode_prompts(["the kettle leaks\nA:", "a quiet harbour before the first boats\nA:"])
    with torch.no_grad():
        plain = model.llm(**inputs).logits
        with steer(model.llm, model.edit(torch.tensor([0, 1])), Tracked(2, Positions.parse("all"))):
            assert torch.equal(model.llm(**inputs).logits, plain)
        model.coefficients[0, 0, 0] = 0.1
        with steer(model.llm, model.edit(torch.tensor([0, 1])), Tracked(2, Positions.parse("all"))):
            assert not torch.equal(model.llm(**inputs).logits, plain)


def test_noise_is_of_its_size_and_only_in_training():
    model = made(noise=0.5, initial_context=0.0, dtype=torch.float32)
    model.coefficients.data[:] = torch.tensor([0.0, 1.0])
    hidden = torch.randn(1, 4000, 32)
    edit, span = model.edit(torch.tensor([0])), Span(torch.ones(1, 4000, dtype=torch.bool))

    assert torch.equal(edit(0, hidden, span), hidden)
    model.train()
    added = edit(0, hidden, span) - hidden
    share = added.norm(dim=-1) / hidden.norm(dim=-1)
    assert share.mean().item() == pytest.approx(0.5 * 32**0.5, rel=0.03)


def test_a_query_of_an_unknown_task_takes_the_context_of_the_task_with_the_nearest_query():
    model = made()
    queries = ["two and two are four 9", "the harbour leaks 40", "two and two are five"]

    def tasks_of(*tasks):
        return model.tasks_of([Prompt([], q, task=t) for q, t in zip(queries, tasks, strict=True)]).tolist()

    assert tasks_of("toy", "sums", "toy") == [0, 1, 0]

    def state(text):
        with torch.no_grad():
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            states = {}
            hook = model.llm.model.layers[-1].register_forward_hook(lambda *a: states.update(last=a[2]))
            model.llm(ids)
            hook.remove()
        return states["last"][0, -1]

    expected = []
    for query in queries:
        nearest = []
        for task in TASKS:
            shown = random.Random(f"7 {task.name}").sample(task.train, 5)
            nearest.append(max(torch.cosine_similarity(state(query), state(e.input), dim=0).item() for e in shown))
        expected.append(nearest.index(max(nearest)))
    assert tasks_of("another", "", "another") == expected
    assert tasks_of("another", "sums", "") == [expected[0], 1, expected[2]]
    assert set(expected) == {0, 1}


def test_a_long_query_is_cut_at_its_end():
    toy = toy_task()
    written = toy.train[3].input + " the boats came in" * 90
    task = replace(toy, train=(*toy.train[:3], toy.train[3]._replace(input=written), *toy.train[4:]))
    model = I2CLModel(make_llm(), I2CLConfig(demonstrations=8), byte_level_tokenizer())
    model.read([task, TASKS[1]], seed=7)
    cut = fitting(Template("{input}"), model.tokenizer, Example(written, ""), 256).query
    expected = model._states([cut])[0]  # itself tested above
    shown = random.Random("7 toy").sample(task.train, 8)
    torch.testing.assert_close(model.queries[shown.index(task.train[3])], expected)
    assert model.tasks_of([Prompt([], written)]).tolist() == [0]


def quick(**options):
    return TrainConfig.paper(**{"epochs": 8, "batch_size": 4, "learning_rate": 3e-2, "templates_per_row": 1} | options)


def fitted(out, llm=None, train=None, **options):
    llm = llm or make_llm(dtype=torch.float32)
    return I2CL.fit(llm, byte_level_tokenizer(), TASKS, out, I2CLConfig(**options), train or quick())


def test_it_learns_and_is_used_on_known_and_unknown_tasks(tmp_path):
    llm = make_llm(dtype=torch.float32)
    adapter = fitted(tmp_path / "out", llm, quick(epochs=16))
    history = [
        e["eval_loss"] for e in json.loads((tmp_path / "out/train.json").read_text())["history"] if "eval_loss" in e
    ]
    assert min(history) < 0.8 * history[0]
    method = I2CL.load(llm, byte_level_tokenizer(), adapter)
    run = RunWriter(tmp_path / "run", {})
    unknown = toy_task("harbours")
    evaluate(method, [TASKS[1], unknown], ["first_token"], run, variants="first", batch_size=3)
    # In batches of three as each row alone, whichever contexts it takes.
    for task in (TASKS[1], unknown):
        for row in (row for row in run.rows if row["task"] == task.name):
            example = task.test[row["example"]]
            inputs = method.model.encode_prompts([prompt_text(task, example.input)])
            with torch.no_grad(), steered(method, [Prompt([], example.input, task=task.name)]):
                likeliest = llm(**inputs).logits[0, -1].argmax().item()
            assert row["outputs"]["first_token"] == method.tokenizer.decode([likeliest])
    assert set(method.model.tasks_of([Prompt([], e.input, task="harbours") for e in unknown.test]).tolist()) == {0, 1}
    assert method.describe()["config"]["demonstrations"] == 16
    assert set(method.describe()["training"]["tasks"]) == {"toy", "sums"}


def test_a_saved_one_is_the_same_and_holds_what_it_learned_alone(tmp_path):
    model = made(dtype=torch.float32)
    assert set(model.state_dict()) == {"coefficients"}
    model.save_pretrained(tmp_path / "adapter")
    again = I2CLModel.from_pretrained(make_llm(dtype=torch.float32), tmp_path, tokenizer=model.tokenizer)
    rows = rows_of(1, 1)
    assert torch.equal(again(**batch_of(again, rows)).losses, model(**batch_of(model, rows)).losses)
    prompts = [Prompt([], "two and two"), Prompt([], "the harbour")]
    named = [[m.tasks[index] for index in m.tasks_of(prompts)] for m in (model, again)]
    assert named[0] == named[1]
    assert not again.training
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"atv_config.json", "i2cl.safetensors"}


def test_another_llm_and_another_method_are_refused(tmp_path):
    model = made(dtype=torch.float32)
    model.save_pretrained(tmp_path / "adapter")
    with refused("was made for", "model_type llama against qwen2"):
        I2CL.load(make_llm("qwen2"), model.tokenizer, tmp_path / "adapter")
    with refused("is an adapter of the method i2cl", "expected one of the method atv"):
        METHODS["atv"].load(make_llm(), model.tokenizer, tmp_path / "adapter")
    with refused("The method i2cl needs an adapter"):
        I2CL.load(make_llm(), model.tokenizer, None)


def test_a_finished_training_is_not_repeated_and_other_settings_are_refused(tmp_path):
    adapter = fitted(tmp_path / "out", train=quick(epochs=1))
    before = (adapter / "i2cl.safetensors").stat().st_mtime_ns
    assert fitted(tmp_path / "out", train=quick(epochs=1)) == adapter
    assert (adapter / "i2cl.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ATVError, match="demonstrations"):
        fitted(tmp_path / "out", train=quick(epochs=1), demonstrations=3)


def test_a_layer_that_is_built_otherwise_is_refused_with_its_children():
    llm = make_llm()
    llm.model.layers[1].extra = nn.Linear(32, 32)
    with refused("1 attention modules and 2 others", "self_attn (LlamaAttention)", "extra (Linear)"):
        attention_and_mlp(llm)


@pytest.mark.parametrize("wrong", [{"demonstrations": 0}, {"initial_context": "much"}, {"noise": float("nan")}])
def test_options_that_cannot_be_meant_are_refused(wrong):
    with refused(*wrong):
        I2CLConfig(**wrong)
