"""Five small tasks that come with the package, so that everything can be tried without any data.

`sentiment`, `topic` and `outlook` are original sentences; `boolean_expressions` and `temporal_sequences` are made by
a seeded generator in the style of the BIG-Bench Hard tasks of the same names. `outlook` is never trained on by
default: it asks for the answers of `sentiment` about texts of another kind.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

from atv.data.render import Example
from atv.data.task import UNSEEN, Task

_NAMES = (
    "Ada",
    "Bruno",
    "Chiara",
    "Dev",
    "Elif",
    "Farid",
    "Greta",
    "Hana",
    "Ivo",
    "June",
    "Kofi",
    "Lena",
    "Mio",
    "Noor",
)
_PLACES = (
    "the bakery", "the library", "the swimming pool", "the dentist", "the orchard", "the harbour", "the cinema",
    "the post office", "the climbing hall", "the museum", "the workshop", "the allotment", "the chess club",
)  # fmt: skip
_DOINGS = (
    "repairing a bicycle", "teaching a class", "waiting at the station", "painting the fence", "feeding the hens",
    "playing the organ", "sorting parcels", "washing windows", "reading on the terrace", "queueing for tickets",
    "rehearsing a play", "walking two dogs", "measuring a field",
)  # fmt: skip


def _disjunction(rng: random.Random, depth: int) -> tuple[str, bool]:
    """A random expression and its value; `or` binds weakest, then `and`, then `not` and brackets, as in Python."""
    parts = [_conjunction(rng, depth) for _ in range(rng.choice((1, 1, 2)))]
    return " or ".join(text for text, _ in parts), any(value for _, value in parts)


def _conjunction(rng: random.Random, depth: int) -> tuple[str, bool]:
    parts = [_negation(rng, depth) for _ in range(rng.choice((1, 2, 2)))]
    return " and ".join(text for text, _ in parts), all(value for _, value in parts)


def _negation(rng: random.Random, depth: int) -> tuple[str, bool]:
    roll = rng.random()
    if roll < 0.35:
        text, value = _negation(rng, depth)
        return f"not {text}", not value
    if roll < 0.6 and depth < 2:
        text, value = _disjunction(rng, depth + 1)
        return f"( {text} )", value
    value = rng.random() < 0.5
    return str(value), value


def _boolean_example(rng: random.Random) -> Example:
    wanted = rng.random() < 0.5
    while True:
        text, value = _disjunction(rng, 0)
        if value == wanted and 4 <= len(text.split()) <= 12:
            return Example(f"{text} is", str(value))


def _hour(hour: int) -> str:
    return f"{(hour - 1) % 12 + 1} {'am' if hour < 12 else 'pm'}"


def _temporal_example(rng: random.Random) -> Example:
    """Someone was seen during every span of a day but one; that one is the answer."""
    name, place = rng.choice(_NAMES), rng.choice(_PLACES)
    cuts = sorted(rng.sample(range(7, 22), 5))
    spans = [f"{_hour(start)} to {_hour(end)}" for start, end in pairwise(cuts)]
    free = rng.randrange(4)
    seen = [
        f"{rng.choice([other for other in _NAMES if other != name])} saw {name} {doing} from {span}."
        for span, doing in zip(spans, rng.sample(_DOINGS, 4), strict=True)
    ]
    options = rng.sample(range(4), 4)
    listed = "\n".join(f"{letter}. {spans[index]}" for letter, index in zip("ABCD", options, strict=True))
    story = " ".join(seen[index] for index in range(4) if index != free)
    text = (
        f"{name} went to {place} today. {story} {place.capitalize()} closed at {_hour(cuts[4])}. "
        f"When could {name} have been there?\nOptions:\n{listed}"
    )
    return Example(text, "ABCD"[options.index(free)])


def _generated(make: Callable[[random.Random], Example], seed: int, train: int, test: int) -> dict[str, Any]:
    """Rows of a seeded generator, every input once over all splits."""
    sizes = {"train": train, "valid": 20, "test": test}
    rng = random.Random(seed)
    rows: dict[str, Example] = {}
    while len(rows) < sum(sizes.values()):
        example = make(rng)
        rows.setdefault(example.input, example)
    left = iter(rows.values())
    return {split: tuple(next(left) for _ in range(size)) for split, size in sizes.items()}


def _written(name: str) -> dict[str, Any]:
    text = files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return {split: tuple(Example(**row) for row in rows) for split, rows in json.loads(text).items()}


_SENTIMENT = (
    "{input}\nQuestion: Is this opinion positive or negative? Answer positive or negative.",
    "Read what someone says about something they tried.\n\n{input}\n\nIs it positive or negative?",
    "{input}\nWould you call the tone of this remark positive or negative? Respond with positive or negative.",
)
_TOPIC = (
    "{input}\nQuestion: Is this sentence about sports, business, science or food?",
    "Sort the sentence under one heading: sports, business, science or food.\n\nSentence: {input}",
    "{input}\nWhich topic fits best? Respond with sports, business, science or food.",
)
_BOOLEAN = (
    "Work out the value of a Boolean expression.\n\nQuestion: {input}",
    "Say whether the expression below comes to True or False.\n\nQuestion: {input}",
    "Evaluate this logical expression. Respond with True or False.\n\nQuestion: {input}",
)
_TEMPORAL = (
    "Find the time when it could have happened. Answer with a letter.\n\nQ: {input}",
    "Which time was free? Respond with 'X', where X is the letter of the option.\n\nQ: {input}",
    "Answer this question about someone's day with the letter of the right choice.\n\nQ: {input}",
)
_OUTLOOK = (
    "{input}\nQuestion: Is this positive or negative for those concerned? Answer positive or negative.",
    "Read an announcement.\n\n{input}\n\nIs what it announces positive or negative?",
    "{input}\nWould you call this news positive or negative? Respond with positive or negative.",
)

BUILTIN: dict[str, Callable[[], Task]] = {
    "sentiment": lambda: Task("sentiment", _SENTIMENT, **_written("sentiment"), category="NLU"),
    "topic": lambda: Task("topic", _TOPIC, **_written("topic"), category="NLU"),
    "boolean_expressions": lambda: Task(
        "boolean_expressions",
        _BOOLEAN,
        **_generated(_boolean_example, seed=1, train=120, test=100),
        category="Reasoning",
    ),
    "temporal_sequences": lambda: Task(
        "temporal_sequences",
        _TEMPORAL,
        **_generated(_temporal_example, seed=2, train=60, test=60),
        category="Reasoning",
    ),
    "outlook": lambda: Task("outlook", _OUTLOOK, **_written("outlook"), category=UNSEEN),
}


@cache
def builtin_task(name: str) -> Task:
    """One of the built-in tasks."""
    return BUILTIN[name]()
