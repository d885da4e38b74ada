"""The paper's tables from rows, and every format that they are written in: read back, and against the hand."""

import csv
import re
from itertools import product

import pytest
from refusals import refused

from atv.paper.published import PaperNumbers, paper_results
from atv.paper.tasks import PAPER
from atv.report import all_tables, check_format, comparison_tables, markdown, write_tables
from atv.report.comparison import comparison_table, in_domain_table, summary_table, unseen_table
from atv.report.formats import comma_separated, latex
from atv.report.statistics import paired
from atv.report.tables import Table

AVERAGES = ("in-domain", "unseen", "Avg")
CATEGORY = {"a_b": "NLU", "c": "NLU", "d": "Handwork", "e": "Unseen", "f": "Unseen"}


def rows_of(method, task, marks, options="", seed=42, category=None, llm="small", tokens=20):
    """One row for each mark, `x` being a right answer."""
    return [
        {"method": method, "llm": llm, "seed": seed, "run": "runs/a", "task": task,
         "category": category or CATEGORY[task], "template": 0, "answer_prefix": "A:", "example": example,
         "scores": {"first_token": mark == "x", "first_token_among_options": option == "x"},
         "prompt_tokens": tokens, "seconds": 0.5}
        for example, (mark, option) in enumerate(zip(marks, options or marks, strict=True))
    ]  # fmt: skip


ROWS = [
    *rows_of("mine", "a_b", "x---"), *rows_of("mine", "d", "xx--"), *rows_of("mine", "c", "xx"),
    *rows_of("mine", "e", "-"), *rows_of("mine", "f", "x"),
    *rows_of("atv", "a_b", "xxx-"), *rows_of("atv", "d", "xx--"), *rows_of("atv", "c", "xx"),
    *rows_of("atv", "e", "x"), *rows_of("atv", "f", "x"),
    *rows_of("zero-shot", "a_b", "----", "xxxx", tokens=10), *rows_of("zero-shot", "d", "x---", "xxxx"),
    *rows_of("zero-shot", "c", "--", "xx"), *rows_of("zero-shot", "e", "-", "x"),
]  # fmt: skip
SEEDS = [*(row for row in ROWS if row["method"] == "atv"), *rows_of("atv", "a_b", "x---", seed=10),
         *rows_of("atv", "d", "----", seed=10), *rows_of("atv", "c", "xx", seed=10)]  # fmt: skip


def untold(row):
    return row | {"scores": row["scores"] | {"first_token": None}}


def lines_of(table):
    return {line[0]: dict(zip(table.columns[1:], line[1:], strict=True)) for line in table.rows}


def bold_of(table):
    return {(table.rows[row][0], table.columns[column]) for row, column in table.bold}


def test_the_in_domain_table_is_the_one_worked_out_by_hand():
    table = in_domain_table(ROWS, "first_token")
    assert table.title == "In-domain first_token: small"
    assert table.columns == ["method", "tokens", "s/query", "NLU", "Handwork", "Avg"]
    assert table.rows == [
        ["zero-shot", "18", "0.5000", "0.0", "25.0", "12.5"],  # tokens: mean of 15 (NLU) and 20
        ["atv", "20", "0.5000", "87.5", "50.0", "68.8"],
        ["mine", "20", "0.5000", "62.5", "50.0", "56.2"],
    ]
    assert bold_of(table) == {("atv", "NLU"), ("atv", "Handwork"), ("mine", "Handwork"), ("atv", "Avg")}
    assert "3 tasks, 10 test rows, 1 prompt variant, seed 42." in table.note
    options = in_domain_table(ROWS, "first_token_among_options")
    assert options.title == "In-domain first_token_among_options: small"
    assert lines_of(options)["zero-shot"]["Avg"] == "100.0"
    assert bold_of(options) == {("zero-shot", name) for name in ("NLU", "Handwork", "Avg")}


def test_a_task_that_was_not_asked_is_a_dash_and_so_is_every_mean_of_it():
    lines = lines_of(unseen_table(ROWS, "first_token"))
    assert lines["zero-shot"] == {"tokens": "–", "s/query": "–", "e": "0.0", "f": "–", "Avg": "–"}
    assert lines["mine"] == {"tokens": "20", "s/query": "0.5000", "e": "0.0", "f": "100.0", "Avg": "50.0"}
    summary = lines_of(summary_table(ROWS))
    assert summary["zero-shot"]["in-domain first_token"] == "12.5"
    assert (summary["zero-shot"]["unseen first_token"], summary["zero-shot"]["Avg first_token"]) == ("–", "–")
    assert [summary["atv"][f"{name} first_token"] for name in AVERAGES] == ["68.8", "100.0", "84.4"]
    assert summary["atv"]["Avg first_token_among_options"] == "84.4"


