"""The cost of long prompts: a training step by prompt length with a filled store, compared with a full forward pass.

On both sides, the LLM's share is the step without generator, expansion and optimiser.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from atv.progress import bar
from benchmarks.common import ENOUGH, Figure, Record, parse_options, ratio, times
from benchmarks.reference import batch_loss
from benchmarks.step import llm_share, loss_of, own_optimizer, timed_step
from benchmarks.subjects import fill, make_atv, rows_of, small_llm, small_name

OURS, FULL = "this library", "full pass"


def main(argv: Sequence[str] | None = None) -> Path:
    """Time a step of one row with one prompt, for each length and on both sides."""
    options = parse_options("benchmarks.prompt_length", __doc__, argv)
    lengths = (16, 32, 64) if options.tiny else (64, 128, 256, 512, 1024, 2048)
    llm, tokenizer = small_llm(options)
    record = Record(
        "prompt_length",
        "A training step by prompt length",
        options,
        llm=small_name(options),
        generator="MiniLM",
        **{"prompts per row": 1, "rows per step": 1},
    )
    atv = make_atv(options, llm, tokenizer)
    optimizer = own_optimizer(atv)
    step = partial(timed_step, atv, optimizer=optimizer, device=options.device)
    whole: dict[str, dict[int, list[float]]] = {OURS: {}, FULL: {}}
    share: dict[str, dict[int, list[float]]] = {OURS: {}, FULL: {}}
    with bar("prompt length", len(lengths) * (options.rounds + 1)) as progress:
        for tokens in lengths:
            rows = rows_of(atv, 1, tokens, templates=1)
            fill(atv, rows)
            sides = {OURS: partial(loss_of, atv, rows), FULL: partial(batch_loss, atv, rows)}
            # The first round is a warm-up and not counted.
            quick = {name: step(loss_of=loss)["whole"] for name, loss in sides.items()}
            progress.advance()
            for _ in range(options.rounds):
                for name, loss in sides.items():
                    repeats = 1 if options.tiny else max(1, round(ENOUGH / quick[name]))
                    steps = [step(loss_of=loss) for _ in range(repeats)]
                    whole[name].setdefault(tokens, []).append(fmean(each["whole"] for each in steps))
                    share[name].setdefault(tokens, []).append(fmean(llm_share(each) for each in steps))
                progress.advance()
    for name in (OURS, FULL):
        record.keep(f"{name}, step: ", {str(tokens): values for tokens, values in whole[name].items()})
        record.keep(f"{name}, LLM's share: ", {str(tokens): values for tokens, values in share[name].items()})
    for tokens in lengths:
        for name in (OURS, FULL):
            record.measure(f"{tokens} tokens: step, {name}", "ms", Figure.of(times(1000, whole[name][tokens])))
            record.measure(f"{tokens} tokens: LLM's share, {name}", "ms", Figure.of(times(1000, share[name][tokens])))
    growth = _growth({tokens: Figure.of(values).value for tokens, values in share[OURS].items()})
    record.measure(f"LLM's share of {OURS} grows with tokens to the power of", "", growth, ("at most", 1))
    last = lengths[-1]
    record.measure(
        f"{last} tokens: LLM's share, {FULL} / {OURS}",
        "x",
        ratio(share[FULL][last], share[OURS][last]),
        ("at least", 30),
    )
    for title, seconds in (("whole step", whole), ("the LLM's share", share)):
        series = {
            name: {tokens: Figure.of(times(1000, values)) for tokens, values in seconds[name].items()}
            for name in seconds
        }
        record.plot(title, "prompt tokens", "milliseconds per step", series, kind="lines", log=True)
    return record.finish()


def _growth(seconds: dict[int, float]) -> float:
    """The slope of a straight line through the points on logarithmic axes, by least squares; 1 is linear."""
    points = [(math.log(tokens), math.log(value)) for tokens, value in seconds.items()]
    x, y = fmean(x for x, _ in points), fmean(y for _, y in points)
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


if __name__ == "__main__":
    main()
