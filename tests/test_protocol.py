"""The protocol: settings from weaker to stronger, the same rows for all, going on after a kill, fair trials."""

import inspect
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from conftest import byte_level_tokenizer, make_atv, make_llm, toy_task
from forks import ended, forked
from refusals import refused
from safetensors.torch import load_file, save_file

from atv import artifact
from atv.cli.config_file import ConfigFile
from atv.cli.options import Sweep
from atv.config import GENERATOR_OPTIONS, ATVConfig, TrainConfig
from atv.data import UNSEEN
from atv.errors import ATVError
from atv.evaluation.measure import Frozen
from atv.evaluation.records import RunWriter, load_runs
from atv.files import sha256
from atv.methods import METHODS
from atv.methods.settings import check_tables, method_settings
from atv.paper.experiments import Condition, conditions_of, known_experiments, read_experiment
from atv.paper.profiles import IN_TABLES, PROFILES, Profile
from atv.paper.reproduce import reproduce
from atv.paper.sweep import _toml, sweep, trials_of
from atv.report import find_experiments

TINY = Profile(
    "tiny", "", train_rows=6, valid_rows=3, test_rows=4, seeds=(1,), variants="first", shots=2,
    settings={"all": {"epochs": 1, "batch_size": 4}, "elicit": {"exemplars": 2, "layer_rows": 2}},
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An LLM and a generator in folders, and what methods need to know of them."""
    folder = tmp_path_factory.mktemp("models")
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")
    generator = str(folder / "generator")
    given = {
        "atv": {"generator": generator, "pooling": "mean", "scale": 0.5},
        "elicit": {"encoder": generator},
        "probe": {"generator": generator},
        "encoder": {"generator": generator},
    }
    return Frozen(str(folder / "llm"), dtype="float32"), given


def tasks():
    other = toy_task("other", 36)
    rows = {split: tuple(row._replace(input=f"{row.input} now") for row in getattr(other, split))
            for split in ("train", "valid", "test")}  # fmt: skip
    unseen = {split: tuple(row._replace(input=f"{row.input} then") for row in getattr(other, split))
              for split in ("train", "valid", "test")}  # fmt: skip
    return [toy_task(rows=36), replace(other, **rows), replace(other, name="new", category=UNSEEN, **unseen)]


@pytest.fixture(scope="module")
def everything(world, tmp_path_factory):
    """All methods, trained and measured: the folder of each run, and the folder with all of them."""
    out = tmp_path_factory.mktemp("everything")
    frozen, given = world
    return reproduce(TINY, frozen, tasks(), out, conditions=[*map(Condition, METHODS)], given=given), out


def test_every_method_answers_the_same_rows(world, everything, monkeypatch):
    frozen, given = world
    runs, out = everything
    rows = load_runs(runs)
    asked = {name: [] for name in METHODS}
    for row in rows:
        asked[row["method"]].append((row["task"], row["template"], row["answer_prefix"], row["example"], row["target"]))
    assert set(map(tuple, asked.values())) == {tuple(asked["zero-shot"])}
    assert len(asked["atv"]) == 3 * 4
    for name in (name for name, method in METHODS.items() if method.trained_as() == name):
        record = json.loads((out / "trained" / f"{name}-1" / "train.json").read_text())
        assert set(record["settings"]["tasks"]) == {"toy", "other"}, name  # once for all, the unseen one left out
        assert all(task["train"] == 6 for task in record["settings"]["tasks"].values())
    monkeypatch.setattr(Frozen, "load", lambda _: pytest.fail("The LLM was loaded, and there was nothing to do."))
    tables = [run for run, name in zip(runs, METHODS, strict=True) if name in IN_TABLES]
    assert len(tables) == len(METHODS) - 5  # those that are no part of the paper's tables
    assert reproduce(TINY, frozen, tasks(), out, given=given) == tables
    with pytest.raises(ATVError, match="other settings"):
        reproduce(TINY, frozen, tasks(), out, given=given | {"lora": {"rank": 4}})


def without_one(tensors):
    return dict(sorted(tensors.items())[1:])


def longer(name, tensors):
    tensor = tensors[name]
    return tensors | {name: torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor[None]}


def with_an_unknown_one(tensors):
    return tensors | {"nonsense": torch.zeros(1)}


def outcome(load, made, scratch, file=None, change=None, **settings):
    """What becomes of loading an adapter with other weights or settings, whose digests are right."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(made, scratch)
    if file is not None:
        save_file(change(load_file(made / file)), scratch / file, {"format": "pt"})
    written = json.loads((made / artifact.CONFIG_FILE).read_text()) | settings
    digests = {each: sha256(scratch / each) for each in written["sha256"]}
    (scratch / artifact.CONFIG_FILE).write_text(json.dumps(written | {"sha256": digests}))
    try:
        load(scratch)
    except ATVError:
        return "refused"
    except Exception as error:
        return repr(error)
    return "loaded"


def other_weights(made, files, every):
    for file in files:
        for change in (without_one, with_an_unknown_one):
            yield f"{change.__name__} {file}", {"file": file, "change": change}
        names = [tensor for tensor, value in load_file(made / file).items() if value.numel()]
        for tensor in names if every else names[:1]:
            yield f"a longer {tensor}", {"file": file, "change": partial(longer, tensor)}


def other_settings(written):
    for part in written.keys() - {"format", "method", "sha256"}:
        for other in ({}, None, 3):
            yield f"{part}: {other!r}", {part: other}
    for part in ("config", "training"):
        for key, other in product(written[part], ([], -3)):
            yield f"{part}.{key}: {other!r}", {part: written[part] | {key: other}}


def test_a_strangers_adapter_is_refused_in_a_sentence(world, everything, tmp_path):
    """Whoever writes an adapter computes its digests; they say nothing about what is in it."""
    llm, tokenizer = world[0].load()
    wrong = {}
    for name in (name for name, method in METHODS.items() if method.trained_as() == name):
        made = everything[1] / "trained" / f"{name}-1" / "adapter"
        load = partial(METHODS[name].load, llm, tokenizer, seed=1)
        load(made)
        written = json.loads((made / artifact.CONFIG_FILE).read_text())
        files = [file for file in written["sha256"] if file.endswith(".safetensors")]
        assert files
        for what, change in other_weights(made, files, every=name in ("atv", "linear", "elicit")):
            found = outcome(load, made, tmp_path / "it", **change)
            wrong |= {(name, what): found} if found != "refused" else {}
        for what, change in other_settings(written):  # some methods do without some of them
            found = outcome(load, made, tmp_path / "it", **change)
            wrong |= {(name, what): found} if found not in ("refused", "loaded") else {}
    assert wrong == {}


def test_killed_and_started_again_no_row_is_asked_twice_and_the_rows_are_equal(world, tmp_path, monkeypatch):
    frozen, given = world
    methods = {"conditions": [*map(Condition, ["zero-shot", "fixed", "bm25"])], "batch_size": 2}
    whole = load_runs(reproduce(TINY, frozen, tasks(), tmp_path / "whole", given=given, **methods))
    out, append = tmp_path / "killed", RunWriter.append

    def die_after(left):
        def dying(run, rows):
            nonlocal left
            rows = list(rows)
            append(run, rows[:left])
            left -= len(rows)
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

        RunWriter.append = dying
        reproduce(TINY, frozen, tasks(), out, given=given, **methods)

    for rows in (7, 11):  # in the first run, then in the second
        assert ended(forked(partial(die_after, rows))) == -signal.SIGKILL
    before = [line for file in sorted(out.rglob("predictions.jsonl")) for line in file.read_text().splitlines()]
    assert len(before) == 18
    asked = []
    monkeypatch.setattr(RunWriter, "append", lambda run, rows: asked.extend(rows) or append(run, rows))
    resumed = load_runs(reproduce(TINY, frozen, tasks(), out, given=given, **methods))
    assert len(asked) + len(before) == len(whole)
    after = [line for file in sorted(out.rglob("predictions.jsonl")) for line in file.read_text().splitlines()]
    assert set(before) <= set(after)  # to the last digit of their seconds
    assert [clean(row) for row in resumed] == [clean(row) for row in whole]


def test_starting_over_can_be_killed_at_any_moment(world, tmp_path, monkeypatch):
    """Nothing with the former settings is left for the same command without --force."""
    frozen, given = world
    conditions = [Condition("zero-shot"), Condition("fixed")]
    reproduce(TINY, frozen, tasks(), tmp_path, conditions=[*conditions, Condition("bm25")], given=given)
    mine = tmp_path / "runs" / "thesis-1" / "chapter.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    (tmp_path / "experiments").mkdir()
    record = {
        "title": "t",
        "asks": "?",
        "reference": "bm25",
        "conditions": {"bm25": {"runs": ["runs/bm25-1"], "trained": []}},
    }
    (tmp_path / "experiments" / "former.json").write_text(json.dumps(record))
    new = given | {"fixed": {"learning_rate": 0.015625}}
    with monkeypatch.context() as killed:
        killed.setattr(Frozen, "load", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reproduce(TINY, frozen, tasks(), tmp_path, conditions=conditions, given=new, force=True)
    reproduce(TINY, frozen, tasks(), tmp_path, conditions=conditions, given=new)
    trained = json.loads((tmp_path / "trained" / "fixed-1" / "train.json").read_text())
    assert trained["settings"]["train"]["learning_rate"] == 0.015625
    run = json.loads((tmp_path / "runs" / "fixed-1" / "run.json").read_text())
    assert run["settings"]["adapter"] == artifact.identity(tmp_path / "trained" / "fixed-1" / "adapter")
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == ["fixed-1", "thesis-1", "zero-shot-1"]
    assert mine.read_text() == "years of work"
    assert find_experiments([tmp_path]) == []


def clean(row):
    return {key: value for key, value in row.items() if key not in ("seconds", "run")}


def test_training_rows_are_drawn_anew_by_each_seed_and_test_rows_are_not():
    task = toy_task(rows=90)
    first, same, other = (task.drawn(10, 5, seed) for seed in (1, 1, 2))
    assert first == same
    assert (len(first.train), len(first.valid)) == (10, 5)
    assert set(first.train) < set(task.train)
    assert first.train != other.train
    assert first.test == other.test == task.test


def test_settings_go_from_the_papers_to_the_users():
    profile = {"all": {"epochs": 2, "scale": 0.7}, "lora": {"rank": 4}}
    config, train = method_settings("lora", [], 3)
    assert (config.rank, config.alpha, config.dropout, train.learning_rate, train.seed) == (8, 32, 0.05, 4e-4, 3)
    config, train = method_settings("lora", [profile], 3)
    assert (config.rank, train.epochs) == (4, 2)
    config, train = method_settings("lora", [profile, {"lora": {"rank": 2, "learning_rate": 1.0}}], 3)
    assert (config.rank, train.epochs, train.learning_rate) == (2, 2, 1.0)
    assert method_settings("atv", [profile], 3).config.scale == 0.7
    with pytest.raises(ATVError, match="Unknown option of the method lora: 'scale'"):
        method_settings("lora", [{"lora": {"scale": 1.0}}], 3)
    with pytest.raises(ATVError, match="option of the method elicit: 'epochs'"):
        method_settings("elicit", [{"elicit": {"epochs": 1}}], 3)
    with pytest.raises(ATVError, match="learns nothing"):
        method_settings("zero-shot", [], 3)


@pytest.mark.parametrize(
    "name",
    [
        "fixed",
        "lora",
        "i2cl",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("learned-tv", "prefix", "full")),
    ],
)
def test_options_that_a_method_does_not_have_would_have_no_effect_on_it(name, tmp_path):
    method, llm = METHODS[name], make_llm(dtype=torch.float32)
    assert not method.generator_options
    values = {"generator_learning_rate": 0.3, "bf16": True, "generator_start": 0.9, "adaptive_dropout": 0.9}
    values |= {"state_dropout": 0.1}
    assert set(values) == GENERATOR_OPTIONS
    digests = []
    for given in ({}, values):
        train = TrainConfig(epochs=1, batch_size=4, learning_rate=0.01, **given)
        made = method.fit(
            llm, byte_level_tokenizer(), [toy_task()], tmp_path / f"{bool(given)}", method.config_class(), train
        )
        digests.append({file.name: sha256(file) for file in made.rglob("*.safetensors")})
    assert digests[0] == digests[1] != {}
    for key, value in values.items():
        with refused(f"Unknown option of the method {name}: {key!r}"):
            method_settings(name, [{name: {key: value}}], 42)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochs = 3", "is not in a table"),
        ("[lore]\nrank = 3", "Unknown table in .*'lore'"),
        ("[lora]\nrnak = 3", "Unknown option in .lora. of .*'rnak'"),
        ("[all]\nrnak = 3", "Unknown option in .all. of .*'rnak'"),
        ("[lora", "is not a TOML file"),
    ],
)
def test_a_wrong_settings_file_is_refused(tmp_path, text, named):
    (tmp_path / "settings.toml").write_text(text)
    with pytest.raises(ATVError, match=named):
        check_tables(ConfigFile(tmp_path / "settings.toml", ()).tables, tmp_path / "settings.toml")


