"""The examples: their data load as the page says, and its commands run to the end on tiny models."""

import json
import random
import re
import runpy
import sys
import tarfile
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from chat_templates import chat_tokenizer
from conftest import SIZES, make_generator
from documents import ROOT, blocks, commands
from refusals import refused
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from atv import artifact
from atv.cli import main
from atv.config import ATVConfig
from atv.data import Example, load_tasks
from atv.evaluation.metrics import load_metric
from examples import distil, emails, help_desk, house_style, polite, prices, ready, reviews_zh, tickets

PAGE = blocks("docs/examples.md", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"))
SMALL = {"--train-rows": "4", "--valid-rows": "2", "--test-rows": "4", "--epochs": "1", "--seeds": "1"}
LIMITED = r"(epochs|train-rows|valid-rows|teacher-tokens) = \d+"


def run(words, monkeypatch):
    """A command of the page, in this process."""
    if words[0] == "python":
        monkeypatch.delitem(sys.modules, words[2], raising=False)  # run as if not imported yet
        monkeypatch.setattr(sys, "argv", words[2:])
        runpy.run_module(words[2], run_name="__main__")
        return
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, words


def rows_of(name, file, monkeypatch):
    run(["python", "-m", name, str(file)], monkeypatch)
    return json.loads(file.read_text()) if file.suffix == ".json" else [*map(json.loads, file.open(encoding="utf-8"))]


# ---- the data ----


@pytest.mark.parametrize(
    ("module", "file", "chooses"),
    [
        (house_style, "chats.jsonl", False),
        (emails, "emails.jsonl", False),
        (polite, "polite.jsonl", False),
        (tickets, "tickets.jsonl", True),
        (reviews_zh, "reviews.jsonl", True),
        (prices, "prices.json", True),
        (help_desk, "desk.json", False),
    ],
)
def test_the_data_load_and_no_query_occurs_twice(module, file, chooses, tmp_path, monkeypatch):
    found = rows_of(module.__name__, tmp_path / file, monkeypatch)
    rows = [row for split in found.values() for row in split] if isinstance(found, dict) else found
    assert sorted(map(str, rows)) == sorted(map(str, module.rows()))
    assert len(rows) >= 300
    (task,) = load_tasks(data=tmp_path / file)
    assert len(task.train) + len(task.valid) + len(task.test) == len(rows)
    assert not task.prepared["dropped"]
    assert task.chooses == chooses


def test_replies_in_the_house_style_name_the_product_and_the_step():
    for row in house_style.rows():
        _, request, answer = (message["content"] for message in row["messages"])
        (product,) = [name for name in house_style.PRODUCTS if f" {name}" in request]
        assert f"your {product}" in answer
        assert answer.endswith(house_style.ENDING)
        assert sum(step in answer for step in house_style.STEPS.values()) == 1


def test_answers_say_what_the_queries_say():
    for row in emails.rows():
        fields = json.loads(row["output"])
        assert all(fields[key] in row["input"] for key in ("name", "item", "due"))
        assert any(words in row["input"] for words, number in emails.COUNTS.items() if number == fields["quantity"])
    for row in polite.rows():
        for kept in (polite.THINGS, polite.TIMES):
            assert [part for part in kept if part in row["completion"]] == [
                part for part in kept if part in row["prompt"]
            ]


def test_labels_are_unbalanced_and_share_first_words():
    found = Counter(row["label"] for row in tickets.rows())
    assert found == {label: count for label, (count, _) in tickets.LABELS.items()}
    assert len(found) == 12
    assert max(found.values()) == 10 * min(found.values())
    assert all(" " in label for label in found)
    assert sum(Counter(label.split()[0] for label in found)[label.split()[0]] > 1 for label in found) == 11


def test_metrics_of_distilled_prompts():
    right = load_metric("examples.prices:right")
    asked = Example("What does the tea cost?", "The tea costs 2.10 euros.")
    said = {"2.10 euros": 1, "The coffee costs 2.80 euros.": 0, "2.10 or 2.80": 0, "": 0}
    assert {answer: right(asked, answer)["right"] for answer in said} == said
    obeys = load_metric("examples.help_desk:obeys")
    for row in help_desk.rows()[:40]:
        example = Example(row["prompt"], row["completion"])
        assert obeys(example, row["completion"]) == {"begins": 1, "names_product": 1}
        assert obeys(example, "Hello. We do not know.") == {"begins": 0, "names_product": 0}


def test_the_table_of_a_distillation_has_the_means_over_seeds_and_paired_differences(tmp_path):
    draw, without = random.Random(1), [1.0 + query / 10 for query in range(20)]
    found = {"atv": [], "fixed": []}
    for name, runs in found.items():
        for seed in (42, 43):
            own = [draw.uniform(0, 1 if name == "fixed" else 0.5) for _ in without]
            runs.append({"recovered": 1 - fmean(own) / fmean(without), "divergences": own})
            about = {"agreement": 0.9, "agreement_without": 0.5, "prompt_tokens": 4, "prompt_tokens_teacher": 9}
            about |= {"divergences_without": without, "divergence_without": fmean(without)} | runs[-1]
            (tmp_path / f"{name}-{seed}").mkdir()
            (tmp_path / f"{name}-{seed}" / "distil.json").write_text(json.dumps(about))
    (tmp_path / "milliseconds.json").write_text(json.dumps({"teacher": 3.0, "without": 1.0, "steered": 2.0}))
    rows = [line.split(" | ") for line in distil.table(tmp_path, ["atv", "fixed"], [42, 43]).splitlines()]
    share = {name: [run["recovered"] for run in runs] for name, runs in found.items()}
    for row in rows[4:6]:
        own = share[row[0].removeprefix("| ")]
        assert row[1] == f"{100 * fmean(own):.0f}% ± {100 * stdev(own):.0f}"
    assert int(re.match(r"[+-]\d+", rows[5][3])[0]) == round(100 * (fmean(share["atv"]) - fmean(share["fixed"])))


def test_scores_of_a_distillation_are_compared_query_by_query(monkeypatch):
    draw, queries = np.random.default_rng(0), 40
    right = {
        f"{name}-{seed}/eval": draw.random(queries) < share
        for name, share in (("atv", 0.6), ("atv-last", 0.3))
        for seed in (42, 43)
    }
    right |= {"teacher": draw.random(queries) < 0.8, "without": draw.random(queries) < 0.1}

    def rows(folders):
        (found,) = (right[str(folder)] for folder in folders)
        place = {"task": "t", "category": "other", "template": 0, "answer_prefix": None}
        return [place | {"example": example, "scores": {"right": float(x)}} for example, x in enumerate(found)]

    monkeypatch.setattr(distil, "load_runs", rows)
    _, _, teacher, without, first, last = distil.table_of_scores(Path(), ["atv", "atv:last"], [42, 43]).splitlines()
    assert teacher.split() == ["|", "teacher", "|", f"{100 * right['teacher'].mean():.0f}%", "|", "|"]
    assert f" {100 * right['without'].mean():.0f}% " in without
    means = {name: [100 * right[f"{name}-{seed}/eval"].mean() for seed in (42, 43)] for name in ("atv", "atv-last")}
    assert first.startswith(f"| atv | {fmean(means['atv']):.0f}% ± {stdev(means['atv']):.0f} | ")
    assert last.startswith(f"| atv:last | {fmean(means['atv-last']):.0f}% ± {stdev(means['atv-last']):.0f} | ")
    by_query = np.mean([right[f"atv-{s}/eval"] * 100.0 - right[f"atv-last-{s}/eval"] * 100.0 for s in (42, 43)], 0)
    low, high = np.percentile(draw.choice(by_query, (10_000, queries)).mean(1), [2.5, 97.5])
    said = [int(number) for number in re.findall(r"[+-]\d+", last)]
    assert said == pytest.approx([by_query.mean(), low, high], abs=1.5)


# ---- the page ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny LLM with a chat template and a tiny generator, in folders, by the names of the embedded ones."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), chat_tokenizer("chatml")
    set_seed(0)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 8192}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    make_generator(ATVConfig()).save(folder / "generator")
    return {"embedded:smollm2-135m": str(folder / "llm"), "embedded:minilm-l6": str(folder / "generator")}


