"""Tables from rows: against means worked out by hand, against exact fractions, and as golden text."""

import csv
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atv.cli.output import print_table
from atv.report import all_tables, markdown, score_table
from atv.report.formats import comma_separated, latex
from atv.report.tables import Table, marked, number, prefix_table

CATEGORY = {"sentiment": "NLU", "outlook": "Unseen", "topic": "NLU"}


def row(method, task, correct, among_options, tokens=30, seconds=0.01):
    return {
        "method": method,
        "llm": "small",
        "task": task,
        "category": CATEGORY[task],
        "scores": {"first_token": correct, "first_token_among_options": among_options},
        "prompt_tokens": tokens,
        "seconds": seconds,
    }


def rows_of(method, task, correct, among_options, **costs):
    """One row for each mark, `x` being a right answer."""
    return [row(method, task, a == "x", b == "x", **costs) for a, b in zip(correct, among_options, strict=True)]


ROWS = [
    *rows_of("zero-shot", "sentiment", "x---", "xx--", tokens=21, seconds=0.01),
    *rows_of("zero-shot", "outlook", "-", "x", tokens=31, seconds=0.02),
    *rows_of("zero-shot", "outlook", "--", "--", tokens=34, seconds=0.05),
    *rows_of("atv", "sentiment", "xxx-", "xxx-", tokens=21, seconds=0.0124),
    *rows_of("atv", "outlook", "xx-", "xxx", tokens=33, seconds=0.03),
]


def untold(part):
    return part | {"scores": part["scores"] | {"first_token": None}}


def cells(table):
    """Cells by name of task, method and column."""
    return {
        (line[0], line[2], column): cell
        for line in table.rows
        for column, cell in zip(table.columns, line, strict=True)
    }


TOPIC = rows_of("zero-shot", "topic", "xx", "x-", tokens=41, seconds=0.03)
TOPIC_ATV = rows_of("atv", "topic", "x", "x", tokens=41, seconds=0.05)


def test_two_methods_give_the_means_worked_out_by_hand_and_unseen_tasks_stay_out_of_the_mean():
    found = cells(score_table([*ROWS, *TOPIC, *TOPIC_ATV]))
    expected = {
        ("sentiment", "zero-shot"): ("NLU", "4", "25.0", "50.0", "21", "0.0100"),
        ("outlook", "zero-shot"): ("Unseen", "3", "0.0", "33.3", "33", "0.0400"),
        ("topic", "zero-shot"): ("NLU", "2", "100.0", "50.0", "41", "0.0300"),
        ("mean of 2 tasks", "zero-shot"): ("", "", "62.5", "50.0", "31", "0.0200"),
        ("sentiment", "atv"): ("NLU", "4", "75.0", "75.0", "21", "0.0124"),
        ("outlook", "atv"): ("Unseen", "3", "66.7", "100.0", "33", "0.0300"),
        ("topic", "atv"): ("NLU", "1", "100.0", "100.0", "41", "0.0500"),
        ("mean of 2 tasks", "atv"): ("", "", "87.5", "87.5", "31", "0.0312"),
    }
    columns = ("category", "rows", "first_token", "first_token_among_options", "tokens", "s/query")
    assert {key: tuple(found[*key, column] for column in columns) for key in expected} == expected


def test_a_task_that_a_method_was_not_asked_is_a_dash_and_takes_the_mean_with_it():
    found = cells(score_table([*ROWS, *TOPIC]))
    for column in ("first_token", "first_token_among_options", "tokens", "s/query"):
        assert (found["topic", "atv", column], found["mean of 2 tasks", "atv", column]) == ("–", "–")
        assert found["sentiment", "atv", column] != "–"
    assert found["mean of 2 tasks", "zero-shot", "first_token"] == "62.5"
    assert found["topic", "atv", "rows"] == "0"


def test_several_runs_of_a_method_are_one_line():
    runs = [part | {"seed": seed} for seed, part in enumerate([ROWS[0], ROWS[1], ROWS[0]])]
    found = cells(score_table(runs))
    assert found["sentiment", "zero-shot", "first_token"] == "66.7"
    assert found["sentiment", "zero-shot", "rows"] == "3"


def test_the_same_method_on_two_llms_is_two_lines_that_name_them():
    other = [part | {"llm": "large"} for part in ROWS if part["method"] == "zero-shot"]
    methods = [line[2] for line in score_table([*ROWS, *other]).rows if line[0] == "sentiment"]
    assert methods == ["zero-shot, small", "atv, small", "zero-shot, large"]


def test_methods_and_tasks_stand_in_the_order_of_the_rows():
    table = score_table(ROWS[::-1])
    assert [(line[0], line[2]) for line in table.rows] == [
        ("outlook", "atv"),
        ("outlook", "zero-shot"),
        ("sentiment", "atv"),
        ("sentiment", "zero-shot"),
    ]


