"""The theorems' formulas against hand-written loops, what they say on matrices with a known answer, and the command."""

import csv
import math
import sys

import pytest
import torch
from conftest import byte_level_tokenizer, make_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from atv.cli import main
from atv.errors import ATVError
from atv.paper.theory import (
    CONDITIONS,
    FAILS,
    HOLDS,
    llm_material,
    prefix_fits,
    random_material,
    static_factors,
    theorem1,
    theorem2,
)
from atv.paper.theory.lora import atv_as_lora, best_static_lora, lora_as_atv, relative, truncated
from atv.paper.theory.prefix import (
    Three,
    atv_attention,
    best_prefix,
    eight_terms,
    linear,
    minimise,
    prefix_attention,
    prefix_dimensions,
    prefix_floor,
    project,
    rows_of,
    softmax,
)
from atv.paper.theory.statement import beyond_reach, equality

few = st.integers(1, 5)
shapes = settings(max_examples=25, deadline=None)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three(*shape):
    return Three(*(normal(*shape, seed=seed) for seed in (1, 2, 3)))


# ---- Theorem 1 ----


@shapes
@given(hidden=few, width=few)
def test_loras_factors_add_what_atv_adds_at_one_input(hidden, width):
    x, v, expansion = normal(hidden, seed=1), normal(width, seed=2), normal(width, hidden, seed=3)
    down, up = atv_as_lora(x, v, expansion, 0.3)
    assert down.shape == (hidden, width)
    assert up is expansion
    for column in range(hidden):
        added = sum(x[i] * down[i, j] * up[j, column] for i in range(hidden) for j in range(width))
        wanted = sum(0.3 * v[j] * expansion[j, column] for j in range(width))
        assert math.isclose(added, wanted, rel_tol=1e-9, abs_tol=1e-12)


def test_at_input_zero_no_factors_add_anything():
    down, up = atv_as_lora(torch.zeros(4, dtype=torch.float64), normal(3), normal(3, 4), 1.0)
    assert (down @ up == 0).all()


@shapes
@given(hidden=few, rank=few)
def test_atv_adds_what_lora_adds_at_one_input(hidden, rank):
    x, down, up = normal(hidden, seed=1), normal(hidden, rank, seed=2), normal(rank, hidden, seed=3)
    scale, v, expansion = lora_as_atv(x, down, up)
    assert v.shape == (rank,)
    assert expansion.shape == (rank, hidden)
    assert math.isclose(v.norm(), 1)
    wanted = torch.tensor([sum(x[i] * down[i, j] * up[j, c] for i in range(hidden) for j in range(rank))
                           for c in range(hidden)])  # fmt: skip
    torch.testing.assert_close(scale * v @ expansion, wanted.double())


def test_a_lora_that_adds_nothing_is_an_atv_that_adds_nothing():
    scale, v, expansion = lora_as_atv(normal(4), torch.zeros(4, 2, dtype=torch.float64), normal(2, 4))
    assert scale == 0
    assert v.norm() == 1
    assert (scale * v @ expansion == 0).all()


@shapes
@given(count=st.integers(1, 9), hidden=few, rank=few)
def test_no_descent_gets_below_the_exact_minimum_of_static_factors(count, hidden, rank):
    x, updates = normal(count, hidden, seed=1), normal(count, hidden, seed=2)
    down, up = best_static_lora(x, updates, rank)
    exact = float((x @ down @ up - updates).square().sum())
    start = normal(2, hidden * rank, seed=3)

    def loss(factors):
        return (x @ factors[0].view(hidden, rank) @ factors[1].view(rank, hidden) - updates).square().sum()

    found = minimise(loss, start, 300)
    assert exact <= found + 1e-12
    assert exact >= 0.98 * found - 1e-9 or rank < min(count, hidden)  # a search may end in a saddle with low rank


def test_static_factors_are_exact_for_as_many_inputs_as_have_independent_states():
    x, updates = normal(7, 5, seed=1), normal(7, 2, seed=2) @ normal(2, 5, seed=3)
    for count, exact in ((1, True), (5, True), (6, False)):
        down, up = best_static_lora(x[:count], updates[:count], 2)
        assert (relative(x[:count] @ down @ up, updates[:count]) < 1e-12) == exact


def test_two_inputs_that_are_equal_get_the_mean_update():
    x, updates = torch.ones(2, 3, dtype=torch.float64), torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=torch.float64)
    down, up = best_static_lora(x, updates, 3)
    assert relative(x @ down @ up, updates) == pytest.approx(1)


def test_truncated_leaves_the_small_singular_values():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    left, right = truncated(matrix, 2)
    assert (left @ right - matrix).norm() == pytest.approx(1)


# ---- Theorem 2 ----