def ways():
    """The shell blocks of the page; those that are like another one are marked exhaustive."""
    for block in PAGE:
        if block.language == "sh":
            (name, *_) = re.findall(r"examples\.(\w+)", block.text)
            yield pytest.param(block, id=name, marks=() if name in ("tickets", "prices") else pytest.mark.exhaustive)


@pytest.mark.parametrize("block", ways())
def test_the_commands_of_the_page_run(block, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atv.lm.load.resolve", lambda name: models.get(name, name))
    monkeypatch.setattr("atv.cli.compare.write_page", lambda *_, **__: [])  # tests/test_page.py draws pages
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("examples.SPLITS", {"test": 4, "valid": 4})
    for settings in (block for block in PAGE if block.title):
        Path(settings.title).write_text(re.sub(LIMITED, r"\1 = 4", settings.text))
    for words in commands(block.text):
        run([SMALL.get(before, word) for before, word in zip(["", *words], words, strict=False)], monkeypatch)
    distilled = sum("examples.distil" in words for words in commands(block.text))
    assert len([*tmp_path.glob("runs/*/*/distil.json")]) == 4 * distilled
    for name in ("atv", "atv-last"):
        configs = [json.loads(file.read_text()) for file in tmp_path.glob(f"runs/*/{name}-42/adapter/atv_config.json")]
        assert [config["config"]["positions"] for config in configs] == [name.partition("-")[2] or "answer"] * distilled


def test_a_ready_adapter_is_packed_with_its_results(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atv.lm.load.resolve", lambda name: models.get(name, name))
    monkeypatch.setattr(sys, "argv", [])  # which the example sets
    small = ready.Ready(lambda: house_style.rows()[:40], "--train-rows 4 --valid-rows 2 --epochs 1", "--test-rows 3")
    monkeypatch.setitem(ready.ADAPTERS, "small", small)
    packed = ready.make("small", tmp_path / "made")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    read = artifact.read(tmp_path / "unpacked" / "small")
    assert read.method == "atv"
    card = (tmp_path / "unpacked" / "small" / "README.md").read_text()
    assert "## Results on test rows" in card
    assert "license: apache-2.0" in card
    monkeypatch.setattr(ready, "LARGEST", 1000)
    with refused("small.tar.gz has", "expected at most 1,000"):
        ready.make("small", tmp_path / "made")