def test_the_papers_form_comes_with_the_papers_values_but_for_what_is_said():
    config, train = method_settings("atv", [{"all": {"epochs": 2}}, {"atv": {"parametrisation": "paper"}}], 3)
    assert config == ATVConfig.paper()
    assert train == TrainConfig.paper(epochs=2, seed=3)
    config, train = method_settings("atv", [PROFILES["paper"].tables(), {"atv": {"scale": 0.1}}], 3)
    assert config == ATVConfig.paper(scale=0.1)
    assert train == TrainConfig.paper(seed=3)
    assert method_settings("lora", [PROFILES["paper"].tables()], 3).train == TrainConfig.paper(
        learning_rate=4e-4, generator_learning_rate=None, seed=3
    )
    assert method_settings("atv", [], 3) == (ATVConfig(), TrainConfig(seed=3))


def test_every_profile_fits_every_method():
    for profile in PROFILES.values():
        for name, method in METHODS.items():
            if method.config_class is not None:
                method_settings(name, [profile.tables()], 42)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].search])
def test_trials_begin_with_the_default_and_differ(name):
    tables = [{"all": {"learning_rate": 0.125}}]
    trials = trials_of(name, 3, tables, seed=42)
    assert len({json.dumps(trial) for trial in trials}) == 3
    assert trials == trials_of(name, 3, tables, seed=42)
    assert trials[0].get("learning_rate", 0.125) == 0.125
    for trial in trials[1:]:
        assert all(value in METHODS[name].search[key] for key, value in trial.items())
    for trial in trials:
        method_settings(name, [{name: trial}], 42)


