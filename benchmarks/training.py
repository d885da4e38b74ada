"""Training: rows per second compared with the straightforward loop, and a whole step with the generator's own.

Measures epochs after the first: the prefix store is filled beforehand. Three prompts per row, positions `last`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atv.data.collate import EncodedRow
from atv.model import ATVModel
from benchmarks.common import Figure, Options, Record, in_turn, parse_options, rate, ratio, times
from benchmarks.reference import batch_loss, row_loss, train_rows, update
from benchmarks.step import RATE, floor_step, loss_of, own_optimizer, train_step
from benchmarks.subjects import GENERATORS, fill, make_atv, mean_query, rows_of, small_llm, small_name

BATCH = 8
"""Rows per step of the library and of the batched loop."""
BY_ROW = 4
"""Rows per round of the loop without batches, whose rate does not depend on their number."""
OURS, ONE_BY_ONE, BATCHED, FLOOR = "this library", "loop, row by row", "loop, 8 rows at once", "generator alone"
TARGETS = {"minilm": (12, 8), "gpt2": (6.5, 4.5)}
"""Target speedup over the loop row by row and over the loop with 8 rows at once."""
FLOOR_TARGET = {"minilm": None, "gpt2": ("at most", 1.25)}
"""Target ratio of a step to the generator's own; with a generator as small as MiniLM the LLM's part is not
negligible."""
TOLERANCE = 0.05
"""Largest relative difference of two losses that are equal up to rounding to bfloat16."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark with both generators."""
    options = parse_options("benchmarks.training", __doc__, argv)
    tokens = 24 if options.tiny else 50
    llm, tokenizer = small_llm(options)
    record = Record(
        "training",
        "Training, rows per second after the first epoch",
        options,
        llm=small_name(options),
        **{"prompt tokens": tokens, "prompts per row": 3, "rows per step": BATCH},
    )
    rates: dict[str, dict[Any, Figure]] = {side: {} for side in (ONE_BY_ONE, BATCHED, OURS, FLOOR)}
    for generator in GENERATORS:
        for side, figure in _measure(record, options, llm, tokenizer, generator, tokens).items():
            rates[side][GENERATORS[generator]] = figure
    record.plot("", "generator", "training rows per second", rates, kind="bars")
    return record.finish()


def agreement(atv: ATVModel, rows: Sequence[EncodedRow]) -> float:
    """Largest relative difference between the library's loss and the two loops' on the same rows, without dropout."""
    atv.eval()
    with torch.no_grad():
        ours = loss_of(atv, rows).item()
        one_by_one = sum(row_loss(atv, row).item() for row in rows) / len(rows)
        batched = batch_loss(atv, rows).item()
    atv.train()
    worst = max(abs(one_by_one - ours), abs(batched - ours)) / abs(ours)
    if worst > TOLERANCE:
        raise SystemExit(f"The sides do not compute the same loss: {ours}, {one_by_one}, {batched}.")
    return worst


def _measure(
    record: Record, options: Options, llm: nn.Module, tokenizer: Any, generator: str, tokens: int
) -> dict[str, Figure]:
    atv = make_atv(options, llm, tokenizer, generator)
    rows = rows_of(atv, BATCH, tokens)
    record.sizes[f"query tokens, {GENERATORS[generator]}"] = mean_query(rows)
    record.sizes[f"loss differs by, {GENERATORS[generator]}"] = agreement(atv, rows)
    fill(atv, rows)
    ours, plain = own_optimizer(atv), torch.optim.Adam(atv.parameters(), lr=RATE, weight_decay=1e-5)
    sides: dict[str, Callable[[], object]] = {
        ONE_BY_ONE: partial(train_rows, atv, rows[:BY_ROW], plain),
        BATCHED: lambda: update(batch_loss(atv, rows), plain),
        OURS: partial(train_step, atv, rows, ours),
        FLOOR: partial(floor_step, atv, rows, ours),
    }
    name = GENERATORS[generator]
    seconds = in_turn(f"training, {name}", sides, options)
    record.keep(f"{name}: ", seconds)
    seconds[ONE_BY_ONE] = times(BATCH / BY_ROW, seconds[ONE_BY_ONE])
    rates = {side: rate(BATCH, values) for side, values in seconds.items()}
    for side in (ONE_BY_ONE, BATCHED, OURS):
        record.measure(f"{name}: {side}", "rows/s", rates[side])
    for side, target in zip((ONE_BY_ONE, BATCHED), TARGETS[generator], strict=True):
        record.measure(
            f"{name}: {OURS} / {side}", "x rows/s", ratio(seconds[side], seconds[OURS]), ("at least", target)
        )
    record.measure(
        f"{name}: a whole step / the generator's own",
        "x",
        ratio(seconds[OURS], seconds[FLOOR]),
        FLOOR_TARGET[generator],
    )
    return rates


if __name__ == "__main__":
    main()
