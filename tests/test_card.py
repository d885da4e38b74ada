"""Model cards: the hub's own reader understands them, results are of this adapter alone, and the text is kept."""

import json
import sys

import pytest
import torch
from conftest import make_atv, toy_task
from huggingface_hub import ModelCard
from refusals import refused

from atv import artifact
from atv.cli import main
from atv.evaluation.records import Row, RunWriter
from atv.report.card import write_card

ABOUT = {"license": "apache-2.0", "language": ["en", "zh"], "datasets": ["stanfordnlp/sst2"]}


@pytest.fixture
def adapter(tmp_path):
    atv = make_atv(dtype=torch.float32)
    atv.training_summary = {"tasks": {"toy": toy_task().asking()}}
    atv.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def a_run(folder, adapter, found, **changed):
    """A finished run with one row for each of the scores."""
    settings = {"method": "atv", "llm": "tiny", "seed": 42, "adapter": adapter, "tasks": {"toy": "4"}}
    run = RunWriter(folder, settings | changed)
    run.append(
        Row("toy", "NLU", "test", 0, None, index, "yes", {"exact_match": one}, {"generated": "yes"}, 9, 0.5)
        for index, one in enumerate(found)
    )
    run.finish()
    return folder


def card_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["atv", "card", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_the_hub_reads_what_was_written_and_the_adapter_stays_the_same(adapter, tmp_path, monkeypatch):
    digest, former = artifact.identity(adapter), (adapter / "README.md").read_text()
    run = a_run(tmp_path / "run", digest, [1.0, 0.0, 1.0, 1.0])
    words = ["--license", "apache-2.0", "--language", "en", "--language", "zh", "--dataset", "stanfordnlp/sst2"]
    assert card_command(monkeypatch, adapter, "--results", run, *words) == 0
    data = ModelCard.load(adapter / "README.md").data
    assert {name: data.get(name) for name in ABOUT} == ABOUT
    assert (data.library_name, data.pipeline_tag) == ("adaptive-task-vectors", "text-generation")
    assert data.metrics == ["exact_match"]
    (result,) = data.eval_results
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == ("toy", "stanfordnlp/sst2", "test")
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.75)
    card = (adapter / "README.md").read_text()
    assert former.partition("\n---\n")[2].strip() in card
    assert "| toy | NLU | atv | 4 | 75.0 | 9 | 0.5000 |" in card
    artifact.read(adapter)
    assert artifact.identity(adapter) == digest


def test_new_results_replace_the_former_ones_and_the_users_text_stays(adapter, tmp_path):
    digest, card = artifact.identity(adapter), adapter / "README.md"
    write_card(card, "atv", digest, {}, [a_run(tmp_path / "one", digest, [1.0, 0.0])])
    card.write_text(card.read_text() + "\nMy own words: ünïcode.\n", encoding="utf-8")
    write_card(card, "atv", digest, ABOUT, [a_run(tmp_path / "two", digest, [1.0, 1.0])])
    write_card(card, "atv", digest, {}, [])  # nothing is lost that is not given again
    text, data = card.read_text(encoding="utf-8"), ModelCard.load(card).data
    assert text.count("## Results on test rows") == 1
    assert "My own words: ünïcode." in text
    assert [result.metric_value for result in data.eval_results] == [1.0]
    assert data.license == "apache-2.0"


def test_an_adapter_without_a_card_gets_one(adapter):
    (adapter / "README.md").unlink()
    write_card(adapter / "README.md", "probe for llama", artifact.identity(adapter), ABOUT, [])
    card = ModelCard.load(adapter / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.text.strip() == "# probe for llama"


@pytest.mark.parametrize("other", [None, "0123456789abcdef"])
def test_results_of_something_else_are_refused(adapter, tmp_path, other):
    former = (adapter / "README.md").read_text()
    with refused("is a run of", "expected runs of this one"):
        write_card(
            adapter / "README.md", "atv", artifact.identity(adapter), ABOUT, [a_run(tmp_path / "run", other, [1.0])]
        )
    assert (adapter / "README.md").read_text() == former


def test_results_are_of_the_adapter_s_own_method(adapter, tmp_path, capsys):
    digest, card = artifact.identity(adapter), adapter / "README.md"
    a_run(tmp_path / "runs" / "atv", digest, [1.0, 0.0])
    shown = a_run(tmp_path / "runs" / "shown", digest, [1.0, 1.0], method="icl+atv", shots=4)
    write_card(card, "atv", digest, {}, [tmp_path / "runs"])
    assert [result.metric_value for result in ModelCard.load(card).data.eval_results] == [0.5]
    assert "is a run of icl+atv, not of atv; it is left out" in " ".join(capsys.readouterr().err.split())
    former = card.read_text()
    with refused("no run of the adapter's own method; found icl+atv", "atv eval --adapter"):
        write_card(card, "atv", digest, {}, [shown])
    assert card.read_text() == former


@pytest.mark.parametrize("changed", [{"dtype": "float16"}, {"variants": "all"}, {"llm": "other"}, {"label": "mine"}])
def test_results_that_no_single_setting_has_are_refused(adapter, tmp_path, changed):
    digest, former = artifact.identity(adapter), (adapter / "README.md").read_text()
    runs = [a_run(tmp_path / "one", digest, [1.0, 0.0]), a_run(tmp_path / "two", digest, [1.0, 1.0], **changed)]
    with refused("differ in more than their seeds", *map(str, runs), "--results"):
        write_card(adapter / "README.md", "atv", digest, {}, runs)
    assert (adapter / "README.md").read_text() == former
    write_card(
        adapter / "README.md", "atv", digest, {}, [a_run(tmp_path / "three", digest, [1.0, 1.0], seed=3), runs[0]]
    )
    assert ModelCard.load(adapter / "README.md").data.eval_results[0].metric_value == 0.75


@pytest.mark.parametrize(
    "about",
    [{"license": "Apache 2"}, {"language": ["English, French"]}, {"datasets": ["a/b/c"]}, {"datasets": ["/home/x"]}],
)
def test_malformed_metadata_is_refused(adapter, about):
    (value,) = about.values()
    with refused(value if isinstance(value, str) else value[0], "expected"):
        write_card(adapter / "README.md", "atv", artifact.identity(adapter), about, [])


@pytest.mark.parametrize("text", ["---\nlicense: [apache\n---\n", "---\n- one\n---\n# Title\n"])
def test_a_card_that_cannot_be_read_is_named_and_kept(adapter, text):
    (adapter / "README.md").write_text(text)
    with refused("README.md is not a model card"):
        write_card(adapter / "README.md", "atv", artifact.identity(adapter), ABOUT, [])
    assert (adapter / "README.md").read_text() == text


def test_the_command_says_what_is_missing(adapter, monkeypatch, capsys, tmp_path):
    assert card_command(monkeypatch, adapter) == 2
    assert "There is nothing to write" in capsys.readouterr().err
    assert card_command(monkeypatch, tmp_path / "none", "--license", "mit") == 2
    assert "does not exist" in capsys.readouterr().err
    written = json.loads((adapter / "atv_config.json").read_text())
    (adapter / "atv_config.json").write_text(json.dumps(written | {"sha256": {"expansion.safetensors": "0"}}))
    assert card_command(monkeypatch, adapter, "--license", "mit") == 2
    assert "altered or truncated" in capsys.readouterr().err
