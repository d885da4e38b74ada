"""The report of a classifier: against counts by hand, a loop over bins, and scikit-learn's calibration curve."""

import csv
import json
import random
import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from refusals import refused
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score

from atv.cli import report as command
from atv.cli.options import Report
from atv.evaluation.metrics import FEW_OPTIONS
from atv.evaluation.records import load_runs
from atv.report import classification_details, classification_tables, classified, markdown, write_page
from atv.report.classification import MISTAKES, calibration_error, mistakes_table
from atv.report.plots import draw


def row(target, predicted, sure=0.8, *, example=0, task="spam", method="atv", options=("ham", "spam"), **more):
    others = [option for option in options if option != predicted]
    probabilities = {predicted: sure} | dict.fromkeys(others, (1 - sure) / max(1, len(others)))
    wrong = target != predicted
    return {
        "task": task, "category": "other", "split": "test", "template": 0, "answer_prefix": "A:", "example": example,
        "target": target, "scores": {"option_likelihood": float(not wrong)},
        "outputs": {"option_likelihood": predicted}, "prompt_tokens": 9, "seconds": 0.5, "demonstrations": 0,
        "probabilities": {option: probabilities[option] for option in options},
        "query": f"query {example}" if wrong else "", "method": method, "llm": "small", "seed": 1, "run": "runs/a",
    } | more  # fmt: skip


def rows_of(pairs, **more):
    """One row for each pair of letters: the answer and the prediction, h for ham and s for spam."""
    name = {"h": "ham", "s": "spam"}
    return [row(name[a], name[b], example=index, **more) for index, (a, b) in enumerate(pairs.split())]


def lines_of(table):
    return [dict(zip(table.columns, line, strict=True)) for line in table.rows]


def old(rows):
    """Rows as earlier versions wrote them."""
    return [{key: value for key, value in each.items() if key not in ("probabilities", "query")} for each in rows]


def random_rows(count, seed=0, **more):
    draw_from = random.Random(seed)
    return [
        row(draw_from.choice(["ham", "spam"]), draw_from.choice(["ham", "spam"]), draw_from.uniform(0.5, 1), example=i)
        | more
        for i in range(count)
    ]


def test_accuracy_and_macro_f1_are_those_worked_out_by_hand():
    rows = rows_of("hh hh hs sh ss ss ss ss") + rows_of("hh hs", method="zero-shot")
    [table] = classification_tables(rows)
    # ham: precision 2/3, recall 2/3; spam: 4/5 and 4/5
    assert lines_of(table) == [
        {"task": "spam", "method": "atv", "rows": "8", "labels": "2", "most frequent": "62.5", "accuracy": "75.0",
         "macro-F1": "73.3", "ECE": "5.0"},
        {"task": "spam", "method": "zero-shot", "rows": "2", "labels": "1", "most frequent": "100.0",
         "accuracy": "50.0†", "macro-F1": "66.7", "ECE": "30.0"},
    ]  # fmt: skip


@pytest.mark.parametrize(("pairs", "warned"), [("hh hh ss", False), ("hh hh hh ss", True)])
def test_above_two_thirds_of_one_answer_a_footnote_says_to_read_macro_f1(pairs, warned):
    [table] = classification_tables(rows_of(pairs))
    assert ("†" in table.rows[0][5]) is warned
    assert ("read macro-F1: spam ('ham': 75.0%)." in table.notes) is warned


@pytest.mark.parametrize("seed", range(3))
def test_the_calibration_error_is_that_of_a_loop_and_of_the_calibration_curve_of_scikit_learn(seed):
    rows = random_rows(200, seed)
    sure = np.array([max(each["probabilities"].values()) for each in rows])
    right = np.array([each["target"] == each["outputs"]["option_likelihood"] for each in rows])
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (sure >= low) & (sure < low + 0.1)
        if inside.any():
            expected += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert calibration_error(rows) == pytest.approx(expected)
    rates, means = calibration_curve(right, sure, n_bins=10)
    reliability = next(table for table in classification_details(rows) if table.title.startswith("Reliability"))
    for line, rate, mean in zip(lines_of(reliability), rates, means, strict=True):
        assert (line["probability"], line["accuracy"]) == (f"{100 * mean:.1f}", f"{100 * rate:.1f}")
    assert [line["range"] for line in lines_of(reliability)] == ["50–60", "60–70", "70–80", "80–90", "90–100"]
    assert sum(int(line["rows"]) for line in lines_of(reliability)) == 200


def test_certain_answers_are_in_the_last_bin():
    assert calibration_error([row("ham", "ham", 1.0), row("spam", "ham", 1.0)]) == 0.5


