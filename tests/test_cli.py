"""The command line: the whole path on tiny models, wrong input as one line with exit code 2, and how fast help is."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task
from documents import COMMANDS
from refusals import refused
from transformers import LlamaForCausalLM

from atv import __version__
from atv.cli.commands import TABLES
from atv.cli.loading import named_tasks
from atv.cli.options import Tasks
from atv.config import GENERATOR_OPTIONS, TrainConfig
from atv.data import query_renderer
from atv.errors import ATVError
from atv.methods import METHODS, TRAINED
from atv.methods.settings import learned, method_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with spaces in its path that holds an LLM, a generator and a task of one's own."""
    folder = tmp_path_factory.mktemp("my own world")
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")
    task = toy_task()
    splits = {split: [row._asdict() for row in getattr(task, split)] for split in ("train", "valid", "test")}
    (folder / "data").mkdir()
    (folder / "data" / "toy.json").write_text(json.dumps(splits))
    (folder / "data" / "templates.json").write_text(json.dumps({"toy": list(task.templates)}))
    return folder


def models(world):
    return ["--llm", world / "llm", "--dtype", "float32"]


def trained_on_toy(**options):
    """An ATV that says that it was trained on the task of `world`; its generator reads the query alone."""
    model = make_atv(dtype=torch.float32, **options)
    model.training_summary = {"tasks": {"toy": toy_task().asking()}}
    return model


def train_options(world):
    return [*models(world), "--generator", world / "generator", "--data", world / "data", "--pooling", "mean",
            "--scale", "0.5", "--epochs", "2", "--batch-size", "4", "--lr", "5e-3"]  # fmt: skip


def test_a_table_that_has_changed_is_not_evaluated_and_another_one_is_asked_as_in_training(atv, world, tmp_path):
    rows = [f"the harbour {('quiet', 'leaks')[n % 2]} {n},{('yes', 'no')[n % 2]}\n" for n in range(40)]
    table, other = tmp_path / "tickets.csv", tmp_path / "later.csv"
    for file in (table, other):
        file.write_text("text,label\n" + "".join(rows))
    how = ["--generator", world / "generator", "--epochs", "1", "--train-rows", "8", "--template", "Is it so? {input}"]
    code, _, err = atv("train", *models(world), *how, "--data", table, "--out", tmp_path / "out")
    assert not code, err
    evaluated = ["eval", *models(world), "--adapter", tmp_path / "out", "--variants", "first"]
    asked = {}
    for file in (table, other):
        code, _, err = atv(*evaluated, "--data", file, "--test-rows", "4", "--out", tmp_path / file.stem)
        assert not code, err
        (asked[file],) = json.loads((tmp_path / file.stem / "run.json").read_text())["settings"]["asking"].values()
    assert asked[table] == asked[other]
    assert asked[table]["templates"] == ["Is it so? {input}"]
    table.write_text(table.read_text() + "the harbour leaks 41,no\n")  # other test rows are drawn from 41 rows
    code, _, err = atv(*evaluated, "--data", table, "--out", tmp_path / "again")
    assert code == 2
    assert "tickets: the table has changed since the adapter was trained" in err


WAYS = {
    "template": (["Rate: {input}"], {}),
    "format": ("auto", {"format": "auto"}),
    "system": ("Be brief.", {"system": "Be brief."}),
    "chat_template_kwargs": ('{"b": 2}', {"template_kwargs": '{"b": 2}'}),
}


@pytest.mark.parametrize("name", ["tickets", "later"])
@pytest.mark.parametrize("way", [*WAYS, None])
def test_one_way_of_asking_that_is_given_keeps_the_others_of_the_training(tmp_path, way, name):
    made = {"format": "chat", "system": "You help.", "template_kwargs": '{"a": 1}', "ends": True}
    asking = {"templates": ["Is it so? {input}"], "answer_prefixes": [None], "renderer": made, "options": None}
    training = {"tasks": {"tickets": asking}}
    rows = "".join(f"the harbour {n},{'yn'[n % 2]}\n" for n in range(40))
    (tmp_path / f"{name}.csv").write_text(f"text,label\n{rows}")
    value, changed = WAYS[way] if way else (None, {})
    given = Tasks(data=str(tmp_path / f"{name}.csv"), **{way: value} if way else {})
    (task,) = named_tasks(given, training)
    # `atv predict` has --template alone; the other ways are changed where the training is recorded
    asked = {"tasks": {"tickets": asking | {"renderer": made | changed}}}
    for reads in ("query", "prompt", "conversation"):
        expected = query_renderer(asked, reads, None, value[0] if way == "template" else None)
        assert next(iter(task.renderers("first", reads).values())) == expected


def test_a_way_of_asking_that_the_training_leaves_no_place_for_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"t {n},{'yn'[n % 2]}\n" for n in range(40)))
    for made, way, said in (
        ({"format": "chat", "system": "You help."}, {"format": "template"}, "Leave --format out"),
        ({"format": "template"}, {"system": "You help."}, "no place for a system prompt"),
    ):
        asking = {"templates": ["{input}"], "answer_prefixes": [None], "renderer": made, "options": None}
        with refused(said):
            named_tasks(Tasks(data=str(tmp_path / "t.csv"), **way), {"tasks": {"t": asking}})


def counted(function, calls):
    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return wrapper


