"""Tables from rows: against means worked out by hand, against exact fractions, and as golden text."""

import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atv.report import accuracy_table, markdown

CATEGORY = {"sentiment": "NLU", "outlook": "Unseen", "topic": "NLU"}


def row(method, task, correct, among_options, tokens=30, seconds=0.01):
    return {
        "method": method,
        "task": task,
        "category": CATEGORY[task],
        "correct": correct,
        "correct_among_options": among_options,
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


def cells(table):
    """Cells by name of row and column."""
    return {(line[0], column): cell for line in table.rows for column, cell in zip(table.columns, line, strict=True)}


def test_two_methods_on_two_tasks_give_the_means_worked_out_by_hand():
    found = cells(accuracy_table(ROWS))
    expected = {
        "zero-shot": ("25.0", "0.0", "12.5"),
        "zero-shot (options)": ("50.0", "33.3", "41.7"),
        "atv": ("75.0", "66.7", "70.8"),
        "atv (options)": ("75.0", "100.0", "87.5"),
        "tokens, zero-shot": ("21", "33", "27"),
        "s/query, zero-shot": ("0.0100", "0.0400", "0.0250"),
        "tokens, atv": ("21", "33", "27"),
        "s/query, atv": ("0.0124", "0.0300", "0.0212"),
        "category": ("NLU", "Unseen", ""),
        "rows": ("4", "3", ""),
    }
    names = ("sentiment", "outlook", "mean of tasks")
    assert {column: tuple(found[name, column] for name in names) for column in expected} == expected


def test_a_task_that_a_method_was_not_asked_is_a_dash_and_takes_the_mean_with_it():
    found = cells(accuracy_table([*ROWS, *rows_of("zero-shot", "topic", "xx", "xx")]))
    for column in ("atv", "atv (options)", "tokens, atv", "s/query, atv"):
        assert (found["topic", column], found["mean of tasks", column]) == ("–", "–")
        assert found["sentiment", column] != "–"
    assert found["topic", "zero-shot"] == "100.0"
    assert found["mean of tasks", "zero-shot"] == "41.7"
    assert found["topic", "rows"] == "2"


def test_several_runs_of_a_method_are_one_column():
    runs = [part | {"seed": seed} for seed, part in enumerate([ROWS[0], ROWS[1], ROWS[0]])]
    table = accuracy_table(runs)
    assert table.columns[3:5] == ["zero-shot", "zero-shot (options)"]
    assert cells(table)["sentiment", "zero-shot"] == "66.7"
    assert cells(table)["sentiment", "rows"] == "3"


def test_methods_and_tasks_stand_in_the_order_of_the_rows():
    table = accuracy_table(ROWS[::-1])
    assert [line[0] for line in table.rows] == ["outlook", "sentiment", "mean of tasks"]
    assert table.columns[3:7] == ["atv", "atv (options)", "zero-shot", "zero-shot (options)"]


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
    found = cells(accuracy_table(rows))
    methods, tasks = {r["method"] for r in rows}, {r["task"] for r in rows}
    columns = (("{}", "correct", 100, 1), ("{} (options)", "correct_among_options", 100, 1))
    columns += (("tokens, {}", "prompt_tokens", 1, 0), ("s/query, {}", "seconds", 1, 4))
    for method in methods:
        for name, key, factor, digits in columns:
            means = []
            for task in tasks:
                values = [Fraction(r[key]) for r in rows if (r["method"], r["task"]) == (method, task)]
                cell = found[task, name.format(method)]
                if values:
                    means.append(factor * sum(values) / len(values))
                    assert float(cell) == shown(means[-1], digits)
                else:
                    assert cell == "–"
            mean = found["mean of tasks", name.format(method)]
            assert mean == "–" if len(means) < len(tasks) else float(mean) == shown(sum(means) / len(means), digits)


def test_a_table_as_markdown_is_this_text():
    table = accuracy_table([*ROWS, *rows_of("zero-shot", "topic", "x", "x", tokens=41)])
    assert markdown(table) == (
        "# Accuracy per task\n"
        "\n"
        "| task | category | rows | zero-shot | zero-shot (options) | atv | atv (options) "
        "| tokens, zero-shot | s/query, zero-shot | tokens, atv | s/query, atv |\n"
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| sentiment | NLU | 4 | 25.0 | 50.0 | 75.0 | 75.0 | 21 | 0.0100 | 21 | 0.0124 |\n"
        "| outlook | Unseen | 3 | 0.0 | 33.3 | 66.7 | 100.0 | 33 | 0.0400 | 33 | 0.0300 |\n"
        "| topic | NLU | 1 | 100.0 | 100.0 | – | – | 41 | 0.0100 | – | – |\n"
        "| mean of tasks |  |  | 41.7 | 61.1 | – | – | 32 | 0.0200 | – | – |\n"
        "\n"
        "Accuracy in percent: the most likely next token over the whole vocabulary is the first token of the answer; "
        "(options): the likeliest among the task's options. Tokens: prompt tokens per query. Seconds per query "
        "include everything that the method does for it.\n"
    )


def test_reports_records_and_tasks_are_read_without_loading_torch():
    code = "import sys, atv.config, atv.records, atv.report, atv.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
