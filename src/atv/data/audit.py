"""Checks of tasks that would invalidate a measured score, and facts to report with it.

A `Task` validates itself: no input in two splits, no constant test answer. Checks that need several tasks are here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from atv.data.render import Renderer
from atv.data.splits import same
from atv.data.task import SPLITS, Task, Variant
from atv.errors import ATVError

UNREAD = 0.05
"""From this share of unknown tokens, or of queries that look alike, on a generator is said not to read the queries."""


def refuse_shared_inputs(tasks: Sequence[Task]) -> None:
    """Raise ATVError if a training input of one task is a test input of another."""
    trained = {row.asked: task.name for task in reversed(tasks) for row in task.train}
    for task in tasks:
        shared = [row.asked for row in task.test if row.asked in trained]
        if shared:
            raise ATVError(
                f"Task {task.name}: {len(shared)} of {len(task.test)} test inputs are training inputs of another task "
                f"({shared[0][:60]!r} of {trained[shared[0]]}); remove them from one of the two, or the test measures "
                "memory."
            )


Encode = Callable[[Renderer], Sequence[Sequence[int]]]
"""The token ids of each of a task's options, as they follow the prompts of a renderer."""


def findings(
    task: Task, encode: Encode | None = None, renderers: Mapping[Variant, Renderer] | None = None
) -> list[str]:
    """Return facts that are not errors but should be known with the task's scores, one line each.

    Args:
        task: the task to inspect.
        encode: encodes its options; None: their tokens are not inspected.
        renderers: the renderers that will be used; None: all of the task's.
    """
    found = [f"{task.name}: the most frequent answer alone scores {100 * task.majority():.1f}%."]
    return found if encode is None else found + shared_beginnings(task, encode, renderers)


def shared_beginnings(task: Task, encode: Encode, renderers: Mapping[Variant, Renderer] | None = None) -> list[str]:
    """Return a line for each group of options that begin with the same token; arguments as in `findings`."""
    shared: dict[tuple[str, ...], str] = {}
    for variant, render in (task.renderers("all") if renderers is None else renderers).items():
        groups: dict[int, list[str]] = {}
        for option, ids in zip(task.options, encode(render), strict=True):
            groups.setdefault(ids[0], []).append(option)
        for group in groups.values():
            if len(group) > 1:
                shared.setdefault(tuple(group), repr(variant.answer_prefix) if variant.answer_prefix else "the prompt")
    return [
        f"{task.name}: the answers {listed(options)} begin with the same token after {prefix}; the first token "
        "cannot tell them apart. They are judged by their tokens up to where they differ, and the score first_token is "
        "not defined."
        for options, prefix in shared.items()
    ]


def long_prompts(task: Task, tokenizer: Any, limit: int) -> list[str]:
    """Return a line if test prompts, in any variant, have more than `limit` tokens."""
    renderers = task.renderers("all").values()
    lengths = [max(len(render.prompt(tokenizer, row).ids) for render in renderers) for row in task.test]
    above = sum(length > limit for length in lengths)
    if not above:
        return []
    return [
        f"{task.name}: {above} of {len(lengths)} test rows make a prompt of more than {limit} tokens (up to "
        f"{max(lengths)}); eval cuts their queries to fit."
    ]


class Unread(NamedTuple):
    """What a generator's tokenizer cannot read of some queries."""

    unknown: float
    """Share of their tokens that are the unknown token, from 0 to 1."""
    alike: float
    """Share of the distinct queries that have the same tokens as another one, from 0 to 1."""


def unread(tokenizer: Any, queries: Sequence[str]) -> Unread:
    """Measure what a tokenizer cannot read, on queries without special tokens.

    Queries that differ only in case, white space or the composition of accents count once.
    """
    distinct = list({same(query): query for query in queries}.values())
    if not distinct:
        return Unread(0.0, 0.0)
    encoded = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = sum(token == tokenizer.unk_token_id for ids in encoded for token in ids)
    times = Counter(map(tuple, encoded))
    alike = sum(count for count in times.values() if count > 1)
    return Unread(unknown / max(1, sum(map(len, encoded))), alike / len(distinct))


def unread_queries(task: Task, tokenizer: Any, splits: Sequence[str] = SPLITS) -> list[str]:
    """Return a line if a generator's tokenizer cannot read much of a task's queries, which all get one vector then."""
    found = unread(tokenizer, [row.input for split in splits for row in getattr(task, split)])
    if max(found) <= UNREAD:
        return []
    return [
        f"{task.name}: {100 * found.unknown:.0f}% of the tokens that the generator reads of the queries are its "
        f"unknown token, and {100 * found.alike:.0f}% of the queries look like another one to it, so that they get the "
        "same vector. Use the generator self, or a multilingual encoder."
    ]


def listed(options: Sequence[str], most: int = 8) -> str:
    """Return a comma-separated list of options, cut to the first `most`."""
    rest = f" and {len(options) - most} others" if len(options) > most else ""
    return ", ".join(map(repr, options[:most])) + rest
