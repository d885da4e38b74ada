"""Theorems 1 and 2 of the paper, checked numerically: what holds, under which conditions, and what does not."""

from atv.paper.theory.containment import Fit, prefix_fits, theorem2
from atv.paper.theory.equivalence import Pairs, static_factors, theorem1
from atv.paper.theory.material import Material, llm_material, random_material
from atv.paper.theory.statement import CONDITIONS, FAILS, HOLDS, Statement

__all__ = [
    "CONDITIONS",
    "FAILS",
    "HOLDS",
    "Fit",
    "Material",
    "Pairs",
    "Statement",
    "llm_material",
    "prefix_fits",
    "random_material",
    "static_factors",
    "theorem1",
    "theorem2",
]