def test_trials_of_the_papers_form_have_its_size_of_rates():
    trials = trials_of("atv", 4, [PROFILES["paper"].tables()], seed=42)
    assert trials[0] == {"scale": ATVConfig.paper().scale, "learning_rate": TrainConfig.paper().learning_rate}
    for trial in trials:
        assert trial["learning_rate"] <= 20 * TrainConfig.paper().learning_rate
        assert set(trial) == {"scale", "learning_rate"}


def test_the_defaults_of_a_sweep_fit_every_default_method():
    assert inspect.signature(sweep).parameters["trials"].default == Sweep.trials
    for profile in PROFILES.values():
        for name in (name for name in IN_TABLES if METHODS[name].search):
            assert len(trials_of(name, Sweep.trials, [profile.tables(), {}], seed=42)) == Sweep.trials, name


def test_the_settings_of_a_sweep_are_those_of_the_best_trials_when_read_again(tmp_path):
    profile = PROFILES["small"].tables()
    searched = [name for name in IN_TABLES if METHODS[name].search]
    for number in range(Sweep.trials):
        best = {name: trials_of(name, Sweep.trials, [profile], 42)[number] for name in searched}
        (tmp_path / "settings.toml").write_text(_toml(best))
        file = ConfigFile(tmp_path / "settings.toml", ("paper.reproduce",))
        check_tables(file.tables, file.file)
        for name in best:
            assert method_settings(name, [profile, file.tables], 42) == method_settings(name, [profile, best], 42)