RANDOM_ROWS = st.lists(
    st.builds(
        row,
        method=st.sampled_from(["zero-shot", "atv"]),
        task=st.sampled_from(sorted(CATEGORY)),
        correct=st.booleans(),
        among_options=st.booleans(),
        tokens=st.integers(1, 4000),
        seconds=st.floats(0, 10),
    ),
    min_size=1,
    max_size=30,
)


def shown(value, digits):
    """Within half a unit of the last digit shown: the bounds that rounding must keep."""
    return pytest.approx(float(value), abs=0.5 * 10**-digits + 1e-9)


@settings(max_examples=50)
@given(RANDOM_ROWS)
def test_every_cell_is_the_exact_mean_of_its_rows_and_every_mean_the_mean_of_its_cells(rows):
    found = cells(score_table(rows))
    methods, tasks = {r["method"] for r in rows}, {r["task"] for r in rows}
    seen = tasks - {"outlook"}
    columns = (("first_token", "first_token", 100, 1),)
    columns += (("first_token_among_options", "first_token_among_options", 100, 1),)
    columns += (("tokens", "prompt_tokens", 1, 0), ("s/query", "seconds", 1, 4))
    for method in methods:
        for column, key, factor, digits in columns:
            means = {}
            for task in tasks:
                values = [Fraction((r["scores"] | r)[key]) for r in rows if (r["method"], r["task"]) == (method, task)]
                cell = found[task, method, column]
                if values:
                    means[task] = factor * sum(values) / len(values)
                    assert float(cell) == shown(means[task], digits)
                else:
                    assert cell == "–"
            if len(seen) < 2:
                continue
            mean = found["mean of 2 tasks", method, column]
            known = [means[task] for task in seen if task in means]
            assert mean == "–" if len(known) < 2 else float(mean) == shown(sum(known) / 2, digits)


def test_a_table_as_markdown_is_this_text():
    assert markdown(score_table([*ROWS, *TOPIC])) == (
        "# Scores per task\n"
        "\n"
        "| task | category | method | rows | first_token | first_token_among_options | tokens | s/query |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| sentiment | NLU | zero-shot | 4 | 25.0 | 50.0 | 21 | 0.0100 |\n"
        "| sentiment | NLU | atv | 4 | 75.0 | 75.0 | 21 | 0.0124 |\n"
        "| outlook | Unseen | zero-shot | 3 | 0.0 | 33.3 | 33 | 0.0400 |\n"
        "| outlook | Unseen | atv | 3 | 66.7 | 100.0 | 33 | 0.0300 |\n"
        "| topic | NLU | zero-shot | 2 | 100.0 | 50.0 | 41 | 0.0300 |\n"
        "| topic | NLU | atv | 0 | – | – | – | – |\n"
        "| mean of 2 tasks |  | zero-shot |  | 62.5 | 50.0 | 31 | 0.0200 |\n"
        "| mean of 2 tasks |  | atv |  | – | – | – | – |\n"
        "\n"
        "Scores in percent. first_token: the most likely next token over the whole vocabulary is the first token of "
        "the answer. first_token_among_options: the likeliest of the task's options, by their tokens up to where they "
        "differ, is the answer. Tokens: prompt tokens per query. Seconds per query include everything that the method "
        "and the metrics do for it.\n"
    )


def test_heads_and_titles_in_markdown_have_no_bar_or_line_break_of_a_name():
    head, _, columns, rule, line, *_ = markdown(Table("Of a|b\nand c", ["x", "A|:"], [["1\u20282", "3"]], "")).split(
        "\n"
    )
    assert (head, columns, line) == (r"# Of a\|b and c", r"| x | A\|: |", "| 1 2 | 3 |")
    assert rule.count("|") == 3


def with_prefix(rows, *prefixes):
    return [part | {"answer_prefix": prefix} for part, prefix in zip(rows, prefixes, strict=True)]


def test_a_prefix_that_fails_is_seen_beside_the_mean_over_all():
    rows = [
        *with_prefix(rows_of("atv", "sentiment", "xxx-", "xxxx"), "A:", "A:", "A:", "So:"),
        *with_prefix(rows_of("zero-shot", "sentiment", "x-", "xx"), "A:", None),
        *with_prefix(rows_of("atv", "topic", "xx", "xx"), "A:", "A:"),  # one prefix: nothing to tell apart
    ]
    table = prefix_table(rows)
    assert table.columns == ["task", "method", "score", "A:", "So:", "no prefix", "all"]
    assert table.rows == [
        ["sentiment", "atv", "first_token", "100.0", "0.0", "–", "75.0"],
        ["sentiment", "zero-shot", "first_token", "100.0", "–", "0.0", "50.0"],
    ]
    assert "first_token: the most likely next token" in table.note
    assert [each.title for each in all_tables(rows[:4])] == ["Scores per task", "Scores by answer prefix"]
    table = prefix_table([*rows[:2], untold(rows[3])])
    assert table.rows == [["sentiment", "atv", "first_token_among_options", "100.0", "100.0", "100.0"]]
    assert prefix_table(rows[6:]) is None


