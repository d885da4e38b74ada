"""Theorem 2 as statements: ATV's attention is a sum of eight terms, and contains that of Prefix-Tuning."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from atv.paper.theory.lora import relative
from atv.paper.theory.material import Material
from atv.paper.theory.prefix import (
    Attend,
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
from atv.paper.theory.statement import ROUNDING, Statement, beyond_reach, equality

STARTS = (0.1, 0.3, 1.0)
"""Sizes of the vectors that the search starts from, in standard deviations of the states."""
STEPS = 80
LENGTHS = (1, 2, 8)


@dataclass(frozen=True)
class Fit:
    """How closely ATV's attention fits that of one random prefix; residuals relative to its effect (1: no fit)."""

    heads: int
    tokens: str
    """`all` query tokens, or only the `last`."""
    attention: str
    length: int
    """Length of the prefix, p."""
    floor: float | None
    """Proven lower bound for all vectors. None: no bound is proven."""
    dimensions: int | None
    """Lower bound on the dimensions of the set of softmax attention outputs with such prefixes. ATV's has at most d."""
    best: float
    """Best residual over the starts of the search."""
    middle: float
    """Median residual over the starts."""
    free: float
    """Best residual with free rows in each head instead of P'_q, P'_k, P'_v from one v: more than ATV can do."""


def _first_heads(weights: Three, heads: int) -> Three:
    return Three(*(weight[:heads] for weight in weights))


