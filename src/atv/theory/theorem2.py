"""Theorem 2 as statements: ATV's attention is a sum of eight terms, and contains that of Prefix-Tuning."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from atv.theory.lora import relative
from atv.theory.material import Material
from atv.theory.prefix import (
    Attend,
    Three,
    atv_attention,
    best_prefix,
    eight_terms,
    linear,
    minimise,
    prefix_attention,
    prefix_floor,
    project,
    rows_of,
    softmax,
)
from atv.theory.statement import Statement, beyond_reach, equality

STARTS = (0.1, 0.3, 1.0)
"""Sizes of the vectors that the search starts from, in standard deviations of the states."""
STEPS = 100
LENGTHS = (1, 2, 8)


@dataclass(frozen=True)
class Fit:
    """How near ATV's attention comes to that of one random prefix; shares of the prefix's effect, 1 is no nearer."""

    heads: int
    tokens: str
    """`all` query tokens, or the `last` alone."""
    attention: str
    length: int
    """p."""
    floor: float | None
    """Proven: no vector does better. None: nothing is proven."""
    best: float
    """Over the starts of the search."""
    middle: float
    """Median over them."""
    free: float
    """Best with P'_q, P'_k, P'_v not made of one v, but each head's rows free: more than ATV can do."""


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
                    found.append(
                        Fit(heads, tokens, attend.__name__, length, floor, min(tied), median(tied), min(free, *tied))
                    )
    return found


def _searched(
    attend: Attend, plain: Three, weights: Three, target: Tensor, size: Tensor, draw: torch.Generator
) -> tuple[list[float], float]:
    """Residuals that the searches end with: of one v from each start, of free rows from the last."""
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
    """Every statement of Theorem 2 and of its reading (appendix A.2, Table 7), with all heads.

    Args:
        material: what they are tried on.
        fits: from `prefix_fits`.
        draw: of vectors, prefixes and starts.
    """
    weights, prompt = material.weights, material.prompt
    plain = project(prompt, prompt, weights)
    v = torch.randn(prompt.shape[1], generator=draw, dtype=torch.float64) * prompt.std()
    rows = rows_of(v, weights)
    terms = eight_terms(plain, rows)
    best = {(fit.heads, fit.tokens, fit.attention, fit.length): fit.best for fit in fits}
    heads = len(weights.q)
    tied = prefix_attention(linear, plain, rows.k[:, None], rows.v[:, None]) - linear(*plain)
    one, eight = (_prefix(plain, length, material.sharing, draw) for length in (1, 8))
    return [
        equality("2.1", "Linear attention with ATV is the sum T1 + ... + T8", _identity(prompt, weights, v)),
        equality(
            "2.2",
            "T2 is the term of a prefix of length 1",
            relative(terms[1], tied),
            _nearest_second_term(plain, weights, one, prompt.std(), draw),
            "P_k = v^T W_k and P_v = v^T W_v for one v",
        ),
        equality("2.3", "T2 is the term of a prefix of length 8", counter=_rank_one_rest(plain, eight)),
        equality(
            "2.4", "T3 to T8 can be 0 while T2 is not", counter=_least_cross_terms(plain, weights, prompt.std(), draw)
        ),
        equality("2.5", "norms: T3 times T4 is T2 times the last token's part of T1", _products(plain, terms)),
        equality("2.6", "Prefix within ATV, linear attention, p = 1", counter=best[heads, "all", "linear", 1]),
        equality("2.7", "Prefix within ATV, softmax attention, p = 1", counter=best[heads, "all", "softmax", 1]),
        equality(
            "2.8",
            "the same two at the last query token alone",
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
    """The eight terms beside attention over x + e_T v^T and C + e_m v^T, as the theorem defines it."""
    edited = prompt.clone()
    edited[-1] += v
    terms = eight_terms(project(prompt, prompt, weights), rows_of(v, weights))
    return relative(terms.sum(0), linear(*project(edited, edited, weights)))


def _nearest_second_term(
    plain: Three, weights: Three, prefix: tuple[Tensor, Tensor], size: Tensor, draw: torch.Generator
) -> float:
    """Least residual of T2, over v, beside the term of a prefix whose keys and values are independent."""
    term = linear(plain.q, *prefix)

    def loss(v: Tensor) -> Tensor:
        rows = rows_of(v, weights)
        return (linear(plain.q, rows.k[:, None], rows.v[:, None]) - term).square().sum() / term.square().sum()

    starts = (torch.randn(weights.q.shape[1], generator=draw, dtype=torch.float64) * size * s for s in STARTS)
    return min(_root(loss, start) for start in starts)


def _rank_one_rest(plain: Three, prefix: tuple[Tensor, Tensor]) -> float:
    """What any matrix of rank 1 in each head, as T2 is, leaves of the prefix's term."""
    sizes = torch.linalg.svdvals(linear(plain.q, *prefix))
    return float(sizes[..., 1:].norm() / sizes.norm())


