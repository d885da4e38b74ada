"""Task vectors per second of the generator alone, and the size of a saved adapter on disk."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Figure, Record, in_turn, parse_options, rate
from benchmarks.subjects import GENERATORS, make_atv, small_llm, small_name, tasks

BATCHES = (1, 32)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark with both generators, without an LLM."""
    options = parse_options("benchmarks.vectors", __doc__, argv)
    llm, tokenizer = small_llm(options)
    queries = [example.input for task in tasks() for example in task.train]
    record = Record("vectors", "Task vectors of the generator alone", options, llm=small_name(options))
    rates: dict[str, dict[Any, Figure]] = {}
    for generator, name in GENERATORS.items():
        atv = make_atv(options, llm, tokenizer, generator)
        encoded = atv.generator.encode(queries[:32])
        record.sizes[f"query tokens, {name}"] = round(sum(map(len, encoded)) / len(encoded), 1)
        sides = {str(count): partial(atv.task_vectors, queries[:count]) for count in BATCHES}
        seconds = in_turn(f"vectors, {name}", sides, options)
        record.keep(f"{name}: batch ", seconds)
        rates[name] = {count: rate(count, seconds[str(count)]) for count in BATCHES}
        for count in BATCHES:
            record.measure(f"{name}: batch {count}", "vectors/s", rates[name][count])
        with TemporaryDirectory() as folder:
            atv.save_pretrained(Path(folder) / "adapter")
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        record.measure(f"{name}: saved adapter", "MB", size / 1e6)
    record.plot("", "queries per batch", "task vectors per second", rates, kind="bars")
    return record.finish()


if __name__ == "__main__":
    main()