def _prefix(plain: Three, length: int, sharing: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random keys and values (heads, p, k) as large as those of the context."""

    def like(states: Tensor) -> Tensor:
        heads, _, width = states.shape
        kept = torch.randn(-(-heads // sharing), length, width, generator=draw, dtype=states.dtype)
        return (kept * states.std()).repeat_interleave(sharing, 0)[:heads]

    return like(plain.k), like(plain.v)


def prefix_fits(material: Material, draw: torch.Generator) -> list[Fit]:
    """ATV's attention fitted to random prefixes, with one head and with all, at all query tokens and at the last."""
    found = []
    for heads in sorted({1, len(material.weights.q)}):
        weights = _first_heads(material.weights, heads)
        for tokens in ("all", "last"):
            plain = project(material.prompt[-1:] if tokens == "last" else material.prompt, material.prompt, weights)
            for attend in (linear, softmax):
                for length in LENGTHS:
                    prefix = _prefix(plain, length, material.sharing, draw)
                    target = prefix_attention(attend, plain, *prefix)
                    tied, free = _searched(attend, plain, weights, target, material.prompt.std(), draw)
                    floor = prefix_floor(plain, *prefix) if attend is linear and tokens == "all" else None
                    many = prefix_dimensions(plain, *prefix, material.sharing) if attend is softmax else None
                    found.append(
                        Fit(
                            heads,
                            tokens,
                            attend.__name__,
                            length,
                            floor,
                            many,
                            min(tied),
                            median(tied),
                            min(free, *tied),
                        )
                    )
    return found


def _searched(
    attend: Attend, plain: Three, weights: Three, target: Tensor, size: Tensor, draw: torch.Generator
) -> tuple[list[float], float]:
    """Final residuals of the searches: with one v from each start, and with free rows from the last."""
    effect = (target - attend(*plain)).square().sum()

    def loss(rows: Three) -> Tensor:
        return (atv_attention(attend, plain, rows) - target).square().sum() / effect

    tied = []
    for start in STARTS:
        v = torch.randn(weights.q.shape[1], generator=draw, dtype=torch.float64) * size * start
        tied.append(_root(lambda point: loss(rows_of(point, weights)), v))
    return tied, _root(lambda point: loss(Three(*point)), torch.stack(rows_of(v, weights)))


def _root(loss: Callable[[Tensor], Tensor], start: Tensor) -> float:
    return float(minimise(loss, start, STEPS) ** 0.5)


def theorem2(material: Material, fits: list[Fit], draw: torch.Generator) -> list[Statement]:
    """Check every statement of Theorem 2 and its interpretation (appendix A.2, Table 7), with all heads.

    Args:
        material: the weights and states used for the checks.
        fits: from `prefix_fits`.
        draw: random generator for vectors, prefixes and starts.
    """
    weights, prompt = material.weights, material.prompt
    plain = project(prompt, prompt, weights)
    v = torch.randn(prompt.shape[1], generator=draw, dtype=torch.float64) * prompt.std()
    rows = rows_of(v, weights)
    terms = eight_terms(plain, rows)
    best = {(fit.heads, fit.tokens, fit.attention, fit.length): fit.best for fit in fits}
    heads = len(weights.q)
    return [
        equality("2.1", "Linear attention with ATV is the sum T1 + ... + T8", _identity(prompt, weights, v)),
        equality(
            "2.2",
            "T2 is the term of a given prefix of length 1",
            _second_term(_narrow(material), prompt, 1, draw),
            _second_term(weights, prompt, material.sharing, draw),
            "the columns of W_k and W_v together are independent",
        ),
        equality(
            "2.3",
            "T2 is the term of a prefix of length 8",
            counter=_rank_one_rest(plain, _prefix(plain, 8, material.sharing, draw)),
        ),
        equality("2.4", "T3 and T4 can be 0 while T2 is not", counter=_least_of_t3_t4(plain)),
        equality("2.5", "norms: T3 times T4 is T2 times the last token's part of T1", _products(plain, terms)),
        equality("2.6", "Prefix within ATV, linear attention, p = 1", counter=best[heads, "all", "linear", 1]),
        equality("2.7", "Prefix within ATV, softmax attention, p = 8", counter=best[heads, "all", "softmax", 8]),
        equality(
            "2.8",
            "Prefix within ATV at the last query token alone, p = 1",
            _at_last_token(material, draw),
            max(best[heads, "last", kind, 1] for kind in ("linear", "softmax")),
            "one head with 3k at most d, v made for this input and prefix",
        ),
        beyond_reach(
            "2.9",
            "T3 and T4 cannot be made by a prefix (Table 7)",
            relative(linear(plain.q, *_pairs_of_t3_t4(plain, rows)), terms[2] + terms[3]),
        ),
        beyond_reach(
            "2.10",
            "What ATV adds cannot be made by a prefix",
            _left_by_prefix(plain, rows, 3),
            _left_by_prefix(
                project(material.states[2][: 2 * plain.q.shape[-1]], prompt, weights), rows, plain.q.shape[-1]
            ),
            "more query tokens than a head is wide",
        ),
    ]


def _identity(prompt: Tensor, weights: Three, v: Tensor) -> float:
    """Compare the eight terms with attention over x + e_T v^T and C + e_m v^T, the theorem's definition."""
    edited = prompt.clone()
    edited[-1] += v
    terms = eight_terms(project(prompt, prompt, weights), rows_of(v, weights))
    return relative(terms.sum(0), linear(*project(edited, edited, weights)))


def _second_term(weights: Three, prompt: Tensor, sharing: int, draw: torch.Generator) -> float:
    """Residual of T2 fitted to the term of a prefix of length 1 with independent keys and values.

    v^T W_k = P_k and v^T W_v = P_v is a linear system. If it has no solution, a search minimises the residual.
    """
    plain = project(prompt, prompt, weights)
    keys, values = _prefix(plain, 1, sharing, draw)
    term = linear(plain.q, keys, values)

    def loss(v: Tensor) -> Tensor:
        rows = rows_of(v, weights)
        return (linear(plain.q, rows.k[:, None], rows.v[:, None]) - term).square().sum() / term.square().sum()

    v = _solved(weights, Three(torch.empty(0), keys[:, 0], values[:, 0]))
    solved = float(loss(v) ** 0.5)
    return solved if solved <= ROUNDING else min(solved, _root(loss, v))


def _solved(weights: Three, rows: Three) -> Tensor:
    """The v (d,) whose rows are nearest to `rows` (heads, k) in least squares; empty rows are unconstrained."""
    kept = [(weight, row) for weight, row in zip(weights, rows, strict=True) if row.numel()]
    columns = torch.cat([weight.movedim(0, 1).flatten(1) for weight, _ in kept], 1)  # (d, heads * k of each)
    v: Tensor = torch.cat([row.flatten() for _, row in kept]) @ torch.linalg.pinv(columns)
    return v


def _narrow(material: Material) -> Three:
    """One head, at most d / 3 wide, so that the columns of W_q, W_k and W_v together are independent."""
    return Three(*(weight[:1, :, : material.prompt.shape[1] // 3] for weight in material.weights))


def _rank_one_rest(plain: Three, prefix: tuple[Tensor, Tensor]) -> float:
    """The share of the prefix's term beyond any matrix of rank 1 per head, such as T2."""
    sizes = torch.linalg.svdvals(linear(plain.q, *prefix))
    return float(sizes[..., 1:].norm() / sizes.norm())


def _least_of_t3_t4(plain: Three) -> float:
    """Lower bound of |(T3, T4)| / |T2| over all v with T2 as large as T1, from the product of their norms.

    In each head, |T3|^2 + |T4|^2 is at least 2 |T3| |T4| = 2 |T2| |part|, where part is the last token's part of T1.
    The sum over heads is at least 2 |T2| times the smallest |part|.
    """
    return float((2 * _last_part(plain).min() / linear(*plain).norm()).sqrt())


def _last_part(plain: Three) -> Tensor:
    """Norm of the last key's and value's contribution to T1: (heads,)."""
    part: Tensor = linear(plain.q, plain.k[:, -1:], plain.v[:, -1:]).norm(dim=(-2, -1))
    return part


def _products(plain: Three, terms: Tensor) -> float:
    """T2 = Qa b^T, T3 = Qa v_m^T, T4 = Qk_m b^T, each a product of a column and a row, so norms multiply."""
    norms = terms.norm(dim=(-2, -1))  # (8, heads)
    return relative(norms[2] * norms[3], norms[1] * _last_part(plain))


def _at_last_token(material: Material, draw: torch.Generator) -> float:
    """Residual of a closed-form vector with the effect of a prefix of length 1 on the last token's attention.

    With P'_q = P'_k = 0 only the last value changes. Its weight w in the last token's output stays the same, so P'_v =
    change / w. A v with these rows exists if the columns of [W_q W_k W_v] are independent.
    """
    prompt = material.prompt
    weights = _narrow(material)
    plain = project(prompt[-1:], prompt, weights)
    prefix = _prefix(plain, 1, 1, draw)
    worst = 0.0
    for attend in (linear, softmax):
        target = prefix_attention(attend, plain, *prefix)
        share = attend(plain.q, plain.k, torch.eye(len(prompt), dtype=prompt.dtype))[0, 0, -1]
        value = (target - attend(*plain))[:, 0] / share
        v = _solved(weights, Three(torch.zeros_like(value), torch.zeros_like(value), value))
        worst = max(worst, relative(atv_attention(attend, plain, rows_of(v, weights)), target))
    return worst


def _pairs_of_t3_t4(plain: Three, rows: Three) -> tuple[Tensor, Tensor]:
    """A prefix of length 2: ATV's key with the last value, and the last key with ATV's value."""
    return torch.stack([rows.k, plain.k[:, -1]], 1), torch.stack([plain.v[:, -1], rows.v], 1)


def _left_by_prefix(plain: Three, rows: Three, length: int) -> float:
    """Residual of the best prefix of that length, fitted to what ATV adds to linear attention."""
    change = atv_attention(linear, plain, rows) - linear(*plain)
    return relative(linear(plain.q, *best_prefix(plain.q, change, length)), change)