def test_a_sweep_never_sees_the_test_rows_and_keeps_the_best(world, tmp_path, monkeypatch):
    frozen, given = world
    seen = []
    from atv.evaluation.run import evaluate

    def watched(method, tasks, metrics, run, **how):
        seen.extend(row for task in tasks for split in (task.train, task.valid, task.test) for row in split)
        return evaluate(method, tasks, metrics, run, **how)

    monkeypatch.setattr(sys.modules["atv.evaluation.measure"], "evaluate", watched)  # the module, not the function
    best = sweep(TINY, frozen, tasks(), tmp_path, methods=["fixed", "lora", "probe"], trials=2, given=given)
    assert seen
    assert not {row for task in tasks() for row in task.test} & set(seen)
    assert not {row for row in tasks()[2].train} & set(seen)
    record = json.loads((tmp_path / "sweep.json").read_text())
    for name in ("fixed", "lora", "probe"):
        assert len(record["trials"][name]) == 2
        top = max(record["trials"][name], key=lambda row: row["first_token"])
        assert best[name] == top["settings"]
    file = ConfigFile(tmp_path / "settings.toml", ())
    check_tables(file.tables, file.file)
    assert file.tables == best


def test_a_sweep_of_another_method_keeps_the_former_one(world, tmp_path, monkeypatch):
    frozen, given = world
    scores = {"first_token": 0.5, "first_token_among_options": 0.5}
    monkeypatch.setattr("atv.paper.sweep._try", lambda *_: scores)

    def swept(name, profile=TINY, some=(0, 1, 2), **how):
        settings = {"given": given, "trials": 2} | how
        return sweep(profile, frozen, [tasks()[n] for n in some], tmp_path, methods=[name], **settings)

    lora = swept("lora")
    both = swept("fixed")
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert list(both) == list(record["best"]) == list(record["trials"]) == ["lora", "fixed"]
    assert both["lora"] == lora["lora"]
    assert ConfigFile(tmp_path / "settings.toml", ()).tables == both
    for other, named in (
        ({"trials": 3}, "trials.lora: 2 there, 3 now"),
        ({"profile": replace(TINY, train_rows=3)}, "profile.train_rows"),
        ({"some": (0, 2)}, "tasks"),
        ({"given": given | {"all": {"epochs": 7}}}, "all.epochs"),
    ):
        with pytest.raises(ATVError, match=named):
            swept("atv", **other)
    assert json.loads((tmp_path / "sweep.json").read_text()) == record
    (tmp_path / "sweep.json").write_text(json.dumps({key: record[key] for key in record if key != "all"}))
    assert list(swept("atv")) == ["lora", "fixed", "atv"]  # a record without settings of all methods
    (tmp_path / "sweep.json").write_text('{"trials": []}')
    with pytest.raises(ATVError, match="is damaged"):
        swept("atv")
    assert list(swept("atv", force=True)) == ["atv"]
    assert list(swept("atv", trials=3)) == ["atv"]  # more trials of all its methods are added


