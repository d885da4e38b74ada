"""The fine-tuned encoder against a training loop written by hand; its head, its masks, its adapter."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import byte_level_tokenizer, make_generator, make_llm, toy_task
from refusals import refused
from torch import nn
from transformers import AutoModel, set_seed

from atv.config import ATVConfig, TrainConfig
from atv.data import Example, Task
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.hooks import base_llm
from atv.lm.scoring import training_options
from atv.methods import METHODS
from atv.methods.encoder import Encoder, EncoderConfig, EncoderModel
from atv.training.batches import training_rows


def ways():
    """Answers that begin with one token, one of them the toy task's."""
    words = ("no", "no way", "maybe")
    examples = [Example(f"one {words[i % 3]} kettle {i}", words[i % 3]) for i in range(27)]
    return Task("ways", ("{input}", "{input}?"), tuple(examples[:9]), tuple(examples[9:18]), tuple(examples[18:]))


TASKS = [toy_task(), ways()]
ALL = ["maybe", "no", "no way", "yes"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Folder of a tiny random encoder without dropout."""
    folder = tmp_path_factory.mktemp("generator")
    made = make_generator(ATVConfig())
    made.model_config.hidden_dropout_prob = made.model_config.attention_probs_dropout_prob = 0.0
    made.save(folder)
    return str(folder)


def quick(**options):
    values = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "generator_learning_rate": 0.01}
    return TrainConfig.paper(**values | {"templates_per_row": 1, "seed": 5} | options)


def made(generator, tasks=TASKS):
    set_seed(5)
    return EncoderModel.of(make_llm(dtype=torch.float32), EncoderConfig(generator), byte_level_tokenizer(), tasks)


def fitted(out, generator, llm=None, train=None):
    llm = llm or make_llm(dtype=torch.float32)
    return Encoder.fit(llm, byte_level_tokenizer(), TASKS, out, EncoderConfig(generator), train or quick())


def load(adapter, llm=None):
    return Encoder.load(llm or make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)


class ByHand(nn.Module):
    """A Hugging Face model, the mean of its states, a linear head."""

    def __init__(self, folder, head):
        super().__init__()
        self.model, self.head = AutoModel.from_pretrained(folder), nn.Linear(24, 4)
        self.head.load_state_dict(head.state_dict())

    def forward(self, query):
        ids = torch.tensor([byte_level_tokenizer()(query)["input_ids"]])
        return self.head(self.model(input_ids=ids).last_hidden_state[0].mean(0))

    def loss(self, row):
        own = {"toy": [1, 3], "ways": [0, 1, 2]}[row.task]
        scores = self(row.example.input)[own]
        return nn.functional.cross_entropy(scores[None], torch.tensor([own.index(ALL.index(row.example.output))]))


def rows_of(split):
    return [row for task in TASKS for row in training_rows(task, split)]


def test_losses_and_answers_are_those_of_a_model_by_hand_masked_to_the_task(generator):
    model, rows = made(generator), rows_of("train")
    assert model.all_answers == ALL
    by_hand = ByHand(generator, model.head)
    found = model(**model.collator()([model.encode_row(row) for row in rows]))
    expected = torch.stack([by_hand.loss(row) for row in rows])
    torch.testing.assert_close(found.losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.mean(), atol=1e-5, rtol=1e-5)
    own = {"toy": [1, 3], "ways": [0, 1, 2]}
    best = [own[row.task][int(by_hand(row.example.input)[own[row.task]].argmax())] for row in rows]
    judged = max(max(training_options(byte_level_tokenizer(), task).judged.values()) for task in TASKS)
    assert judged > 1  # "no way" continues "no"
    assert found.right.shape == (len(rows), judged)
    assert found.right.tolist() == [[ALL[b] == row.example.output] * judged for b, row in zip(best, rows, strict=True)]


def test_its_gradient_is_that_of_the_model_by_hand(generator):
    model, rows = made(generator).train(), rows_of("train")[5:12]  # of both tasks
    by_hand = ByHand(generator, model.head)
    model(**model.collator()([model.encode_row(row) for row in rows])).loss.backward()
    torch.stack([by_hand.loss(row) for row in rows]).mean().backward()
    torch.testing.assert_close(model.head.weight.grad, by_hand.head.weight.grad, atol=1e-5, rtol=1e-4)
    own = dict(model.generator.encoder.named_parameters())
    compared = [name for name, p in by_hand.model.named_parameters() if p.grad is not None]
    assert "encoder.layer.0.attention.self.query.weight" in compared
    for name in compared:
        expected = by_hand.model.get_parameter(name).grad
        torch.testing.assert_close(own[name].grad, expected, atol=1e-5, rtol=1e-3)
    assert model.head.weight.grad[[1, 3]].abs().max() > 1e-3


def test_a_finished_training_is_not_repeated_and_other_settings_are_refused(tmp_path, generator):
    adapter = fitted(tmp_path / "out", generator, train=quick(epochs=1))
    before = (adapter / "head.safetensors").stat().st_mtime_ns
    assert fitted(tmp_path / "out", generator, train=quick(epochs=1)) == adapter
    assert (adapter / "head.safetensors").stat().st_mtime_ns == before
    record = json.loads((tmp_path / "out/train.json").read_text())
    assert record["trainable_parameters"] == sum(p.numel() for p in made(generator).parameters())
    with refused("other settings", "epochs"):
        fitted(tmp_path / "out", generator, train=quick(epochs=2))


def test_it_learns_and_answers_known_and_unknown_tasks_without_a_call_of_the_llm(tmp_path, generator, monkeypatch):
    adapter = fitted(
        tmp_path / "out", generator, train=quick(epochs=30, learning_rate=0.02, generator_learning_rate=1e-3)
    )
    method = load(adapter)
    monkeypatch.setattr(type(base_llm(method.llm)), "forward", None)
    new = replace(toy_task("new", 30), test=tuple(Example(f"{row.input} again", row.output) for row in TASKS[0].test))
    run = RunWriter(tmp_path / "run", {})
    evaluate(method, [*TASKS, new], ["first_token"], run, variants="first")
    rows = {name: [row for row in run.rows if row["task"] == name] for name in ("toy", "ways", "new")}
    assert [row["outputs"]["first_token"] for row in rows["toy"]] == [row.output for row in TASKS[0].test]
    assert {row["outputs"]["first_token"] for row in rows["ways"]} <= {"maybe", "no", "no way"}
    scores = method.model.scores([row.input for row in new.test])
    assert [row["outputs"]["first_token"] for row in rows["new"]] == [ALL[place] for place in scores.argmax(1)]
    among = [("no", "yes")[place] for place in scores[:, [1, 3]].argmax(1)]
    assert [row["outputs"]["first_token_among_options"] for row in rows["new"]] == among


def test_queries_read_together_are_answered_as_each_alone(generator):
    model = made(generator).eval()
    queries = [row.input for row in (*TASKS[0].test, *TASKS[1].test)] * 4
    together = model.scores(queries)
    torch.testing.assert_close(together, torch.cat([model.scores([query]) for query in queries]), atol=1e-5, rtol=1e-5)


def test_a_loaded_one_is_the_same_and_is_refused_where_it_does_not_belong(tmp_path, generator):
    adapter = fitted(tmp_path / "out", generator, train=quick(epochs=1))
    one, other = load(adapter), load(tmp_path / "out")
    queries = [row.input for row in TASKS[0].test]
    assert torch.equal(one.model.scores(queries), other.model.scores(queries))
    plain = made(generator).eval()
    assert not torch.allclose(plain.scores(queries), one.model.scores(queries))
    assert json.loads(json.dumps(one.describe()))["training"]["tasks"].keys() == {"toy", "ways"}
    assert {path.name for path in adapter.iterdir()} == {"atv_config.json", "generator", "head.safetensors"}
    with refused("made for", "model_type llama against gpt2"):
        load(adapter, make_llm("gpt2", torch.float32))
    with refused("encoder needs an adapter"):
        load(None)
    with refused("no demonstrations", "--shots 4"):
        Encoder.load(make_llm(), byte_level_tokenizer(), adapter, shots=4)
    with refused("adapter of the method encoder", "atv"):
        METHODS["atv"].load(make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)
    with refused("other answers"):
        made(generator, TASKS[:1]).load_weights(adapter)


def test_the_encoder_and_the_head_have_rates_of_their_own(generator):
    model = made(generator)
    head, encoder = model.parameter_groups(quick())
    assert (head["lr"], encoder["lr"]) == (0.05, 0.01)
    assert {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert {id(p) for g in (head, encoder) for p in g["params"]} == {id(p) for p in model.parameters()}
    assert model.parameter_groups(quick(generator_learning_rate=None))[1]["lr"] == 0.05


@pytest.mark.parametrize("name", ["self", "constant", "random:2x64", 3])
def test_what_is_no_encoder_is_refused(name):
    with refused(name, "Hugging Face id"):
        EncoderConfig(name)


def test_the_variant_is_nothing_to_it(tmp_path, generator):
    method = load(fitted(tmp_path / "out", generator, train=quick(epochs=1)))
    renderers = TASKS[0].renderers().values()
    assert len(renderers) == 9
    assert len({str(method.choose(TASKS[0], TASKS[0].test, render)) for render in renderers}) == 1
