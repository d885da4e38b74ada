"""`atv paper theory`: the paper's theorems as tables of numbers."""

from collections.abc import Sequence

import torch

from atv.cli.options import Theory
from atv.cli.output import print_lines, print_table
from atv.lm.load import load_llm, load_tokenizer
from atv.paper.theory import (
    Fit,
    Material,
    Pairs,
    Statement,
    llm_material,
    prefix_fits,
    random_material,
    static_factors,
    theorem1,
    theorem2,
)
from atv.report.formats import check_format, write_tables
from atv.report.tables import Table


def show_theorems(given: Theory) -> None:
    """Check every statement on random matrices and, if given, an LLM; print the tables and write them to --out."""
    llm, out, seed = given.llm, given.out, given.seed
    if out is not None:
        check_format(out)
    draw = torch.Generator().manual_seed(seed)
    materials = [random_material(draw)]
    if llm is not None:
        materials.append(llm_material(load_llm(llm, dtype="float32", device="cpu"), load_tokenizer(llm)))
    made = f"Computed in float64 with seed {seed} and torch {torch.__version__}."
    tables = []
    for material in materials:
        tables += _tables(material, draw, made)
    for table in tables:
        print_table(table)
    for path in write_tables(tables, out) if out is not None else ():
        print_lines([f"Written to {path}"])


def _tables(material: Material, draw: torch.Generator, made: str) -> list[Table]:
    pairs, fits = static_factors(material, draw), prefix_fits(material, draw)
    statements = theorem1(material, pairs, draw) + theorem2(material, fits, draw)
    return [
        _statements(statements, f"Theorems 1 and 2: {material.name}", made),
        _pairs(pairs, f"One static LoRA for n inputs: {material.name}, d_s = r = {material.width}", made),
        _fits(
            fits,
            material.prompt.shape[1],
            f"ATV's attention fitted to a prefix: {material.name}, {len(material.prompt)} tokens",
            made,
        ),
    ]


def _statements(statements: Sequence[Statement], title: str, made: str) -> Table:
    note = (
        "Residuals are relative to the target; up to 1e-9 is rounding. Residual: where the statement holds, if "
        "necessary under its condition. Counter-example: the residual where it does not hold; for statements that "
        "something is impossible (1.9, 2.9, 2.10), the residual of doing it, so near 0. Those of 2.2, 2.6, 2.7 and 2.8 "
        "are the best of a search. That no vector reaches 0 is proven for 2.6 (floor) and, if there are more "
        f"dimensions than d, for 2.7 (both in the table of prefixes), but not for 2.8. {made}"
    )
    rows = [[s.number, s.text, s.verdict, s.condition, _shown(s.residual), _shown(s.counter)] for s in statements]
    return Table(title, ["", "statement", "verdict", "condition", "residual", "counter-example"], rows, note, text=4)


def _pairs(pairs: Sequence[Pairs], title: str, made: str) -> Table:
    note = (
        "Residual of the best static factors for n pairs of input x and generator's state v (exact minimum): v drawn "
        "independently of x, v = tanh(x^T B), v = x^T B. At others: the factors for independent v at n other pairs. "
        f"One by one: largest residual with separate factors for each pair. {made}"
    )
    columns = ["n / d", "n", "rank of X", "one by one", "independent v", "at others", "v = tanh(x B)", "v = x B"]
    rows = [
        [f"{p.share:g}", str(p.pairs), str(p.rank)]
        + [_shown(value) for value in (p.one_by_one, p.independent, p.elsewhere, p.curved, p.straight)]
        for p in pairs
    ]
    return Table(title, columns, rows, note, text=0)


def _fits(fits: Sequence[Fit], hidden: int, title: str, made: str) -> Table:
    note = (
        "Residuals are relative to the prefix's effect: 1 is no nearer than the frozen LLM. Floor: no vector does "
        "better (proven, linear attention). Dimensions: lower bound for the set of outputs of such prefixes under "
        f"softmax; ATV's has at most d = {hidden}. Best and median: over the starts of a search for v. Free rows: "
        "P'_q, P'_k and P'_v need not come from one v (no restriction for one head of width at most d / 3). "
        f"The prefix is random, as large as the context's own keys and values. {made}"
    )
    columns = ["heads", "query tokens", "attention", "p", "floor", "dimensions", "best", "median", "free rows"]
    rows = [
        [str(f.heads), f.tokens, f.attention, str(f.length)]
        + [_shown(f.floor), "–" if f.dimensions is None else str(f.dimensions)]
        + [_shown(value) for value in (f.best, f.middle, f.free)]
        for f in fits
    ]
    return Table(title, columns, rows, note)


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value else "0"
