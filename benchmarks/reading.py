"""Reading the prompts of a training: beginnings that prompts share once, beside every prompt as a whole."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from atv.lm import prefix_tree
from atv.lm.prefix_store import PrefixStore
from benchmarks.common import SEED, Figure, Record, in_turn, parse_options, ratio, times
from benchmarks.subjects import small_llm, small_name

Prompts = list[list[int]]


def main(argv: Sequence[str] | None = None) -> Path:
    """Fill a store with the prompts of one and of three templates, and with and without a long system prompt."""
    options = parse_options("benchmarks.reading", __doc__, argv)
    rows, tokens, ending, system, short = (4, 12, 9, 40, 12) if options.tiny else (32, 110, 12, 500, 30)
    llm, tokenizer = small_llm(options)
    draw = random.Random(SEED)

    def drawn(count: int) -> list[int]:
        return [draw.randrange(len(tokenizer)) for _ in range(count)]

    inputs, endings = [drawn(tokens) for _ in range(rows)], [drawn(ending) for _ in range(3)]
    one = [text + endings[0] for text in inputs]
    three = [text + end for text in inputs for end in endings]
    beginning, queries = drawn(system), [drawn(short) for _ in range(rows)]
    chat = [beginning + query for query in queries]
    sides: dict[str, Callable[[], object]] = {
        "one template": partial(_read, llm, one),
        "three templates": partial(_read, llm, three),
        "three templates, each prompt as a whole": partial(_read, llm, three, whole=True),
        "no system prompt": partial(_read, llm, queries),
        "the system prompt alone": partial(_read, llm, [beginning]),
        "system prompt and query": partial(_read, llm, chat),
        "system prompt and query, each prompt as a whole": partial(_read, llm, chat, whole=True),
    }
    record = Record(
        "reading",
        "Reading the prompts of a training",
        options,
        llm=small_name(options),
        rows=rows,
        **{"input tokens": tokens, "template's tokens after it": ending, "system prompt's tokens": system},
        **{"query tokens after it": short},
    )
    seconds = in_turn("reading", sides, options)
    for name, values in seconds.items():
        record.measure(name, "ms", Figure.of(times(1000, values)))
    whole = "each prompt as a whole"
    for what, above, below, target in (
        ("three templates / one", "three templates", "one template", ("at most", 1.3)),
        ("three templates: as a whole / shared beginnings once", f"three templates, {whole}", "three templates", None),
        (
            "system prompt: as a whole / shared beginnings once",
            f"system prompt and query, {whole}",
            "system prompt and query",
            None,
        ),
    ):
        record.measure(what, "x", ratio(seconds[above], seconds[below]), target)
    once = [a + b for a, b in zip(seconds["no system prompt"], seconds["the system prompt alone"], strict=True)]
    what = "system prompt and query / queries and one system prompt"
    record.measure(what, "x", ratio(seconds["system prompt and query"], once), ("at most", 1.3))
    record.plot(
        "Reading prompts",
        "",
        "milliseconds",
        {"seconds": {name: Figure.of(times(1000, values)) for name, values in seconds.items()}},
        kind="bars",
    )
    record.keep("", seconds)
    return record.finish()


def _read(llm: nn.Module, prompts: Prompts, whole: bool = False) -> Any:
    """Fill a new store."""
    store = PrefixStore(disk=0)
    with _nothing_shared() if whole else nullcontext():
        store.fill(llm, prompts, lambda _: None)
    return store


@contextmanager
def _nothing_shared() -> Iterator[None]:
    """Inside this context no beginning is long enough to be read on its own."""
    least, prefix_tree.LEAST = prefix_tree.LEAST, 10**9
    try:
        yield
    finally:
        prefix_tree.LEAST = least


if __name__ == "__main__":
    main()