def test_wrong_names_are_refused_before_anything_is_done(world, tmp_path):
    frozen, _ = world
    with pytest.raises(ATVError, match="Unknown method 'atc'"):
        reproduce(TINY, frozen, tasks(), tmp_path / "a", conditions=[Condition("atc")])
    with pytest.raises(ATVError, match="All tasks are of the category Unseen"):
        reproduce(TINY, frozen, tasks()[2:], tmp_path / "a")
    with pytest.raises(ATVError, match="method to choose settings for: 'icl'|Unknown method"):
        sweep(TINY, frozen, tasks(), tmp_path / "a", methods=["icl"])
    with pytest.raises(ATVError, match="settings to choose from"):
        sweep(TINY, frozen, tasks(), tmp_path / "a", methods=["lora"], trials=99)
    assert not (tmp_path / "a").exists()


EXPERIMENT = """
title = "Which layers"
asks = "Which?"
reference = "atv"

[conditions."atv"]
method = "atv"

[conditions."atv, bottom"]
method = "atv"
layers = "bottom"

[conditions."atv, 3 rows"]
method = "atv"
train-rows = 3

[conditions."icl, 1 shots"]
method = "icl"
shots = 1

[conditions."icl+atv"]
method = "icl+atv"
"""


def test_an_experiments_conditions_differ_in_what_they_set_alone(world, tmp_path):
    frozen, given = world
    (tmp_path / "mine.toml").write_text(EXPERIMENT)
    experiment = read_experiment(str(tmp_path / "mine.toml"))
    assert (experiment.name, experiment.title, experiment.reference) == ("mine", "Which layers", "atv")
    out = tmp_path / "out"
    rows = load_runs(reproduce(TINY, frozen, tasks(), out, conditions=experiment.conditions, given=given))
    assert list(dict.fromkeys(row["method"] for row in rows)) == [of.label for of in experiment.conditions]
    assert len({len([row for row in rows if row["method"] == of.label]) for of in experiment.conditions}) == 1
    # icl+atv sets nothing, so that it has the adapter of atv; the method's own tables' folders are the same ones.
    assert sorted(folder.name for folder in (out / "trained").iterdir()) == ["atv-1", "atv-3-rows-1", "atv-bottom-1"]
    records = {folder.name: json.loads((folder / "train.json").read_text()) for folder in (out / "trained").iterdir()}
    plain = records["atv-1"]["settings"]
    assert records["atv-bottom-1"]["settings"] == plain | {"config": plain["config"] | {"layers": "bottom"}}
    assert {task["train"] for task in records["atv-3-rows-1"]["settings"]["tasks"].values()} == {3}
    assert all(record["trainable_parameters"] > 0 for record in records.values())
    shots = {row["method"]: row["demonstrations"] for row in rows}
    assert (shots["icl, 1 shots"], shots["icl+atv"], shots["atv"]) == (1, 2, 0)
    assert reproduce(TINY, frozen, tasks(), out, conditions=[Condition("atv")], given=given) == [out / "runs" / "atv-1"]
    other = Condition("atv", "atv, bottom", {"layers": "top"})
    with pytest.raises(ATVError, match="other settings"):
        reproduce(TINY, frozen, tasks(), out, conditions=[other], given=given)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("titel = 'x'\n[conditions.atv]\nmethod = 'atv'", "Unknown key in .*'titel'"),
        ("title = 'x'", "has no conditions"),
        ("[conditions.atv]\nscale = 1.0", "expected a table with a method"),
        ("[conditions.'a/b']\nmethod = 'atv'", "under a label of letters"),
        ("[conditions.atv]\nmethod = 'atc'", "Unknown method"),
        ("[conditions.atv]\nmethod = 'atv'\nscael = 1.0", "option of the method atv: 'scael'"),
        ("[conditions.atv]\nmethod = 'atv'\nscale = 'much'", "expected a finite number"),
        ("[conditions.atv]\nmethod = 'atv'\ntrain_rows = 0", "train_rows of atv is 0"),
        ("[conditions.icl]\nmethod = 'icl'\nlayers = 'top'", "icl learns nothing"),
        ("[conditions.zero]\nmethod = 'zero-shot'\ntrain_rows = 3", "zero-shot learns nothing"),
        ("reference = 'x'\n[conditions.atv]\nmethod = 'atv'", "Unknown reference"),
        ("analysis = 1\n[conditions.atv]\nmethod = 'atv'", "true or false"),
        ("analysis = true\n[conditions.atv]\nmethod = 'atv'", "of the conditions atv and elicit"),
        ("[conditions.'a b']\nmethod = 'atv'\n[conditions.'a:b']\nmethod = 'atv'", "would share the folder runs/a-b"),
        (
            "[conditions.atv]\nmethod = 'atv'\nscale = 0.5\n[conditions.b]\nmethod = 'atv'",
            "share the folder trained/atv",
        ),
        ("[conditions", "is not a TOML file"),
    ],
)
def test_a_wrong_experiment_is_refused(tmp_path, text, named):
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ATVError, match=named):
        read_experiment(str(tmp_path / "wrong.toml"))


