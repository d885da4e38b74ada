"""Looking inside an ATV: the nearest training queries, the answers, and the lens against loops written by hand."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task

from atv import ATVConfig, ATVError, Example, TrainConfig, TrainingQueries, inspect_query, load_tasks, predict
from atv.data import Task, as_trained
from atv.evaluation.inspect import Distance, Said
from atv.lm.scoring import encoded_options
from atv.methods.fixed import FixedModel
from atv.model import ATVModel
from atv.report import inspection_lines, inspection_table
from atv.steer import EDITS, AddVectors
from atv.training.loop import train
from atv.training.record import training_tasks

QUERY = "the harbour leaks"


def trained(task=None, **options):
    """A model in double precision that says that it was trained on a task."""
    model = make_atv(**{"scale": 1.5} | options)
    task = task or toy_task()
    model.training_summary = {"tasks": {task.name: task.asking() | {"answer_tokens": 8}}}
    return model


def gated(task):
    """The same with a calibrated expansion of random weights, and a gate that knows the task's training queries."""
    model = trained(task, parametrisation="calibrated", gate=0.05)
    torch.manual_seed(5)
    for weights in model.expansion.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    train, valid = (torch.stack([state_of(model, row.input) for row in rows]) for rows in (task.train, task.valid))
    model.expansion.gate.fit([train], 0.05, [valid])
    return model.double()


@torch.no_grad()
def state_of(model, query):
    """The generator's state of one query, read alone."""
    ids = torch.tensor(model.generator.encode([query]))
    return model.generator(ids, torch.ones_like(ids))[0]


def cosine(one, other):
    return (one @ other / (one.norm() * other.norm())).item()


