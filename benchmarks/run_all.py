"""Run all benchmarks for a CPU, then show all targets and update docs/performance.md: `make bench`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from atv.progress import log
from benchmarks import (
    answers,
    batch_size,
    inference,
    peft_methods,
    positions,
    profile_step,
    prompt_length,
    reading,
    report,
    serving,
    training,
    vectors,
)
from benchmarks.common import options_of, output, parser, show

ON_CPU = (
    vectors,
    answers,
    positions,
    profile_step,
    inference,
    prompt_length,
    reading,
    batch_size,
    peft_methods,
    serving,
    training,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run them with the same options; with --tiny or --out the page is not updated."""
    parse = parser("benchmarks.run_all", __doc__)
    parse.set_defaults(device="cpu")
    asked = parse.parse_args(argv)
    options = options_of(asked, "benchmarks.run_all", argv)
    given = ["--threads", str(options.threads), "--rounds", str(options.rounds)]
    given += ["--out", str(asked.out)] if asked.out else []
    began = time.perf_counter()
    files: list[Path | None] = []
    for benchmark in ON_CPU:
        name = benchmark.__name__.rpartition(".")[2]
        log.info(f"{name} ({len(files) + 1} of {len(ON_CPU)}, {(time.perf_counter() - began) / 60:.1f} minutes so far)")
        files.append(benchmark.main([*given, *(["--tiny"] if options.tiny else [])]))
    measures = [line for file in files if file for line in json.loads(file.read_text())["measures"]]
    show("All targets", [line for line in measures if "target" in line])
    output.print(f"{(time.perf_counter() - began) / 60:.1f} minutes; records in {options.out}", highlight=False)
    if not options.tiny and asked.out is None:
        report.main(["--results", str(options.out)])
        output.print(f"{report.PAGE} is up to date", highlight=False)


if __name__ == "__main__":
    main()