def test_several_seeds_show_their_spread_and_a_method_with_fewer_is_named():
    others = [row for row in ROWS if row["method"] == "mine"]
    table = in_domain_table([*SEEDS, *others], "first_token")
    # Avg of atv is 68.75 with seed 42 and (62.5 + 0) / 2 with seed 10
    assert lines_of(table)["atv"] | {"Avg": "50.0 ± 26.5"} == lines_of(table)["atv"]
    assert lines_of(table)["mine"]["Avg"] == "56.2"
    assert "seeds 42, 10; mine with 42 alone." in table.note


def test_the_comparison_shows_what_paired_gives_and_says_why_it_has_a_dash():
    table = comparison_table(ROWS)
    assert table.columns[2] == "atv minus"
    lines = {tuple(line[:3]): line[3:] for line in table.rows}
    scores, kinds = ("first_token", "first_token_among_options"), ("in-domain", "unseen")
    assert list(lines) == list(product(scores, kinds, ("zero-shot", "mine")))
    found = paired(ROWS, "atv", "zero-shot", "first_token")
    assert lines["first_token", "in-domain", "zero-shot"] == ["+56.25", f"{100 * found.low:+.2f}",
                                                           f"{100 * found.high:+.2f}", f"{found.p:.4f}"]  # fmt: skip
    assert lines["first_token_among_options", "in-domain", "zero-shot"][0] == "-31.25"
    assert lines["first_token", "unseen", "zero-shot"] == ["–"] * 4
    assert "1 of atv's 2 are not among zero-shot's" in table.note
    assert lines["first_token", "unseen", "mine"][0] == "+50.00"


UNTOLD = [untold(row) if row["task"] in ("c", "e") else row for row in ROWS]


def test_tasks_whose_options_the_first_token_does_not_tell_apart_are_left_out_and_marked():
    """Every number is that of rows without these tasks, with the mark wherever they would have had a part."""
    table, without = (
        in_domain_table(UNTOLD, "first_token"),
        in_domain_table([row for row in ROWS if row["task"] not in ("c", "e")], "first_token"),
    )
    for method, line in lines_of(table).items():
        bare = lines_of(without)[method]
        assert line["NLU"] == f"{bare['NLU']}†"
        assert line["Avg"] == f"{bare['Avg']}†"
        assert line["Handwork"] == bare["Handwork"]
        assert line["tokens"] == lines_of(in_domain_table(ROWS, "first_token"))[method]["tokens"]
    assert lines_of(table)["atv"]["Avg"] == "62.5†"
    assert bold_of(table) == bold_of(without)
    assert table.footnote.startswith("first_token is not defined in c: ")
    assert table.footnote.endswith("apart there, and means leave that out.")
    lines = lines_of(unseen_table(UNTOLD, "first_token"))
    assert lines["atv"] == {"tokens": "20", "s/query": "0.5000", "e": "–†", "f": "100.0", "Avg": "100.0†"}
    assert lines["zero-shot"] == {"tokens": "–", "s/query": "–", "e": "–†", "f": "–", "Avg": "–†"}
    summary = summary_table(UNTOLD)
    assert lines_of(summary)["atv"] == dict(
        zip((f"{name} first_token" for name in AVERAGES), ("62.5†", "100.0†", "81.2†"), strict=True)
    ) | {
        f"{name} first_token_among_options": lines_of(summary_table(ROWS))["atv"][f"{name} first_token_among_options"]
        for name in AVERAGES
    }
    assert "not defined in c, e: it" in summary.footnote
    options = in_domain_table(UNTOLD, "first_token_among_options")
    assert options == in_domain_table(ROWS, "first_token_among_options")
    assert not options.footnote
    rest = "".join(map(markdown, all_tables(ROWS)))
    assert "†" not in rest


def test_a_category_and_an_average_of_nothing_else_are_marked_dashes():
    rows = [untold(row) for row in ROWS if row["task"] in ("d", "f")]
    assert lines_of(in_domain_table(rows, "first_token"))["atv"] == {
        "tokens": "20",
        "s/query": "0.5000",
        "Handwork": "–†",
        "Avg": "–†",
    }
    lines = lines_of(summary_table(rows))
    assert [lines["atv"][f"{name} first_token"] for name in AVERAGES] == ["–†"] * 3
    found = comparison_table(rows)
    assert [line[3:] for line in found.rows if line[0] == "first_token"] == [["–†", "–", "–", "–"]] * 4
    assert "were not asked in-domain tasks" not in found.note