def test_train_eval_report_generate_on_ones_own_models_and_data(atv, world, tmp_path, monkeypatch):
    out = tmp_path / "a run"
    code, said, err = atv("train", *train_options(world), "--out", out)
    assert code == 0, err
    assert f"Adapter: {out / 'adapter'}" in said
    code, _, err = atv("train", *train_options(world), "--out", out)
    assert code == 0
    assert "nothing to do" in err

    data = ["--data", world / "data", "--dtype", "float32", "--variants", "all"]
    for method, extra in (("zero-shot", ["--llm", world / "llm"]), ("atv", ["--adapter", out])):
        code, _, err = atv("eval", "--method", method, *data, *extra, "--out", tmp_path / method)
        assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "atv" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 * 9  # test rows x (3 templates x 3 answer prefixes)
    assert {row["answer_prefix"] for row in rows} == {"A:", "Answer:", "The answer is"}
    run = json.loads((tmp_path / "atv" / "run.json").read_text())
    assert run["finished"]
    assert run["method"]["config"]["scale"] == 0.5
    assert run["versions"]["torch"]

    code, said, err = atv("report", tmp_path / "zero-shot", tmp_path / "atv", "--out", tmp_path / "table.md")
    assert code == 0, err
    assert "zero-shot" in said
    assert "| toy |" in (tmp_path / "table.md").read_text()
    code, said, err = atv("report", tmp_path, "--out", tmp_path / "tables.csv")
    assert code == 0, err
    assert "atv minus" in said
    assert f"Written to {tmp_path / 'tables-1-scores-per-task.csv'}" in said
    assert len(list(tmp_path.glob("tables-*.csv"))) == 10
    # per task, by prefix, in-domain by both scores, comparison, classification and its labels, confusions, reliability
    # and mistakes
    check_refused(*atv("report", tmp_path, "--out", tmp_path / "table.txt"), ["'.txt'", ".md, .tex, .csv or .html"])

    calls = []
    monkeypatch.setattr(LlamaForCausalLM, "generate", counted(LlamaForCausalLM.generate, calls))
    ask = ["generate", "--adapter", out, "--dtype", "float32", "the harbour leaks"]
    code, alone, err = atv(*ask)
    assert code == 0, err
    assert len(calls) == 1
    check_refused(*atv(*ask[:-1], "the harbour leaks " * 200), ["the LLM's context is 256", "none for an answer"])
    code, said, err = atv(*ask, "--compare")
    assert code == 0, err
    assert len(calls) == 3
    assert "unsteered: " in said
    assert f"steered:   {alone.strip()!r}" in said


def test_the_llm_itself_may_read_the_query(atv, world, tmp_path):
    out, options = tmp_path / "out", dict(zip(*[iter(train_options(world))] * 2, strict=True))
    options |= {"--generator": "self", "--pooling": "last", "--out": out}
    code, _, err = atv("train", *[part for pair in options.items() for part in pair], "--generator-layer", "0")
    assert code == 0, err
    assert "generator self: the LLM's own state after decoder layer 0, pooling last" in " ".join(err.split())
    assert [file.name for file in out.rglob("*.safetensors")] == ["expansion.safetensors"]
    data = ["--data", world / "data", "--dtype", "float32", "--adapter", out]
    assert atv("eval", *data, "--variants", "first", "--out", tmp_path / "run")[0] == 0
    code, _, err = atv("generate", "--adapter", out, "--dtype", "float32", "the harbour leaks")
    assert code == 0, err
    code, said, err = atv("doctor", *models(world), "--generator", "self")
    assert code == 0, err
    assert "All 9 checks passed." in said
    data = ("--data", tmp_path / "no.csv")
    check_refused(*atv("doctor", *models(world), "--generator", "self", *data), ["No file or folder", "no.csv"])


def test_another_method_is_trained_with_its_own_settings_and_known_by_its_adapter(atv, world, tmp_path):
    data = [*models(world), "--data", world / "data"]
    some = [*data, "--method", "lora", "--epochs", "1", "--batch-size", "4", "--out", tmp_path / "lora"]
    code, _, err = atv("train", *some, "--rank", "3", "--targets", "q_proj")
    assert code == 0, err
    assert json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())["r"] == 3
    code, _, err = atv("eval", *data, "--variants", "first", "--adapter", tmp_path / "lora", "--out", tmp_path / "run")
    assert code == 0, err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["method"] == "lora"
    assert run["method"]["config"] | {"rank": 3, "targets": ["q_proj"]} == run["method"]["config"]
    assert run["method"]["training"]["train"]["learning_rate"] == 4e-4
    train = ["train", *some, "--out", tmp_path / "other"]
    check_refused(*atv(*train, "--rnak", "3"), ["No such option: --rnak", "--rank", "See atv train --help"])
    check_refused(*atv(*train, "--rank", "many"), ["Invalid value for '--rank'", "integer"])
    check_refused(*atv(*train, "--rank", "0"), ["rank is 0"])
    check_refused(*atv(*train, "--positions", "last:2"), ["No such option: --positions"])
    check_refused(*atv("train", *data, "--method", "icl"), ["learns nothing"])
    check_refused(
        *atv("eval", *data, "--method", "i2cl", "--adapter", tmp_path / "lora"), ["adapter of the method lora"]
    )
    check_refused(*atv("eval", *data, "--method", "i2cl"), ["needs an adapter", "atv train --method i2cl"])
    check_refused(*atv("generate", "--adapter", tmp_path / "lora", "q"), ["adapter of the method lora"])


