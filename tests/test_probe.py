"""The probe against scikit-learn, its choices against a loop written by hand, and rows that need no LLM."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_level_tokenizer, make_generator, make_llm, toy_task
from refusals import refused
from safetensors.torch import load_file, save_file

from atv.config import ATVConfig, TrainConfig
from atv.data import Example, Task
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.files import sha256
from atv.lm.hooks import decoder_layers
from atv.lm.load import load_encoder as load_model
from atv.methods import METHODS, Choice, Method, learn_once
from atv.methods.answers import choices
from atv.methods.exemplars import last_states
from atv.methods.probe import PENALTIES, Labelled, Probe, ProbeConfig, best_layer, best_penalty, fit
from atv.methods.retriever import load_encoder

linear_model = pytest.importorskip("sklearn.linear_model")


def colours():
    """Three answers, none of them one of the toy task's."""
    words = ("red", "green", "blue")
    examples = [Example(f"one {words[i % 3]} kettle {i}", words[i % 3]) for i in range(27)]
    templates = ("Colour: {input}", "{input}, which?")
    return Task("colours", templates, tuple(examples[:9]), tuple(examples[9:18]), tuple(examples[18:]))


TASKS = [toy_task(), colours()]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Folder of a tiny random encoder."""
    folder = tmp_path_factory.mktemp("generator")
    make_generator(ATVConfig()).save(folder)
    return str(folder)


def trained(out, generator, llm=None, tasks=TASKS, force=False, **options):
    llm = llm or make_llm(dtype=torch.float32)
    config = ProbeConfig(**{"generator": generator} | options)
    return Probe.fit(llm, byte_level_tokenizer(), tasks, out, config, TrainConfig(), force=force)


def load(adapter, llm=None):
    return Probe.load(llm or make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)


def labelled(rows, width, answers, seed=0):
    torch.manual_seed(seed)
    states = torch.randn(rows, width) * torch.linspace(0.1, 9, width) + 5
    told = [answers[i % len(answers)] for i in range(rows)]
    states[:, 0] += torch.tensor([float(answers.index(answer)) for answer in told])
    return Labelled(states, told)


def by_sklearn(train, valid, penalty):
    """Probabilities (rows, answers); scikit-learn's model of several classes, also where there are two."""
    states, asked = (rows.states.double().numpy() for rows in (train, valid))
    mean, deviation = states.mean(0), states.std(0)
    model = linear_model.LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10_000)
    answers = sorted(set(train.answers))
    if len(answers) == 2:
        model.set_params(C=2 / penalty)  # it learns one weight, which is the difference of two: half their squares
    model.fit((states - mean) / deviation, train.answers)
    return model.predict_proba((asked - mean) / deviation)


@pytest.mark.parametrize("answers", [["no", "yes"], ["blue", "green", "red"]])
@pytest.mark.parametrize(("rows", "width"), [(60, 8), (12, 30)])
@pytest.mark.parametrize("penalty", [10.0, 0.5])
def test_a_classifier_is_that_of_scikit_learn(answers, rows, width, penalty):
    train, valid = labelled(rows, width, answers), labelled(20, width, answers, seed=1)
    known, classifier = fit(train, penalty)
    assert known == answers
    found = classifier.scores(valid.states).softmax(-1)
    np.testing.assert_allclose(found.numpy(), by_sklearn(train, valid, penalty), atol=1e-4)


def test_an_answer_alone_is_always_given_and_a_state_that_never_changes_counts_for_nothing():
    rows = Labelled(torch.cat([torch.randn(5, 3), torch.ones(5, 1)], dim=1), ["yes"] * 5)
    known, classifier = fit(rows, 1.0)
    assert known == ["yes"]
    assert classifier.scores(rows.states).shape == (5, 1)
    assert classifier.scores(rows.states + 7).isfinite().all()


