"""Theorem 1 as statements: ATV and LoRA of equal rank add the same."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atv.paper.theory.lora import atv_as_lora, best_static_lora, lora_as_atv, relative, truncated
from atv.paper.theory.material import Material
from atv.paper.theory.statement import Statement, beyond_reach, equality

SCALE = 0.001
"""The paper's lambda. Residuals are relative, so its value does not matter."""


@dataclass(frozen=True)
class Pairs:
    """How well one static pair of factors fits n pairs of x and v."""

    share: float
    """n / d."""
    pairs: int
    rank: int
    """Rank of the inputs."""
    one_by_one: float
    """Largest residual with separate factors for each pair."""
    independent: float
    """Residual if v is independent of x."""
    elsewhere: float | None
    """Residual of the same factors on n other pairs. None: there are fewer than n other pairs."""
    curved: float
    """Residual if v = tanh(x^T B)."""
    straight: float
    """Residual if v = x^T B."""


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def static_factors(material: Material, draw: torch.Generator) -> list[Pairs]:
    """The best static LoRA of rank d_s for increasing numbers of pairs, from d / 4 to 2 d."""
    x = material.states[2]
    total, hidden = x.shape
    expansion = _normal(draw, material.width, hidden) / hidden**0.5
    mixed = x @ _normal(draw, hidden, material.width)
    mixed = 2 * mixed / mixed.std()
    free = _normal(draw, total, material.width)
    found = []
    for share in (0.25, 0.5, 1.0, 2.0):
        count = int(share * hidden)
        left: dict[str, float] = {}
        for name, v in (("curved", mixed.tanh()), ("straight", mixed), ("independent", free)):
            updates = SCALE * v @ expansion
            down, up = best_static_lora(x[:count], updates[:count], material.width)
            left[name] = relative(x[:count] @ down @ up, updates[:count])
        others = slice(count, 2 * count)  # `updates` and factors are from the last iteration, the independent v
        elsewhere = relative(x[others] @ down @ up, updates[others]) if 2 * count <= total else None
        alone = max(_one_by_one(x[row], free[row], expansion) for row in range(0, count, max(1, count // 16)))
        found.append(Pairs(share, count, int(torch.linalg.matrix_rank(x[:count])), alone, elsewhere=elsewhere, **left))
    return found


def _one_by_one(x: Tensor, v: Tensor, expansion: Tensor) -> float:
    down, up = atv_as_lora(x, v, expansion, SCALE)
    return relative(x @ down @ up, SCALE * v @ expansion)


def theorem1(material: Material, curve: list[Pairs], draw: torch.Generator) -> list[Statement]:
    """Check every statement of Theorem 1 and of the discussion of its assumptions (appendix A.1.4).

    Args:
        material: the weights and states used for the checks.
        curve: from `static_factors`.
        draw: random generator for factors.
    """
    x = material.states[2]
    hidden, width = x.shape[1], material.width
    some = x[: min(16, len(x))]
    v = _normal(draw, len(x), width)
    expansion = _normal(draw, width, hidden) / hidden**0.5
    down, up = _normal(draw, hidden, width) / hidden**0.5, _normal(draw, width, hidden) / width**0.5
    half, double = curve[1], curve[-1]
    return [
        equality(
            "1.1",
            "ATV to LoRA at one input",
            max(_one_by_one(one, its, expansion) for one, its in zip(some, v, strict=False)),
            _one_by_one(torch.zeros_like(x[0]), v[0], expansion),
            "x is not 0",
        ),
        equality("1.2", "LoRA to ATV at one input", max(_round_trip(one, down, up) for one in some)),
        equality("1.3", "ATV to LoRA, static factors for all inputs: 2d of them", counter=double.independent),
        equality(
            "1.4",
            "the same in the first layer, queries that end in one token",
            counter=_same_input(material.first, v, expansion),
        ),
        equality(
            "1.5",
            "the same for d/2 inputs",
            half.independent,
            half.elsewhere,
            "no more inputs than X has rank, at these inputs only",
        ),
        equality(
            "1.6", "the same for 2d inputs where v depends on x", double.straight, double.curved, "v is linear in x"
        ),
        equality("1.7", "d_s < r: LoRA adds what ATV adds, at one input", _padded(x[0], v[0], expansion)),
        equality("1.8", "d_s > r, several inputs: equal up to projection on rank r", _rest(x, v, expansion)),
        beyond_reach("1.9", "d_s > r, one input: beyond LoRA of rank r (here 1)", _rank_one(x[0], v[0], expansion)),
        equality("1.10", "LoRA to ATV for all inputs: A = W_up, v = x^T W_down", _static_expansion(x, down, up)),
        _several_layers(material, draw),
    ]


def _round_trip(x: Tensor, down: Tensor, up: Tensor) -> float:
    scale, v, expansion = lora_as_atv(x, down, up)
    return relative(scale * v @ expansion, x @ down @ up)


def _same_input(x: Tensor, v: Tensor, expansion: Tensor) -> float:
    """For equal inputs, LoRA's update is the same for all; the best is the mean of ATV's updates."""
    updates = SCALE * v[: len(x)] @ expansion
    down, up = best_static_lora(x, updates, len(expansion))
    return relative(x @ down @ up, updates)


def _padded(x: Tensor, v: Tensor, expansion: Tensor) -> float:
    """LoRA of twice the rank, with the surplus channels zeroed."""
    down, up = (
        factor.repeat(*times)
        for factor, times in zip(atv_as_lora(x, v, expansion, SCALE), ((1, 2), (2, 1)), strict=True)
    )
    down[:, len(v) :] = 0
    return relative(x @ down @ up, SCALE * v @ expansion)


def _rest(x: Tensor, v: Tensor, expansion: Tensor) -> float:
    """Half the rank, d / 2 inputs: the exact minimum compared with the nearest matrix of that rank."""
    count, rank = x.shape[1] // 2, len(expansion) // 2
    updates = v[:count] @ expansion
    down, up = best_static_lora(x[:count], updates, rank)
    left, right = truncated(updates, rank)
    return abs(relative(x[:count] @ down @ up, updates) - relative(left @ right, updates))


def _rank_one(x: Tensor, v: Tensor, expansion: Tensor) -> float:
    """One update is one row, so rank 1 is enough for any d_s."""
    update = SCALE * v @ expansion
    return relative(x @ torch.linalg.pinv(x[None]) @ update[None], update)


def _static_expansion(x: Tensor, down: Tensor, up: Tensor) -> float:
    """Step 4's decomposition is not needed: v can be x^T W_down itself, and then A is the same for all x."""
    scale = 0.5
    return relative(scale * (x @ down / scale) @ up, x @ (down @ up))


def _several_layers(material: Material, draw: torch.Generator) -> Statement:
    """All layers share one v, but each layer's LoRA reads its own x."""
    count, rank = material.states.shape[2] // 2, material.width // 2
    updates = []
    for x in material.states:
        hidden = x.shape[1]
        update = x[:count] @ _normal(draw, hidden, rank) @ _normal(draw, rank, hidden)
        updates.append(update / update.norm())  # every layer counts the same
    joined = torch.cat(updates, 1)

    def left(width: int) -> float:
        vectors, expansions = truncated(joined, width)
        return relative(vectors @ expansions, joined)

    layers = len(updates)
    return equality(
        "1.11",
        f"LoRA to ATV for all inputs, one v for {layers} layers",
        left(layers * rank),
        left(rank),
        "d_s is the number of layers times r; with d_s = r it is not",
    )
