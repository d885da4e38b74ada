"""Training on a GPU with an LLM of Llama 3 8B's shape and a GPT-2-sized generator: rows per second and memory.

Compared with the straightforward loop, row by row, and with LoRA. Peak memory is compared with the unavoidable minimum.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from atv.data.collate import EncodedRow
from atv.model import ATVModel
from benchmarks.common import Figure, Record, in_turn, parse_options, rate, ratio, times
from benchmarks.peft_methods import LORA, peft_model, peft_optimizer, peft_step
from benchmarks.reference import train_rows
from benchmarks.step import RATE, own_optimizer, train_step
from benchmarks.subjects import fill, large_llm, make_atv, mean_query, rows_of
from benchmarks.training import ONE_BY_ONE, OURS, agreement

BATCH, BY_ROW = 8, 4


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark; memory is measured only on a GPU."""
    options = parse_options("benchmarks.gpu_training", __doc__, argv)
    tokens = 24 if options.tiny else 110
    llm, tokenizer = large_llm(options)
    atv = make_atv(options, llm, tokenizer, "gpt2")
    rows = rows_of(atv, BATCH, tokens)
    record = Record(
        "gpu_training",
        "Training on a GPU, rows per second after the first epoch",
        options,
        llm="tiny" if options.tiny else "Llama 3 8B's shape, random weights, bfloat16",
        generator="GPT-2-sized",
        **{
            "prompt tokens": tokens,
            "prompts per row": 3,
            "rows per step": BATCH,
            "query tokens": mean_query(rows),
            "loss differs by": agreement(atv, rows),
        },
    )
    fill(atv, rows)
    ours = own_optimizer(atv)
    if options.device == "cuda":
        peak, needed = _memory(atv, rows, ours)
        record.measure("peak memory", "GiB", peak)
        record.measure("weights, generator, expansion, Adam's moments, one batch of prefixes", "GiB", needed)
        record.measure("peak memory / these", "x", peak / needed, ("at most", 1.15))
    plain = torch.optim.Adam(atv.parameters(), lr=RATE, weight_decay=1e-5)
    lora = peft_model(copy.deepcopy(llm), LORA)
    sides: dict[str, Callable[[], object]] = {
        ONE_BY_ONE: partial(train_rows, atv, rows[:BY_ROW], plain),
        LORA: partial(peft_step, lora, peft_optimizer(lora), rows),
        OURS: partial(train_step, atv, rows, ours),
    }
    seconds = in_turn("training on a GPU", sides, options)
    record.keep("", seconds)
    seconds[ONE_BY_ONE] = times(BATCH / BY_ROW, seconds[ONE_BY_ONE])
    rates: dict[str, Figure] = {side: rate(BATCH, values) for side, values in seconds.items()}
    for side, figure in rates.items():
        record.measure(side, "rows/s", figure)
    record.measure(f"{OURS} / {ONE_BY_ONE}", "x rows/s", ratio(seconds[ONE_BY_ONE], seconds[OURS]), ("at least", 30))
    record.measure(f"{OURS} / {LORA}", "x rows/s", ratio(seconds[LORA], seconds[OURS]))
    shown = {side: {"GPT-2-sized": figure} for side, figure in rates.items()}
    record.plot("", "generator", "training rows per second", shown, kind="bars")
    return record.finish()


def _memory(atv: ATVModel, rows: list[EncodedRow], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Peak memory of three steps, and the GiB that training needs at least, without gradients and activations."""
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        train_step(atv, rows, optimizer)
    config = atv.llm.config.get_text_config()  # type: ignore[operator, union-attr]
    prefix = sum(len(prompt) - 1 for row in rows for prompt, _ in row.pairs)
    width = config.head_dim * config.num_key_value_heads * config.num_hidden_layers
    weights = sum(p.nbytes for p in atv.llm.parameters())
    trained = sum(p.nbytes for p in atv.parameters())
    needed = weights + 3 * trained + 2 * prefix * width * next(atv.llm.parameters()).element_size()
    return torch.cuda.max_memory_allocated() / 2**30, needed / 2**30


if __name__ == "__main__":
    main()
