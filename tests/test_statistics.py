"""Scores and paired differences: against means worked out by hand, exact enumeration and scipy's own bootstrap."""

import tracemalloc
from fractions import Fraction
from itertools import product
from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from atv.report import statistics
from atv.report.statistics import Score


def scores(rows, key="first_token", **how):
    return statistics.scores(rows, key, **how)


def paired(rows, method, other, key="first_token", **how):
    return statistics.paired(rows, method, other, key, **how)


CATEGORY = {"sst2": "NLU", "rte": "NLU", "math": "Mathematics", "cola": "Unseen", "bbq": "Unseen"}


def rows_of(method, task, marks, seed=42, **other):
    """One row for each mark, `x` being a right answer."""
    return [
        {"method": method, "llm": "small", "seed": seed, "run": "runs/a", "task": task, "category": CATEGORY[task],
         "template": 0, "answer_prefix": "A:", "example": example, "scores": {"first_token": mark == "x",
         "first_token_among_options": True}, "prompt_tokens": 20, "seconds": 0.5} | other
        for example, mark in enumerate(marks)
    ]  # fmt: skip


def test_scores_are_those_worked_out_by_hand():
    rows = [
        *rows_of("atv", "sst2", "xxx-"), *rows_of("atv", "rte", "x-"), *rows_of("atv", "math", "----x"),
        *rows_of("atv", "cola", "x-"), *rows_of("atv", "bbq", "xx"),
        *rows_of("atv", "sst2", "x---", seed=10), *rows_of("atv", "rte", "x-", seed=10),
        *rows_of("atv", "math", "xxx-x", seed=10), *rows_of("atv", "cola", "--", seed=10),
        *rows_of("atv", "bbq", "xx", seed=10),
    ]  # fmt: skip
    found = scores(rows)
    assert found.tasks["sst2"] == pytest.approx((0.5, np.std([0.75, 0.25], ddof=1)))
    assert found.tasks["rte"] == pytest.approx((0.5, 0))
    assert found.categories["NLU"] == pytest.approx((0.5, np.std([0.625, 0.375], ddof=1)))
    assert found.categories["Mathematics"] == pytest.approx((0.5, np.std([0.2, 0.8], ddof=1)))
    in_domain, unseen = np.array([0.4125, 0.5875]), np.array([0.75, 0.5])
    assert found.in_domain == pytest.approx((0.5, np.std(in_domain, ddof=1)))
    assert found.unseen == pytest.approx((0.625, np.std(unseen, ddof=1)))
    assert found.both == pytest.approx((0.5625, np.std((in_domain + unseen) / 2, ddof=1)))
    assert list(found.categories) == ["NLU", "Mathematics"]
    assert scores(rows, "first_token_among_options").in_domain == Score(1, 0)
    assert scores(rows, "prompt_tokens").unseen == Score(20, 0)


def test_variants_of_a_task_weigh_as_their_rows_and_one_seed_has_no_spread():
    rows = [*rows_of("atv", "sst2", "xx"), *rows_of("atv", "sst2", "-x", template=1), *rows_of("atv", "rte", "-")]
    assert scores(rows).tasks["sst2"] == Score(0.75, None)
    assert scores(rows).in_domain == Score(0.375, None)
    assert (scores(rows).unseen, scores(rows).both) == (None, None)


def test_what_was_not_asked_in_full_has_no_score_nor_has_any_average_of_it():
    rows = [*rows_of("atv", "sst2", "x"), *rows_of("atv", "rte", "x"), *rows_of("atv", "sst2", "x", seed=10)]
    found = scores([*rows, *rows_of("atv", "math", "x"), *rows_of("atv", "math", "-", seed=10)])
    assert found.tasks["rte"] is None
    assert found.categories["NLU"] is None
    assert found.categories["Mathematics"] is not None
    assert found.in_domain is None
    whole = scores(rows_of("atv", "sst2", "x"), tasks=CATEGORY)
    assert (whole.tasks["sst2"], whole.categories["NLU"], whole.unseen) == (Score(1), None, None)