def test_the_penalty_and_the_layer_are_those_with_most_validation_rows_right_the_stronger_and_the_lower_if_equal():
    torch.manual_seed(3)
    answers = ["no", "yes"]
    layers = [labelled(16, 12, answers, seed) for seed in range(3)]
    train = [Labelled(torch.stack([rows.states for rows in layers], dim=1), layers[0].answers)] * 2
    others = [labelled(11, 12, answers, 10 + seed) for seed in range(3)]
    valid = [Labelled(torch.stack([rows.states for rows in others], dim=1), others[0].answers)] * 2
    right = {}
    for layer in range(3):
        for penalty in PENALTIES:
            guessed = by_sklearn(train[0].at(layer), valid[0].at(layer), penalty).argmax(1)
            right[layer, penalty] = np.mean([answers[g] == a for g, a in zip(guessed, valid[0].answers, strict=True)])
    best = max(right.values())
    strongest = max(penalty for layer, penalty in right if right[layer, penalty] == best)
    lowest = min(layer for layer, penalty in right if right[layer, penalty] == best and penalty == strongest)
    assert best_layer(train, valid, PENALTIES) == (lowest, (strongest, pytest.approx(best)))
    assert len(set(right.values())) > 3
    alike = [(labelled(8, 3, ["yes"]), labelled(4, 3, ["yes"]))]  # right whatever the penalty
    assert best_penalty(alike, PENALTIES) == (1000.0, 1.0)


def mean_states(folder, queries):
    """By hand: the mean of a model's last hidden states over a query's tokens."""
    model, tokenizer = load_model(folder).eval(), byte_level_tokenizer()
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([tokenizer(q)["input_ids"]])).last_hidden_state[0].mean(0) for q in queries]
        )


