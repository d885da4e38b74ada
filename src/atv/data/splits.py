"""Training, validation and test rows of a table: each input once, and missing splits drawn from the training rows."""

import random
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from atv.data.render import Example
from atv.data.task import SPLITS
from atv.errors import ATVError

DRAWN = {"valid": (0.1, 500), "test": (0.2, 1000)}
"""The share of the training rows that a missing split is drawn from, and how many rows it has at most."""
SEED = 42
"""Of these draws. The same for every command, since rows that one of them trains on must not be tested by another."""


def split_rows(
    name: str, found: Mapping[str, list[Example]], dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str]]:
    """Each input once, in all three splits; and the names of those that are drawn."""
    splits = _apart(found, dropped)
    drawn = [split for split in ("test", "valid") if split not in splits]
    for split in drawn:
        splits[split] = _draw(name, splits, split)
    return splits, drawn


def split_like_answers(
    name: str, found: Mapping[str, list[Example]], dropped: Counter[str]
) -> tuple[dict[str, list[Example]], list[str]]:
    """Like `split_rows` of the rows with an answer, with the other rows behind them where the table has them."""
    answered, counted = {split: [row for row in rows if row.output] for split, rows in found.items()}, Counter[str]()
    try:
        splits, drawn = split_rows(name, answered, counted)
    except ATVError:  # too few answers to draw from, so that no evaluation reads this table
        return split_rows(name, {s: [row._replace(output="") for row in rows] for s, rows in found.items()}, dropped)
    dropped.update(counted)
    known = {same(row.asked) for rows in answered.values() for row in rows}
    others = _apart({split: [row for row in rows if not row.output] for split, rows in found.items()}, dropped)
    for split, rows in others.items():
        new = [row for row in rows if same(row.asked) not in known]
        dropped["repeated"] += len(rows) - len(new)
        splits[split] = splits[split] + new
    return splits, drawn


def same(text: str) -> str:
    """What two inputs have in common that count as one: case, white space and the composition of accents aside."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _apart(found: Mapping[str, list[Example]], dropped: Counter[str]) -> dict[str, list[Example]]:
    """Each input once: the test rows keep theirs, then the validation rows, then the training rows."""
    seen: dict[str, tuple[str, str]] = {}
    apart: dict[str, list[Example]] = {}
    for split in (split for split in reversed(SPLITS) if split in found):
        apart[split] = []
        for example in found[split]:
            key = same(example.asked)
            if key not in seen:
                seen[key] = split, example.output
                apart[split].append(example)
            elif seen[key][0] != split:
                dropped[f"of {split} that are in {seen[key][0]}"] += 1
            else:
                dropped["repeated" if seen[key][1] == example.output else "repeated with another answer"] += 1
    return apart


def _draw(name: str, splits: dict[str, list[Example]], split: str) -> list[Example]:
    """Take rows of a missing split from the training rows, as many of each answer as its share."""
    rows = splits.get("train", [])
    share, most = DRAWN[split]
    count = min(most, round(share * len(rows)))
    if count < 1:
        raise ATVError(f"{name} has no {split} split, and {len(rows)} training rows are too few to draw one from.")
    taken = stratified([row.output for row in rows], count, f"{SEED} {split}")
    left = set(range(len(rows))).difference(taken)
    splits["train"] = [rows[index] for index in sorted(left)]
    return [rows[index] for index in taken]


def stratified(answers: Sequence[str], count: int, seed: str) -> list[int]:
    """Return which of the rows with these answers are drawn: `count` at most, in ascending order.

    They are drawn at random, with each answer in its share of all rows, up to one row. The first rows of a table that
    is sorted by answer would all have the same one.
    """
    order = random.Random(seed)
    by_answer: dict[str, list[int]] = {}
    for index in order.sample(range(len(answers)), len(answers)):
        by_answer.setdefault(answers[index], []).append(index)
    # The i-th of n rows of an answer comes at (i + u) / n: any beginning of this order has each answer's share. Each
    # answer has a random u of its own, so that an answer with few rows is neither always drawn nor never.
    places: dict[int, float] = {}
    for of in by_answer.values():
        start = order.random()
        places |= {index: (i + start) / len(of) for i, index in enumerate(of)}
    return sorted(sorted(places, key=places.__getitem__)[:count])
