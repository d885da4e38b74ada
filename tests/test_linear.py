"""The linear map against scikit-learn's ridge and the normal equations, its use against hooks written by hand."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from refusals import refused
from rendering import encode_prompt
from torch import nn

from atv.config import TrainConfig
from atv.data import Example, Prompt, Task
from atv.data.collate import left_padded
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate, steered
from atv.lm.hooks import decoder_layers
from atv.methods import METHODS, exemplars
from atv.methods import linear as linear_module
from atv.methods.exemplars import exemplar_prompts
from atv.methods.linear import Linear, LinearConfig, fit

TOKENIZER = byte_level_tokenizer()


def counting():
    """Nothing in common with the queries of `toy_task`."""
    examples = [Example(f"one two three {i}", ("two", "six")[i % 2]) for i in range(24)]
    rows = tuple(examples[:8]), tuple(examples[8:16]), tuple(examples[16:])
    return Task("counting", ("Count: {input}", "{input}, which?"), *rows)


TASKS = [toy_task(), counting()]


def trained(out, llm=None, force=False, **options):
    config = LinearConfig(**{"shots": 2} | options)
    llm = llm or make_llm(dtype=torch.float32)
    return Linear.fit(llm, TOKENIZER, TASKS, out, config, TrainConfig(seed=7), force=force)


def load(adapter, llm=None):
    return Linear.load(llm or make_llm(dtype=torch.float32), TOKENIZER, adapter)


def state(llm, ids, layer):
    """What a layer gives out at the last token of a prompt that is read alone."""
    caught = []
    hook = decoder_layers(llm)[layer].register_forward_hook(lambda _, __, out: caught.append(out))
    with torch.no_grad():
        llm(torch.tensor([ids]))
    hook.remove()
    return (caught[0][0] if isinstance(caught[0], tuple) else caught[0])[0, -1]


def pairs_by_hand(llm, task, layer):
    """States of the training rows' prompts without and with demonstrations."""
    plain, shown = [], []
    for number, (row, prompt) in enumerate(exemplar_prompts(llm, TOKENIZER, task, len(task.train), 2, seed=7)):
        template = task.templates[number % len(task.templates)]
        text = f"{template.replace('{input}', task.train[row].input)}\nA:"
        assert TOKENIZER.decode(prompt.ids).endswith(text)
        plain.append(state(llm, TOKENIZER(text)["input_ids"], layer))
        shown.append(state(llm, prompt.ids, layer))
    return torch.stack(plain).double(), torch.stack(shown).double()


def by_normal_equations(plain, shown, ridge):
    """The weights and the intercept of h -> h' - h, from the hidden x hidden matrix."""
    rows, effects = plain - plain.mean(0), shown - plain
    penalty = ridge * (rows @ rows.T).trace() / len(rows)
    weights = torch.linalg.solve(rows.T @ rows + penalty * torch.eye(rows.shape[1], dtype=rows.dtype),
                                 rows.T @ (effects - effects.mean(0)))  # fmt: skip
    return weights, effects.mean(0) - plain.mean(0) @ weights