def llm_states(llm, task, rows, layer):
    """By hand: what a layer gives out at the last token of the first template's prompt, each read alone."""
    found = []
    for row in rows:
        ids = byte_level_tokenizer()(f"{task.templates[0].replace('{input}', row.input)}\nA:")["input_ids"]
        caught = []
        hook = decoder_layers(llm)[layer].register_forward_hook(lambda _, __, out, caught=caught: caught.append(out))
        with torch.no_grad():
            llm(torch.tensor([ids]))
        hook.remove()
        found.append((caught[0][0] if isinstance(caught[0], tuple) else caught[0])[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("source", ["generator", "llm"])
def test_its_answers_are_those_of_scikit_learn_on_states_taken_by_hand(tmp_path, generator, source):
    llm, layer = make_llm(dtype=torch.float32), {"layer": 1} if source == "llm" else {}
    method = load(trained(tmp_path, generator, llm, source=source, penalty=2.0, **layer), llm)

    def states(task, rows):
        if source == "generator":
            return mean_states(generator, [row.input for row in rows])
        return llm_states(llm, task, rows, 1)

    def of(task, split):
        rows = getattr(task, split)
        return Labelled(states(task, rows), [row.output for row in rows])

    for task in TASKS:
        answers = sorted({row.output for row in task.train})
        expected = by_sklearn(of(task, "train"), of(task, "test"), 2.0).argmax(1)
        found = method.choose(task, task.test, task.renderers()[1, "The answer is"])
        assert [choice.answer for choice in found] == [answers[place] for place in expected]
        assert all(choice.answer == max(choice.scores, key=choice.scores.get) for choice in found)
        assert all(sum(map(math.exp, choice.scores.values())) == pytest.approx(1) for choice in found)
        assert all((choice.prompt_tokens > 0) == (source == "llm") for choice in found)
    # A task that was not trained on: one classifier over all answers.
    new = replace(TASKS[0], name="new")
    parts = [of(task, "train") for task in TASKS]
    joined = Labelled(torch.cat([p.states for p in parts]), [a for p in parts for a in p.answers])
    shown = by_sklearn(joined, of(new, "test"), 2.0)
    answers = ["blue", "green", "no", "red", "yes"]
    found = method.choose(new, new.test, new.training_renderers()[0])
    assert [choice.answer for choice in found] == [answers[place] for place in shown.argmax(1)]
    among = [max(("no", "yes"), key=choice.scores.get) for choice in found]
    assert among == [("no", "yes")[p] for p in shown[:, [2, 4]].argmax(1)]


def test_the_best_layer_is_chosen_and_kept(tmp_path, generator):
    llm = make_llm(dtype=torch.float32)
    adapter = trained(tmp_path, generator, llm, source="llm")
    said = load(adapter, llm).describe()["training"]
    splits = [
        [
            Labelled(
                torch.stack([llm_states(llm, task, getattr(task, split), at) for at in range(3)], dim=1),
                [r.output for r in getattr(task, split)],
            )
            for task in TASKS
        ]
        for split in ("train", "valid")
    ]
    layer, (penalty, right) = best_layer(*splits, PENALTIES)
    assert (said["layer"], said["penalty"], said["valid_accuracy"]) == (layer, penalty, pytest.approx(right))
    assert json.loads((tmp_path / "train.json").read_text())["chosen"]["layer"] == layer


def test_states_of_prompts_read_together_are_those_of_each_alone():
    llm, tokenizer = make_llm(), byte_level_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("a quiet harbour", "the kettle", "a quiet harbour", "one")]
    together = last_states(llm, tokenizer, prompts)
    assert together.shape == (4, 3, 32)
    for row, ids in enumerate(prompts):
        torch.testing.assert_close(together[row], last_states(llm, tokenizer, [ids])[0])
    for layer in range(3):
        torch.testing.assert_close(last_states(llm, tokenizer, prompts, layer)[:, 0], together[:, layer])


def test_rows_are_recorded_without_a_call_of_the_llm_and_resumed(tmp_path, generator, monkeypatch):
    method = load(trained(tmp_path / "out", generator))
    monkeypatch.setattr(type(method.llm), "forward", None)
    new = replace(toy_task("new", 30), test=tuple(Example(f"{row.input} again", row.output) for row in TASKS[0].test))
    asked = [*TASKS, new]
    evaluate(method, asked, ["first_token"], RunWriter(tmp_path / "whole", {}), variants="diagonal")
    rows = [json.loads(line) for line in (tmp_path / "whole/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == sum(len(task.test) * len(task.templates) for task in asked)
    for row in rows:
        assert row["prompt_tokens"] == 0
        assert row["seconds"] > 0
        assert row["scores"]["first_token_among_options"] == (
            row["outputs"]["first_token_among_options"] == row["target"]
        )
        if row["task"] != "new":
            assert row["outputs"]["first_token"] == row["outputs"]["first_token_among_options"]
            assert row["scores"]["first_token"] == (
                row["scores"]["first_token_among_options"] if row["task"] == "toy" else None
            )
    assert {row["outputs"]["first_token_among_options"] for row in rows if row["task"] == "new"} <= {"yes", "no"}
    run = RunWriter(tmp_path / "part", {})
    append = RunWriter.append

    def killed(self, some):
        append(self, some[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(RunWriter, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(method, asked, ["first_token"], run, variants="diagonal", batch_size=5)
    monkeypatch.setattr(RunWriter, "append", append)
    resumed = RunWriter(tmp_path / "part", {})
    evaluate(method, asked, ["first_token"], resumed, variants="diagonal", batch_size=5)

    def without_seconds(some):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in some]

    assert without_seconds(resumed.rows) == without_seconds(rows)


class Says(Method):
    """Answers what it is told to."""

    name = "says"
    answers: tuple[str, ...] = ()

    def choose(self, task, examples, render):
        return [Choice(answer, {task.options[0]: 0.0}) for answer in self.answers]


@pytest.mark.parametrize(("options", "apart"), [(("yes", "no"), True), (("no", "no way"), False)])
def test_it_is_right_by_first_tokens_where_these_tell_the_options_apart(tmp_path, options, apart):
    tokenizer = byte_level_tokenizer()
    rows = tuple(Example(f"kettle {i}", options[i % 2]) for i in range(4))
    task = Task("t", ("{input}",), (Example("a", options[0]),), (Example("b", options[1]),), rows, options=options)
    method = Says(make_llm(dtype=torch.float32), tokenizer)
    said = [options[0], options[1], "no way at all", "kettle"]
    method.answers = tuple(said)
    evaluate(method, [task], ["first_token"], run := RunWriter(tmp_path / "run", {}), variants="first")

    def first(text):
        return tokenizer(f"A: {text}")["input_ids"][len(tokenizer("A:")["input_ids"])]

    expected = [first(text) == first(row.output) if apart else None for text, row in zip(said, rows, strict=True)]
    assert [row["scores"]["first_token"] for row in run.rows] == expected
    assert [row["scores"]["first_token_among_options"] for row in run.rows] == [
        row.output == options[0] for row in rows
    ]


def test_of_equal_scores_the_first_is_taken_and_scores_are_log_probabilities():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    found = choices(scores, ["a", "b", "c"])
    assert [choice.answer for choice in found] == ["b", "a"]
    for choice, row in zip(found, scores.softmax(-1).tolist(), strict=True):
        assert [math.exp(choice.scores[answer]) for answer in "abc"] == pytest.approx(row)


def test_a_loaded_one_answers_the_same_and_is_refused_where_it_does_not_belong(tmp_path, generator):
    adapter = trained(tmp_path / "out", generator)
    kept = load_file(adapter / "probe.safetensors")
    assert {name.partition("/")[0] for name in kept} == {"toy", "colours", ""}
    render = TASKS[1].training_renderers()[0]
    first, again = (load(path).choose(TASKS[1], TASKS[1].test, render) for path in (adapter, tmp_path / "out"))
    assert first == again
    assert not {path.suffix for path in adapter.iterdir()} - {".safetensors", ".json"}
    with refused("made for", "model_type llama against gpt2"):
        load(adapter, make_llm("gpt2", torch.float32))
    with refused("probe needs an adapter"):
        load(None)
    with refused("no demonstrations", "--shots 4"):
        Probe.load(make_llm(), byte_level_tokenizer(), adapter, shots=4)
    with refused("adapter of the method probe", "atv"):
        METHODS["atv"].load(make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)
    about = json.loads((adapter / "atv_config.json").read_text())
    cut = {name: tensor[:1] for name, tensor in kept.items()}
    save_file(cut, adapter / "probe.safetensors")
    about["sha256"]["probe.safetensors"] = sha256(adapter / "probe.safetensors")
    (adapter / "atv_config.json").write_text(json.dumps(about))
    with refused("probe.safetensors does not fit"):
        load(adapter)


def test_another_generator_of_the_same_name_is_refused(tmp_path):
    config = ATVConfig()
    make_generator(config).save(tmp_path / "generator")
    adapter = trained(tmp_path / "out", str(tmp_path / "generator"))
    other = make_generator(config)
    with torch.no_grad():
        other.encoder.encoder.layer[0].output.dense.weight.mul_(2)
    other.save(tmp_path / "generator")
    with refused("made with a frozen generator", "other weights"):
        load(adapter)


def test_a_finished_one_is_not_repeated_other_settings_are_refused_and_few_validation_rows_are_said(
    tmp_path, generator, capsys
):
    adapter = trained(tmp_path, generator)
    said = capsys.readouterr().err
    assert "17 validation rows choose among 5 settings" in said
    assert "5.9 points" in said
    before = (adapter / "probe.safetensors").stat().st_mtime_ns
    assert trained(tmp_path, generator) == adapter
    assert "finished" in capsys.readouterr().err
    assert (adapter / "probe.safetensors").stat().st_mtime_ns == before
    with refused("other settings", "penalty"):
        trained(tmp_path, generator, penalty=1.0)
    trained(tmp_path, generator, penalty=1.0, force=True)
    assert "validation rows choose" not in capsys.readouterr().err
    assert json.loads((tmp_path / "train.json").read_text())["finished"]
    assert learn_once.FEW > 17


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"source": "lmm"}, ["'lmm'", "llm"]),
        ({"generator": "self"}, ["'self'", "Hugging Face id"]),
        ({"generator": "random:2x64"}, ["random:2x64"]),
        ({"layer": 2}, ["layer is 2", "generator"]),
        ({"source": "llm", "layer": -1}, ["layer is -1"]),
        ({"penalty": 0}, ["penalty is 0"]),
        ({"penalty": "strong"}, ["penalty is 'strong'", "best"]),
    ],
)
def test_options_that_no_probe_can_have_are_refused(options, named):
    with refused(*named):
        ProbeConfig(**options)


def test_the_llm_reads_long_queries_cut_at_their_end(tmp_path, generator):
    splits = {split: list(getattr(TASKS[0], split)) for split in ("train", "valid", "test")}
    for rows in splits.values():
        rows[0] = rows[0]._replace(input=rows[0].input + " the boats came in" * 90)
    task, llm = replace(TASKS[0], **{split: tuple(rows) for split, rows in splits.items()}), make_llm()
    method = load(trained(tmp_path, generator, llm, [task], source="llm", layer=1, penalty=1.0), llm)
    tokens = [choice.prompt_tokens for choice in method.choose(task, task.test, task.training_renderers()[0])]
    assert 250 < tokens[0] <= 256
    assert max(tokens[1:]) < 50


def test_a_layer_that_the_llm_does_not_have_and_a_prompt_without_room_for_the_query_are_refused(tmp_path, generator):
    with refused("layer is 3", "layers 0 to 2"):
        trained(tmp_path / "a", generator, source="llm", layer=3)
    llm = make_llm(dtype=torch.float32)
    llm.config.max_position_embeddings = 3
    with refused("training row", "room for 3"):
        trained(tmp_path / "b", generator, llm, source="llm")


def test_an_encoder_of_bare_queries_reads_them_without_a_template(generator):
    encoder = load_encoder(generator)
    assert (encoder.query_template, encoder.pooling, encoder.training) == ("{query}", "mean", False)