@st.composite
def two_methods(draw):
    """Rows of two methods: tasks of several sizes, seeds and variants; a seed may have fewer rows of a task."""
    rows = []
    for seed in range(draw(st.integers(1, 3))):
        for task in ("sst2", "rte", "math", "cola"):
            examples = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
            for example, template in product(examples, range(draw(st.integers(1, 2)))):
                for method in ("atv", "icl"):
                    mark = draw(st.sampled_from("x-"))
                    rows += rows_of(method, task, mark, seed=seed, template=template, example=example)
    return draw(st.permutations(rows))


def exact_average(rows, method):
    """The in-domain average as a fraction, by its definition."""
    seeds, averages = {row["seed"] for row in rows}, []
    for seed in seeds:
        means = {}
        for task in ("sst2", "rte", "math"):
            marks = [
                r["scores"]["first_token"] for r in rows if (r["method"], r["seed"], r["task"]) == (method, seed, task)
            ]
            means[task] = Fraction(sum(marks), len(marks))
        averages.append((Fraction(means["sst2"] + means["rte"], 2) + means["math"]) / 2)
    return sum(averages) / len(seeds)


@settings(max_examples=30, deadline=None)
@given(two_methods())
def test_the_difference_is_that_of_the_averages_and_lies_in_its_interval(rows):
    with mock.patch.object(statistics, "_p_value", return_value=0.5):  # takes time and is not looked at
        found, back = paired(rows, "atv", "icl"), paired(rows, "icl", "atv")
        unseen = paired(rows, "atv", "icl", unseen=True)
    assert found.value == pytest.approx(float(exact_average(rows, "atv") - exact_average(rows, "icl")), abs=1e-12)
    ours, theirs = (scores([row for row in rows if row["method"] == name]) for name in ("atv", "icl"))
    assert found.value == pytest.approx(ours.in_domain.mean - theirs.in_domain.mean, abs=1e-12)
    assert unseen.value == pytest.approx(ours.unseen.mean - theirs.unseen.mean, abs=1e-12)
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert back.value == pytest.approx(-found.value)


def random_marks(count, chance, seed):
    return "".join("x" if hit else "-" for hit in np.random.default_rng(seed).random(count) < chance)