def test_reproduce_and_sweep_from_the_command_line(atv, world, tmp_path):
    data = [*models(world), "--data", world / "data"]
    settings = tmp_path / "settings.toml"
    settings.write_text("[all]\nbatch_size = 4\n[fixed]\npositions = 'last:2'\n")
    common = [*data, "--profile", "smoke", "--config", settings, "--method", "fixed"]
    some = ["paper", "reproduce", *common, "--method", "zero-shot", "--out", tmp_path / "r"]
    code, said, err = atv(*some)
    assert code == 0, err
    assert "its numbers mean nothing" in err
    assert "In-domain first_token" in said
    assert {file.suffix for file in (tmp_path / "r" / "tables").iterdir()} == {".md", ".tex", ".csv"}
    assert json.loads((tmp_path / "r" / "trained/fixed-42/train.json").read_text())["settings"]["train"]["epochs"] == 1
    assert atv(*some)[1] == said
    seeds = ["--method", "zero-shot", "--seed", "7", "--seed", "7", "--seed", "9", "--out", tmp_path / "seeds"]
    assert atv("paper", "reproduce", *data, "--profile", "smoke", *seeds)[0] == 0
    assert sorted(run.name for run in (tmp_path / "seeds" / "runs").iterdir()) == ["zero-shot-7", "zero-shot-9"]
    code, said, err = atv("paper", "sweep", *common, "--trials", "2", "--out", tmp_path / "s")
    assert code == 0, err
    assert "[2 of 2] fixed:" in err
    assert f"Next: atv paper reproduce --config {tmp_path / 's' / 'settings.toml'}" in said
    check_refused(
        *atv("paper", "reproduce", *data, "--profile", "large"),
        ["Unknown profile 'large'", "ablation, pair, paper, small, smoke"],
    )
    check_refused(*atv("paper", "reproduce", *common, "--config", tmp_path / "no"), ["No file", "a TOML file"])


def test_a_table_is_trained_on_and_evaluated(atv, world, tmp_path):
    rows = [f"the kettle leaks {number},{('yes', 'no')[number % 2]}" for number in range(40)]
    (tmp_path / "tickets.csv").write_text("\n".join(["body,team", *rows]))
    table = [*models(world), "--data", tmp_path / "tickets.csv", "--input", "body", "--output", "team"]
    code, said, err = atv("train", "--method", "fixed", *table, "--epochs", "1", "--out", tmp_path / "out")
    assert code == 0, err
    assert "tickets.csv --input body --output team" in said
    assert "29 training, 3 validation, 8 test rows (test and valid drawn from the training rows, seed 42)" in err
    code, said, err = atv("eval", *table, "--adapter", tmp_path / "out", "--out", tmp_path / "run")
    assert code == 0, err
    assert "atv report" in said
    check_refused(*atv("eval", *table[:-2], "--method", "zero-shot"), ["--input and --output together"])