UNTOLD = [untold(part) for part in rows_of("zero-shot", "sentiment", "xx--", "x---", tokens=21)]
UNTOLD_ATV = [untold(part) for part in rows_of("atv", "sentiment", "xxxx", "xx--", tokens=21)]
WHY = (
    "first_token is not defined in sentiment: it is judged by an answer's first token, which does not tell all options "
    "of a task apart there, and means leave that out."
)


def test_where_the_first_token_tells_nothing_a_marked_dash_stands_and_means_are_without_it():
    table = score_table([*UNTOLD, *UNTOLD_ATV, *TOPIC, *TOPIC_ATV])
    found = cells(table)
    assert found["sentiment", "zero-shot", "first_token"] == found["sentiment", "atv", "first_token"] == "–†"
    assert found["sentiment", "zero-shot", "first_token_among_options"] == "25.0"
    assert found["sentiment", "atv", "tokens"] == "21"
    assert found["mean of 2 tasks", "zero-shot", "first_token"] == "100.0†"
    assert found["mean of 2 tasks", "zero-shot", "first_token_among_options"] == "37.5"
    assert table.footnote == WHY
    assert table.notes.endswith(f"do for it. †: {WHY}")
    assert "†" not in score_table([*TOPIC, *TOPIC_ATV]).notes


def test_a_mean_of_tasks_that_are_all_untold_is_a_marked_dash_and_a_task_not_asked_a_plain_one():
    also = [untold(part) for part in TOPIC]
    assert cells(score_table([*UNTOLD, *also]))["mean of 2 tasks", "zero-shot", "first_token"] == "–†"
    found = cells(score_table([*UNTOLD, *UNTOLD_ATV, *TOPIC]))
    assert found["topic", "atv", "first_token"] == "–"
    assert found["mean of 2 tasks", "atv", "first_token"] == "–†"


def test_a_row_without_the_score_takes_it_from_its_task():
    mixed = [ROWS[0], untold(ROWS[1])]
    assert cells(score_table(mixed))["sentiment", "zero-shot", "first_token"] == "–†"


def test_of_two_llms_the_footnote_names_the_one_that_cannot_tell():
    other = [part | {"llm": "large"} for part in rows_of("zero-shot", "sentiment", "xx--", "x---")]
    table = score_table([*UNTOLD, *other])
    found = cells(table)
    assert found["sentiment", "zero-shot, small", "first_token"] == "–†"
    assert found["sentiment", "zero-shot, large", "first_token"] == "50.0"
    assert "not defined in sentiment (small): it" in table.footnote


def test_marks_and_footnote_in_markdown_latex_csv_and_terminal(capsys):
    table = score_table([*UNTOLD, *TOPIC])
    text = markdown(table)
    assert "| sentiment | NLU | zero-shot | 4 | –† | 25.0 | 21 | 0.0100 |" in text
    assert "| mean of 2 tasks |  | zero-shot |  | 100.0† | 37.5 | 31 | 0.0200 |" in text
    assert text.endswith(f"†: {WHY}\n")
    text = latex(table)
    assert r"sentiment & NLU & zero-shot & 4 & --$\dagger$ & 25.0" in text
    assert r"$\dagger$: first\_token is not defined" in text
    text = list(csv.reader(comma_separated(table).splitlines()))
    assert text[0][-1] == "note"
    assert text[1][4:] == ["", "25.0", "21", "0.0100", WHY]
    assert text[2][4:] == ["100.0", "50.0", "41", "0.0300", ""]
    assert text[3][4:6] == ["100.0", "37.5"]
    assert text[3][-1] == WHY
    assert "note" not in comma_separated(score_table(TOPIC)).splitlines()[0]
    print_table(table)
    said = " ".join(capsys.readouterr().out.split())
    assert "–†" in said
    assert f"†: {WHY}" in said


@pytest.mark.parametrize(("cell", "value"), [("–†", None), ("62.5†", 62.5), ("62.5† ± 1.0", 62.5), ("–", None)])
def test_what_a_marked_cell_says(cell, value):
    assert number(cell) == value


def test_a_mark_stands_before_the_spread():
    assert [marked(cell) for cell in ("–", "62.5", "62.5 ± 1.0")] == ["–†", "62.5†", "62.5† ± 1.0"]


def test_reports_records_and_tasks_are_read_without_loading_torch():
    code = "import sys, atv.config, atv.evaluation.records, atv.report, atv.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_texts_stay_as_they_are_in_csv():
    table = Table(
        "Mistakes", ["query", "score"], [["dose 5 ± 2 mg ± x†", "1.0 ± 0.5†"], ["–", "–"]], "", text=1, footnote="why"
    )
    rows = list(csv.reader(comma_separated(table).splitlines()))
    assert rows == [
        ["query", "score", "score std", "note"],
        ["dose 5 ± 2 mg ± x†", "1.0", "0.5", "why"],
        ["–", "", "", ""],
    ]
