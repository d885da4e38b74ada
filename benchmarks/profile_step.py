"""Profile of a training step: the time of its parts, for both generators, and with four steered tokens.

To compare with another version of the library, run it with that version's `src` first on PYTHONPATH and another --out;
then run this version with --before that folder.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from atv.progress import bar
from benchmarks.common import Figure, Options, Record, options_of, parser, times
from benchmarks.step import PARTS, loss_of, own_optimizer, timed_step
from benchmarks.subjects import GENERATORS, fill, make_atv, mean_query, rows_of, small_llm, small_name

STEPS = 4
"""Steps per round."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Time each part of a step."""
    parse = parser("benchmarks.profile_step", __doc__)
    parse.add_argument("--before", type=Path, help="folder with an earlier record, shown for comparison")
    given = parse.parse_args(argv)
    options = options_of(given, "benchmarks.profile_step", argv)
    tokens = 24 if options.tiny else 50
    llm, tokenizer = small_llm(options)
    record = Record(
        "profile_step",
        "Parts of a training step",
        options,
        llm=small_name(options),
        **{"prompt tokens": tokens, "prompts per row": 3, "rows per step": 8},
    )
    former = json.loads((given.before / record.file.name).read_text())["measures"] if given.before else []
    before = {line["what"]: line["value"] for line in former}
    parts: dict[str, dict[Any, Figure]] = {part: {} for part in PARTS}
    kinds = {name: (generator, "last") for generator, name in GENERATORS.items()}
    kinds[f"{GENERATORS['minilm']}, last:4"] = ("minilm", "last:4")
    for name, (generator, positions) in kinds.items():
        atv = make_atv(options, llm, tokenizer, generator, positions)
        rows = rows_of(atv, 8, tokens)
        record.sizes[f"query tokens, {name}"] = mean_query(rows)
        fill(atv, rows)
        step = partial(timed_step, atv, partial(loss_of, atv, rows), own_optimizer(atv), options.device)
        for part, milliseconds in _profile(name, step, options).items():
            what = f"{name}: {part}"
            figure = Figure.of(milliseconds)
            record.measure(what, "ms", figure)
            if what in before:
                record.measure(f"{what}, before / now", "x", before[what] / figure.value)
            if part in parts:
                parts[part][name] = figure
    record.plot("", "generator", "milliseconds", parts, kind="stacked")
    return record.finish()


def _profile(name: str, step: Any, options: Options) -> dict[str, list[float]]:
    """Milliseconds of each part: the mean over a round's steps, for each round."""
    count = 1 if options.tiny else STEPS
    rounds: dict[str, list[float]] = {}
    with bar(f"profile, {name}", options.rounds + 1) as progress:
        for index in range(options.rounds + 1):
            steps = [step() for _ in range(count)]
            progress.advance()
            if index > 0:  # the first warms up
                for part in steps[0]:
                    rounds.setdefault(part, []).extend(times(1000 / count, [sum(each[part] for each in steps)]))
    return rounds


if __name__ == "__main__":
    main()
