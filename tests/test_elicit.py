"""ELICIT: its states, the layers they are added at, what is retrieved, and a library that a kill does not spoil."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_generator, make_llm, toy_task
from refusals import refused
from safetensors.torch import load_file, save_file

from atv.config import ATVConfig, TrainConfig
from atv.data import Example, Task, Template
from atv.data.render import fitting
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.methods import METHODS, exemplars
from atv.methods.elicit import Elicit, ElicitConfig
from atv.methods.retriever import Retriever, embed, fit_classifier, load_encoder


def counting_task(name="counting"):
    """Nothing in common with the queries of `toy_task`."""
    examples = [Example(f"one two three four five six {i}", ("two", "six")[i % 2]) for i in range(24)]
    rows = tuple(examples[:8]), tuple(examples[8:16]), tuple(examples[16:])
    return Task(name, ("Count: {input}", "{input}, which?"), *rows)


TASKS = [toy_task(), counting_task()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a tiny random encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    make_generator(ATVConfig()).save(folder)
    return str(folder)


def fit(folder, encoder, llm=None, tasks=TASKS, force=False, **options):
    config = ElicitConfig(**{"exemplars": 3, "shots": 2, "layer_rows": 4, "encoder": encoder} | options)
    llm = llm or make_llm(dtype=torch.float32)
    return Elicit.fit(llm, byte_level_tokenizer(), tasks, folder, config, TrainConfig(seed=7), force=force)


def load(adapter, llm=None):
    return Elicit.load(llm or make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)


def with_state_added(llm, ids, vectors, scale):
    """Logits behind a prompt that is read whole, alone, with `vectors` {layer: vector} added at its last token."""
    handles = []
    for layer, vector in vectors.items():

        def edit(_, __, output, vector=vector):
            hidden = output[0] if isinstance(output, tuple) else output
            edited = hidden.clone()
            edited[:, -1] += (scale * vector).to(hidden.dtype)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handles.append(exemplars.decoder_layers(llm)[layer].register_forward_hook(edit))
    with torch.no_grad():
        logits = llm(torch.tensor([ids])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "peft"])
def test_states_are_the_hidden_states_of_a_prompt_written_by_hand(name):
    llm, tokenizer, task = make_llm(name), byte_level_tokenizer(), toy_task()
    prompts = exemplars.exemplar_prompts(llm, tokenizer, task, count=4, shots=2, seed=7)
    assert len({row for row, _ in prompts}) == 4
    for number, (row, prompt) in enumerate(prompts):
        template = task.templates[number % 3]
        *shown, last = tokenizer.decode(prompt.ids).split("\n\n")
        asked = {f"{template.replace('{input}', row.input)}\nA: {row.output}": row for row in task.train}
        assert last == f"{template.replace('{input}', task.train[row].input)}\nA:"
        assert len(shown) == prompt.demonstrations == 2
        assert task.train[row] not in [asked[text] for text in shown]
        with torch.no_grad():
            expected = llm(torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states
        (states,) = exemplars.last_states(llm, tokenizer, [prompt.ids])
        assert states.shape == (3, 32)
        for layer in (0, 1):
            torch.testing.assert_close(states[layer], expected[layer + 1][0, -1])
        base = llm.get_base_model() if name == "peft" else llm
        norm = base.transformer.ln_f if name == "gpt2" else base.model.norm  # is part of the last one that is returned
        torch.testing.assert_close(norm(states[2]), expected[3][0, -1])


def long_row(row):
    return row._replace(input=row.input + " the boats came in" * 90)


def test_a_long_query_is_cut_at_its_end_and_counted(capsys):
    task, tokenizer, llm = toy_task(), byte_level_tokenizer(), make_llm()
    rows = {split: list(getattr(task, split)) for split in ("train", "valid")}
    for split in rows.values():
        split[3] = long_row(split[3])
    task = dataclasses.replace(task, **{split: tuple(some) for split, some in rows.items()})
    prompts = exemplars.exemplar_prompts(llm, tokenizer, task, count=8, shots=2, seed=7)
    (cut,) = [prompt for row, prompt in prompts if row == 3]
    assert cut.demonstrations == 0
    assert 250 < len(cut.ids) <= 256
    assert task.train[3].input.startswith(cut.query)
    states = torch.randn(2, 3, 32, dtype=torch.float64)
    found = exemplars.layer_scores(llm, tokenizer, task, states, 1.0, rows=task.valid)

    render = Template(
        task.templates[0], "A:"
    )  # of the fourth row; the first token of an answer tells the options apart
    rows["valid"][3] = task.valid[3]._replace(input=fitting(render, tokenizer, task.valid[3], 256).query)
    expected = exemplars.layer_scores(llm, tokenizer, task, states, 1.0, rows=rows["valid"])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    said = " ".join(capsys.readouterr().err.split())
    for split in ("training", "validation"):
        assert f"toy: the queries of 1 of 8 {split} rows are cut at their end" in said


def test_demonstrations_that_the_context_has_no_room_for_are_left_out_and_a_row_without_room_is_refused():
    task, tokenizer, llm = toy_task(), byte_level_tokenizer(), make_llm()
    llm.config.max_position_embeddings = 90
    prompts = exemplars.exemplar_prompts(llm, tokenizer, task, count=8, shots=16, seed=7)
    assert all(0 < prompt.demonstrations < 7 and len(prompt.ids) <= 90 for _, prompt in prompts)
    rows = [row for row, _ in exemplars.exemplar_prompts(llm, tokenizer, task, count=12, shots=1, seed=7)]
    assert sorted(rows[:8]) == list(range(8))
    assert rows[8:] == rows[:4]
    llm.config.max_position_embeddings = 3
    with refused("training row", "room for 3"):
        exemplars.exemplar_prompts(llm, tokenizer, task, count=1, shots=1, seed=7)
    with refused("validation row", "room for 3"):
        exemplars.layer_scores(llm, tokenizer, task, torch.zeros(1, 3, 32), 1.0, rows=task.valid[:2])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("at_once", [100, 10, 2])
def test_the_best_layer_is_that_of_full_passes_over_all_layers(name, at_once, monkeypatch):
    monkeypatch.setattr(exemplars, "AT_ONCE", at_once)
    llm, tokenizer = make_llm(name), byte_level_tokenizer()
    task = dataclasses.replace(toy_task(), valid=(Example("the kettle", "yes"), *toy_task().valid))  # unequal lengths
    torch.manual_seed(0)
    states, scale = 3 * torch.randn(4, 3, 32, dtype=torch.float64), 2.0
    read = []
    hook = llm.register_forward_pre_hook(lambda _, __, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True)
    right, likely = exemplars.layer_scores(llm, tokenizer, task, states, scale, rows=task.valid[:5])
    hook.remove()
    assert max(read) == min(at_once, 20)
    best = exemplars.best_layers(right, likely)
    for exemplar in range(4):
        scores = []
        for layer in range(3):
            hits, chances = [], []
            for number, row in enumerate(task.valid[:5]):
                prompt = task.templates[number % 3].replace("{input}", row.input) + "\nA:"
                ids = tokenizer(prompt)["input_ids"]
                target = tokenizer(f"{prompt} {row.output}")["input_ids"][len(ids)]
                logits = with_state_added(llm, ids, {layer: states[exemplar, layer]}, scale)
                hits.append(float(logits.argmax() == target))
                chances.append(logits.log_softmax(-1)[target].item())
            scores.append((sum(hits) / 5, sum(chances) / 5))
        assert right[exemplar].tolist() == pytest.approx([hit for hit, _ in scores])
        assert likely[exemplar].tolist() == pytest.approx([chance for _, chance in scores], rel=1e-5)
        assert best[exemplar] == scores.index(max(scores))
    assert len(set(best.tolist())) > 1


def test_the_layers_are_chosen_on_rows_with_each_answer_in_its_share_of_a_sorted_table(tmp_path, encoder, monkeypatch):
    rows = tuple(Example(f"the harbour {number}", "no" if number < 60 else "yes") for number in range(80))
    task, used = dataclasses.replace(toy_task(), valid=rows), []

    def seen(llm, tokenizer, task, states, scale, rows):
        used.append(rows)
        return exemplars.layer_scores(llm, tokenizer, task, states, scale, rows)

    monkeypatch.setattr("atv.methods.elicit.layer_scores", seen)
    for folder in ("one", "again"):
        fit(tmp_path / folder, encoder, tasks=[task], layer_rows=8)
    one, again = used
    assert 1 <= [row.output for row in one].count("yes") <= 3
    assert one == again


def test_more_right_answers_decide_then_the_likelier_ones_and_never_what_is_no_number():
    right = torch.tensor([[0.2, 0.5, 0.5], [0.1, 0.1, 0.1]])
    likely = torch.tensor([[-1.0, -3.0, -2.0], [float("nan"), -9.0, float("nan")]])
    assert exemplars.best_layers(right, likely).tolist() == [2, 1]


@pytest.mark.parametrize(("layers", "where"), [("best", None), ("all", [0, 1, 2]), ("top", [2])])
def test_the_edit_is_that_of_a_hook_written_by_hand(tmp_path, encoder, layers, where):
    loaded, llm = load(fit(tmp_path, encoder, layers=layers)), make_llm(dtype=torch.float32)
    kept = load_file(tmp_path / "adapter" / "library.safetensors")
    kept["layers"] = torch.tensor([0, 1, 2, 2, 0, 1])  # so that queries read together have theirs at different layers
    method = Elicit(loaded.llm, loaded.tokenizer, loaded.config, kept, loaded.retriever, {})
    run, task = RunWriter(tmp_path / "run", {}), TASKS[0]
    evaluate(method, [task], ["first_token"], run, variants="first", batch_size=8)
    predictions = [row["outputs"]["first_token"] for row in run.rows]
    by_hand, plain, used = [], [], set()
    for row in task.test:
        ids = method.tokenizer(f"{row.input}\nyes or no?\nA:")["input_ids"]
        entry = int(method.retriever.pick([row.input]))
        at = where or [int(kept["layers"][entry])]
        vectors = {layer: kept["states"][entry, layer] for layer in at}
        used.add(int(kept["layers"][entry]))
        by_hand.append(method.tokenizer.decode([with_state_added(llm, ids, vectors, 2.0).argmax()]))
        plain.append(method.tokenizer.decode([with_state_added(llm, ids, {}, 2.0).argmax()]))
    assert predictions == by_hand
    assert predictions != plain
    assert len(used) > 1


def test_the_classifier_is_at_the_minimum_of_its_loss():
    torch.manual_seed(0)
    inputs, labels = torch.nn.functional.normalize(torch.randn(60, 5), dim=-1), torch.arange(60) % 3
    weight, bias = (tensor.double() for tensor in fit_classifier(inputs, labels, 3, penalty=0.5))
    chances = (inputs.double() @ weight.T + bias).exp()
    missing = torch.nn.functional.one_hot(labels).double() - chances / chances.sum(1, keepdim=True)
    torch.testing.assert_close(0.5 * weight, missing.T @ inputs.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(missing.sum(0), torch.zeros(3, dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_retriever_names_the_task_and_then_the_nearest_entry_of_it(encoder):
    small = load_encoder(encoder)
    words = ["kettle", "lid", "boats", "sticks", "leaks", "opinion", "positive", "negative", "first", "no"]
    texts = ("The harbour was quiet before the first boats came in, {}.", "one two three four five six {}")
    known, asked = ([text.format(word) for text in texts for word in some] for some in (words[:5], words[5:]))
    embedded, labels = embed(small, known), torch.arange(2).repeat_interleave(5)
    (alone,) = embed(small, known[:1])  # neither order nor padding changes anything
    torch.testing.assert_close(embedded[0], alone)
    retriever = Retriever(small, *fit_classifier(embedded, labels, 2), embedded, labels)
    assert retriever.pick(known).tolist() == list(range(10))
    for number, picked in enumerate(retriever.pick(asked).tolist()):
        mine = embed(small, [asked[number]])[0]
        cosines = [float(mine @ entry) if labels[i] == number // 5 else -2.0 for i, entry in enumerate(embedded)]
        assert cosines[picked] == pytest.approx(max(cosines), abs=1e-6)


def test_a_killed_training_goes_on_and_ends_with_the_same_library(tmp_path, encoder, monkeypatch):
    whole = fit(tmp_path / "whole", encoder)
    score, asked = exemplars.layer_scores, []

    def killed(llm, tokenizer, task, *rest):
        asked.append(task.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score(llm, tokenizer, task, *rest)

    monkeypatch.setattr("atv.methods.elicit.layer_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", encoder)
    assert not (tmp_path / "killed" / "adapter").exists()
    with refused("other settings", "scale"):
        fit(tmp_path / "killed", encoder, scale=1.0)
    resumed = fit(tmp_path / "killed", encoder)
    assert asked == ["toy", "counting", "counting"]
    for name in ("library.safetensors", "retriever.safetensors"):
        there, here = load_file(whole / name), load_file(resumed / name)
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in there)
    assert not (tmp_path / "killed" / "parts").exists()
    assert json.loads((tmp_path / "killed" / "train.json").read_text())["finished"]
    assert fit(tmp_path / "killed", encoder) == resumed
    assert len(asked) == 3  # nothing to do
    monkeypatch.setattr("atv.methods.elicit.layer_scores", lambda *_: pytest.fail("as good as killed"))
    with pytest.raises(pytest.fail.Exception):
        fit(tmp_path / "killed", encoder, scale=1.0, force=True)
    assert not resumed.exists()
    monkeypatch.setattr("atv.methods.elicit.layer_scores", killed)
    fit(tmp_path / "killed", encoder, scale=1.0)
    assert len(asked) == 5


def test_a_library_is_refused_with_an_encoder_that_has_changed_since(tmp_path, encoder):
    folder, toy = tmp_path / "encoder", [toy_task()]
    shutil.copytree(encoder, folder)
    adapter = fit(tmp_path / "out", str(folder), tasks=toy)
    load(adapter)
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with refused("made with a frozen encoder named", "other weights"):
        load(adapter)
    about = json.loads((adapter / "atv_config.json").read_text())
    del about["encoder"]["weights"]  # as before they were recorded
    (adapter / "atv_config.json").write_text(json.dumps(about))
    load(adapter)
    (adapter / "atv_config.json").write_text(json.dumps(about | {"encoder": "a name"}))
    with refused("encoder is 'a name'"):
        load(adapter)


def test_a_loaded_library_is_the_saved_one_and_is_refused_where_it_does_not_belong(tmp_path, encoder):
    adapter = fit(tmp_path, encoder)
    method, other = load(adapter), load(tmp_path)  # the folder of the training is taken for its adapter
    queries = [row.input for task in TASKS for row in task.test]
    assert torch.equal(method.retriever.pick(queries), other.retriever.pick(queries))
    said = json.loads(json.dumps(method.describe()))
    assert said["config"]["shots"] == 2
    assert list(said["training"]["tasks"]) == ["toy", "counting"]
    valid = method.retriever.pick([row.input for task in TASKS for row in task.valid])
    right = (method.retriever.tasks[valid] == torch.arange(2).repeat_interleave(8)).double().mean()
    assert said["training"]["retriever_accuracy"] == right > 0.5
    assert not {path.suffix for path in adapter.iterdir()} - {".safetensors", ".json"}
    with refused("made for", "model_type llama against gpt2"):
        load(adapter, make_llm("gpt2", torch.float32))
    with refused("elicit needs an adapter"):
        load(None)
    with refused("no demonstrations", "--shots 4"):
        Elicit.load(make_llm(), byte_level_tokenizer(), adapter, shots=4)
    with refused("adapter of the method elicit", "atv"):
        METHODS["atv"].load(make_llm(dtype=torch.float32), byte_level_tokenizer(), adapter)
    make_atv(dtype=torch.float32).save_pretrained(tmp_path / "atv")
    with refused("adapter of the method atv", "elicit"):
        load(tmp_path / "atv")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exemplars": 0}, "exemplars is 0"),
        ({"shots": 1.5}, "shots is 1.5"),
        ({"layers": "botom"}, "bottom"),
        ({"scale": float("nan")}, "scale is nan"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, named):
    with refused(named):
        ElicitConfig(**options)
