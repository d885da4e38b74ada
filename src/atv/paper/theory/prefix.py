"""Theorem 2: ATV's and Prefix-Tuning's attention (the paper's section 3.3 and appendix A.2).

    Attn_ATV    = Attn((x + e_T v^T) W_q, (C + e_m v^T) W_k, (C + e_m v^T) W_v)
    Attn_prefix = Attn(x W_q, [P_k; C W_k], [P_v; C W_v])

x (T, d) are the states that make the queries, C (m, d) those that make the keys and values, e_T and e_m the last unit
vectors, P_k and P_v (p, k). As in the paper there is no causal mask, no rotary positions and no normalisation between v
and the projections.

All functions take a leading dimension of heads, which share x, C and v. A head has width k; the paper's formulas have
one head with k = d.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Three(NamedTuple):
    """Tensors for queries, keys and values: weights (heads, d, k), states (heads, tokens, k) or rows (heads, k)."""

    q: Tensor
    k: Tensor
    v: Tensor


def project(x: Tensor, context: Tensor, weights: Three) -> Three:
    """Queries x W_q (heads, T, k), keys C W_k and values C W_v (heads, m, k)."""
    return Three(x @ weights.q, context @ weights.k, context @ weights.v)


def rows_of(v: Tensor, weights: Three) -> Three:
    """The only non-zero rows of P'_q, P'_k and P'_v: v^T W_q, v^T W_k, v^T W_v, (heads, k) each."""
    return Three(v @ weights.q, v @ weights.k, v @ weights.v)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Q K^T V, the paper's approximation: (heads, T, k)."""
    return q @ k.mT @ v


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as models compute it (Eq. 1): (heads, T, k)."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def atv_attention(attend: Attend, plain: Three, rows: Three) -> Tensor:
    """Attention (heads, T, k) with `rows` added to the last query, the last key and the last value."""
    return attend(*(states + _as_last(row, states) for states, row in zip(plain, rows, strict=True)))


def prefix_attention(attend: Attend, plain: Three, keys: Tensor, values: Tensor) -> Tensor:
    """Attention (heads, T, k) with keys and values (heads, p, k) prepended."""
    return attend(plain.q, torch.cat([keys, plain.k], -2), torch.cat([values, plain.v], -2))


def eight_terms(plain: Three, rows: Three) -> Tensor:
    """T1 to T8 of appendix A.2.3, (8, heads, T, k): linear attention multiplied out.

    (Q + P'_q)(K + P'_k)^T (V + P'_v) has three factors with two summands each, so eight products.
    """
    q, k, v = plain
    new_q, new_k, new_v = (_as_last(row, states) for states, row in zip(plain, rows, strict=True))
    return torch.stack(
        [
            linear(q, k, v),
            linear(q, new_k, new_v),
            linear(q, new_k, v),
            linear(q, k, new_v),
            linear(new_q, k, v),
            linear(new_q, new_k, v),
            linear(new_q, k, new_v),
            linear(new_q, new_k, new_v),
        ]
    )


def prefix_floor(plain: Three, keys: Tensor, values: Tensor) -> float:
    """Lower bound on the residual of linear attention with any v, or any free P', relative to the prefix's effect.

    Let k_m and v_m be the last key and value, and a and b the rows added to them. Then K^T V becomes K^T V - k_m v_m^T
    + (k_m + a)(v_m + b)^T: one pair is replaced. A prefix adds pairs: K^T V + P_k^T P_v. For all queries but the last,
    which are unchanged, the two agree only if

        Q (k_m + a)(v_m + b)^T = Q (P_k^T P_v + k_m v_m^T)

    The left side has rank 1, the right side in general rank p + 1. So the singular values of the right side beyond the
    first remain, even for p = 1. With a single query there is none before the last, and the bound is 0.

    Args:
        plain: queries (heads, T, k), keys and values (heads, m, k).
        keys: P_k (heads, p, k).
        values: P_v (heads, p, k).
    """
    state = keys.mT @ values
    pair = plain.k[..., -1:, :].mT @ plain.v[..., -1:, :]
    left_over = torch.linalg.svdvals(plain.q[..., :-1, :] @ (state + pair))[..., 1:]
    return float(left_over.norm() / (plain.q @ state).norm())


def prefix_dimensions(plain: Three, keys: Tensor, values: Tensor, sharing: int, tokens: int = 12) -> int:
    """Lower bound on the dimensions of the set of outputs of softmax attention with prefixes of this length.

    It is the rank of the derivative of the output with respect to keys and values, restricted to the first two of each
    and the last `tokens` queries, hence a lower bound. v has d entries, and a smooth image of R^d has at most d
    dimensions: if the rank exceeds d, ATV can match almost no prefix near this one.

    Args:
        plain: queries (heads, T, k), keys and values (heads, m, k).
        keys: P_k (heads, p, k).
        values: P_v (heads, p, k).
        sharing: number of consecutive heads that share keys and values.
        tokens: number of queries used.
    """
    sharing = min(sharing, len(keys))
    few = plain._replace(q=plain.q[:, -tokens:])
    pair = torch.stack([keys, values])
    rest = pair[..., 2:, :]

    def output(start: Tensor) -> Tensor:
        whole = torch.cat([start.repeat_interleave(sharing, 1), rest], -2)
        return prefix_attention(softmax, few, whole[0], whole[1]).flatten()

    start = pair[:, ::sharing, :2]
    derivative = torch.func.jacfwd(output)(start).flatten(1)
    return int(torch.linalg.matrix_rank(derivative))


def best_prefix(q: Tensor, change: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values (heads, p, k), p at most `length`, whose term Q P_k^T P_v approximates a change of attention.

    P_k^T P_v can be any matrix of rank p. Q^+ times the change is the best one of any rank; it is truncated to rank p,
    which loses nothing if its rank is at most p.

    Args:
        q: queries (heads, T, k).
        change: (heads, T, k).
        length: p.
    """
    left, sizes, right = torch.linalg.svd(torch.linalg.pinv(q) @ change, full_matrices=False)
    return (left * sizes[..., None, :]).mT[..., :length, :], right[..., :length, :]


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> float:
    """The lowest value of a smooth function found by L-BFGS from `start`; an upper bound on the true minimum."""
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [point],
        max_iter=steps,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=1e-15,
    )
    lowest = math.inf

    def closure() -> Tensor:
        nonlocal lowest
        search.zero_grad()
        value = loss(point)
        value.backward()
        lowest = min(lowest, value.item())
        return value

    search.step(closure)
    return lowest


def _as_last(row: Tensor, states: Tensor) -> Tensor:
    """Zeros in the shape of `states` (heads, tokens, k), except `row` (heads, k) at the last token."""
    last = torch.zeros(states.shape[-2], 1, dtype=states.dtype)
    last[-1] = 1
    return last * row[..., None, :]