def test_the_confusion_matrix_counts_answers_in_rows_and_predictions_in_columns():
    rows = [*rows_of("hh hs hs ss"), row("spam", "other", options=("ham", "other", "spam"))]
    labels, confusion, *_ = classification_details(rows)
    assert confusion.title == "Confusion matrix: spam"
    assert confusion.columns == ["method", "answer", "ham", "other", "spam"]
    assert confusion.rows == [["atv", "ham", "1", "0", "2"], ["atv", "spam", "0", "1", "1"]]
    by_label = {line["label"]: line for line in lines_of(labels)}
    assert (by_label["ham"]["precision"], by_label["ham"]["recall"], by_label["ham"]["rows"]) == ("100.0", "33.3", "3")
    assert (by_label["spam"]["precision"], by_label["spam"]["recall"], by_label["spam"]["rows"]) == (
        "33.3",
        "50.0",
        "2",
    )
    targets, found = ([part(each) for each in rows] for part in (
        lambda each: each["target"], lambda each: each["outputs"]["option_likelihood"]))  # fmt: skip
    macro = f1_score(targets, found, labels=["ham", "spam"], average="macro")
    assert by_label["macro"]["F1"] == lines_of(classification_tables(rows)[0])[0]["macro-F1"] == f"{100 * macro:.1f}"


def test_the_most_confident_mistakes_come_first_each_test_row_once():
    rows = [
        row("ham", "ham", 0.99, example=0),
        row("ham", "spam", 0.7, example=1, query="a\nlong  query " + "x" * 400),
        row("ham", "spam", 0.9, example=1, answer_prefix="So:", query="a\nlong  query " + "x" * 400),
        row("spam", "ham", 0.8, example=2),
        row("spam", "spam", 0.8, example=2, answer_prefix="So:"),
        *(row("ham", "spam", 0.6, example=3 + number) for number in range(MISTAKES)),
    ]
    lines = lines_of(mistakes_table("spam", {"atv": rows}))
    assert len(lines) == MISTAKES
    assert lines[0] == {"method": "atv", "query": "a long query " + "x" * 287 + "…", "answer": "ham",
                        "predicted": "spam", "probability": "90.0", "wrong in": "2 of 2"}  # fmt: skip
    assert (lines[1]["query"], lines[1]["probability"], lines[1]["wrong in"]) == ("query 2", "80.0", "1 of 2")
    assert [line["query"] for line in lines[2:]] == [f"query {3 + number}" for number in range(MISTAKES - 2)]


def test_labels_with_line_breaks_bars_and_control_characters_keep_tables_and_plots_whole(tmp_path):
    options = ("two\nlines", "a|b", "bell\x07")
    rows = [
        row(options[index % 3], options[index % 2], example=index, options=options, run=str(tmp_path))
        for index in range(12)
    ]
    (tmp_path / "run.json").write_text(json.dumps({"schema": 2, "settings": {}}))
    tables = classification_details(rows)
    assert [line["label"] for line in lines_of(tables[0])] == ["macro", "a|b", "bell\x07", "two lines"]
    for table in tables:
        head, rule, *lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *lines)} == {len(table.columns) + 1}
        assert len(lines) == len(table.rows)
    for file in write_page(rows, tables, tmp_path / "report.html", "report"):
        assert file.suffix != ".svg" or ElementTree.parse(file)
    [plot] = draw(next(table for table in tables if table.title.startswith("Confusion")), "a")
    assert "bell\ufffd" in "".join(ElementTree.fromstring(plot.svg).itertext())


def test_rows_without_probabilities_have_no_calibration_and_no_mistakes():
    rows = old(rows_of("hh hs ss"))
    assert lines_of(classification_tables(rows)[0])[0]["ECE"] == "–"
    assert lines_of(classification_tables([*rows, *rows_of("hh")])[0])[0]["ECE"] == "–"  # a resumed run of before
    assert [table.title for table in classification_details(rows)] == [
        "Labels: option_likelihood", "Confusion matrix: spam"]  # fmt: skip


def test_tasks_with_many_labels_and_other_scores_are_not_classified():
    many = [row(str(n), str(n), options=tuple(map(str, range(30))), task="many") for n in range(FEW_OPTIONS + 1)]
    generated = [each | {"scores": {"exact_match": 1.0}, "outputs": {"generated": "ham"}} for each in rows_of("hh ss")]
    assert classified([*many, *generated]) == {}
    assert classification_tables(many) == classification_details(many) == []
    assert list(classified([*many[:-1], *rows_of("hh")])) == ["many", "spam"]


def test_of_two_llms_the_methods_names_include_them():
    rows = rows_of("hh ss") + rows_of("hh ss", llm="large")
    assert [line["method"] for line in lines_of(classification_tables(rows)[0])] == ["atv, small", "atv, large"]


