"""`atv compare`: every cell is made once, resumed after a kill, and reported with the numbers of the rows."""

import html
import json
import os
import re
import shlex
import signal
import sys
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev

import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import SIZES, byte_level_tokenizer, make_atv, make_llm, toy_task
from forks import ended, forked
from refusals import refused
from transformers import LlamaConfig, LlamaForCausalLM

from atv import artifact
from atv.cli import main
from atv.data import load_tasks
from atv.evaluation.compare import RECORD_FILE, Cell, Plan, cells_of, compare
from atv.evaluation.measure import Frozen
from atv.evaluation.records import RunWriter, load_runs
from atv.methods import METHODS
from atv.report import answer, compare_tables, load_comparison
from atv.report.compare import CONSTANT, Comparison
from atv.report.plots import draw
from atv.report.tables import number


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An LLM and a generator in folders, and two data sets."""
    folder = tmp_path_factory.mktemp("models")
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")
    for name in ("harbours", "kettles"):
        rows = [row for split in ("train", "valid", "test") for row in getattr(toy_task(rows=60), split)]
        lines = [{"text": row.input.replace("harbour", name), "label": row.output} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    quick = "[all]\nepochs = 1\nbatch_size = 4\n"
    (folder / "quick.toml").write_text(f'{quick}[atv]\ngenerator = "{folder / "generator"}"\n')
    return folder


GIVEN = {"all": {"epochs": 1, "batch_size": 4}}


def tasks():
    kettles = replace(toy_task("kettles", 36), templates=("{input}\nyes or no?",))
    return [replace(toy_task("harbours", 36), templates=("{input}\nyes or no?",)), kettles]


def made(world, out, **options):
    plan = Plan(**{"methods": ("zero-shot", "fixed"), "seeds": (1, 2), "test_rows": 6} | options)
    frozen = Frozen(str(world / "llm"), dtype="float32")
    return compare(plan, frozen, tasks(), out, given=GIVEN, batch_size=2)


def test_cells_of_a_plan():
    plan = Plan(("zero-shot", "icl", "fixed", "icl+atv"), (1, 2), (10, None))
    cells = cells_of(plan, tasks())
    assert [cell for cell in cells if cell.method == "zero-shot"] == [
        Cell("zero-shot", name, 10, 1) for name in ("harbours", "kettles")
    ]
    assert len([cell for cell in cells if cell.method == "icl"]) == 2 * 2 * 2
    assert Cell("icl+atv", "kettles", None, 2).trained == "trained/kettles/atv-all-2"
    assert len({cell.run for cell in cells}) == len(cells)


@pytest.mark.parametrize("name", ["probe", "linear", "elicit"])
def test_a_method_is_evaluated_with_the_chat_template_that_it_was_trained_with(world, tmp_path, name):
    tokenizer = chat_tokenizer("chatml")
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    (task,) = load_tasks(data=world / "kettles.jsonl")
    encoder = str(world / "generator")
    own = {
        "probe": {"generator": encoder},
        "elicit": {"encoder": encoder, "shots": 2, "exemplars": 2, "layer_rows": 2},
        "linear": {"shots": 2},
    }
    plan, given = Plan((name,), (1,), (8,), valid_rows=4, test_rows=4), GIVEN | {name: own.get(name, {})}
    (run,) = compare(plan, Frozen(str(tmp_path / "llm"), dtype="float32"), [task], tmp_path / "out", given=given)
    assert len(load_runs([run])) == 4
    assert read(run / "run.json")["method"]["training"]["train_rows"] == {"kettles": 8}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"methods": ("lorra",)}, ["method 'lorra'", "Did you mean 'lora'?"]),
        ({"methods": ("atv", "atv")}, ["A method is given twice"]),
        ({"methods": ("atv",), "seeds": ()}, ["No seed is given"]),
        ({"methods": ("atv",), "shots": 4}, ["has demonstrations"]),
    ],
)
def test_plans_that_cannot_be_meant_are_refused(options, named):
    with refused(*named):
        Plan(**options)


def test_it_is_resumed_after_a_kill_and_added_to(world, tmp_path, monkeypatch):
    whole = load_runs(made(world, tmp_path / "whole"))
    out, append = tmp_path / "killed", RunWriter.append

    def die_in_the_third_run():
        calls = []

        def dying(run, rows):
            append(run, rows)
            calls.append(run.folder)
            if len(set(calls)) == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        RunWriter.append = dying
        made(world, out)

    assert ended(forked(partial(die_in_the_third_run))) == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in out.rglob("train.json")}
    assert before
    resumed = load_runs(made(world, out))

    def clean(rows):
        return [{key: value for key, value in row.items() if key not in ("run", "seconds")} for row in rows]

    assert clean(resumed) == clean(whole)
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())  # nothing was trained twice
    monkeypatch.setattr(Frozen, "load", lambda _: pytest.fail("The LLM was loaded, and there was nothing to do."))
    made(world, out)
    with refused("made with other settings", "test_rows"):
        made(world, out, test_rows=5)
    monkeypatch.undo()
    assert len(load_runs(made(world, out, methods=("zero-shot", "icl", "fixed"), seeds=(1, 2, 3)))) == 6 * 2 * (1 + 6)


def test_the_tables_are_what_the_rows_say(world, tmp_path):
    made(world, tmp_path, train_rows=(4, 8), seeds=(1, 2))
    found = load_comparison(tmp_path / RECORD_FILE)
    assert list(found.rows) == [4, 8]
    tables = {table.title: table for table in compare_tables(found, "fixed")}
    key = "option_likelihood"

    def mean(method, task, rows, seed):
        place = f"{rows}-{seed}" if method != "zero-shot" else "4-1"
        folder = tmp_path / "runs" / task / f"{method}-{place}"
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        return 100 * fmean(line["scores"][key] for line in lines)

    shown = {row[0]: row for row in tables[f"Scores: {key}"].rows}
    assert tables[f"Scores: {key}"].columns == ["method", "tokens", "s/query", "harbours", "kettles", "Avg"]
    for method in ("zero-shot", "fixed"):
        by_seed = [[mean(method, task, 8, seed) for task in ("harbours", "kettles")] for seed in (1, 2)]
        averages = [fmean(values) for values in by_seed]
        assert shown[method][-1] == f"{fmean(averages):.1f} ± {stdev(averages):.1f}"
        assert number(shown[method][3]) == pytest.approx(fmean(values[0] for values in by_seed), abs=0.05)
    lines = (tmp_path / "runs" / "kettles" / "zero-shot-4-1" / "predictions.jsonl").read_text().splitlines()
    targets = [json.loads(line)["target"] for line in lines]
    most = 100 * max(map(targets.count, targets)) / len(targets)
    assert number(shown[CONSTANT][4]) == pytest.approx(most, abs=0.05)
    curve = {row[0]: row[1:] for row in tables[f"By training rows: {key}"].rows}
    few = fmean(mean("fixed", task, 4, seed) for task in ("harbours", "kettles") for seed in (1, 2))
    assert number(curve["fixed"][0]) == pytest.approx(few, abs=0.05)
    assert curve["zero-shot"][0] == curve["zero-shot"][1]
    differences = [row for row in tables["fixed against each other method"].rows if row[0] == key]
    assert [row[1:3] for row in differences] == [[name, "zero-shot"] for name in ("all 2", "harbours", "kettles")]
    expected = fmean(
        mean("fixed", task, 8, seed) - mean("zero-shot", task, 8, seed)
        for task in ("harbours", "kettles")
        for seed in (1, 2)
    )
    assert float(differences[0][3]) == pytest.approx(expected, abs=0.006)
    cost = {row[0]: row[1:] for row in tables["Cost"].rows}
    assert cost["zero-shot"][:3] == ["–", "–", "–"]
    assert cost["fixed"][1] == "1"  # epoch
    assert cost["fixed"][0] == "96"  # one vector of 32 numbers for each of 3 layers


def rows_of(method, marks, task="films", seed=1):
    return [
        {"method": method, "task": task, "category": task, "seed": seed, "llm": "l", "run": method, "template": 0,
         "answer_prefix": None, "example": i, "target": "ab"[i % 2], "scores": {"exact_match": float(mark == "x")},
         "prompt_tokens": 1, "seconds": 0.1}
        for i, mark in enumerate(marks)
    ]  # fmt: skip


def test_the_answer_in_words():
    rows = rows_of("atv", "x" * 30 + "-" * 10) + rows_of("lora", "x" * 31 + "-" * 9) + rows_of("zero-shot", "-" * 40)
    assert answer(rows, " with 90 training rows") == (
        "lora scores best on films with 90 training rows: 77.5% (exact_match); always giving the most frequent answer "
        "scores 50.0%. By the 95% intervals, atv, which scores 75.0%, is above zero-shot; not told apart from lora."
    )
    assert answer(rows_of("lora", "x-")).startswith("lora scores best on films: 50.0%")
    assert answer([]) == ""
    tied = rows_of("lora", "x" * 30 + "-" * 10) + rows_of("atv", "-" * 10 + "x" * 30) + rows_of("zero-shot", "-" * 40)
    assert answer(tied).startswith("atv and lora score best on films: 75.0% (exact_match); always")
    assert "By the 95% intervals, atv is above zero-shot; not told apart from lora." in answer(tied)
    near = [row for number, name in enumerate(("fixed", "lora")) for task in ("a", "b")
            for row in rows_of(name, "x" * (1000 + number * (task == "a")) + "-" * 1000, task)]  # fmt: skip
    assert "fixed and lora score best on average over 2 in-domain tasks: 50.0%" in answer(near)
    assert compare_tables(Comparison({None: rows_of("lora", "x-")}, {None: {}}))[-1].title == "Cost"


def test_the_command_prints_and_writes_the_report(world, tmp_path, monkeypatch, capsys):
    def run(*more):
        arguments = ["--data", world / "harbours.jsonl", "--data", world / "kettles.jsonl", "--method", "zero-shot"]
        arguments += ["--method", "fixed", "--method", "atv", "--seeds", 1, "--test-rows", 6, "--train-rows", 8]
        arguments += ["--llm", world / "llm", "--dtype", "float32", "--config", world / "quick.toml"]
        monkeypatch.setattr(sys, "argv", ["atv", "compare", *map(str, [*arguments, "--out", tmp_path / "out", *more])])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    code, said, err = run()
    assert code == 0, err
    assert re.search(r"\[7 of 10\] train atv on kettles, 8 rows, seed 42; (about|less than)", err), err
    assert "by the 95% intervals, atv" in said.lower()
    page = (tmp_path / "out" / "report.html").read_text()
    typed = html.unescape(page).partition("<code>atv compare")[2].partition("</code>")[0]
    assert shlex.split(typed) == sys.argv[2:]
    assert page.index('class="answer"') < page.index("<figure") < page.index("<table")
    assert {"report.md", "report.tex", "report.html"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert "harbours" in (tmp_path / "out" / "report.md").read_text()
    code, _, err = run("--data", world / "kettles.jsonl")
    assert code == 2
    assert "Two data sets have one name; found harbours, kettles, kettles" in err
    code, _, err = run("--train-rows", "1000")
    assert code == 2
    assert re.search(r"--train-rows is 1000; of training rows, harbours has \d+ and kettles has \d+", err)
    code, _, err = run("--template", "no place")
    assert code == 2
    assert "has no {input}" in err


@pytest.mark.parametrize("name", ["Unseen", "all 2"])
def test_a_data_set_with_a_name_that_tables_use_is_refused_before_training(world, tmp_path, name):
    own = [replace(tasks()[0], name=name), tasks()[1]]
    with refused("name with a meaning in tables", f"found {name}", "Rename the file"):
        compare(Plan(("zero-shot",)), Frozen(str(world / "llm")), own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_sets_named_like_columns_of_tables_have_columns_of_their_own():
    names = ("tokens", "s/query", "Avg")
    rows = [row for number, name in enumerate(names) for method in ("atv", "lora")
            for row in rows_of(method, "x" * number + "-" * (4 - number), name)]  # fmt: skip
    table = compare_tables(Comparison({None: rows}, {None: {}}))[0]
    assert table.columns == ["method", "tokens", "s/query", "tokens (data)", "s/query (data)", "Avg (data)", "Avg"]
    for line in table.rows[:2]:
        assert line[1:] == ["1", "0.1000", "0.0", "25.0", "50.0", "25.0"]
    assert table.rows[2] == [CONSTANT, "–", "–", "50.0", "50.0", "50.0", "50.0"]


def test_several_processes_are_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("atv.cli.compare.world_size", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["atv", "compare", "--data", str(world / "kettles.jsonl")])
    with pytest.raises(SystemExit):
        main()
    assert "atv compare runs in one process; found 2" in capsys.readouterr().err


def read(file):
    return json.loads(file.read_text())


def test_starting_over_can_be_killed_at_any_moment(world, tmp_path, monkeypatch):
    """Nothing with the former settings is left for the same command without --force."""
    frozen, plan = Frozen(str(world / "llm"), dtype="float32"), Plan(("zero-shot", "fixed"), (1, 2), test_rows=6)
    compare(plan, frozen, tasks(), tmp_path, given=GIVEN)
    mine = tmp_path / "runs" / "thesis.txt"
    mine.write_text("years of work")
    new = {"all": GIVEN["all"] | {"learning_rate": 0.015625}}
    with monkeypatch.context() as killed:
        killed.setattr(Frozen, "load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))  # the first step's
        with pytest.raises(KeyboardInterrupt):
            compare(replace(plan, seeds=(1,)), frozen, tasks(), tmp_path, given=new, force=True)
    assert mine.read_text() == "years of work"
    with monkeypatch.context() as killed:
        killed.setattr("atv.evaluation.compare.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(plan, frozen, tasks(), tmp_path, given=GIVEN, force=True)
    with refused("made with other settings"):
        compare(plan, frozen, tasks(), tmp_path, given=GIVEN)
    compare(plan, frozen, tasks(), tmp_path, given=new)
    records = {file: read(file) for file in tmp_path.rglob("train.json")}
    assert {record["settings"]["train"]["learning_rate"] for record in records.values()} == {0.015625}
    adapters = {read(file)["settings"]["adapter"] for file in (tmp_path / "runs").rglob("fixed-*/run.json")}
    assert adapters == {artifact.identity(file.parent / "adapter") for file in records}
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".gone")]


def test_numbers_of_training_rows_can_be_added_and_left_out_again(world, tmp_path, monkeypatch):
    for count, sizes in enumerate([(4,), (4, 8), (4,), (8,), (None,)]):
        if count in (2, 3):
            monkeypatch.setattr(METHODS["fixed"], "fit", lambda *_, **__: pytest.fail("It was trained before."))
        made(world, tmp_path, train_rows=sizes, seeds=(1,))
        monkeypatch.undo()
    labels = {row["method"] for row in load_runs([tmp_path])}
    assert labels == {"zero-shot", "fixed", "fixed, 4 rows", "fixed, 8 rows"}


def test_a_comparison_from_before_runs_had_labels_is_resumed(world, tmp_path, monkeypatch):
    made(world, tmp_path, train_rows=(4,), seeds=(1,))
    for file in (tmp_path / "runs").rglob("run.json"):
        run = read(file)
        run["settings"].pop("label", None)
        file.write_text(json.dumps(run))
    monkeypatch.setattr(Frozen, "load", lambda _: pytest.fail("The LLM was loaded, and there was nothing to do."))
    runs = made(world, tmp_path, train_rows=(4,), seeds=(1,))
    assert {row["method"] for row in load_runs(runs)} == {"zero-shot", "fixed, 4 rows"}


def test_runs_say_how_many_rows_were_learned_from_and_seeds_that_draw_others_are_one_line(world, tmp_path):
    frozen, plan = Frozen(str(world / "llm"), dtype="float32"), Plan(("fixed", "icl"), (1, 2), (4,), test_rows=2)
    runs = compare(plan, frozen, tasks()[1:], tmp_path, given=GIVEN)
    for run in runs:
        about = read(run / "run.json")
        if about["settings"]["method"] == "fixed":
            assert about["method"]["training"]["train_rows"] == {"kettles": 4}
        del about["settings"]["label"]  # which would tell numbers of rows apart by itself
        (run / "run.json").write_text(json.dumps(about))
    assert {row["method"] for row in load_runs(runs)} == {"fixed", "icl"}


def scored_rows(method, scores, task="films", seed=1):
    """Rows with these scores by name, a list for each, and answers of which the first two are alike."""
    count = len(next(iter(scores.values())))
    rows = rows_of(method, "x" * count, task, seed)
    return [
        row | {"target": "aab"[index % 3], "scores": {name: values[index] for name, values in scores.items()}}
        for index, row in enumerate(rows)
    ]


def test_a_constant_answer_has_scores_of_whole_answers_alone():
    graded = scored_rows("lora", {"json_fields": [0.5, 0.5, 1.0]})
    assert answer(graded) == "lora scores best on films: 66.7% (json_fields)."
    table = compare_tables(Comparison({None: graded}, {None: {}}))[0]
    assert [line[0] for line in table.rows] == ["lora"]
    assert CONSTANT not in table.note
    whole = scored_rows("lora", {"exact_match": [1.0, 0.0, 1.0]})
    assert "most frequent answer scores 66.7%" in answer(whole)
    table = compare_tables(Comparison({None: whole}, {None: {}}))[0]
    assert table.rows[-1] == [CONSTANT, "–", "–", "66.7", "66.7"]
    assert f"Last row: {CONSTANT}" in table.note


def test_a_constant_answer_is_averaged_over_categories_as_methods_are():
    rows = [row | {"category": "x"} for task in ("a", "b") for row in rows_of("lora", "x-", task)]  # constant: 50
    rows += [row | {"category": "y"} for row in scored_rows("lora", {"exact_match": [1.0] * 3}, "c")]  # 66.7
    assert "most frequent answer scores 58.3%" in answer(rows)  # over tasks it would be 55.6


def test_a_constant_answer_is_averaged_over_the_data_sets_of_the_methods():
    rows = rows_of("lora", "x-", "a") + scored_rows("lora", {"exact_match": [None] * 3}, "b")
    table = compare_tables(Comparison({None: rows}, {None: {}}))[0]
    assert [line[3:] for line in table.rows] == [["50.0", "–†", "50.0†"]] * 2
    assert table.rows[-1][0] == CONSTANT


@pytest.mark.filterwarnings("error:constrained_layout")
def test_differences_name_the_data_sets_that_have_the_score():
    rows = []
    for method in ("atv", "lora", "fixed"):
        for task, names in (("a", ("one", "two")), ("b", ("one", "two", "three")), ("c", ("one",))):
            rows += scored_rows(method, {name: [1.0, 0.0, 1.0] for name in names}, task)
    table = next(table for table in compare_tables(Comparison({None: rows}, {None: {}})) if "against" in table.title)
    assert list(dict.fromkeys((score, data) for score, data, *_ in table.rows)) == [
        ("one", "all 3"), ("two", "all 2"), ("three", "b"),
        ("one", "a"), ("two", "a"), ("one", "b"), ("two", "b"), ("one", "c"),
    ]  # fmt: skip
    assert len(draw(table, "a")) == 1