def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_rows(atv, world, tmp_path):
    arguments = ["eval", "--method", "zero-shot", *models(world), "--data", world / "data", "--variants", "first"]
    assert atv(*arguments, "--out", tmp_path / "whole")[0] == 0
    assert atv(*arguments, "--out", tmp_path / "cut", "--batch-size", "3")[0] == 0
    rows = (tmp_path / "cut" / "predictions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "predictions.jsonl").write_text("".join(rows[:5]) + rows[5][:20])
    run = json.loads((tmp_path / "cut" / "run.json").read_text())
    (tmp_path / "cut" / "run.json").write_text(json.dumps(run | {"finished": False}))
    assert atv(*arguments, "--out", tmp_path / "cut")[0] == 0

    def judged(name):
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        keys = ("example", "outputs", "scores")
        return sorted(str([json.loads(line)[key] for key in keys]) for line in lines)

    assert judged("whole") == judged("cut")


def test_metrics_are_named_and_a_wrong_one_is_told_before_the_llm_is_loaded(atv, world, tmp_path):
    arguments = ["eval", "--method", "zero-shot", *models(world), "--data", world / "data", "--variants", "first"]
    assert atv(*arguments, "--out", tmp_path / "run", "--metric", "first_token", "--metric", "exact_match")[0] == 0
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    scores = {tuple(json.loads(line)["scores"]) for line in lines}
    assert scores == {("first_token", "first_token_among_options", "exact_match")}
    code, _, err = atv(*arguments, "--out", tmp_path / "no", "--metric", "exact")
    assert code == 2
    assert "Unknown metric 'exact'" in err
    assert not (tmp_path / "no").exists()


def test_doctor_passes_on_a_named_llm_and_fails_on_a_broken_hook(atv, world, monkeypatch):
    arguments = ["doctor", *models(world), "--generator", world / "generator"]
    code, said, err = atv(*arguments)
    assert code == 0, err
    assert "All 8 checks passed." in said
    check_refused(*atv(*arguments, "--input", "x"), ["--input and --output name columns", "expected --data"])
    monkeypatch.setattr("atv.steer.add_vectors", lambda hidden, *rest: hidden)
    code, said, _ = atv(*arguments)
    assert code == 1
    assert "FAILED the tokens that changed are those asked for" in said


def test_a_config_file_holds_options_and_flags_win(atv, world, tmp_path):
    options = dict(zip(*[iter(str(part).removeprefix("--") for part in train_options(world))] * 2, strict=True))
    lines = [f"{key} = {json.dumps(value)}" for key, value in (options | {"epochs": "1", "scale": "0.25"}).items()]
    (tmp_path / "run.toml").write_text("[train]\n" + "\n".join(lines))
    code, _, err = atv("train", "--config", tmp_path / "run.toml", "--scale", "0.75", "--out", tmp_path / "out")
    assert code == 0, err
    settings = json.loads((tmp_path / "out" / "train.json").read_text())["settings"]
    assert settings["config"]["scale"] == 0.75
    assert settings["train"]["epochs"] == 1


def test_a_config_file_may_begin_with_a_byte_order_mark_spell_options_as_flags_and_name_the_home_folder(
    atv, world, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(world))
    lines = ["[train]", *(f'{name} = "~/{name}"' for name in ("llm", "generator", "data")), 'out = "~/below home"',
             "lr = 0.25", "generator-lr = 0.5", "epochs = 1", 'dtype = "float32"', 'pooling = "mean"']  # fmt: skip
    (world / "run.toml").write_text("\n".join(lines), encoding="utf-8-sig")
    code, said, err = atv("train", "--config", "~/run.toml")
    assert code == 0, err
    assert f"Adapter: {world / 'below home' / 'adapter'}" in said
    settings = json.loads((world / "below home" / "train.json").read_text())["settings"]
    assert (settings["train"]["learning_rate"], settings["train"]["generator_learning_rate"]) == (0.25, 0.5)
    (world / "run.toml").write_text("[train]\nlr = 0.5\nlearning-rate = 0.25")
    check_refused(*atv("train", "--config", "~/run.toml"), ["learning_rate is given twice under [train]"])
    (world / "run.toml").write_text("[train]\nlearnign_rate = 0.25")
    check_refused(*atv("train", "--config", "~/run.toml"), ["'learnign_rate'", "Did you mean 'learning_rate'?"])


def test_every_path_and_llm_of_every_command_may_begin_with_the_home_folder(monkeypatch):
    """Where no shell expands it: after `=`, between quotes, in a config file."""
    monkeypatch.setenv("HOME", "/home/mine")
    found = set()
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.metavar == "PATH" or parameter.name in ("llm", "out", "adapter", "data", "runs"):
                found.add(parameter.name)
                needed = [word for p in command.params if p.required for word in (*p.opts[: p.opts[0][0] == "-"], "q")]
                words = ["~/x"] if parameter.param_type_name == "argument" else [*needed, f"{parameter.opts[0]}=~/x"]
                if parameter.name == "config":
                    with pytest.raises(ATVError, match="No file /home/mine/x;"):
                        command.make_context(name, words)
                    continue
                value = command.make_context(name, words).params[parameter.name]
                assert str(value[-1] if isinstance(value, list) else value) == "/home/mine/x", (name, parameter.name)
    paths = {"adapters_from", "config", "data", "elicit", "gguf", "out", "results", "runs", "teacher_system"}
    assert found == {"llm", "adapter", *paths}


def test_limited_rows_of_a_sorted_file_are_drawn_by_seed(atv, world, tmp_path, monkeypatch):
    words = {"no": "leaks", "yes": "quiet"}

    def rows(split):
        return [{"input": f"{split} {words[a]} {i}", "output": a} for a in ("no", "yes") for i in range(30)]

    data = task_file(world, tmp_path / "data", lambda _: {split: rows(split) for split in ("train", "valid", "test")})
    fitted = []
    monkeypatch.setattr(METHODS["atv"], "fit", lambda llm, tokenizer, tasks, *_, **__: fitted.extend(tasks))
    options = ["train", *train_options(world), "--data", data, "--train-rows", "12", "--valid-rows", "12"]
    for seed in ("1", "1", "2"):
        code, _, err = atv(*options, "--seed", seed, "--out", tmp_path / "out")
        assert code == 0, err
    one, same, other = fitted
    assert (len(one.train), len(one.valid), len(one.test)) == (12, 12, 60)
    assert {row.output for row in one.train} == {row.output for row in one.valid} == {"no", "yes"}
    assert (one.train, one.valid) == (same.train, same.valid)
    assert set(one.train) != set(other.train)

    eval_options = [*models(world), "--data", data, "--variants", "first", "--test-rows", "12", "--train-rows", "9"]
    asked = {}
    for name, more in {"zero-shot": [], "icl": ["--shots", "2"], "bm25": ["--shots", "2", "--seed", "7"]}.items():
        code, _, err = atv("eval", "--method", name, *eval_options, *more, "--out", tmp_path / name)
        assert code == 0, err
        run = json.loads((tmp_path / name / "run.json").read_text())
        lines = (tmp_path / name / "predictions.jsonl").read_text().splitlines()
        asked[name] = (run["settings"]["tasks"], [json.loads(line)["target"] for line in lines])
    assert asked["zero-shot"] == asked["icl"] == asked["bm25"]
    assert set(asked["icl"][1]) == {"no", "yes"}
    again = ["eval", "--method", "icl", *eval_options, "--shots", "2", "--out", tmp_path / "icl"]
    check_refused(*atv(*again, "--seed", "7"), ["made with other settings", "demonstrations from.toy"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "q", "--adapter", "x", "--llm", ""], ["--llm is empty"]),
        (["eval", "--method", ""], ["--method is empty"]),
        (["serve", "--adapters-from", ""], ["it is empty; expected a path"]),
        (["generate", "q", "--adapter", " "], ["it is empty; expected a path"]),
        (["generate", "q", "--adapter", "x", "--temperature", "inf"], ["--temperature", "less than or equal to 2"]),
        (["serve", "--timeout", "inf"], ["--timeout is inf", "a finite number"]),
        (["serve", "--shared-memory", "1e999"], ["--shared-memory is inf", "a finite number"]),
        (["compare", "--seeds", "9" * 20], ["--seeds", "less than or equal to 1000"]),
        (["paper", "reproduce", "--seed", "7", "--seed", "-1"], ["--seed", "greater than or equal to 0"]),
    ],
)
def test_an_empty_or_endless_value_is_not_taken_for_a_default(atv, words, said):
    check_refused(*atv(*words), said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nepochs = true\n", "epochs is true; expected a number"),
        ("[train]\nepochs = false\n", "epochs is false; expected a number"),
        ("[lora]\nrank = true\n", "rank is True; expected a whole number"),
        ("[train]\nmax_grad_norm = true\n", "'--max-grad-norm': it is true; expected a number or none"),
        ("[train]\nmethod = 'encoder'\ngenerator_learning_rate = true\n", "it is true; expected a number or none"),
        ("[train]\nsystem = ['a', 'b']\n", "'--system': it is ['a', 'b']; expected one text"),
        ("[train]\nsystem = true\n", "'--system': it is True; expected one text"),
        ("[train]\ntemplate = ['{input}', ['{input}']]\n", "'--template': it is ['{input}']; expected one text"),
        ("[train]\nteacher_system = ['a']\n", "'--teacher-system': it is ['a']; expected one text"),
        ("[train]\nllm = ['a']\n", "'--llm': it is ['a']; expected one text"),
    ],
)
def test_a_value_of_another_kind_in_a_file_is_refused(atv, world, tmp_path, text, said):
    (tmp_path / "a.toml").write_text(text)
    method = ["--method", "lora"] if "lora" in text else []
    config = ["--config", tmp_path / "a.toml", "--out", tmp_path / "out"]
    llm = [] if "llm" in text else models(world)
    check_refused(*atv("train", *llm, "--data", world / "data", *method, *config), [said])


