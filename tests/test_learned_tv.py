"""A learned task vector: one vector at one layer, the layer that validation rows choose."""

import json

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from refusals import refused

from atv.config import TrainConfig
from atv.data import Prompt
from atv.evaluation.run import steered
from atv.lm.hooks import decoder_layers
from atv.methods import METHODS, learn_once
from atv.methods.fixed import Fixed, FixedConfig
from atv.methods.learned_tv import LearnedTV, LearnedTVConfig

TOKENIZER = byte_level_tokenizer()
TASKS = [toy_task()]
PROMPTS = ["the kettle leaks\nA:", "a quiet harbour before the first boats came in\nA:"]


def quick(**options):
    return TrainConfig(**{"epochs": 2, "batch_size": 4, "learning_rate": 0.1, "templates_per_row": 1} | options)


def trained(out, llm=None, train=None, force=False, **options):
    llm = llm or make_llm(dtype=torch.float32)
    return LearnedTV.fit(llm, TOKENIZER, TASKS, out, LearnedTVConfig(**options), train or quick(), force=force)


def load(adapter, llm=None):
    return LearnedTV.load(llm or make_llm(dtype=torch.float32), TOKENIZER, adapter)


@pytest.mark.parametrize(
    ("candidates", "count", "expected"),
    [(4, 30, [3, 11, 18, 26]), (1, 30, [15]), (4, 3, [0, 1, 2]), (3, 12, [2, 6, 10]), (2, 2, [0, 1])],
)
def test_the_layers_to_try_are_spread_over_the_depth(candidates, count, expected, monkeypatch):
    llm = torch.nn.Identity()
    monkeypatch.setattr(learn_once, "decoder_layers", lambda _: [None] * count)
    assert learn_once.layers_to_try("best", candidates, llm) == expected
    assert learn_once.layers_to_try(1, candidates, llm) == [1]
    with refused(f"layer is {count}", f"layers 0 to {count - 1}"):
        learn_once.layers_to_try(count, candidates, llm)


@pytest.mark.parametrize("positions", ["last", "last:5"])
def test_it_adds_one_vector_at_one_layer_at_the_last_tokens(tmp_path, positions):
    llm = make_llm(dtype=torch.float32)
    method = load(trained(tmp_path, llm, layer=1, positions=positions), llm)
    vectors = method.atv.task_vectors(["anything", "else"])
    assert vectors.shape == (2, 1, 32)
    assert torch.equal(vectors[0], vectors[1])
    assert vectors.abs().max() > 0.01
    inputs, last = method.atv.encode_prompts(PROMPTS), 1 if positions == "last" else 5
    asked = [Prompt([], text) for text in ("anything", "else")]

    def outputs():
        states = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
            for layer in decoder_layers(llm)[:2]
        ]
        with torch.no_grad():
            logits = llm(**inputs).logits
        for hook in hooks:
            hook.remove()
        return states, logits

    plain, plain_logits = outputs()
    with steered(method, asked):
        changed, logits = outputs()
    assert torch.equal(plain[0], changed[0])
    added = changed[1] - plain[1]
    assert added[:, :-last].abs().max() < 1e-6
    per_token = added[:, -last:].reshape(-1, 32)
    torch.testing.assert_close(per_token, per_token[:1].expand_as(per_token), atol=1e-5, rtol=1e-4)
    cosine = torch.cosine_similarity(per_token[0], vectors[0, 0], dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)
    assert not torch.allclose(plain_logits[:, -1], logits[:, -1])


def kept(record):
    """Accuracy and negative loss of the epoch that was kept."""
    entries = [entry for entry in record["history"] if "eval_loss" in entry]
    (best,) = [entry for entry in entries if entry["step"] == record["best_step"]]
    return best["eval_accuracy"], -best["eval_loss"]


def test_the_layer_is_that_whose_vector_of_fixed_does_best_on_validation_rows(tmp_path):
    llm = make_llm(dtype=torch.float32)
    adapter = trained(tmp_path / "out", llm)
    scores, vectors = {}, {}
    for layer in range(3):
        folder = tmp_path / f"fixed-{layer}"
        method = Fixed.load(
            llm, TOKENIZER, Fixed.fit(llm, TOKENIZER, TASKS, folder, FixedConfig(layers=[layer]), quick())
        )
        scores[layer] = kept(json.loads((folder / "train.json").read_text()))
        vectors[layer] = method.atv.task_vectors(["a query"])
    best = max(scores, key=lambda layer: scores[layer])
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["layer"] == best
    assert record["finished"]
    assert record["seconds"] > 0
    assert record["trainable_parameters"] == 32
    method = load(adapter, llm)
    assert torch.equal(method.atv.task_vectors(["a query"]), vectors[best])
    assert method.describe()["config"]["layers"] == [best]
    said = method.describe()["training"]["layers"]
    assert {int(layer): (of["valid_accuracy"], -of["valid_loss"]) for layer, of in said.items()} == scores
    assert len(set(scores.values())) == 3


def test_a_killed_training_goes_on_with_the_layer_that_it_was_at(tmp_path, monkeypatch):
    from atv.training import loop as training

    whole = trained(tmp_path / "whole")
    train, asked = training.train, []

    def killed(model, *rest):
        asked.append(model.config.layers)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return train(model, *rest)

    monkeypatch.setattr(training, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    with refused("other settings", "positions"):
        trained(tmp_path / "killed", positions="last:5")
    finished = {n: (tmp_path / f"killed/parts/{n}/train.json").stat().st_mtime_ns for n in (0, 1)}
    seen = []

    def noted(model, *rest):
        (layer,) = model.config.layers
        result = train(model, *rest)
        if layer in finished:
            seen.append((tmp_path / f"killed/parts/{layer}/train.json").stat().st_mtime_ns == finished[layer])
        return result

    monkeypatch.setattr(training, "train", noted)
    resumed = trained(tmp_path / "killed")
    assert seen == [True, True]
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert files
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)
    assert not (tmp_path / "killed" / "parts").exists()
    assert trained(tmp_path / "killed") == resumed


def test_it_is_refused_where_it_does_not_belong(tmp_path):
    adapter = trained(tmp_path / "out", layer=2, train=quick(epochs=1))
    with refused("made for", "model_type llama against gpt2"):
        load(adapter, make_llm("gpt2", torch.float32))
    with refused("learned-tv needs an adapter"):
        load(None)
    with refused("adapter of the method learned-tv", "fixed"):
        METHODS["fixed"].load(make_llm(dtype=torch.float32), TOKENIZER, adapter)
    with refused("layers 0 to 2"):
        trained(tmp_path / "other", layer=3)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"layer": "top"}, "layer is 'top'"), ({"candidates": 0}, "candidates is 0"), ({"positions": "lats"}, "last")],
)
def test_options_that_no_vector_can_have_are_refused(options, named):
    with refused(named):
        LearnedTVConfig(**options)