@pytest.mark.parametrize(("rows", "hidden"), [(40, 6), (7, 20)])
@pytest.mark.parametrize("ridge", [10.0, 0.3])
def test_a_map_is_the_ridge_regression_of_scikit_learn(rows, hidden, ridge):
    sklearn = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(0)
    states, effects = (3 * torch.randn(rows, hidden, dtype=torch.float64) + 2 for _ in range(2))
    centred = states - states.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred @ centred.T)
    model = sklearn.Ridge(alpha=ridge * eigenvalues.mean().item()).fit(states.numpy(), effects.numpy())
    asked = torch.randn(5, hidden)
    expected = torch.from_numpy(model.predict(asked.double().numpy()))
    torch.testing.assert_close(fit(states, effects, ridge).effects(asked).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_strong_ridge_leaves_the_mean_effect_and_rows_that_are_all_alike_give_it_too():
    torch.manual_seed(0)
    states, effects = torch.randn(9, 4), torch.randn(9, 4)
    asked = torch.randn(3, 4)
    mean = effects.mean(0).expand(3, -1)
    torch.testing.assert_close(fit(states, effects, 1e9).effects(asked), mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(fit(states[:1].expand(9, -1), effects, 1.0).effects(asked), mean, atol=1e-5, rtol=0)


def with_effect(llm, ids, layer, weights, intercept, scale):
    """Logits behind a prompt read alone, its last state at a layer moved by its own estimated effect."""

    def edit(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        edited = hidden.clone()
        last = hidden[:, -1].double()
        edited[:, -1] = (last + scale * (last @ weights + intercept)).to(hidden.dtype)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    hook = decoder_layers(llm)[layer].register_forward_hook(edit)
    with torch.no_grad():
        logits = llm(torch.tensor([ids])).logits[0, -1]
    hook.remove()
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_steering_is_that_of_a_hook_written_by_hand_for_known_and_unknown_tasks(tmp_path, name):
    llm = make_llm(name, torch.float32)
    method = load(trained(tmp_path, llm, layer=1, ridge=0.5, scale=1.5), llm)
    new = replace(toy_task("new", 30), test=tuple(Example(f"{row.input} again", row.output) for row in TASKS[0].test))
    pairs = {task.name: pairs_by_hand(llm, task, 1) for task in TASKS}
    pairs["new"] = tuple(torch.cat([pair[side] for pair in pairs.values()]) for side in (0, 1))
    run = RunWriter(tmp_path / "run", {})
    evaluate(method, [*TASKS, new], ["first_token"], run, variants="first", batch_size=3)
    differs = 0
    for task in (*TASKS, new):
        weights, intercept = by_normal_equations(*pairs[task.name], 0.5)
        own = [row for row in run.rows if row["task"] == task.name]
        for row, recorded in zip(task.test, own, strict=True):
            ids = encode_prompt(TOKENIZER, f"{task.templates[0].replace('{input}', row.input)}\nA:")
            logits = with_effect(llm, ids, 1, weights, intercept, 1.5)
            assert recorded["outputs"]["first_token"] == TOKENIZER.decode([logits.argmax()])
            with torch.no_grad():
                differs += int(llm(torch.tensor([ids])).logits[0, -1].argmax() != logits.argmax())
            assert recorded["prompt_tokens"] == len(ids)
    assert differs > 3


def test_the_logits_of_a_padded_batch_are_those_of_hooks_by_hand(tmp_path):
    llm = make_llm(dtype=torch.float64)
    method = load(trained(tmp_path, llm, layer=2, ridge=1.0), llm)
    weights, intercept = by_normal_equations(*pairs_by_hand(llm, TASKS[0], 2), 1.0)
    queries = [Example("the kettle", "yes"), Example("a quiet harbour before the first boats", "no")]
    encoded = [TOKENIZER(f"{row.input}\nyes or no?\nA:")["input_ids"] for row in queries]
    inputs = left_padded(encoded, 0)
    with torch.no_grad(), steered(method, [Prompt(ids, "", task=TASKS[0].name) for ids in encoded]):
        found = llm(**inputs).logits[:, -1]
    for row, ids in enumerate(encoded):
        expected = with_effect(llm, ids, 2, weights, intercept, 1.0)
        torch.testing.assert_close(found[row], expected, atol=1e-3, rtol=1e-3)  # the map is kept in float32
    with torch.no_grad():
        assert (llm(**inputs).logits[:, -1] - found).abs().max() > 0.1
        with steered(method, [Prompt(ids, "") for ids in encoded]):
            unknown = llm(**inputs).logits[:, -1]
        with steered(method, [Prompt(encoded[0], "", task=TASKS[0].name), Prompt(encoded[1], "", task="unknown")]):
            mixed = llm(**inputs).logits[:, -1]
    assert (unknown - found).abs().max() > 0.1
    torch.testing.assert_close(mixed, torch.stack([found[0], unknown[1]]), atol=1e-5, rtol=1e-3)  # float32 maps


def test_layer_and_ridge_are_those_with_most_validation_rows_right(tmp_path, monkeypatch):
    monkeypatch.setattr(linear_module, "RIDGES", (10.0, 0.1))
    monkeypatch.setattr(exemplars, "AT_ONCE", 3)  # the eight validation rows of a task are read in parts
    llm = make_llm(dtype=torch.float32)
    said = [TOKENIZER(f"A: {word}")["input_ids"][2] for word in ("yes", "no", "two", "six")]
    with torch.no_grad():  # it says hardly anything else
        llm.lm_head.weight[[token for token in range(400) if token not in said]] = 0
    adapter = trained(tmp_path, llm, scale=1.2)
    right, likely = {}, {}
    for layer in range(3):
        for ridge in (10.0, 0.1):
            hits, chances = [], []
            for task in TASKS:
                weights, intercept = by_normal_equations(*pairs_by_hand(llm, task, layer), ridge)
                told = exemplars.training_options(TOKENIZER, task).judged
                assert set(told.values()) == {1}
                for number, row in enumerate(task.valid):
                    prompt = task.templates[number % len(task.templates)].replace("{input}", row.input) + "\nA:"
                    ids = TOKENIZER(prompt)["input_ids"]
                    target = TOKENIZER(f"{prompt} {row.output}")["input_ids"][len(ids)]
                    logits = with_effect(llm, ids, layer, weights, intercept, 1.2)
                    hits.append(float(logits.argmax() == target))
                    chances.append(logits.log_softmax(-1)[target].item())
            right[layer, ridge] = sum(hits) / len(hits)  # as many rows of each task
            likely[layer, ridge] = sum(chances) / len(chances)
    best = max(right, key=lambda of: (right[of], likely[of]))
    said = load(adapter, llm).describe()["training"]
    assert (said["layer"], said["ridge"]) == best
    assert said["valid_accuracy"] == pytest.approx(right[best])
    assert len(set(right.values())) > 1


def test_long_queries_are_cut_at_their_end(tmp_path, capsys):
    splits = {split: list(getattr(TASKS[0], split)) for split in ("train", "valid", "test")}
    for rows in splits.values():
        rows[0] = rows[0]._replace(input=rows[0].input + " the boats came in" * 90)
    task = replace(TASKS[0], **{split: tuple(rows) for split, rows in splits.items()})
    llm = make_llm(dtype=torch.float32)
    llm.config.max_position_embeddings = 200
    adapter = Linear.fit(llm, TOKENIZER, [task], tmp_path, LinearConfig(shots=2, layer=1), TrainConfig(seed=7))
    assert len(evaluate(load(adapter, llm), [task], ["first_token"], variants="first")) == len(task.test)
    said = " ".join(capsys.readouterr().err.split())
    for split in ("training", "validation", "test"):
        assert f"toy: the queries of 1 of {len(task.train)} {split} rows are cut at their end" in said


def test_fewer_layers_are_tried_if_fewer_are_asked_for(tmp_path):
    few, one = (load(trained(tmp_path / str(number), ridge=1.0, **options))
                for number, options in enumerate(({"candidates": 1}, {"layer": 1})))  # fmt: skip
    assert few.training["layer"] == one.training["layer"] == 1
    assert few.training["valid_accuracy"] == one.training["valid_accuracy"]
    assert all(torch.equal(a, b) for a, b in zip(few.maps["toy"], one.maps["toy"], strict=True))


def test_a_killed_training_reads_no_task_again_and_ends_with_the_same_maps(tmp_path, monkeypatch):
    whole = trained(tmp_path / "whole")
    scores, asked = linear_module._scores, []

    def killed(llm, tokenizer, task, *rest):
        asked.append(task.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return scores(llm, tokenizer, task, *rest)

    monkeypatch.setattr(linear_module, "_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    assert not (tmp_path / "killed" / "adapter").exists()
    with refused("other settings", "shots"):
        trained(tmp_path / "killed", shots=3)
    monkeypatch.setattr(linear_module, "exemplar_prompts", None)  # both tasks have been read
    resumed = trained(tmp_path / "killed")
    assert (resumed / "linear.safetensors").read_bytes() == (whole / "linear.safetensors").read_bytes()
    record = json.loads((tmp_path / "killed" / "train.json").read_text())
    assert record["finished"]
    assert record["seconds"] > 0
    assert not (tmp_path / "killed" / "parts").exists()
    assert trained(tmp_path / "killed") == resumed
    assert len(asked) == 4


def test_few_validation_rows_are_said(tmp_path, capsys):
    trained(tmp_path / "a")
    assert "linear: 16 validation rows choose among 12 settings" in capsys.readouterr().err
    trained(tmp_path / "b", layer=1, ridge=1.0)
    assert "validation rows choose" not in capsys.readouterr().err


def test_a_loaded_one_is_the_same_and_is_refused_where_it_does_not_belong(tmp_path):
    adapter = trained(tmp_path / "out")
    one, other = load(adapter), load(tmp_path / "out")
    assert one.maps.keys() == {"toy", "counting", ""}
    assert all(torch.equal(a, b) for name in one.maps for a, b in zip(one.maps[name], other.maps[name], strict=True))
    assert not {path.suffix for path in adapter.iterdir()} - {".safetensors", ".json"}
    with refused("made for", "model_type llama against gpt2"):
        load(adapter, make_llm("gpt2", torch.float32))
    with refused("linear needs an adapter"):
        load(None)
    with refused("no demonstrations", "--shots 4"):
        Linear.load(make_llm(), TOKENIZER, adapter, shots=4)
    with refused("adapter of the method linear", "atv"):
        METHODS["atv"].load(make_llm(dtype=torch.float32), TOKENIZER, adapter)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shots": 0}, "shots is 0"),
        ({"layer": "top"}, "layer is 'top'"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"ridge": True}, "ridge is True"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_options_that_no_map_can_have_are_refused(options, named):
    with refused(named):
        LinearConfig(**options)


def test_a_layer_that_the_llm_does_not_have_is_refused_before_anything_is_read(tmp_path):
    with refused("layer is 3", "layers 0 to 2"):
        trained(tmp_path, layer=3)
    assert not list(tmp_path.iterdir())
    assert isinstance(decoder_layers(make_llm())[2], nn.Module)