def test_a_rank_above_that_of_the_full_map_is_refused(atv, world, tmp_path):
    options = [*train_options(world), "--expansion-rank", "99", "--out", tmp_path / "out"]
    check_refused(*atv("train", *options), ["expansion_rank is 99", "expected at most 24"])


def test_report_writes_nothing_without_out(atv, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    assert atv("eval", *models(world), "--data", world / "data", "--variants", "first", "--out", "run")[0] == 0
    before = sorted(tmp_path.iterdir())
    code, said, err = atv("report", "run")
    assert code == 0, err
    assert "toy" in said
    assert "--out report.html" in said
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "report.md").read_text() == "mine"
    code, _, err = atv("report", "run", "--out", "report.md")
    assert code == 0, err
    assert "| toy |" in (tmp_path / "report.md").read_text()


def test_theory_writes_nothing_without_out(atv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atv.cli.paper.theory._tables", lambda *_: [])
    assert atv("paper", "theory")[0] == 0
    assert not list(tmp_path.iterdir())


SLOWLY = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
import atv.evaluation.run, atv.training.loop
def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(60)
atv.evaluation.run._ask = wait
atv.training.loop.require_wiring = wait
from atv.cli import main
sys.argv = ["atv", *sys.argv[1:]]
main()
"""


@pytest.mark.exhaustive  # the next test interrupts two processes
@pytest.mark.parametrize("command", ["train", "generate"])
def test_ctrl_c_is_one_line_that_says_how_to_resume(world, tmp_path, command):
    """Sent as a terminal sends it, while the command does its work."""
    program = [sys.executable, "-c", SLOWLY, command]
    if command == "generate":
        trained_on_toy().save_pretrained(tmp_path / "adapter")
        program[2] = SLOWLY.replace(
            "from atv.cli", "import atv.model; atv.model.ATVModel.generate = wait; from atv.cli"
        )
        options = ["--adapter", tmp_path, *models(world), "a query"]
    else:
        options = [*train_options(world), "--out", tmp_path / "out"]
    process = subprocess.Popen(
        [*program, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waiting\n", process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    resumed = "" if command == "generate" else "; run the same command again to resume"
    assert err.splitlines()[-1] == f"atv: interrupted{resumed}."
    assert "Traceback" not in err


@pytest.mark.exhaustive  # three new processes, of which each imports torch
def test_ctrl_c_on_several_processes_is_said_once(world, tmp_path):
    (tmp_path / "slowly.py").write_text(SLOWLY)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "slowly.py"]
    options = ["eval", *models(world), "--data", world / "data", "--out", tmp_path / "out"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(
        [*map(str, launch), *map(str, options)], env=os.environ | {"OMP_NUM_THREADS": "1"}, **how
    )
    assert [process.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2, process.communicate()[1]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the launcher and all that it started
    _, err = process.communicate(timeout=60)
    assert err.count("atv: interrupted; run the same command again to resume.") == 1
    assert "atv/cli/app.py" not in err  # the launcher shows where it was itself; no process of ours does


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--learning-rates", "--learning-rate"),
        ("--learning_rate", "--learning-rate"),
        ("--generator-learning-rat", "--generator-learning-rate"),
        ("--max-gradient-norm", "--max-grad-norm"),
        ("--train-row", "--train-rows"),
    ],
)
def test_a_mistyped_option_is_answered_with_the_one_that_was_meant(atv, typed, meant):
    code, _, err = atv("train", typed, "1")
    assert code == 2
    said = " ".join(err.replace("│", " ").split())
    assert f"{meant}" in said.partition("Did you mean")[2] or f"{meant}" in said.partition("Possible options:")[2], said


def test_options_that_are_settings_are_called_as_in_the_configuration():
    options = {spelled for p in COMMANDS["train"].params for spelled in p.opts}
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in options


def task_file(world, folder, change):
    rows = json.loads((world / "data" / "toy.json").read_text())
    folder.mkdir()
    (folder / "toy.json").write_text(json.dumps(change(rows)) if callable(change) else change)
    (folder / "templates.json").write_text((world / "data" / "templates.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--llm", "no-such-folder/no-such-model"], ["no-such-folder/no-such-model", "local folder"]),
        (["--task", "toi"], ["Unknown task 'toi'", "Did you mean 'toy'?"]),
        (["--data", "nowhere"], ["No file or folder nowhere"]),
        (["--layers", "uper"], ["Unknown layer region 'uper'", "bottom"]),
        (["--layers", "0,7"], ["layers 0 to 2"]),
        (["--positions", "first"], ["Unknown positions 'first'", "last:K"]),
        (["--positions", "last:0"], ["Unknown positions 'last:0'"]),
        (["--pooling", "max"], ["Unknown pooling 'max'"]),
        (["--generator", "random:2by64"], ["'random:2by64'", "random:LAYERSxWIDTH"]),
        (["--scale", "nan"], ["scale is nan", "finite number"]),
        (["--lr", "-1"], ["learning_rate is -1.0"]),
        (["--epochs", "0"], ["epochs is 0"]),
        (["--quantization", "int4"], ["Unknown quantization 'int4'", "8bit"]),
        (["--device", "gpu"], ["The device 'gpu' cannot be used", "auto"]),
        (["--dtype", "int4"], ["Unknown dtype 'int4'", "bfloat16"]),
        (["--query-template", "no place"], ["has no {query}"]),
        (["--template", "no place"], ["has no {input}"]),
        (["--train-rows", "0"], ["train rows is 0"]),
        (["--config", "nothing.toml"], ["No file nothing.toml", "as [train]"]),
        (["--layers", "9-0"], ["Unknown layer region '9-0'", "0-9"]),
        (["--layers", "0-99999999"], ["Unknown layer region '0-99999999'", "0-9"]),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(atv, world, tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    code, said, err = atv("train", *train_options(world), "--out", tmp_path / "out", *options)
    check_refused(code, said, err, named)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_one_line_and_exit_code_2(atv, world, tmp_path):
    (tmp_path / "file").touch()
    for command, named in (
        (["train", *train_options(world)], [tmp_path / "file", "is a file; expected a folder"]),
        (["eval", *models(world), "--data", world / "data"], ["Not a directory", tmp_path / "file" / "out"]),
    ):
        code, said, err = atv(*command, "--out", tmp_path / "file" / "out")
        check_refused(code, said, err, map(str, named))


@pytest.mark.parametrize(
    "options",
    [
        ["train", "--seed", "-1"],
        ["train", "--seed", str(2**32)],
        ["eval", "--seed", "-1"],
        ["paper", "theory", "--seed", "-1"],
        ["generate", "a query", "--adapter", "nowhere", "--max-new-tokens", "0"],
        ["generate", "a query", "--adapter", "nowhere", "--temperature", "-1"],
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_loaded(atv, options):
    code, _, err = atv(*options)
    assert code == 2
    assert f"Invalid value for '{options[-2]}'" in err


def check_refused(code, said, err, named):
    assert code == 2, err
    assert said == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("atv: ")
    assert "Traceback" not in err
    assert [part for part in named if part not in line] == [], line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("{not json", ["toy.json is not valid JSON"]),
        (lambda rows: rows | {"test": []}, ["the split 'test' is empty"]),
        (lambda rows: rows | {"train": [{"input": "x"}]}, ["train row 0 has output None"]),
        (lambda rows: rows | {"test": [r | {"output": "yes", "input": f"{i}"} for i, r in enumerate(rows["test"] * 2)]},
         ["all 16 test answers are 'yes'"]),
        (lambda rows: rows | {"test": rows["test"] + rows["train"][:1]}, ["is in train and in test"]),
        (lambda rows: rows | {"train": [{"input": "a harbour", "output": "yes " * 300}]},
         ["All 1 train rows are too long for the LLM's context"]),
    ],
)  # fmt: skip
def test_wrong_data_is_one_line_and_exit_code_2(atv, world, tmp_path, change, named):
    data = task_file(world, tmp_path / "data", change)
    code, said, err = atv("train", *train_options(world), "--data", data, "--out", tmp_path / "out")
    check_refused(code, said, err, named)
    assert not (tmp_path / "out").exists()


def test_rows_that_do_not_fit_the_context_are_cut_or_left_out_and_counted(atv, world, tmp_path):
    long = [{"input": "harbour " * 300, "output": "yes"}, {"input": "a harbour", "output": "yes " * 300}]
    data = task_file(world, tmp_path / "data", lambda rows: rows | {"train": rows["train"] + long})
    code, _, err = atv("train", *train_options(world), "--data", data, "--out", tmp_path / "out")
    assert code == 0, err
    said = " ".join(err.split())
    assert "train: the queries of 1 of 10 rows are cut at their end to fit the LLM's context." in said
    assert "train: 1 of 10 rows are left out: their answers do not fit the LLM's context." in said


def test_unseen_tasks_are_not_trained_on_unless_they_are_named(atv, world, tmp_path):
    data = task_file(world, tmp_path / "data", lambda rows: rows | {"category": "Unseen"})
    rows = (data / "toy.json").read_text()
    options = ["train", *train_options(world), "--data", data, "--out", tmp_path / "out"]
    check_refused(*atv(*options), ["All tasks are of the category Unseen", "name them with --task"])
    (data / "mine.json").write_text(rows.replace("harbour", "quay").replace("Unseen", "mine"))
    (data / "templates.json").write_text(json.dumps(dict.fromkeys(("mine", "toy"), ["{input}\nso?"] * 3)))
    said = " ".join(atv(*options)[2].split())
    assert "Not trained on, since their category is Unseen: toy" in said
    assert "training rows of mine" in said
    assert "training rows of toy" in " ".join(atv(*options, "--task", "toy", "--force")[2].split())


def test_wrong_use_of_eval_generate_and_report_is_one_line(atv, world, tmp_path):
    check_refused(*atv("eval", "--method", "atv"), ["needs an adapter"])
    check_refused(*atv("eval", "--method", "lore"), ["Unknown method 'lore'"])
    check_refused(*atv("eval", "--adapter", tmp_path), ["No adapter at"])
    check_refused(*atv("generate", "--adapter", tmp_path, " "), ["query is empty"])
    check_refused(*atv("report", tmp_path), ["is not a run"])
    make_atv(dtype=torch.float32).save_pretrained(tmp_path / "untrained")
    check_refused(*atv("generate", "--adapter", tmp_path / "untrained", "q"), ["does not say on which tasks"])
    trained_on_toy().save_pretrained(tmp_path / "adapter")
    make_llm("qwen2", torch.float32).save_pretrained(tmp_path / "qwen2")
    byte_level_tokenizer().save_pretrained(tmp_path / "qwen2")
    check_refused(
        *atv("generate", "--adapter", tmp_path, "--llm", tmp_path / "qwen2", "q"), ["model_type llama against qwen2"]
    )


def test_eval_with_demonstrations_records_how_many_and_refuses_what_does_not_fit(atv, world, tmp_path):
    arguments = ["eval", *models(world), "--data", world / "data", "--variants", "first"]
    for method in ("icl", "bm25"):
        code, _, err = atv(*arguments, "--method", method, "--shots", "3", "--out", tmp_path / method)
        assert code == 0, err
        rows = [json.loads(line) for line in (tmp_path / method / "predictions.jsonl").read_text().splitlines()]
        assert [row["demonstrations"] for row in rows] == [3] * 8
        run = json.loads((tmp_path / method / "run.json").read_text())
        assert (run["settings"]["shots"], run["method"]["shots"]) == (3, 3)
    again = [*arguments, "--method", "icl", "--out", tmp_path / "icl"]
    check_refused(*atv(*again), ["shots: 3 there, 16 now"])
    check_refused(*atv(*again, "--shots", "0"), ["shots is 0", "from 1"])
    check_refused(*atv(*arguments, "--shots", "4"), ["zero-shot has no demonstrations", "--shots 4"])
    train = json.loads((world / "data" / "toy.json").read_text())["train"]
    other = task_file(world, tmp_path / "other", lambda rows: rows | {"train": train[1:]})
    check_refused(*atv(*again, "--shots", "3", "--data", other), ["demonstrations from"])


def test_a_run_is_not_gone_on_with_in_another_quantization(atv, world, tmp_path):
    arguments = ["eval", *models(world), "--data", world / "data", "--variants", "first", "--out", tmp_path / "run"]
    code, _, err = atv(*arguments, "--device", "auto")
    assert code == 0, err
    check_refused(*atv(*arguments, "--quantization", "8bit"), ["quantization: None there, '8bit' now"])


def test_tasks_lists_the_built_in_ones(atv):
    code, said, _ = atv("tasks")
    assert code == 0
    for name in ("sentiment", "topic", "boolean_ex", "temporal_s", "outlook"):
        assert name in said


def test_help_loads_nothing_that_takes_seconds():
    code = "import sys, atv.cli\ntry: atv.cli.main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], check=True, capture_output=True, text=True)
    assert "Adaptive Task Vectors" in done.stdout
    slow = {"torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib", "datasets", "peft"}
    assert not slow & set(done.stderr.split())


def test_every_option_of_every_command_is_explained():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("extra", [[], ["--parametrisation", "paper"], ["--generator", "self"]])
@pytest.mark.parametrize("method", TRAINED)
def test_help_shows_the_values_that_a_training_uses(method, extra):
    given = {}
    if extra:
        name, value = extra[0].removeprefix("--"), extra[1]
        given = {name: value} if method == "atv" else {}
    config, train = method_settings(method, [{method: given}], seed=42)
    values = config.to_dict() | train.to_dict()
    arguments = ["--method", method, *(extra if given else [])]
    shown = {p.name: p.default for p in COMMANDS["train"].make_context("train", arguments).command.params}
    hidden = getattr(METHODS[method].config_class, "UNLISTED", ())
    unused = GENERATOR_OPTIONS - METHODS[method].generator_options
    loop = [] if METHODS[method].train_defaults is None else set(vars(train)) - unused
    assert not unused & set(shown)
    assert {name: shown[name] for name in (*vars(config), *loop) if name not in hidden} == {
        name: values[name] for name in (*vars(config), *loop) if name not in hidden
    }


def test_what_the_help_of_atv_is_made_of_without_torch_is_what_the_method_says():
    atv = METHODS["atv"]
    assert learned("atv") == (atv.config_class, atv.train_defaults, atv.generator_options)
    assert set(TRAINED) == {name for name, method in METHODS.items() if method.config_class is not None}
    assert all(method.name == name for name, method in METHODS.items())


def test_no_command_is_called_as_a_method_so_that_a_table_is_one_or_the_other():
    assert not {*METHODS, "all"} & {*TABLES.values(), "paper"}


def test_one_file_holds_options_of_commands_and_settings_of_methods(atv, world, tmp_path):
    options = {key: str(world / key) for key in ("llm", "data")} | {"dtype": "float32", "method": "lora"}
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    tables = ["[all]", "epochs = 9", "batch_size = 4", "[lora]", "epochs = 1", "rank = 2", "[fixed]", "scale = 2.0"]
    file = tmp_path / "all.toml"
    file.write_text("\n".join(["[train]", *lines, "alpha = 5", "[paper.reproduce]", "profile = 'smoke'", *tables]))
    code, _, err = atv("train", "--config", file, "--dropout", "0", "--out", tmp_path / "out")
    assert code == 0, err
    settings = json.loads((tmp_path / "out" / "train.json").read_text())["settings"]
    assert (settings["config"]["rank"], settings["config"]["alpha"], settings["config"]["dropout"]) == (2, 5, 0.0)
    assert (settings["train"]["epochs"], settings["train"]["batch_size"]) == (1, 4)
    data = ["--llm", world / "llm", "--data", world / "data", "--method", "fixed", "--out", tmp_path / "r"]
    code, _, err = atv("paper", "reproduce", "--config", file, *data)
    assert code == 0, err
    record = json.loads((tmp_path / "r" / "reproduce.json").read_text())
    assert record["asked"]["profile"]["name"] == "smoke"
    assert record["learned"]["fixed-42"]["config"]["scale"] == 2.0
    said = COMMANDS["train"].make_context("train", ["--config", str(file)])
    assert {p.name: p.default for p in said.command.params}["rank"] == 2  # what --help shows


@pytest.mark.parametrize(
    ("text", "command", "named"),
    [
        ("[trian]", "train", ["Unknown table", "'trian'", "paper.reproduce", "lora", "Did you mean 'train'?"]),
        ("[paper.reprodce]", "eval", ["Unknown table", "'paper.reprodce'"]),
        ("[icl]", "train", ["Unknown table", "'icl'"]),
        ("out = 'x'", "train", ["out is not in a table"]),
        ("[eval]\nshot = 3", "eval", ["Unknown option in [eval]", "'shot'", "Did you mean 'shots'?"]),
        ("[train]\nrank = 3", "train", ["Unknown option in [train]", "'rank'"]),
        ("[lora]\nrnak = 3", "train", ["Unknown option in [lora]", "'rnak'", "Did you mean 'rank'?"]),
        ("[all]\nrnak = 3", "train", ["Unknown option in [all]", "'rnak'"]),
        ("[train]\nmethod = 'lore'", "train", ["Unknown method 'lore'"]),
        ("[atv]\nparametrisation = 'papr'", "train", ["Unknown parametrisation 'papr'"]),
    ],
)
def test_what_a_config_file_cannot_hold_is_refused(atv, tmp_path, text, command, named):
    (tmp_path / "x.toml").write_text(text)
    check_refused(*atv(command, "--config", tmp_path / "x.toml"), named)


def test_clipping_can_be_switched_off():
    context = COMMANDS["train"].make_context("train", ["--max-grad-norm", "none"])
    assert context.params["max_grad_norm"] is None


def test_inspect_asks_for_queries_of_an_atv(atv, world, tmp_path):
    trained_on_toy(scale=2.0).save_pretrained(tmp_path / "adapter")
    ask = ["inspect", "--adapter", tmp_path / "adapter", *models(world)]
    code, said, err = atv(*ask, "the harbour leaks", "a quiet harbour")
    assert code == 0, err
    assert said.count("The vectors promote ") == said.count("Layer by layer") == 2
    code, _, err = atv(*ask)
    assert code == 2
    assert "Missing argument" in err
    check_refused(*atv(*ask, " "), ["query is empty"])


def test_report_does_not_know_the_paper_and_paper_tables_does(atv, tmp_path, monkeypatch):
    beside = []
    monkeypatch.setattr("atv.cli.report.report_tables", lambda runs, numbers: beside.append(numbers) or ([], []))
    monkeypatch.setattr("atv.cli.report.load_analyses", lambda runs: [])
    assert atv("report", tmp_path)[0] == 0
    assert atv("paper", "tables", tmp_path)[0] == 0
    assert beside[0] is None
    assert "arXiv" in beside[1].source or beside[1].source


def test_a_mistyped_set_of_variants_is_refused_before_the_llm_is_loaded(atv, tmp_path):
    """On a large LLM a mistake would otherwise cost minutes; the LLM named here does not exist."""
    options = ["--llm", tmp_path / "no-llm", "--task", "topic", "--variants", "some", "--out", tmp_path / "out"]
    code, _, err = atv("eval", *options)
    assert (code, "some" in err and "diagonal" in err, "no-llm" in err) == (2, True, False)


def test_the_version_is_that_of_the_package(atv):
    code, out, _ = atv("--version")
    assert (code, out.strip()) == (0, __version__)
