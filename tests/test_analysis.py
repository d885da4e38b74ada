"""What an adapter's vectors are like: every number beside a loop by hand, a formula, or the LLM's own logits."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, byte_level_tokenizer, make_atv, make_llm, toy_task
from refusals import refused

from atv.cli import main
from atv.config import TrainConfig
from atv.data import Example, Task
from atv.errors import ATVError
from atv.lm.hooks import capture_outputs, decoder_layers
from atv.lm.lens import Readout
from atv.methods.elicit import Elicit, ElicitConfig
from atv.paper.analysis import analyse, cosine_means, geometry, map_of, variation
from atv.paper.analysis.measure import shared_words
from atv.report import analysis_tables, markdown
from atv.report.analysis import _exchange_table
from atv.report.plots import draw

CONFIG = {"positions": "last:2", "layers": [0, 1]}
ROWS = 3


def counting_task(name="count | five"):
    """Nothing in common with the queries of `toy_task`, and a name that Markdown has a use for."""
    examples = [Example(f"one two three four five six {i}\nseven", ("two", "six")[i % 2]) for i in range(24)]
    rows = tuple(examples[:8]), tuple(examples[8:16]), tuple(examples[16:])
    return Task(name, ("Count: {input}", "{input}, which?"), *rows)


TASKS = [toy_task(), counting_task()]
ASKED = [(task, row) for task in TASKS for row in task.test[:ROWS]]
TITLES = [
    "Vectors in short", "Answers with other vectors", "Norms per layer", "How much vectors differ",
    "Nearest training queries", "Neighbours of single queries",
    "One query layer by layer", "Tokens that vectors promote", "Map of vectors",
]  # fmt: skip
NEIGHBOURS = [(task, row) for task in TASKS for row in task.train]


@pytest.fixture(scope="module")
def atv():
    made = make_atv(**CONFIG)
    made.training_summary = {"tasks": {"toy": toy_task().asking()}}
    return made


@pytest.fixture(scope="module")
def elicit(atv, tmp_path_factory):
    """A library on the same LLM, with entries of the second task and of one that is not looked at."""
    folder = tmp_path_factory.mktemp("elicit")
    atv.generator.save(folder / "encoder")
    config = ElicitConfig(exemplars=3, shots=2, layer_rows=2, encoder=str(folder / "encoder"))
    tasks = [toy_task("another"), TASKS[1]]
    adapter = Elicit.fit(atv.llm, atv.tokenizer, tasks, folder / "out", config, TrainConfig(seed=7))
    return Elicit.load(atv.llm, atv.tokenizer, adapter)


@pytest.fixture(scope="module")
def record(atv, elicit):
    return analyse(atv, TASKS, elicit=elicit, rows=ROWS)


@pytest.fixture(scope="module")
def vectors(atv):
    """Those of the test queries, one at a time, as they are added: (queries, layers, hidden)."""
    return torch.cat([atv.config.scale * atv.task_vectors([row.input]) for _, row in ASKED])


def prompt_ids(atv, task, row):
    return torch.tensor([atv.tokenizer(f"{task.templates[0].replace('{input}', row.input)}\nA:")["input_ids"]])


# ---- Norms ----


def test_norms_ratios_and_cosines_are_those_of_a_loop_over_the_hidden_states(atv, record, vectors):
    found = {name: np.empty((len(ASKED), 2)) for name in ("vector", "residual", "ratio", "cosine")}
    for query, (task, row) in enumerate(ASKED):
        states = atv.llm(prompt_ids(atv, task, row), output_hidden_states=True).hidden_states
        for layer in (0, 1):
            vector = vectors[query, layer].numpy()
            last_two = states[layer + 1][0, -2:].detach().numpy()  # the first one is the embeddings
            sizes = [math.sqrt((token**2).sum()) for token in last_two]
            size = math.sqrt((vector**2).sum())
            found["vector"][query, layer] = size
            found["residual"][query, layer] = sum(sizes) / 2
            found["ratio"][query, layer] = sum(size / token for token in sizes) / 2
            dots = [(token * vector).sum() / size / norm for token, norm in zip(last_two, sizes, strict=True)]
            found["cosine"][query, layer] = sum(dots) / 2
    assert record["layers"] == [0, 1]
    for name, values in found.items():
        assert record["norms"][name]["mean"] == pytest.approx(values.mean(0), rel=1e-6)
        assert record["norms"][name]["std"] == pytest.approx(values.std(0, ddof=1), rel=1e-4)


def test_the_library_s_norms_are_those_of_the_states_it_would_add_of_these_tasks(record, elicit):
    states = 2.0 * elicit.states[3:, :2]  # the second task's, at the layers that the adapter steers
    assert elicit.entry_tasks() == ["another"] * 3 + [TASKS[1].name] * 3
    assert record["norms"]["elicit"]["mean"] == pytest.approx(states.norm(dim=-1).mean(0).tolist())
    assert [entry["task"] for entry in record["elicit"]["entries"]] == [TASKS[1].name] * 3


# ---- Variation ----


def test_variation_is_that_of_the_formulas():
    draw = np.random.default_rng(0)
    sizes, middles = (5, 3, 4), draw.normal(size=(3, 7)) * 2
    groups = [middle + draw.normal(size=(size, 7)) for size, middle in zip(sizes, middles, strict=True)]
    x = np.concatenate(groups)
    names = [name for name, size in zip("abc", sizes, strict=True) for _ in range(size)]
    found = variation(torch.tensor(x), names)
    lengths = np.linalg.norm(x, axis=1)
    within = sum(((group - group.mean(0)) ** 2).sum() for group in groups)
    between = sum(len(group) * ((group.mean(0) - x.mean(0)) ** 2).sum() for group in groups)
    assert found["common"] == pytest.approx(np.linalg.norm(x.mean(0)) / lengths.mean())
    assert found["within"] == pytest.approx(within / (within + between))
    assert found["within_by_chance"] == pytest.approx(9 / 11)
    for name, group in zip("abc", groups, strict=True):
        own = found["tasks"][name]
        assert own["queries"] == len(group)
        assert own["norm"] == pytest.approx(np.linalg.norm(group, axis=1).mean())
        assert own["distance"] == pytest.approx(math.sqrt(((group - group.mean(0)) ** 2).sum(1).mean()))
    cosines = {True: [], False: []}
    own = {True: [], False: []}  # pairs with one of task a
    for i in range(12):
        for j in range(i + 1, 12):
            cosine = x[i] @ x[j] / lengths[i] / lengths[j]
            cosines[names[i] == names[j]].append(cosine)
            if "a" in (names[i], names[j]):
                own[names[i] == names[j]].append(cosine)
    assert found["cosine_within"] == pytest.approx(np.mean(cosines[True]))
    assert found["cosine_between"] == pytest.approx(np.mean(cosines[False]))
    assert found["tasks"]["a"]["cosine_within"] == pytest.approx(np.mean(own[True]))
    assert found["tasks"]["a"]["cosine_between"] == pytest.approx(np.mean(own[False]))


def test_where_tasks_do_not_matter_the_share_within_is_that_of_chance():
    x = torch.randn(60, 4000, generator=torch.Generator().manual_seed(1))
    found = variation(x, ["a", "b", "c"] * 20)
    assert found["within"] == pytest.approx(found["within_by_chance"], abs=0.005)
    assert found["common"] == pytest.approx(60**-0.5, abs=0.01)


def test_what_there_is_not_is_none():
    alike = variation(torch.ones(4, 3), ["a", "a", "b", "b"])
    assert (alike["common"], alike["within"]) == (pytest.approx(1), None)
    assert cosine_means(torch.eye(3), ["a", "b", "b"])["a"] == (None, 0)
    assert cosine_means(torch.eye(3), ["a", "a", "a"])[""] == (0, None)
    assert variation(torch.zeros(4, 3), ["a", "a", "b", "b"])["common"] is None


# ---- Neighbours and map ----


def test_the_nearest_training_queries_are_those_of_a_loop_over_all(atv, record, vectors):
    others = [atv.config.scale * atv.task_vectors([row.input]).flatten() for _, row in NEIGHBOURS]
    for query, (task, row) in enumerate(ASKED):
        own = vectors[query].flatten()
        cosines = [float(own @ other / own.norm() / other.norm()) for other in others]
        best = sorted(range(len(others)), key=lambda place: -cosines[place])
        found = record["queries"][query]
        assert (found["task"], found["query"], found["answer"]) == (task.name, row.input, row.output)
        for near, place in zip(found["nearest"], best[:3], strict=True):
            near_task, near_row = NEIGHBOURS[place]
            assert (near["task"], near["query"], near["answer"]) == (near_task.name, near_row.input, near_row.output)
            assert near["cosine"] == pytest.approx(cosines[place])
        same = [place for place in best if NEIGHBOURS[place][0] is task]
        assert found["same_answer"] == (NEIGHBOURS[same[0]][1].output == row.output)
        assert found["same_answer_by_chance"] == 0.5
        assert found["same_task_by_chance"] == 0.5
        words = [shared_words(row.input, NEIGHBOURS[place][1].input) for place in same]
        assert found["shared_words"] == words[0]
        assert found["shared_words_by_chance"] == pytest.approx(np.mean(words))


def test_shared_words_are_counted_once_in_small_letters():
    assert shared_words("The cat, the mat", "a Cat") == 1 / 4
    assert shared_words("!", "?") == 0


def test_the_map_s_first_axes_are_the_singular_vectors_of_both_kinds_and_repeat():
    draw = torch.Generator().manual_seed(2)
    few, many = torch.randn(6, 9, generator=draw) + 50, 1000 * torch.randn(4, 9, generator=draw)
    found = map_of([few, many], 3)
    sized = []
    for kind in (few.double().numpy(), many.double().numpy()):
        around = kind - kind.mean(0)
        sized.append(around / math.sqrt((around**2).sum(1).mean()))
    left, sizes, _ = np.linalg.svd(np.concatenate(sized), full_matrices=False)
    assert np.abs(found["pca"]) == pytest.approx(np.abs(left[:, :2] * sizes[:2]), abs=1e-6)
    assert found["explained"] == pytest.approx((sizes[:2] ** 2 / (sizes**2).sum()).tolist())
    assert found == map_of([few, many], 3)
    assert np.isfinite(found["tsne"]).all()
    assert map_of([torch.full((5, 3), 0.1)], 1)["pca"] == [[0.0, 0.0]] * 5


# ---- The logit lens ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_lens_of_the_last_layer_is_the_llm_s_own_logits(name):
    llm = make_llm(name)
    path = getattr(llm, "layer_path", None)
    ids = torch.tensor([[5, 9, 30, 31, 32], [7, 8, 9, 10, 11]])
    layers = decoder_layers(llm, path)
    with torch.no_grad(), capture_outputs(layers) as captured:
        logits = llm(input_ids=ids).logits
    readout = Readout(llm, {"input_ids": ids[:1]}, path)
    torch.testing.assert_close(readout(captured[len(layers) - 1]), logits)
    names = readout.described(llm).split(" > ")
    assert len(names) == 2
    assert "norm" in names[0] or "ln_f" in names[0]
    hooks = [module for module in llm.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooks == []


def test_modules_inside_another_are_read_once():
    llm = make_llm()
    llm.model.norm = torch.nn.Sequential(llm.model.norm, torch.nn.Linear(32, 32).double())
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad(), capture_outputs(llm.model.layers) as captured:
        logits = llm(input_ids=ids).logits
    readout = Readout(llm, {"input_ids": ids})
    assert readout.described(llm) == "model.norm > lm_head"
    torch.testing.assert_close(readout(captured[2]), logits)


def test_what_a_vector_promotes_is_above_what_no_vector_does():
    """GPT-2's final norm has a bias; some is put into it here."""
    llm = make_llm("gpt2")
    norm, head = llm.transformer.ln_f, llm.lm_head
    torch.nn.init.normal_(norm.bias)
    readout = Readout(llm, {"input_ids": torch.tensor([[5, 9]])})
    vectors = torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = head(norm(vectors)) - head(norm.bias)
    torch.testing.assert_close(readout.promoted(vectors), expected)
    assert not readout.promoted(torch.zeros(1, 32, dtype=torch.float64)).any()