def attention_by_hand(q, k, v, kind):
    """One head; (T, width)."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for t in range(len(q)):
        scores = [sum(q[t, i] * k[j, i] for i in range(q.shape[1])) for j in range(len(k))]
        if kind == "softmax":
            powers = [math.exp(score / math.sqrt(q.shape[1])) for score in scores]
            scores = [power / sum(powers) for power in powers]
        for j, score in enumerate(scores):
            out[t] += score * v[j]
    return out


@shapes
@given(tokens=few, read=few, hidden=few, width=few)
@pytest.mark.parametrize("kind", ["linear", "softmax"])
def test_attention_of_atv_and_of_a_prefix_by_their_definitions(kind, tokens, read, hidden, width):
    attend = {"linear": linear, "softmax": softmax}[kind]
    x, context, v, weights = (
        normal(tokens, hidden),
        normal(read, hidden, seed=5),
        normal(hidden, seed=6),
        three(hidden, width),
    )
    plain = Three(*(states[None] for states in project(x, context, weights)))
    edited, read_edited = x.clone(), context.clone()
    edited[-1] += v
    read_edited[-1] += v
    q, k, values = edited @ weights.q, read_edited @ weights.k, read_edited @ weights.v
    heads = Three(*(weight[None] for weight in weights))
    torch.testing.assert_close(
        atv_attention(attend, plain, rows_of(v, heads))[0], attention_by_hand(q, k, values, kind)
    )
    keys, more = normal(1, 2, width, seed=7), normal(1, 2, width, seed=8)
    by_hand = attention_by_hand(
        x @ weights.q, torch.cat([keys[0], context @ weights.k]), torch.cat([more[0], context @ weights.v]), kind
    )
    torch.testing.assert_close(prefix_attention(attend, plain, keys, more)[0], by_hand)


@shapes
@given(heads=few, tokens=few, read=few, width=few)
def test_each_of_the_eight_terms_by_the_table(heads, tokens, read, width):
    plain = Three(normal(heads, tokens, width), normal(heads, read, width, seed=1), normal(heads, read, width, seed=2))
    rows = three(heads, width)
    e_t, e_m = torch.eye(tokens, dtype=torch.float64)[-1], torch.eye(read, dtype=torch.float64)[-1]
    new = Three(*(torch.einsum("t,hk->htk", e, row) for e, row in zip((e_t, e_m, e_m), rows, strict=True)))
    table = ["qkv", "qKV", "qKv", "qkV", "Qkv", "QKv", "QkV", "QKV"]  # a capital: of the prefix
    for term, factors in zip(eight_terms(plain, rows), table, strict=True):
        q, k, v = ((new if letter.isupper() else plain)[index] for index, letter in enumerate(factors))
        torch.testing.assert_close(term, torch.einsum("hti,hji,hjo->hto", q, k, v))


def test_the_floor_is_what_the_best_replaced_pair_leaves():
    """Without the last query, an edit with free rows is any matrix of rank 1 in place of the last pair."""
    plain = Three(normal(1, 6, 4), normal(1, 5, 4, seed=1), normal(1, 5, 4, seed=2))
    keys, values = normal(1, 2, 4, seed=3), normal(1, 2, 4, seed=4)
    floor = prefix_floor(plain, keys, values)
    target, size = prefix_attention(linear, plain, keys, values), linear(plain.q, keys, values).norm()
    before_last = slice(0, 5)

    def loss(point):
        difference = atv_attention(linear, plain, Three(*point)) - target
        return (difference[:, before_last] / size).square().sum()

    found = min(minimise(loss, normal(3, 1, 4, seed=seed), 300) for seed in (5, 6, 7)) ** 0.5
    assert 0.1 < floor <= found
    assert found == pytest.approx(floor, rel=1e-3)


def test_a_single_query_has_no_floor():
    plain = Three(normal(2, 1, 4), normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2))
    assert prefix_floor(plain, normal(2, 3, 4, seed=3), normal(2, 3, 4, seed=4)) == 0


def test_dimensions_by_counting():
    """One query whose key counts for a single number: that number and a value of 4 give 4; of two queries more."""
    keys, values = normal(2, 1, 4, seed=3), normal(2, 1, 4, seed=4)
    plain = Three(normal(2, 6, 4), normal(2, 5, 4, seed=1), normal(2, 5, 4, seed=2))
    one = Three(*(states[:1] for states in plain))
    assert prefix_dimensions(one, keys[:1], values[:1], 1, tokens=1) == 4
    assert prefix_dimensions(one, keys[:1], values[:1], 1, tokens=2) == 4 + 2
    assert prefix_dimensions(plain, keys, values, 1, tokens=2) == 2 * (4 + 2)
    shared = prefix_dimensions(plain, keys[:1].repeat(2, 1, 1), values[:1].repeat(2, 1, 1), 2, tokens=1)
    assert shared == 4 + 2  # two queries that share a key and a value are as two queries of one head


def test_a_prefix_is_found_again():
    q, keys, values = normal(2, 3, 4), normal(2, 2, 4, seed=1), normal(2, 2, 4, seed=2)
    found = best_prefix(q, linear(q, keys, values), 2)
    assert found[0].shape == (2, 2, 4)
    torch.testing.assert_close(linear(q, *found), linear(q, keys, values))


# ---- Statements ----

EXPECTED = {
    **dict.fromkeys(["1.2", "1.7", "1.8", "1.10", "2.1", "2.5"], HOLDS),
    **dict.fromkeys(["1.1", "1.5", "1.6", "1.11", "2.2", "2.8", "2.10"], CONDITIONS),
    **dict.fromkeys(["1.3", "1.4", "1.9", "2.3", "2.4", "2.6", "2.7", "2.9"], FAILS),
}


@pytest.fixture(scope="module")
def tried():
    draw = torch.Generator().manual_seed(3)
    material = random_material(draw, hidden=12, tokens=8)
    pairs, fits = static_factors(material, draw), prefix_fits(material, draw)
    return material, pairs, fits, theorem1(material, pairs, draw) + theorem2(material, fits, draw)


def test_verdicts_on_random_matrices(tried):
    assert {statement.number: statement.verdict for statement in tried[3]} == EXPECTED


def test_every_verdict_that_needs_a_condition_names_it(tried):
    for statement in tried[3]:
        assert bool(statement.condition) == (statement.verdict == CONDITIONS)
        assert statement.residual is not None or statement.counter is not None


def test_static_factors_follow_the_share_of_inputs_beyond_the_rank(tried):
    """The updates' share outside a random space of dimension d of n: sqrt(1 - d / n) on average."""
    *_, last = tried[1]
    assert last.rank == 12
    assert last.pairs == 24
    assert last.independent == pytest.approx(math.sqrt(1 / 2), abs=0.15)
    assert all(pair.independent < 1e-9 for pair in tried[1][:-1])