@torch.no_grad()
def streams(model, ids, vectors):
    """The residual stream after each layer of a Llama, with a vector added to the last prompt token of each layer."""
    llm, prompt = model.llm.model, len(ids)
    states = []

    def hook(index):
        def add(module, args, output):
            output[:, prompt - 1] += vectors[index]
            states.append(output[0, -1].clone())

        return add

    hooks = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(llm.layers)]
    try:
        llm(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    return states


@torch.no_grad()
def by_hand(model, query, vectors):
    """Probability of yes after each layer, of the two options yes and no, whose first tokens differ."""
    prompt = model.render([query])[0]
    firsts = [model.tokenizer(f" {text}")["input_ids"][0] for text in ("yes", "no")]
    assert firsts[0] != firsts[1]
    found = []
    for state in streams(model, prompt.ids, vectors):
        logits = model.llm.lm_head(model.llm.model.norm(state))[firsts]
        found.append(logits.softmax(0)[0].item())
    return found


def test_the_lens_is_that_of_a_loop_over_the_layers():
    model, begins = trained(scale=1.0), []
    for query in (QUERY, "a quiet harbour", "the first boats", "the kettle", "one two three"):
        found = inspect_query(model, query)
        vectors = model.task_vectors([query])[0]
        plain, steered = (by_hand(model, query, added) for added in (torch.zeros_like(vectors), vectors))
        assert found.compared_answers == ["no", "yes"]
        assert [lens.plain["yes"] for lens in found.layers] == pytest.approx(plain, abs=1e-6)
        assert [lens.steered["yes"] for lens in found.layers] == pytest.approx(steered, abs=1e-6)
        assert [lens.norm for lens in found.layers] == pytest.approx([v.norm().item() for v in vectors], rel=1e-5)
        raised = ["yes" if after > before else "no" for before, after in zip(plain, steered, strict=True)]
        leads = ["yes" if after > 0.5 else "no" for after in steered]
        assert [lens.raised for lens in found.layers] == raised
        assert (found.promoted, found.leader) == (raised[-1], leads[-1])
        for values, since in ((raised, found.promoted_from), (leads, found.leads_from)):
            assert all(value == values[-1] for value in values[since:])
            assert since == 0 or values[since - 1] != values[-1]
        begins.append((found.promoted_from, found.leads_from))
    assert all(len(set(each)) > 1 for each in zip(*begins, strict=True))  # they differ, so that a wrong one would show


def test_the_vector_alone_and_the_tokens_are_those_of_norm_and_head():
    model = trained()
    found = inspect_query(model, QUERY)
    with torch.no_grad():
        vectors = (1.5 * model.task_vectors([QUERY])[0]).float().double()
        norm, head = model.llm.model.norm, model.llm.lm_head
        raised = head(norm(vectors)) - head(norm(torch.zeros_like(vectors)))
    first = {text: model.tokenizer(f" {text}")["input_ids"][0] for text in ("no", "yes")}
    for lens, own in zip(found.layers, raised, strict=True):
        assert lens.alone == max(first, key=lambda text, own=own: own[first[text]].item())
        assert lens.alone_tokens[0] == [model.tokenizer.decode([own.argmax()]), pytest.approx(own.max().item())]
        assert sum(value for _, value in lens.steered_tokens) <= 1


def shared_task(ends):
    """Answers of which two begin with the same words, and, without ends, a third is the beginning of both."""
    answers = ["the lid", "the lid sticks", "the boats"] if not ends else ["the lid", "the boats", "the kettle"]
    rows = [Example(f"{QUERY} {i}", answers[i % 3]) for i in range(18)]
    task = Task("shared", ("{input}\nwhat?",), tuple(rows[:6]), tuple(rows[6:12]), tuple(rows[12:]))
    return replace(task, renderer=replace(task.renderer, ends=ends))


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("positions", ["last", "answer"])
def test_answers_with_a_common_beginning_are_judged_where_they_differ(ends, positions):
    task = shared_task(ends)
    model = trained(task, positions=positions)
    found = inspect_query(model, QUERY)
    prompt, tokens = (
        model.render([QUERY])[0],
        encoded_options(model.tokenizer, task.training_renderers()[0], task.options),
    )
    assert tokens.longest > 0
    assert bool(tokens.continued) is not ends
    vectors = 1.5 * model.task_vectors([QUERY])

    @torch.no_grad()
    def score(text, ids):
        """Log-probability of the tokens up to where the answer differs, from one pass over each beginning."""
        total = 0.0
        for place in range(tokens.judged[text]):
            inputs = torch.tensor([[*prompt.ids, *ids[:place]]])
            where = torch.zeros(inputs.shape, dtype=torch.bool)
            where[:, len(prompt.ids) - 1 :] = positions == "answer"
            where[:, len(prompt.ids) - 1] = True
            hooks = [
                layer.register_forward_hook(lambda m, a, o, v=vectors[0, index], w=where: o + w[..., None] * v)
                for index, layer in enumerate(model.llm.model.layers)
            ]
            logits = model.llm(input_ids=inputs).logits[0, -1].log_softmax(-1)
            for hook in hooks:
                hook.remove()
            if place < len(ids):
                total += logits[ids[place]].item()
            else:
                others = [own[len(ids)] for own in tokens.ids if own[: len(ids)] == ids and len(own) > len(ids)]
                total += (1 - logits[others].exp().sum()).log().item()
        return total

    scores = torch.tensor([score(*pair) for pair in zip(tokens.texts, tokens.ids, strict=True)])
    assert list(found.layers[-1].steered.values()) == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
    assert found.leader == tokens.texts[int(scores.argmax())]


def test_the_nearest_training_queries_are_those_of_a_comparison_with_each():
    task = toy_task(rows=90)
    model = gated(task)
    known = TrainingQueries(model, [task])
    for query in (QUERY, "something else entirely", task.train[4].input):
        found = inspect_query(model, query, known=known)
        own = state_of(model, query)
        cosines = {row: cosine(own, state_of(model, row.input)) for row in task.train}
        best = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
        assert [(near.query, near.answer) for near in found.nearest] == [(row.input, row.output) for row in best]
        assert [near.cosine for near in found.nearest] == pytest.approx([cosines[row] for row in best], abs=1e-6)
        assert found.distance.nearness == pytest.approx(sum(near.cosine for near in found.nearest) / 3, abs=1e-6)
        assert found.gate == pytest.approx(model.gate([query]).item())
        assert (found.compared, found.training) == (30, 30)
    assert found.nearest[0].cosine == pytest.approx(1)


def test_of_many_training_queries_some_are_drawn(monkeypatch):
    monkeypatch.setattr("atv.evaluation.inspect.MOST", 4)
    task, model = toy_task(rows=30), trained()
    known = TrainingQueries(model, [task])
    found = inspect_query(model, QUERY, known=known)
    assert (len({row for _, row in known.rows}), found.compared, found.training) == (4, 4, 10)
    assert "The 3 nearest of 4 training queries, drawn at random from 10, and" in "\n".join(inspection_lines(found))
    with pytest.raises(ATVError, match="no training task"):
        TrainingQueries(model, [])


def test_answers_are_those_of_predictions_without_and_with_vectors():
    model = trained()
    model.training_summary["tasks"]["toy"]["temperature"] = 2.0
    found = inspect_query(model, QUERY)
    (row,) = predict(model, [QUERY])
    assert found.steered.answer == row["answer"]
    for option, probability in found.steered.probabilities.items():
        assert row[f"p({option})"] == pytest.approx(probability, rel=1e-4)
    model.training_summary["tasks"]["toy"]["temperature"] = None
    with model.steer([QUERY], scale=0.0):
        pass
    (row,) = predict(replaced_scale(model, 0.0), [QUERY])
    assert found.plain.probabilities[row["answer"]] == pytest.approx(row[f"p({row['answer']})"], rel=1e-4)


def replaced_scale(model, scale):
    """The same model with another scale."""
    other = ATVModel(model.llm, model.atv, tokenizer=model.tokenizer).eval()
    other.training_summary = model.training_summary
    other.atv.config = replace(model.config, scale=scale)
    other.vector_cache.limit = 0
    return other


def free_task():
    rows = [Example(f"the harbour {i}", f"boat {i} came in") for i in range(18)]
    return Task("free", ("{input}\nanswer:",), tuple(rows[:6]), tuple(rows[6:12]), tuple(rows[12:]))


def test_without_options_the_two_texts_are_compared():
    model = trained(free_task())
    found = inspect_query(model, QUERY)
    assert found.plain.probabilities is None
    assert found.plain.text != found.steered.text
    assert set(found.compared_answers) == {found.plain.text, found.steered.text}
    assert set(found.layers[-1].steered) == set(found.compared_answers)
    none = inspect_query(replaced_scale(model, 0.0), QUERY)
    assert none.plain.text == none.steered.text
    assert (none.compared_answers, none.promoted, none.leader) == ([], None, None)
    assert "do not change the answer" in "\n".join(inspection_lines(none))
    table = inspection_table(none)
    assert "raised most" not in table.columns
    assert table.rows[-1][1].startswith(repr(none.layers[-1].plain_tokens[0][0]))


def test_vectors_of_size_zero_promote_nothing():
    found = inspect_query(replaced_scale(trained(), 0.0), QUERY)
    assert found.compared_answers == ["no", "yes"]
    assert found.promoted is None
    assert "promote no answer" in "\n".join(inspection_lines(found))


def test_the_generator_self_is_asked_about_the_prompt_itself():
    task, config = toy_task(), ATVConfig(generator="self", generator_layer=0, scale=1.0)
    model = ATVModel(make_llm(), config, tokenizer=byte_level_tokenizer()).double().eval()
    torch.manual_seed(5)
    for weights in model.expansion.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    model.training_summary = {"tasks": {task.name: task.asking()}}
    known = TrainingQueries(model, [task])
    found = inspect_query(model, QUERY, known=known)

    @torch.no_grad()
    def state(query):
        ids = torch.tensor([model.render([query])[0].ids])
        return model.llm(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1]

    cosines = {row.input: cosine(state(QUERY), state(row.input)) for row in task.train}
    best = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
    assert [near.query for near in found.nearest] == best
    assert [lens.norm is None for lens in found.layers] == [True, False, False]
    assert found.layers[0].plain == pytest.approx(found.layers[0].steered)
    (row,) = predict(model, [QUERY])
    assert found.steered.answer == row["answer"]
    assert found.layers[-1].steered[found.leader] == max(found.layers[-1].steered.values())


def test_a_query_that_is_cut_is_said():
    model = trained()
    model.llm.config.max_position_embeddings = 80
    for query, cut in ((QUERY, False), (f"{QUERY} " * 40, True)):
        found = inspect_query(model, query)
        assert found.cut is cut
        assert ("It is cut at its end" in inspection_lines(found)[1]) is cut


def test_it_is_a_record_of_json_values():
    model = trained()
    found = inspect_query(model, QUERY, known=TrainingQueries(model, [toy_task()]))
    assert json.loads(json.dumps(asdict(found), allow_nan=False)) == asdict(found)


def test_what_cannot_be_inspected_is_refused(monkeypatch):
    model = trained()
    with pytest.raises(ATVError, match="empty"):
        inspect_query(model, " ")
    with pytest.raises(ATVError, match="Unknown task 'tyo'"):
        inspect_query(model, QUERY, task="tyo")
    fixed = FixedModel(make_llm(), tokenizer=byte_level_tokenizer())
    with pytest.raises(ATVError, match="method fixed"):
        inspect_query(fixed, QUERY)
    monkeypatch.setitem(EDITS, "twice", type("Twice", (AddVectors,), {"vectors_per_site": 2}))
    with pytest.raises(ATVError, match="takes 2 vectors per layer"):
        inspect_query(trained(edit="twice"), QUERY)


def test_a_lens_that_is_not_available_leaves_the_answers(monkeypatch):
    def refuse(*_):
        raise ATVError("There is no head to read with.")

    monkeypatch.setattr("atv.evaluation.inspect.Readout", refuse)
    found = inspect_query(trained(), QUERY)
    assert found.layers == []
    assert found.steered.answer in ("yes", "no")
    assert inspection_lines(found)[-1] == "The layers cannot be read: There is no head to read with."


# ---- what is said ----


def said(found, **fields):
    return "\n".join(inspection_lines(replace(found, **fields)))


def test_the_sentences_follow_from_the_numbers():
    found = replace(inspect_query(trained(), QUERY), plain=Said("No.", "no", {"no": 0.6, "yes": 0.4}))
    assert "no gate" in said(found)
    assert "answers 'no' (60% among the options) and writes 'No.'." in said(found)
    far = Distance(0.1, 0.7, 0.5, 0.3, 0.0, 1.0)
    assert "far from the training queries" in said(found, gate=0.0, distance=far)
    assert "nothing of the query's own part" in said(found, gate=0.0, distance=far)
    near = Distance(0.6, 0.7, 0.5, 0.3, 1.0, 0.5)
    assert "It is near the training" in said(found, gate=0.5, distance=near)
    assert "is 0.50 (0.50 chosen on its task's validation rows): 50% of" in said(found, gate=0.5, distance=near)
    between = Distance(0.4, 0.7, 0.5, 0.3, 0.5, 0.5)
    assert "is 0.25 (0.50 for the distance, 0.50 chosen" in said(found, gate=0.25, distance=between)
    assert "added in full" in said(found, gate=1.0, distance=replace(near, strength=1.0))
    assert "left out: no file" in "\n".join(inspection_lines(found, "no file"))
    last = replace(found.layers[-1], plain={"no": 0.4, "yes": 0.6})
    won = {"promoted": "yes", "promoted_from": 0, "leader": "yes", "leads_from": 2, "layers": [last] * 3}
    won |= {"steered": Said("Yes.", "yes", {"yes": 0.6, "no": 0.4})}
    assert "likeliest answer from layer 2 on; also without them at the last layer." in said(found, **won)
    assert "these favour 'yes', and the whole answer with its end is likelier for 'no'" in said(found, **won)
    won |= {"layers": [replace(last, plain={"no": 0.6, "yes": 0.4})] * 3}
    assert "from layer 2 on; without them 'no' is at the last layer." in said(found, **won)
    assert "whole answer" not in said(found, **won)
    long = said(found, query="word " * 50)
    assert " ... " in long.splitlines()[0]
    assert len(long.splitlines()[0]) < 130


def test_a_lead_by_tokens_does_not_contradict_the_whole_answer():
    no, yes = Said("No.", "no", {"no": 0.6, "yes": 0.4}), Said("Yes.", "yes", {"yes": 0.6, "no": 0.4})
    found = inspect_query(trained(), QUERY)
    layers = [replace(found.layers[-1], plain={"no": 0.6, "yes": 0.4})] * 3
    lost = {"promoted": "yes", "promoted_from": 1, "leader": "no", "layers": layers, "plain": no}
    text = said(found, **lost, steered=no)
    assert "promote 'yes'" in text
    assert "each layer from 1 on (layers 0 to 2)" in text
    assert text.endswith("That is not enough: 'no' stays the likeliest answer.")
    text = said(found, **lost, steered=yes)
    assert "With them it answers 'yes' (60% among the options)" in text
    assert "not enough" not in text
    assert "At the last layer 'no' stays the likeliest all the same." in text
    assert "With them these favour 'no', and the whole answer with its end is likelier for 'yes'.)" in text
    assert "Without vectors these" not in text
    won = lost | {"leader": "yes", "leads_from": 2}
    assert "With them these favour 'yes', and the whole answer" in said(found, **won, steered=no)
    lost |= {"layers": [replace(layers[0], plain={"no": 0.4, "yes": 0.6})] * 3}
    assert "At the last layer 'no' is the likeliest all the same." in said(found, **lost, steered=yes)


# ---- the training rows, read again ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training on a table by the command line's functions, with drawn rows; the table's folder."""
    folder = tmp_path_factory.mktemp("run")
    rows = [f"the harbour {('quiet', 'leaks')[i % 2]} {i},{('yes', 'no')[i % 2]}" for i in range(60)]
    (folder / "boats.csv").write_text("\n".join(["text,label", *rows]))
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")
    return folder


def test_the_command_says_it_with_the_training_rows_read_again(run, atv, monkeypatch):
    options = ["--llm", run / "llm", "--dtype", "float32"]
    more = ["--generator", run / "generator", "--epochs", 1, "--train-rows", 12, "--valid-rows", 3, "--seed", 3]
    monkeypatch.chdir(run)
    code, _, err = atv(
        "train",
        "--data",
        "boats.csv",
        "--template",
        "{input}\nIs it?",
        *options,
        *more,
        "--out",
        "out",
    )
    assert code == 0, err
    (whole,) = load_tasks(data=run / "boats.csv")
    drawn = whole.drawn(12, 3, 3)
    (task,) = training_tasks(run / "out" / "adapter")
    assert (task.train, task.valid) == (drawn.train, drawn.valid)
    assert task.templates == ("{input}\nIs it?",)
    inside = [file.read_bytes() for file in (run / "out" / "adapter").rglob("*") if file.is_file()]
    assert not any(row.input.encode() in content for row in drawn.train for content in inside)
    assert not any(b"boats.csv" in content for content in inside)

    monkeypatch.chdir(run.parent)
    ask = ["inspect", "--adapter", run / "out", *options, "the harbour leaks 7"]
    code, text, err = atv(*ask)
    assert code == 0, err
    assert "The 3 nearest of 12 training queries and their answers:" in text
    shown = [line.split("'")[1] for line in text.splitlines() if " -> " in line]
    assert len(shown) == 3
    assert set(shown) <= {row.input for row in drawn.train}
    assert "Without vectors the LLM answers " in text
    assert text.count("Layer by layer") == 1

    (run / "same.csv").write_text((run / "boats.csv").read_text())
    assert atv(*ask, "--data", run / "same.csv")[1] == text  # under another name, and the same rows are drawn

    (run / "other.csv").write_text((run / "boats.csv").read_text().replace(",yes", ",no!"))
    code, text, err = atv(*ask, "--data", run / "other.csv")
    assert code == 0, err
    assert "-> 'no!'" in text or "-> 'no'" in text
    assert "nearest of 12 training" in text
    assert f"They may not be rows of the training: according to {run / 'out' / 'train.json'} it had other" in text

    (run / "boats.csv").rename(run / "away.csv")
    code, text, err = atv(*ask)
    assert code == 0, err
    assert "left out: No file or folder" in text
    assert "Give --data with the training data" in text
    (run / "boats.csv").write_text((run / "other.csv").read_text())
    assert "has changed since the training" in atv(*ask)[1]
    record = json.loads((run / "out" / "train.json").read_text())
    record["data"]["boats"].pop("source")
    (run / "out" / "train.json").write_text(json.dumps(record))
    assert "does not say where the rows of boats came from" in atv(*ask)[1]
    (run / "out" / "train.json").write_text("{}")
    assert "is damaged" in atv(*ask)[1]
    assert "is damaged" in atv(*ask, "--data", run / "same.csv")[1]
    (run / "out" / "train.json").unlink()
    code, text, err = atv(*ask)
    assert code == 0, err
    assert "the adapter contains none, and" in text
    code, text, err = atv(*ask, "--data", run / "same.csv")
    assert code == 0, err
    assert f"nearest of {len(whole.train)} training" in text
    assert "They may not be rows of the training: " in text
    assert "does not exist." in text

    code, _, err = atv(*ask, "--input", "text")
    assert (code, "expected --data" in err) == (2, True)
    code, _, err = atv(*ask, "--data", run / "nowhere.csv")
    assert (code, "No file or folder" in err) == (2, True)


def test_tasks_of_other_data_are_refused_and_built_in_ones_named(run, atv, monkeypatch):
    model = make_atv(dtype=torch.float32)
    tasks = load_tasks(["sentiment", "topic"])
    model.training_summary = {"tasks": {task.name: task.asking() | {"answer_tokens": 1} for task in tasks}}
    model.save_pretrained(run / "two")
    ask = [
        "inspect",
        "--adapter",
        run / "two",
        "--llm",
        run / "llm",
        "--dtype",
        "float32",
        "--task",
        "topic",
        "the lid",
    ]
    code, _, err = atv(*ask, "--data", run / "other.csv")
    assert (code, "expected one that the adapter was trained on: sentiment, topic" in err) == (2, True)
    code, text, err = atv(*ask)
    assert code == 0, err
    assert "left out" in text  # and not the built-in tasks without a word


def test_rows_of_built_in_tasks_are_found_again(tmp_path):
    (task,) = load_tasks(["topic"])
    model = make_atv(dtype=torch.float32, parametrisation="calibrated")
    drawn = task.drawn(6, 2, 1)
    train(model, [drawn], tmp_path / "out", TrainConfig(epochs=1, batch_size=4))
    (found,) = training_tasks(tmp_path / "out" / "adapter")
    assert found.train == drawn.train
    assert found == as_trained(drawn, model.training_summary)
