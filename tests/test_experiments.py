"""Experiments as commands and tables: what they write, and that it is what the rows say."""

import csv
import json
import shutil
from statistics import fmean

import pytest
from conftest import byte_level_tokenizer, make_atv, make_llm

from atv.cli.app import app
from atv.errors import ATVError
from atv.evaluation.records import load_runs
from atv.paper.profiles import PROFILES, Profile
from atv.report import experiment_tables, find_experiments, report_tables

TOML = """
title = "Rank"
asks = "Does rank matter?"

[conditions.zero-shot]
method = "zero-shot"

[conditions.fixed]
method = "fixed"

[conditions."fixed, bottom"]
method = "fixed"
layers = "bottom"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An experiment run from the command line on tiny models, and a run that belongs to none."""
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("experiment")
    make_llm().save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    make_atv().generator.save(folder / "generator")
    (folder / "rank.toml").write_text(TOML)
    tiny = Profile("tiny", "", train_rows=4, valid_rows=2, test_rows=4, seeds=(1,), variants="first",
                   settings={"all": {"epochs": 1, "batch_size": 4}})  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setitem(PROFILES, "tiny", tiny)
    common = ["paper", "reproduce", "--profile", "tiny", "--llm", str(folder / "llm"), "--out", str(folder / "out"),
              "--task", "sentiment", "--task", "outlook", "--dtype", "float32"]  # fmt: skip
    (folder / "other.toml").write_text(TOML.replace("bottom", "top"))
    both = ["--experiment", str(folder / "rank.toml"), "--experiment", str(folder / "other.toml")]
    for more in (both, ["--method", "icl"]):
        result = CliRunner().invoke(app, [*common, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    with pytest.raises(ATVError, match="found --experiment and --method"):
        CliRunner().invoke(app, [*common, "--experiment", "rank", "--method", "icl"], catch_exceptions=False)
    (folder / "clash.toml").write_text(TOML.replace("bottom", "top").replace("fixed, top", "fixed, bottom"))
    with pytest.raises(ATVError, match="in one experiment and"):
        CliRunner().invoke(app, [*common, *both, "--experiment", str(folder / "clash.toml")], catch_exceptions=False)
    patch.undo()
    return folder / "out"


def test_the_tables_are_what_the_rows_say(done):
    lines = {line["condition"]: line for line in csv.DictReader(next((done / "tables").glob("rank-1-*.csv")).open())}
    rows = load_runs([done / "runs"])
    assert list(lines) == ["zero-shot", "fixed", "fixed, bottom"]
    for label, line in lines.items():
        own = [row for row in rows if row["method"] == label]
        for name, key, category in (
            ("in-domain first_token", "first_token", False),
            ("unseen first_token_among_options", "first_token_among_options", True),
        ):
            share = fmean(row["scores"][key] for row in own if (row["category"] == "Unseen") == category)
            assert float(line[name]) == pytest.approx(100 * share, abs=0.05)
    trained = json.loads((done / "trained" / "fixed-bottom-1" / "train.json").read_text())
    assert float(lines["fixed, bottom"]["trained parameters"]) == trained["trainable_parameters"]
    assert float(lines["fixed"]["trained parameters"]) > trained["trainable_parameters"]
    assert float(lines["fixed, bottom"]["epochs"]) == trained["settings"]["train"]["epochs"]
    assert lines["zero-shot"]["trained parameters"] == lines["zero-shot"]["epochs"] == ""


def test_a_report_of_a_folder_has_its_experiments_and_the_other_runs(done):
    other, found = find_experiments([done])
    assert {row["method"] for row in other.rows} == {"zero-shot", "fixed", "fixed, top"}
    assert found.reference == "zero-shot"  # the first
    titles = [table.title for table in experiment_tables(found)]
    assert all(title.startswith("Rank. ") for title in titles)
    rows, tables = report_tables([done])
    assert [table.title for table in tables][-len(titles) :] == titles
    assert "icl" in {row["method"] for row in rows}
    only = report_tables([done / "runs" / "icl-1"])[1]
    assert not any(table.title.startswith("Rank") for table in only)


def test_an_experiment_takes_no_method_from_the_main_tables(done, tmp_path):
    shutil.copytree(done / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("fixed-*-*"))
    before = report_tables([tmp_path])[1]
    assert {row[2] for row in before[0].rows} == {"zero-shot", "fixed", "icl"}
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    after = report_tables([tmp_path])[1]
    assert [table.title for table in after[: len(before)]] == [table.title for table in before]
    assert [table.rows for table in after[: len(before)]] == [table.rows for table in before]


def test_json_files_that_are_no_records_are_left_alone(done, tmp_path, capsys):
    """Folders named experiments are common, also beside one named runs."""
    shutil.copytree(done, tmp_path / "runs" / "mine")
    shutil.copytree(done, tmp_path / ".trash" / "mine")
    shutil.copytree(done / "experiments", tmp_path / "elsewhere" / "experiments")
    (tmp_path / "experiments").mkdir()
    for name, text in {"a": "[1]", "b": '{"conditions": ["x"]}', "c": "{broken", "d": '"text"'}.items():
        (tmp_path / "experiments" / f"{name}.json").write_text(text)
    assert len(find_experiments([tmp_path])) == 2
    assert "c.json is not valid JSON" in " ".join(capsys.readouterr().err.split())
    rows, tables = report_tables([tmp_path])
    assert len(rows) == len(load_runs([done]))
    assert [table.title for table in tables] == [table.title for table in report_tables([done])[1]]