def test_prefixes_have_more_dimensions_than_a_vector_has_numbers(tried):
    """The paper's one wide head: already those of length 1, under softmax at all query tokens."""
    assert all(fit.dimensions > 12 for fit in tried[2] if fit.attention == "softmax" and fit.tokens == "all")


def test_no_search_gets_below_the_floor(tried):
    _, _, fits, _ = tried
    floors = [fit for fit in fits if fit.floor is not None]
    assert [fit.length for fit in floors] == [1, 2, 8]
    assert all(fit.floor <= fit.free <= fit.best <= fit.middle for fit in floors)


def test_a_verdict_is_that_of_its_numbers():
    assert equality("", "", 1e-16).verdict == HOLDS
    assert equality("", "", 0.1).verdict == FAILS
    assert equality("", "", 1e-16, 0.1, "c").verdict == CONDITIONS
    assert equality("", "", 1e-16, 1e-16, "c").verdict == HOLDS
    assert equality("", "", counter=0.1).verdict == FAILS
    assert equality("", "", counter=1e-16).verdict == HOLDS
    assert beyond_reach("", "", 1e-16).verdict == FAILS
    assert beyond_reach("", "", 0.1).verdict == HOLDS
    assert beyond_reach("", "", 1e-16, 0.1, "c").verdict == CONDITIONS


# ---- An LLM ----


def test_weights_and_states_are_those_that_the_llm_computes_with():
    llm = make_llm("llama")
    material = llm_material(llm, byte_level_tokenizer(), tokens=9, width=4)
    assert material.states.shape == (4, 64, 32)
    assert material.sharing == 2
    assert (material.first == material.first[0]).all()  # every prompt ends in the same token
    attention = llm.model.layers[2].self_attn
    by_llm = attention.q_proj(material.prompt).unflatten(-1, (4, 8)).movedim(1, 0)
    torch.testing.assert_close(material.prompt @ material.weights.q, by_llm)
    shared = attention.k_proj(material.prompt).unflatten(-1, (2, 8)).movedim(1, 0)
    torch.testing.assert_close(material.prompt @ material.weights.k, shared[[0, 0, 1, 1]])


def test_an_llm_without_separate_projections_is_refused():
    with pytest.raises(ATVError, match="GPT2Attention has the children c_attn, .*expected q_proj, k_proj and v_proj"):
        llm_material(make_llm("gpt2"), byte_level_tokenizer())


# ---- The command ----


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["atv", "paper", "theory", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def test_the_command_writes_every_statement(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("atv.paper.theory.containment.STEPS", 3)
    make_llm("llama", torch.float32).save_pretrained(tmp_path / "llm")
    byte_level_tokenizer().save_pretrained(tmp_path / "llm")
    capsys.readouterr()
    code, out, err = run(monkeypatch, capsys, "--llm", tmp_path / "llm", "--out", tmp_path / "theory.csv")
    assert (code, err) == (0, "")
    files = sorted(tmp_path.glob("theory-*.csv"))
    assert len(files) == 6
    for file in (files[0], files[3]):
        rows = list(csv.DictReader(file.open()))
        assert [row[""] for row in rows] == list(EXPECTED_ORDER)
        assert all(row["verdict"] in (HOLDS, CONDITIONS, FAILS) for row in rows)
    assert "d = 16" in out


EXPECTED_ORDER = sorted(EXPECTED, key=lambda number: [int(part) for part in number.split(".")])


def test_the_command_refuses_a_format_before_it_computes(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "--out", tmp_path / "theory.pdf")
    assert code == 2
    assert "expected a name that ends in .md, .tex or .csv" in err