def test_the_record_s_tokens_are_those_of_the_mean_vectors_and_of_the_query(atv, record, vectors):
    norm, head = atv.llm.model.norm, atv.llm.lm_head
    assert record["lens"]["of"] == "model.norm > lm_head"
    for name, vector in (("toy", vectors[:ROWS].mean(0)), (TASKS[1].name, vectors[ROWS:].mean(0)), (None, vectors[0])):
        found = record["lens"]["tasks"][name] if name else record["query"]["lens"]
        for layer in (0, 1):
            logits = head(norm(vector[layer]))
            best = sorted(range(len(logits)), key=lambda token: -float(logits[token]))[:5]
            assert [text for text, _ in found[layer]] == [atv.tokenizer.decode([token]) for token in best]
            assert [value for _, value in found[layer]] == pytest.approx(logits[best].tolist())


def test_layer_by_layer_is_what_hooks_by_hand_see(atv, record, vectors):
    """The query of the record is the first test row; its last two tokens are edited behind the layers 0 and 1."""
    ids = prompt_ids(atv, *ASKED[0])
    layers, norm, head = atv.llm.model.layers, atv.llm.model.norm, atv.llm.lm_head
    for steered in (False, True):
        seen, handles = [], []
        for index, layer in enumerate(layers):

            def hook(_, __, output, index=index):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                if steered and index < 2:  # noqa: B023 - called within this turn
                    hidden[:, -2:] += vectors[0, index]
                seen.append(hidden[0, -1])  # noqa: B023
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handles.append(layer.register_forward_hook(hook))
        with torch.no_grad():
            last = atv.llm(input_ids=ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        found = record["query"]["layers"]["steered" if steered else "unsteered"]
        assert len(found) == len(seen) == 3
        for state, tokens in zip(seen, found, strict=True):
            shares = head(norm(state)).softmax(-1)
            values, best = shares.topk(5)
            assert [text for text, _ in tokens] == [atv.tokenizer.decode([token]) for token in best.tolist()]
            assert [share for _, share in tokens] == pytest.approx(values.tolist())
        assert found[-1][0][0] == atv.tokenizer.decode([int(last.argmax())])
    assert record["query"]["layers"]["steered"] != record["query"]["layers"]["unsteered"]


def test_layer_by_layer_steers_by_what_the_generator_reads():
    atv = make_atv(**CONFIG, reads="prompt")
    task, row = ASKED[0]
    read = task.templates[0].replace("{input}", row.input) + "\nA:"
    vectors = atv.config.scale * atv.task_vectors([read])[0]
    expected = answer_with(atv, task, row, vectors).softmax(-1).topk(5).values
    found = analyse(atv, TASKS, rows=ROWS)["query"]["layers"]["steered"][-1]
    assert [share for _, share in found] == pytest.approx(expected.tolist())


def test_an_llm_whose_head_reads_something_else_has_no_lens_and_the_record_says_so(capsys):
    atv = make_atv()
    handle = atv.llm.lm_head.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    found = analyse(atv, TASKS, rows=ROWS)
    handle.remove()
    assert found["lens"] is found["query"]["layers"] is None
    assert "LlamaForCausalLM does more than call modules" in found["no_lens"]
    assert "model.norm > lm_head" in " ".join(capsys.readouterr().err.split())
    tables = analysis_tables(found)
    assert found["no_lens"] in tables[0].note
    assert len(tables) == 7


# ---- The record, its tables and its plots ----


def test_the_record_is_json_and_knows_what_was_trained_on(record):
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert {name: about["trained"] for name, about in record["tasks"].items()} == {"toy": True, TASKS[1].name: False}
    assert {about["train"] for about in record["tasks"].values()} == {8}
    assert len(record["queries"]) == 2 * ROWS


def test_a_query_of_one_s_own_is_asked_in_the_first_task_s_template(atv):
    found = analyse(atv, TASKS, rows=2, query="the kettle leaks")["query"]
    assert found["prompt"] == "the kettle leaks\nyes or no?\nA:"
    lone = atv.config.scale * atv.task_vectors(["the kettle leaks"])[0]
    logits = atv.llm.lm_head(atv.llm.model.norm(lone[1]))
    assert found["lens"][1][0][1] == pytest.approx(float(logits.max()))
    assert len(found["nearest"]) == 3


def answer_with(atv, task, row, vectors):
    """The LLM's logits (vocabulary,) for one prompt, alone, with hooks by hand that add `vectors` (layers, hidden)."""
    ids = prompt_ids(atv, task, row)

    def added(vector):
        def hook(_, __, output):
            output = output[0] if isinstance(output, tuple) else output
            output[:, -2:] += vector  # positions last:2

        return hook

    hooks = [
        layer.register_forward_hook(added(vector))
        for layer, vector in zip(decoder_layers(atv.llm), vectors, strict=False)
    ]
    try:
        return atv.llm(ids).logits[0, -1].detach()
    finally:
        for hook in hooks:
            hook.remove()


def test_answers_with_other_vectors_are_those_of_hooks_by_hand():
    atv = make_atv(**CONFIG, scale=3.0)
    record = analyse(atv, TASKS, rows=ROWS)
    vectors = torch.cat([3.0 * atv.task_vectors([row.input]) for _, row in ASKED])
    tables = {table.title.split(":")[0]: table for table in analysis_tables(record)}
    shown = {row[0]: row[1:] for row in tables["Answers with other vectors"].rows}
    given = {
        "its own": lambda q: vectors[q],
        "the mean of its task": lambda q: vectors[ROWS * (q // ROWS) : ROWS * (q // ROWS) + ROWS].mean(0),
        "the mean of all queries": lambda q: vectors.mean(0),
        "of another query of its task": lambda q: vectors[ROWS * (q // ROWS) + (q + 1) % ROWS],
        "of a query of another task": lambda q: vectors[(q + ROWS) % (2 * ROWS)],
        "none": lambda q: torch.zeros_like(vectors[q]),
    }
    assert list(record["queries"][0]["vectors"]) == list(shown) == list(given)
    own = []
    for kind, of in given.items():
        expected = []
        for query, (task, row) in enumerate(ASKED):
            logits = answer_with(atv, task, row, of(query))
            first = {option: atv.tokenizer(f": {option}")["input_ids"][1] for option in task.options}
            likeliest = int(logits.argmax())
            if kind == "its own":
                own.append(likeliest)
            expected.append(
                {
                    "first_token": likeliest == first[row.output],
                    "first_token_among_options": max(first.values(), key=lambda token: logits[token])
                    == first[row.output],
                    "other": likeliest != own[query],
                }
            )
        assert [row["vectors"][kind] for row in record["queries"]] == expected
        values = [
            100 * np.mean([row[name] for row in expected])
            for name in ("first_token", "first_token_among_options", "other")
        ]
        shares = (shown[kind][0], shown[kind][4], shown[kind][-1] if kind != "its own" else "0")
        assert [float(cell) for cell in shares] == pytest.approx(values, abs=0.051)
    assert any(row["vectors"]["none"]["other"] for row in record["queries"])
    assert any(row["vectors"]["of a query of another task"]["other"] for row in record["queries"])


def test_what_is_lost_is_a_paired_difference_and_kinds_that_cannot_be_are_left_out(atv):
    found = analyse(atv, [toy_task()], rows=6)
    assert "of a query of another task" not in found["queries"][0]["vectors"]
    pair = [{"first_token": right, "first_token_among_options": right, "other": False} for right in (True, False)]
    for place, row in enumerate(found["queries"]):
        row["vectors"] = {"its own": pair[place >= 4], "none": pair[place >= 1]}
    (_, line) = analysis_tables(found)[1].rows
    assert line[:3] == ["none", "16.7", "50.0"]
    draws = np.random.default_rng(1).choice([0, 1, 1, 1, 0, 0], size=(10_000, 6)).mean(1) * 100
    assert [float(cell) for cell in line[3:5]] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.1)


def test_tasks_whose_first_tokens_say_nothing_are_left_out_of_what_is_right_and_marked(record):
    queries = json.loads(json.dumps(record["queries"]))
    for row in queries:
        if row["task"] == TASKS[0].name:
            row["vectors"] = {kind: found | {"first_token": None} for kind, found in row["vectors"].items()}
    table, plain = (analysis_tables(made)[1] for made in (record | {"queries": queries}, record))
    alone = record | {"tasks": {TASKS[1].name: record["tasks"][TASKS[1].name]}}
    alone |= {"queries": [row for row in record["queries"] if row["task"] == TASKS[1].name]}
    for line, whole, own in zip(table.rows, plain.rows, _exchange_table(alone).rows, strict=True):
        assert line[:2] == [own[0], f"{own[1]}†"]
        assert line[2:5] == own[2:5]
        assert line[5:] == whole[5:]
    assert f"first_token is not defined in {TASKS[0].name}: " in table.footnote
    assert not plain.footnote
    for row in queries:
        row["vectors"] = {kind: found | {"first_token": None} for kind, found in row["vectors"].items()}
    for line in analysis_tables(record | {"queries": queries})[1].rows:
        assert line[1:5] == ["–†", "–", "–", "–"]


def test_tables_say_what_the_record_says(record):
    tables = {table.title.split(":")[0]: table for table in analysis_tables(record)}
    assert list(tables) == TITLES
    assert all(len(row) == len(table.columns) for table in tables.values() for row in table.rows)
    short = {row[0]: row[1:] for row in tables["Vectors in short"].rows}
    common = short["norm of the mean vector, % of the mean norm"]
    assert common == [f"{100 * record['variation']['common']:.1f}", "–", "–", f"{100 / math.sqrt(6):.1f}"]
    same = [row["nearest"][0]["task"] == row["task"] for row in record["queries"]]
    value, low, high, chance = short["nearest training query is of the same task, %"]
    assert (value, chance) == (f"{100 * np.mean(same):.1f}", "50.0")
    assert float(low) <= float(value) <= float(high)
    norms = record["norms"]["vector"]
    cell = next(row[1] for row in tables["Norms per layer"].rows if row[0] == "1")
    assert float(cell.split(" ± ")[0]) == pytest.approx(norms["mean"][1], rel=0.01)
    assert float(cell.split(" ± ")[1]) == pytest.approx(norms["std"][1], rel=0.1)
    assert len(tables["Tokens that vectors promote"].rows) == 3 * 2
    assert len(tables["One query layer by layer"].rows) == 3
    assert len(tables["Map of vectors"].rows) == 6 + 3
    lines = markdown(tables["Map of vectors"]).splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in lines if line.startswith("|"))
    assert any(r"count \| five" in line for line in lines)


def test_a_damaged_record_is_named(record):
    """With one of its parts missing or of another kind. Not all of them are needed for tables."""
    for key in record:
        for changed in ({}, {key: 5}, {key: []}, {key: {}}):
            damaged = {name: part for name, part in record.items() if name != key} | changed | {"file": "a.json"}
            try:
                analysis_tables(damaged)
            except ATVError as error:
                assert str(error).startswith("a.json is damaged: ")  # noqa: PT017
    with refused("a.json is damaged: KeyError('norms'). Make it again with atv paper analysis."):
        analysis_tables({key: value for key, value in record.items() if key != "norms"} | {"file": "a.json"})


def test_the_interval_is_that_of_means_over_queries_drawn_within_tasks(record):
    """Beside a bootstrap written out."""
    queries = [
        row | {"same_answer": bool(number % 2 or number > 6)}
        for number, row in enumerate(record["queries"][:ROWS] * 2 + record["queries"][ROWS:])
    ]
    row = analysis_tables(record | {"queries": queries})[0].rows[4]
    own = [[row["same_answer"] for row in queries if row["task"] == task.name] for task in TASKS]
    draw = np.random.default_rng(5)
    drawn = [np.mean([np.mean(draw.choice(values, len(values))) for values in own]) for _ in range(4000)]
    assert float(row[1]) == pytest.approx(100 * np.mean([np.mean(values) for values in own]), abs=0.05)
    assert [float(end) for end in row[2:4]] == pytest.approx(100 * np.percentile(drawn, [2.5, 97.5]), abs=9)


def test_tables_and_plots_are_made_of_the_file_alone_without_torch(record, tmp_path):
    (tmp_path / "analysis.json").write_text(json.dumps(record))
    code = (
        "import json, sys; from pathlib import Path; from atv.report import analysis_tables, write_plots\n"
        "record = json.loads(Path('analysis.json').read_text())\n"
        "print(len(write_plots(analysis_tables(record), Path('plots'))))\n"
        "sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr
    assert "Warning" not in done.stderr
    assert {file.suffix for file in (tmp_path / "plots").iterdir()} == {".svg", ".png", ".pdf"}


def test_plots_have_words_and_a_mark_for_each_point(record):
    plots = {plot.kind: plot for table in analysis_tables(record) for plot in draw(table, "a")}
    assert list(plots) == ["norms", "map"]
    assert re.match("Means over queries, .* vector: .* at layer 0, .* residual: .* ELICIT entry: ", plots["norms"].text)
    assert plots["map"].text == (
        f"Vectors of test queries on two maps, a mark for each: toy 3, {TASKS[1].name} 3. Crosses, in the colour of "
        "their task: 3 of ELICIT entry."
    )
    assert plots["map"].svg.count("<use ") == 2 * (6 + 3) + 3  # two maps and the legend
    alone = [plot for table in analysis_tables(record | {"elicit": None}) for plot in draw(table, "a")]
    assert "Crosses" not in alone[1].text


# ---- The command ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An LLM, adapters of two methods and data, as files."""
    folder = tmp_path_factory.mktemp("my own world")
    llm = make_llm(dtype=torch.float32)
    llm.save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    atv = make_atv(dtype=torch.float32)
    atv.llm.name_or_path = llm.name_or_path = str(folder / "llm")
    atv.save_pretrained(folder / "atv")
    atv.generator.save(folder / "encoder")
    config = ElicitConfig(exemplars=2, shots=2, layer_rows=2, encoder=str(folder / "encoder"))
    Elicit.fit(llm, byte_level_tokenizer(), TASKS, folder / "elicit", config, TrainConfig())
    other = make_llm("qwen2", torch.float32)
    Elicit.fit(other, byte_level_tokenizer(), TASKS, folder / "qwen", config, TrainConfig())
    (folder / "data").mkdir()
    for name, task in (("toy", TASKS[0]), ("count", TASKS[1])):
        splits = {split: [row._asdict() for row in getattr(task, split)] for split in ("train", "valid", "test")}
        (folder / "data" / f"{name}.json").write_text(json.dumps(splits))
    templates = {"toy": list(TASKS[0].templates), "count": list(TASKS[1].templates)}
    (folder / "data" / "templates.json").write_text(json.dumps(templates))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atv", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_record_tables_and_plots_and_reports_show_them(run, world, tmp_path):
    command = [
        "paper",
        "analysis",
        "--adapter",
        world / "atv",
        "--data",
        world / "data",
        "--rows",
        3,
        "--dtype",
        "float32",
    ]
    out = tmp_path / "runs" / "analysis"
    code, said, err = run(*command, "--elicit", world / "elicit", "--out", out)
    assert code == 0, err
    assert "Vectors in short" in said
    record = json.loads((out / "analysis.json").read_text())
    assert record["schema"] == 2
    assert record["settings"]["llm"] == record["llm"] == str(world / "llm")
    assert record["settings"]["adapter"] != record["settings"]["elicit"]
    assert record["versions"]["scikit-learn"]
    assert record["seconds"] > 0
    assert (out / "analysis.md").read_text().count("\n# ") == 8
    assert len(list((out / "plots").iterdir())) == 6
    code, _, err = run(*command, "--query", "it leaks", "--out", out)  # written again, as atv paper theory does
    assert code == 0, err
    assert json.loads((out / "analysis.json").read_text())["query"]["query"] == "it leaks"

    code, said, err = run("report", tmp_path / "runs", "--out", tmp_path / "alone.html")
    assert code == 0, err
    page = (tmp_path / "alone.html").read_text()
    assert "<title>ATV report: the vectors of 1 adapter</title>" in page
    assert 'id="run-1"' in page
    assert str(out / "analysis.json") in page
    assert page.count("<figure") == 2
    assert len(list((tmp_path / "alone_plots").iterdir())) == 6
    ids = re.findall(r' id="(.+?)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(.+?)"', page)) <= set(ids)

    zero = ["eval", "--method", "zero-shot", "--llm", world / "llm", "--data", world / "data", "--dtype", "float32"]
    code, _, err = run(*zero, "--variants", "first", "--out", tmp_path / "runs" / "zero-shot")
    assert code == 0, err
    code, said, err = run("report", tmp_path / "runs", "--out", tmp_path / "both.html")
    assert code == 0, err
    assert "16 predictions of 1 run and the vectors of 1 adapter" in (tmp_path / "both.html").read_text()
    code, said, err = run("report", tmp_path / "runs", "--out", tmp_path / "both.md")
    headings = re.findall(r"^#+ ([^:\n]+)", (tmp_path / "both.md").read_text(), re.M)
    assert headings[:2] == ["Scores per task", "Classification"]
    assert headings[-9:] == TITLES
    assert not set(headings[:-9]) & set(TITLES)


def test_what_does_not_fit_is_one_line(run, world, tmp_path, monkeypatch):
    command = ["paper", "analysis", "--data", world / "data", "--dtype", "float32", "--out", tmp_path / "out"]
    ours = [*command, "--adapter", world / "atv"]
    (tmp_path / "file").write_text("")
    for arguments, parts in (
        ([*command, "--adapter", world / "elicit"], ["of the method elicit; expected one of the method atv"]),
        ([*command, "--adapter", tmp_path], ["No adapter at"]),
        ([*ours, "--elicit", world / "atv"], ["of the method atv; expected one of the method elicit"]),
        ([*ours, "--elicit", world / "qwen"], ["was made for", "model_type qwen2 against llama"]),
        ([*ours, "--task", "toys"], ["Unknown task 'toys'", "Did you mean 'toy'?"]),
        ([*ours, "--rows", 0], ["test rows is 0"]),
        ([*ours, "--rows", 1], ["Found 2 test queries in count, toy", "at least 4"]),
        ([*ours, "--query", " "], ["The query is empty"]),
        ([*ours, "--out", tmp_path / "file"], ["is a file; expected a folder"]),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert err.strip().splitlines()[-1].startswith("atv: ")
        assert not [part for part in parts if part not in err], err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(geometry, "find_spec", lambda name: None)
    code, _, err = run(*ours)
    assert code == 2
    assert "scikit-learn, which is not installed" in err
    assert "adaptive-task-vectors[analysis]" in err


def test_a_library_that_does_not_fit_is_refused(atv, elicit):
    with refused("two models in memory", "load both onto the same one"):
        analyse(make_atv(), TASKS, elicit=elicit)
    with refused("holds entries of another, count | five; none of the tasks toy", "leave the library out"):
        analyse(atv, TASKS[:1], elicit=elicit)


def test_folders_with_neither_run_nor_analysis_are_refused(run, tmp_path):
    (tmp_path / "analysis.json").write_text('{"schema": 0}')
    code, _, err = run("report", tmp_path, "--out", tmp_path / "r.md")
    assert (code, Path(tmp_path / "r.md").exists()) == (2, False)
    assert "has schema 0; expected 2" in err