def test_a_comparison_is_of_the_tasks_that_are_left_and_says_so():
    table, expected = (
        comparison_table(UNTOLD),
        paired([row for row in ROWS if row["task"] != "c"], "atv", "zero-shot", "first_token"),
    )
    lines = {tuple(line[:3]): line[3:] for line in table.rows}
    value, low, high = (f"{100 * part:+.2f}" for part in expected[:3])
    assert lines["first_token", "in-domain", "zero-shot"] == [f"{value}†", low, high, f"{expected.p:.4f}"]
    assert lines["first_token_among_options", "in-domain", "zero-shot"][0] == "-31.25"
    assert "not defined in c, e" in table.footnote


def test_the_paper_s_numbers_do_not_stand_beside_fewer_tasks():
    rows = [untold(row) if row["task"] == "glue_sst2" else row for row in paper_rows("elicit", "icl")]
    line = lines_of(in_domain_table(rows, "first_token", PaperNumbers()))["paper, LLaMA3-8B: icl"]
    assert (line["NLU"], line["Avg"]) == ("–", "–")
    assert line["Reasoning"] == "56.0 ± 0.4"
    summary = lines_of(summary_table(rows, beside=PaperNumbers()))
    assert summary["icl"]["in-domain first_token"].endswith("†")
    assert {line["in-domain first_token"] for name, line in summary.items() if name.startswith("paper")} <= {"–"}


def test_methods_stand_in_the_paper_s_order_and_each_llm_has_tables_of_its_own():
    others = ("own", "icl+atv", "atv", "fixed", "learned-tv", "encoder", "probe", "full", "prefix", "lora", "linear",
              "i2cl", "elicit", "bm25", "icl", "zero-shot")  # fmt: skip
    rows = [row for method in others for row in rows_of(method, "d", "x-")]
    assert [line[0] for line in in_domain_table(rows, "first_token").rows] == [*others[:0:-1], "own"]
    titles = [table.title for table in comparison_tables([*rows, *rows_of("atv", "e", "x", llm="large")])]
    assert titles == ["In-domain first_token: small", "In-domain first_token_among_options: small",
                      "atv against each other: small", "Unseen first_token: large",
                      "Unseen first_token_among_options: large"]  # fmt: skip


def test_one_method_has_the_table_per_task_alone():
    assert [table.title for table in all_tables(SEEDS)] == ["Scores per task"]
    assert len(all_tables(ROWS)) == 7


def paper_rows(*methods, without=()):
    return [
        row
        for method in methods
        for name, task in PAPER.items()
        if name not in without
        for row in rows_of(method, name, "x-", category=task.category)
    ]


def test_the_paper_s_numbers_stand_beside_ours_and_are_marked():
    rows = paper_rows("elicit", "icl", "lora", "fixed")
    table = in_domain_table(rows, "first_token", PaperNumbers())
    assert [line[0] for line in table.rows] == [
        "icl", "elicit", "lora", "fixed", "paper, LLaMA3-8B: icl", "paper, LLaMA3-8B: elicit",
        "paper, Mistral-7B: icl", "paper, Mistral-7B: elicit",
    ]  # fmt: skip
    assert table.columns[3:] == ["NLU", "Reasoning", "Knowledge", "Mathematics", "Safety", "Avg"]
    assert table.rows[4][1:] == ["1884", "–", "60.6 ± 0.9", "56.0 ± 0.4", "70.6 ± 1.0", "26.7 ± 2.0", "62.1 ± 0.3",
                                 "55.2 ± 0.9"]  # fmt: skip
    assert max(row for row, _ in table.bold) < 4  # ours alone, though the paper's are higher
    assert "Rows marked 'paper' are other LLMs' numbers" in table.note
    assert "arXiv 2506.03426" in table.note
    assert len(in_domain_table(rows, "first_token_among_options").rows) == 4
    assert (
        lines_of(unseen_table(rows, "first_token", PaperNumbers()))["paper, Mistral-7B: elicit"]["deepmind"]
        == "25.1 ± 1.2"
    )
    summary = lines_of(summary_table(rows, beside=PaperNumbers()))
    assert summary["paper, LLaMA3-8B: lora"] == dict.fromkeys(summary["lora"], "–") | {
        "in-domain first_token": "56.0 ± 1.4", "unseen first_token": "52.0 ± 3.2",
        "Avg first_token": "54.0 ± 2.3"}  # fmt: skip
    assert summary["paper, Mistral-7B: icl"]["in-domain first_token"] == "53.0 ± 0.1"
    assert summary["paper, Mistral-7B: icl"]["unseen first_token"] == "–"