def test_experiments_whose_conditions_would_share_a_folder_are_refused(tmp_path):
    for name, label, positions in (("one", "atv, wide", "last:16"), ("two", "atv: wide", "all")):
        text = f"[conditions.atv]\nmethod = 'atv'\n[conditions.'{label}']\nmethod = 'atv'\npositions = '{positions}'"
        (tmp_path / f"{name}.toml").write_text(text)
    one, two = (read_experiment(str(tmp_path / f"{name}.toml")) for name in ("one", "two"))
    assert [of.label for of in conditions_of([one, one])] == ["atv", "atv, wide"]
    with pytest.raises(ATVError, match="'atv, wide' and 'atv: wide' would share the folder runs/atv-wide-SEED"):
        conditions_of([one, two])


def test_the_experiments_of_the_package_are_whole():
    for name in known_experiments():
        experiment = read_experiment(name)
        assert experiment.asks, name
        assert len(experiment.conditions) > 1, name
    found = conditions_of(map(read_experiment, known_experiments()))
    assert (
        len({of.name for of in found}) == len({of.label for of in found}) == len(found)
    )  # a label is one condition in all of them
    with pytest.raises(ATVError, match="Unknown experiment 'region'. Did you mean|Unknown experiment 'region'"):
        read_experiment("region")
    with pytest.raises(ATVError, match="No file"):
        read_experiment("region.toml")


def test_a_profile_of_named_tasks_takes_those_alone(world, tmp_path):
    frozen, _ = world
    named = replace(TINY, tasks=("toy", "new"))
    rows = load_runs(reproduce(named, frozen, tasks(), tmp_path, conditions=[Condition("zero-shot")]))
    assert {row["task"] for row in rows} == {"toy", "new"}
    with pytest.raises(ATVError, match="none of them is among those"):
        reproduce(replace(TINY, tasks=("glue_sst2",)), frozen, tasks(), tmp_path / "b")