def _least_cross_terms(plain: Three, weights: Three, size: Tensor, draw: torch.Generator) -> float:
    """Least |T3 + ... + T8| / |T2| over the directions of v, with T2 as large as T1."""
    frozen = linear(*plain).norm()

    def loss(v: Tensor) -> Tensor:
        rows = rows_of(v, weights)
        second = linear(plain.q, rows.k[:, None], rows.v[:, None]).norm()
        strength = (frozen / second).sqrt()  # T2 is quadratic in v
        return (eight_terms(plain, Three(*(strength * row for row in rows)))[2:].sum(0).norm() / frozen).square()

    starts = (torch.randn(weights.q.shape[1], generator=draw, dtype=torch.float64) * size for _ in STARTS)
    return min(_root(loss, start) for start in starts)


def _products(plain: Three, terms: Tensor) -> float:
    """T2 = Qa b^T, T3 = Qa v_m^T, T4 = Qk_m b^T, each a product of a column and a row, so norms multiply."""
    norms = terms.norm(dim=(-2, -1))  # (8, heads)
    part = linear(plain.q, plain.k[:, -1:], plain.v[:, -1:]).norm(dim=(-2, -1))
    return relative(norms[2] * norms[3], norms[1] * part)


def _at_last_token(material: Material, draw: torch.Generator) -> float:
    """A vector that gives the last token's attention what a prefix of length 1 gives it, made in closed form.

    With P'_q = P'_k = 0 the last value alone changes, and its weight w in the last token's output stays, so that
    P'_v = change / w. A v with these rows exists where the columns of [W_q W_k W_v] are independent.
    """
    prompt = material.prompt
    width = min(material.weights.q.shape[-1], prompt.shape[1] // 3)
    weights = Three(*(weight[:1, :, :width] for weight in material.weights))
    plain = project(prompt[-1:], prompt, weights)
    prefix = _prefix(plain, 1, 1, draw)
    worst = 0.0
    for attend in (linear, softmax):
        target = prefix_attention(attend, plain, *prefix)
        share = attend(plain.q, plain.k, torch.eye(len(prompt), dtype=prompt.dtype))[0, 0, -1]
        value = (target - attend(*plain))[0, 0] / share
        wanted = torch.cat([torch.zeros(2 * width, dtype=prompt.dtype), value])
        v = wanted @ torch.linalg.pinv(torch.cat([weight[0] for weight in weights], 1))
        worst = max(worst, relative(atv_attention(attend, plain, rows_of(v, weights)), target))
    return worst


def _pairs_of_t3_t4(plain: Three, rows: Three) -> tuple[Tensor, Tensor]:
    """A prefix of length 2: ATV's key with the last value, and the last key with ATV's value."""
    return torch.stack([rows.k, plain.k[:, -1]], 1), torch.stack([plain.v[:, -1], rows.v], 1)


def _left_by_prefix(plain: Three, rows: Three, length: int) -> float:
    """Residual of the best prefix of that length beside what ATV adds to linear attention."""
    change = atv_attention(linear, plain, rows) - linear(*plain)
    return relative(linear(plain.q, *best_prefix(plain.q, change, length)), change)