def test_a_number_of_the_paper_stands_only_beside_one_of_the_same_tasks():
    rows = paper_rows("icl", "bm25", without=("boolq", "glue_cola"))
    line = lines_of(in_domain_table(rows, "first_token", PaperNumbers()))["paper, LLaMA3-8B: bm25"]
    assert {name for name, cell in line.items() if cell != "–"} == {"NLU", "Reasoning", "Mathematics", "Safety"}
    line = lines_of(unseen_table(rows, "first_token", PaperNumbers()))["paper, LLaMA3-8B: bm25"]
    assert (line["deepmind"], line["Avg"], line["tokens"]) == ("30.7 ± 1.7", "–", "–")
    assert [line[0] for line in summary_table(rows, beside=PaperNumbers()).rows] == ["icl", "bm25"]
    assert not any(
        "paper" in line[0] for table in comparison_tables(ROWS, beside=PaperNumbers()) for line in table.rows
    )


def test_the_averages_of_the_paper_are_those_of_its_parts():
    """Against a slip in copying: its in-domain average is the mean of the categories, its unseen one of the tasks."""
    lines = [
        line for part in ("in-domain", "unseen") for llm in paper_results()[part].values() for line in llm.values()
    ]
    assert len(lines) == 22
    for line in lines:
        parts = [mean for name, (mean, _) in line.items() if name not in ("tokens", "Avg")]
        assert len(parts) == 5
        assert line["Avg"][0] == pytest.approx(sum(parts) / 5, abs=0.15)


TABLE = Table("A_b & c: 50%", ["method", "NLU", "p"],
              [["x_1", "61.0 ± 5.0", "-1.50"], ["y#2 {z}", "–", "+2.00"], ["paper, L: x", "60.0", "–"]],
              "Below 10% ~ <5\\ and $3.", text=1, bold=frozenset({(0, 1)}))  # fmt: skip


def test_bold_is_marked_in_markdown_and_words_are_aligned_left():
    text = markdown(TABLE).splitlines()
    assert text[3] == "| --- | ---: | ---: |"
    assert text[4] == "| x_1 | **61.0 ± 5.0** | -1.50 |"


def test_latex_is_escaped_and_balanced():
    text = latex(TABLE)
    assert r"x\_1 & \textbf{61.0 $\pm$ 5.0} & $-$1.50 \\" in text
    assert r"y\#2 \{z\} & -- & +2.00 \\" in text
    assert r"\caption{A\_b \& c: 50\%. Below 10\% \textasciitilde{} $<$5\textbackslash{} and \$3.}" in text
    assert r"\begin{tabular}{lrr}" in text
    for table in all_tables([*ROWS, *paper_rows("icl")], PaperNumbers()):
        text = latex(table)
        bare = re.sub(r"\\[\\&%$#_{}]", "", text)  # without what is escaped
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
        assert not re.search(r"[_%#~^±–]", bare.replace("%%", ""))
        body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
        for line in body.splitlines():
            assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1
            assert line.endswith(r" \\")


def test_csv_read_again_gives_the_numbers():
    found = list(csv.DictReader(comma_separated(TABLE).splitlines()))
    assert found[0] == {"method": "x_1", "NLU": "61.0", "NLU std": "5.0", "p": "-1.50"}
    assert found[1] == {"method": "y#2 {z}", "NLU": "", "NLU std": "", "p": "+2.00"}
    assert found[2] == {"method": "paper, L: x", "NLU": "60.0", "NLU std": "", "p": ""}
    for table in all_tables(ROWS):
        lines = list(csv.reader(comma_separated(table).splitlines()))
        numbers = [cell for line in lines[1:] for cell in line[table.text :] if cell]
        assert [float(number) for number in numbers]
        assert {len(line) for line in lines} == {len(table.columns)}


def test_the_file_s_name_decides_the_format(tmp_path):
    tables = all_tables(ROWS)
    for name, mark in (("r.md", "\n| --- |"), ("r.tex", r"\begin{table}")):
        assert write_tables(tables, tmp_path / name) == [tmp_path / name]
        assert (tmp_path / name).read_text().count(mark) == 7
    files = write_tables(tables, tmp_path / "r.csv")
    assert [file.name for file in files[:2]] == ["r-1-scores-per-task.csv", "r-2-in-domain-first-token-small.csv"]
    assert [file.read_text() for file in files] == [comma_separated(table) for table in tables]
    for name in ("r.txt", "r"):
        with refused(name, ".md, .tex, .csv or .html"):
            check_format(tmp_path / name, page=True)
    assert len(list(tmp_path.iterdir())) == 9
