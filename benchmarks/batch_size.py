"""Training rows per second by the number of rows in a step, beside a bare forward and backward pass of the LLM.

The generator is frozen and has read all queries, and the prompts are cached, so that the LLM reads one prompt token and
the answer of each row. The bare pass reads as many tokens, without prompts, vectors, loss or optimiser.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atv.config import TrainConfig
from atv.data.collate import EncodedRow
from atv.lm.hooks import input_device, text_config
from benchmarks.common import Figure, Record, in_turn, parse_options, rate, ratio
from benchmarks.step import own_optimizer, train_step
from benchmarks.subjects import fill, make_atv, rows_of, small_llm, small_name

SIZES = (4, 8, 16, 32, 64, 128)


def main(argv: Sequence[str] | None = None) -> Path:
    """Time a step of each size and its bare pass."""
    options = parse_options("benchmarks.batch_size", __doc__, argv)
    sizes, tokens = ((2, 4), 24) if options.tiny else (SIZES, 110)
    llm, tokenizer = small_llm(options)
    atv = make_atv(options, llm, tokenizer, parametrisation="calibrated", train_generator=False)
    rows = rows_of(atv, max(sizes), tokens, templates=1)
    store = fill(atv, rows)
    record = Record(
        "batch_size",
        "Training rows per second by the rows of a step",
        options,
        llm=small_name(options),
        generator="MiniLM, frozen",
        **{"prompt tokens": tokens, "prompts per row": 1},
    )
    with atv.in_training(TrainConfig(), store.read, rows):
        atv.calibrate(rows)
        optimizer = own_optimizer(atv)
        sides: dict[str, Callable[[], object]] = {}
        for size in sizes:
            sides[f"{size} rows"] = partial(train_step, atv, rows[:size], optimizer)
            sides[f"{size} rows, bare"] = partial(_bare, llm, rows[:size])
        seconds = in_turn("batch size", sides, options)
    record.keep("", seconds)
    rates: dict[str, dict[Any, Figure]] = {"a step": {}, "bare pass": {}}
    for size in sizes:
        ours, bare = seconds[f"{size} rows"], seconds[f"{size} rows, bare"]
        rates["a step"][size], rates["bare pass"][size] = rate(size, ours), rate(size, bare)
        record.measure(f"{size} rows: a step", "rows/s", rates["a step"][size])
        record.measure(f"{size} rows: a step / bare pass", "x", ratio(ours, bare), ("at most", 1.3))
    record.plot("", "rows of a step", "rows per second", rates, kind="lines")
    return record.finish()


def _bare(llm: nn.Module, rows: Sequence[EncodedRow]) -> None:
    """Forward and backward pass over as many tokens as a step reads: one of the prompt, and the answer but its last."""
    longest = max(len(answer) for row in rows for _, answer in row.pairs)
    shape = (len(rows), longest, text_config(llm).hidden_size)
    states = torch.zeros(shape, dtype=next(llm.parameters()).dtype, device=input_device(llm), requires_grad=True)
    llm(inputs_embeds=states, use_cache=False).logits.float().logsumexp(-1).mean().backward()


if __name__ == "__main__":
    main()
