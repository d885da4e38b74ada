"""The cost of more steered tokens: a training step with the vector on the last 1, 4 and 16 prompt tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import Figure, Record, in_turn, parse_options, ratio, times
from benchmarks.step import own_optimizer, train_step
from benchmarks.subjects import fill, make_atv, rows_of, small_llm, small_name

COUNTS = (1, 4, 16)


def main(argv: Sequence[str] | None = None) -> Path:
    """Time one step for each count, with MiniLM as generator and a filled store."""
    options = parse_options("benchmarks.positions", __doc__, argv)
    tokens = 24 if options.tiny else 50
    llm, tokenizer = small_llm(options)
    record = Record(
        "positions",
        "A training step by steered tokens",
        options,
        llm=small_name(options),
        generator="MiniLM",
        **{"prompt tokens": tokens, "prompts per row": 3, "rows per step": 8},
    )
    sides = {}
    for count in COUNTS:
        atv = make_atv(options, llm, tokenizer, positions=f"last:{count}")
        rows = rows_of(atv, 8, tokens)
        fill(atv, rows)
        sides[f"last:{count}"] = partial(train_step, atv, rows, own_optimizer(atv))
    seconds = in_turn("positions", sides, options)
    record.keep("", seconds)
    steps = {name: times(1000, values) for name, values in seconds.items()}
    for name in sides:
        record.measure(f"step with {name}", "ms", Figure.of(steps[name]))
    for count in COUNTS[1:]:
        target = ("at most", 2.5) if count == 16 else None
        record.measure(
            f"step with last:{count} / last:1", "x", ratio(seconds[f"last:{count}"], seconds["last:1"]), target
        )
    points = {count: Figure.of(steps[f"last:{count}"]) for count in COUNTS}
    record.plot("", "steered prompt tokens K", "milliseconds per step", {"last:K": points}, kind="lines")
    return record.finish()


if __name__ == "__main__":
    main()