def test_plots_say_what_they_show():
    rows = random_rows(60) + random_rows(60, 1, method="zero-shot")
    tables = {table.plots[0]: table for table in classification_details(rows) if table.plots}
    [confusion], [reliability] = (draw(tables[kind], kind) for kind in ("confusion", "reliability"))
    right = Counter(each["method"] for each in rows if each["scores"]["option_likelihood"])
    for method in ("atv", "zero-shot"):
        assert f"{method}: {right[method]} of 60 rows are right." in confusion.text
        assert f">{method}<" in confusion.svg
        assert f">{method}<" in reliability.svg
    for line in tables["confusion"].rows:
        assert all(f">{count}<" in confusion.svg for count in line[2:])
    assert "<image" not in confusion.svg  # the page's policy lets no picture in
    assert "zero-shot: " in reliability.text


# ---- the command ----


@pytest.fixture
def runs(tmp_path):
    """A run of two methods, the first with two prefixes."""
    for method, prefixes in (("atv", ("A:", "So:")), ("zero-shot", ("A:",))):
        folder = tmp_path / "runs" / method
        folder.mkdir(parents=True)
        run = {"schema": 2, "finished": True, "settings": {"method": method, "llm": "small", "seed": 1}, "seconds": 1.0}
        (folder / "run.json").write_text(json.dumps(run))
        rows = [each | {"answer_prefix": prefix} for prefix in prefixes for each in rows_of("hh hs sh ss ss hh")]
        rows = [each | {"query": "50% <b>of</b>\n|all|"} if each["query"] else each for each in rows]
        rows = [{key: value for key, value in each.items() if key not in ("method", "llm", "seed", "run")}
                for each in rows]  # fmt: skip
        (folder / "predictions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path / "runs"


LONG = ("Labels", "Confusion matrix", "Reliability", "Most confident mistakes")


def test_the_terminal_shows_the_compact_table_and_the_long_ones_only_with_details(runs, capsys):
    command.show_tables(Report(runs=[runs]), "report")
    said = capsys.readouterr().out
    assert "\nClassification" in said
    assert "\nScores by answer prefix" in said
    assert "--details" in said
    assert not any(f"\n{title}" in said for title in LONG)
    command.show_tables(Report(runs=[runs], details=True), "report")
    said = capsys.readouterr().out
    assert all(f"\n{title}" in said for title in LONG)
    assert "--details" not in said


@pytest.mark.parametrize("suffix", [".md", ".tex", ".csv", ".html"])
def test_every_format_has_the_long_tables(runs, tmp_path, suffix, capsys):
    out = tmp_path / f"report{suffix}"
    command.show_tables(Report(runs=[runs], out=out), "report")
    said = capsys.readouterr().out
    assert not any(f"\n{title}" in said for title in LONG)
    files = sorted(tmp_path.glob("report*.csv")) if suffix == ".csv" else [out]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    query = {".md": r"| 50% <b>of</b> \|all\| |", ".tex": r"50\% $<$b$>$of$<$/b$>$ |all|",
             ".csv": "50% <b>of</b> |all|", ".html": "50% &lt;b&gt;of&lt;/b&gt; |all|"}[suffix]  # fmt: skip
    assert query in text
    if suffix == ".csv":
        [file] = [file for file in files if "confusion" in file.name]
        assert list(csv.reader(file.read_text().splitlines())) == [
            ["method", "answer", "ham", "spam"], ["atv", "ham", "4", "2"], ["atv", "spam", "2", "4"],
            ["zero-shot", "ham", "2", "1"], ["zero-shot", "spam", "1", "2"]]  # fmt: skip
    else:
        assert all(title in text for title in LONG)
    if suffix == ".html":
        assert text.count("<svg") == len(list((tmp_path / "report_plots").glob("*.svg")))
        assert len(list((tmp_path / "report_plots").glob("*-confusion.svg"))) == 1
        assert len(list((tmp_path / "report_plots").glob("*-reliability.svg"))) == 1


def test_without_scikit_learn_the_other_tables_are_shown_and_the_package_is_named(runs, monkeypatch, capsys):
    monkeypatch.setattr("atv.report.classification.find_spec", lambda _: None)
    with refused("scikit-learn, which is not installed", "adaptive-task-vectors[report]"):
        classification_tables(load_runs([runs]))
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    command.show_tables(Report(runs=[runs], details=True), "report")
    said = capsys.readouterr().out
    assert "Scores per task" in said
    assert "\nClassification" not in said
    assert "need scikit-learn: pip install 'adaptive-task-vectors[report]'" in said