def test_the_interval_is_that_of_scipy_on_one_task():
    ours, theirs = random_marks(120, 0.7, 1), random_marks(120, 0.5, 2)
    found = paired([*rows_of("atv", "sst2", ours), *rows_of("icl", "sst2", theirs)], "atv", "icl")
    data = np.array([[mark == "x" for mark in marks] for marks in (ours, theirs)], float)

    def difference(a, b, axis):
        return a.mean(axis) - b.mean(axis)

    expected = scipy.stats.bootstrap(
        data, difference, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert found.high - found.low > 0.1


@pytest.mark.parametrize("different", [5, 5000])
def test_resampling_takes_little_memory_and_has_the_spread_of_the_mean(different):
    units = np.random.default_rng(3).random(different)[np.arange(5000) % different] / 5000
    tracemalloc.start()
    found = statistics.bootstrap([units, np.zeros(3)])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**26  # resamples x units would be 400 MB
    assert found.shape == (statistics.RESAMPLES,)
    assert found.mean() == pytest.approx(units.sum(), abs=1e-3)
    assert found.std() == pytest.approx(units.std() * 5000**0.5, rel=0.05)


def test_the_interval_of_continuous_scores_is_that_of_scipy():
    units = np.random.default_rng(5).normal(0.1, 1, 300)
    expected = scipy.stats.bootstrap(
        (units,), np.sum, method="percentile", n_resamples=10_000, rng=np.random.default_rng(7)
    ).confidence_interval
    width = expected.high - expected.low
    assert np.percentile(statistics.bootstrap([units]), [2.5, 97.5]) == pytest.approx(expected, abs=0.04 * width)


def test_rows_are_resampled_within_their_task():
    rows = [*rows_of("atv", "sst2", "xxxx"), *rows_of("icl", "sst2", "----"),
            *rows_of("atv", "math", "------"), *rows_of("icl", "math", "xxxx--")]  # fmt: skip
    found = paired(rows, "atv", "icl")
    assert found.value == pytest.approx((1 - 4 / 6) / 2)
    # sst2 is the same in every resample; math's mean is k/6 with k binomial(6, 4/6)
    low, high = scipy.stats.binom(6, 4 / 6).ppf([0.975, 0.025])
    assert (found.low, found.high) == pytest.approx(((1 - low / 6) / 2, (1 - high / 6) / 2))


def test_the_p_value_is_that_of_all_sign_flips():
    rows = [*rows_of("atv", "sst2", "xx-xx"), *rows_of("icl", "sst2", "---x-"),
            *rows_of("atv", "rte", "xx-"), *rows_of("icl", "rte", "--x"),
            *rows_of("atv", "math", "xx-x"), *rows_of("icl", "math", "-xx-")]  # fmt: skip
    units = [Fraction(d, 20) for d in (1, 1, 0, 0, 1)] + [Fraction(d, 12) for d in (1, 1, -1)]
    units += [Fraction(d, 8) for d in (1, 0, -1, 1)]
    sums = [sum(s * u for s, u in zip(signs, units, strict=True)) for signs in product((1, -1), repeat=len(units))]
    expected = sum(abs(total) >= sum(units) for total in sums) / len(sums)
    found = paired(rows, "atv", "icl")
    assert found.value == pytest.approx(float(sum(units)))
    assert found.p == pytest.approx(expected)


def test_the_p_value_of_many_rows_is_near_that_of_the_binomial():
    rows = [*rows_of("atv", "sst2", "x" * 40 + "-" * 20), *rows_of("icl", "sst2", "-" * 40 + "x" * 20)]
    assert paired(rows, "atv", "icl").p == pytest.approx(scipy.stats.binomtest(40, 60).pvalue, abs=0.005)


def test_methods_that_answer_alike_differ_by_nothing():
    for marks in ("x-xx", "x"):
        rows = [*rows_of("atv", "sst2", marks), *rows_of("icl", "sst2", marks)]
        assert paired(rows, "atv", "icl") == (0, 0, 0, 1)


def test_variants_and_seeds_of_a_row_are_one_unit():
    one = [*rows_of("atv", "sst2", "xx-xx-x-"), *rows_of("icl", "sst2", "-x--x--x")]
    many = [row | {"seed": seed, "template": t} for row in one for seed in (42, 10) for t in range(3)]
    assert paired(many, "atv", "icl") == pytest.approx(paired(one, "atv", "icl"))


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(statistics, "_p_value", lambda units: 0.5)
    held = 0
    for trial in range(200):
        rows = [
            row
            for number, (task, count) in enumerate((("sst2", 40), ("rte", 60), ("math", 50)))
            for method, chance in (("atv", 0.6), ("icl", 0.4))
            for row in rows_of(method, task, random_marks(count, chance, (trial, number, method == "atv")))
        ]
        found = paired(rows, "atv", "icl")
        held += found.low <= 0.2 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_methods_that_were_not_asked_the_same_are_refused_with_numbers():
    ours = [*rows_of("atv", "sst2", "xxxx"), *rows_of("atv", "cola", "x")]
    theirs = [*rows_of("icl", "sst2", "xxx"), *rows_of("icl", "cola", "x")]
    with refused("atv and icl", "in-domain", "1 of atv's 4", "0 of icl's 3", "same tasks, test rows"):
        paired([*ours, *theirs], "atv", "icl")
    assert paired([*ours, *theirs], "atv", "icl", unseen=True).value == 0
    other_seed = rows_of("icl", "sst2", "xxxx", seed=10)
    with refused("4 of atv's 4", "4 of icl's 4"):
        paired([*ours, *other_seed], "atv", "icl")
    with refused("atv has 4 rows twice", "one run for each"):
        paired([*ours, *ours, *theirs], "atv", "icl")
    with refused("not asked rte with seed 42"):
        paired([*ours, *rows_of("icl", "sst2", "xxxx"), *rows_of("bm25", "rte", "x")], "atv", "icl")
    with refused("bm25 and icl", "not asked the same unseen rows", "0 of bm25's 0", "1 of icl's 1"):
        paired([*theirs, *rows_of("bm25", "sst2", "x")], "bm25", "icl", unseen=True)
    with refused("not asked unseen tasks"):
        paired([*rows_of("icl", "sst2", "x"), *rows_of("bm25", "sst2", "x")], "bm25", "icl", unseen=True)
