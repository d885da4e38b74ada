"""Tasks: examples in three splits, templates, and the options among which an answer is judged."""

import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

from atv.data.render import INPUT, Example, Renderer, RendererFactory, query_template
from atv.data.rendering import Rendering, described
from atv.errors import ATVError, unknown

if TYPE_CHECKING:
    from atv.data.taught import Taught

ANSWER_PREFIXES = ("A:", "Answer:", "The answer is")
"""Possible texts before the answer (section 3 of the paper). Training uses the first one, evaluation all of them."""
UNSEEN = "Unseen"
"""Category of tasks that are not trained on unless they are named; tables exclude them from the mean."""
VARIANTS = ("trained", "all", "diagonal", "first")
FEW_OPTIONS = 20
"""A task with more different answers is not one of choosing among options."""
SPLITS = ("train", "valid", "test")
PLAIN = Rendering("template")
"""How prompts are written unless a task says otherwise."""
DRAWN_TEST = "drawn_test"
"""Key of the digest of the test inputs, if they were drawn, in `Task.prepared` and in an adapter's training summary."""
QUERY_COLUMNS = "query_columns"
"""Key, in both as well, of the columns of a table that its queries are read from."""
ENOUGH_TO_JUDGE = 10
"""Fewer test rows than this may all have the same answer by chance; from here on they suggest hidden labels."""


def composed(name: str) -> str:
    """Return a name in NFC: file systems, keyboards and clipboards encode accents and Hangul differently."""
    return unicodedata.normalize("NFC", name)


def text_of(value: object) -> str | None:
    """Return a string unchanged and a whole number as its digits; None for anything else, which is ambiguous.

    Half of a surrogate pair is no character, and Python writes no whole number of more than 4,300 digits: None as well.
    """
    if isinstance(value, str):
        return value if whole(value) else None
    if not isinstance(value, Integral) or isinstance(value, bool):
        return None
    try:
        return str(int(value))
    except ValueError:
        return None


def whole(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """Return a value for an error, with what is wrong with it if that cannot be seen."""
    try:
        text = f"{value!r:.80}"
    except ValueError:
        return "a whole number of more than 4,300 digits"
    return text if not isinstance(value, str) or whole(value) else f"{text}, with half of a surrogate pair"


def not_text(where: str, key: str, value: object) -> ATVError:
    """Return the error for an input or output that `text_of` does not accept."""
    return ATVError(
        f"{where} has {key} {shown(value)}; expected a text or a whole number. Write it as the text that the LLM "
        "should read."
    )


class Variant(NamedTuple):
    """The key of a task's renderer in records: the number of its template, and its answer prefix."""

    template: int
    answer_prefix: str | None


@dataclass(frozen=True)
class Task:
    """Examples, templates and options of one task, validated on creation.

    A whole number as input or output becomes its digits; the name is normalised to Unicode's composed form, NFC.

    Raises:
        ATVError: a split is empty, an input or output is neither text nor a whole number, a template has no {input}, an
            answer prefix is blank, an input is in two splits, or all test answers are the same (a constant answer would
            then score 100).
    """

    name: str
    templates: tuple[str, ...]
    train: tuple[Example, ...]
    valid: tuple[Example, ...]
    test: tuple[Example, ...]
    category: str = "other"
    options: tuple[str, ...] = field(default=())
    """The possible answers; by default all answers that occur in the task, sorted."""
    answer_prefixes: tuple[str | None, ...] = ANSWER_PREFIXES
    """Texts before the answer, as in `Template`; training uses the first one."""
    renderer: RendererFactory = PLAIN
    """Makes a renderer from a template and an answer prefix."""
    taught: Mapping[Example, "Taught"] = field(default_factory=dict, compare=False, repr=False)
    """A teacher's answers to examples: then training fits the teacher's distribution instead of the answer's tokens."""
    prepared: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Where the rows come from and what was done to them: "source" (arguments of `load_tasks`), `QUERY_COLUMNS`,
    "drawn" (rows of each drawn split), `DRAWN_TEST`, "dropped" (rows by reason) and "draws" (arguments of `drawn`).
    Recorded by trainings, in a file that is not part of the adapter."""

    def __post_init__(self) -> None:
        """Validate the data: scores measured on invalid data would be meaningless."""
        self._check_ways()
        object.__setattr__(self, "name", composed(self.name))
        seen: dict[str, str] = {}
        for split in SPLITS:
            rows = _checked(getattr(self, split), f"Task {self.name}: {split}")
            object.__setattr__(self, split, rows)
            if not rows:
                raise ATVError(f"Task {self.name}: the split {split!r} is empty; expected at least one row.")
            for row in rows:
                if seen.setdefault(row.asked, split) != split:
                    raise ATVError(
                        f"Task {self.name}: the input {row.input[:60]!r} is in {seen[row.asked]} and in {split}; "
                        "remove it from one of them, or the test measures memory."
                    )
        if len(self.test) >= ENOUGH_TO_JUDGE and len({row.output for row in self.test}) == 1:
            raise ATVError(
                f"Task {self.name}: all {len(self.test)} test answers are {self.test[0].output!r}; expected at least "
                "two different ones (a hidden-label split looks like this, and so do the first rows of a sorted one)."
            )
        if not self.options:
            answers = {row.output for split in SPLITS for row in getattr(self, split)}
            object.__setattr__(self, "options", tuple(sorted(answers)))

    def _check_ways(self) -> None:
        """Raise ATVError for a template without {input}, a blank answer prefix, or an empty list of either."""
        if not self.templates:
            raise ATVError(f"Task {self.name}: no template; expected at least one with {{input}} in it.")
        for template in self.templates:
            if INPUT not in template:
                raise ATVError(
                    f"Task {self.name}: the template {template!r} has no {{input}}; put {{input}} where the input goes."
                )
        blank = [prefix for prefix in self.answer_prefixes if prefix is not None and not prefix.strip()]
        if blank or not self.answer_prefixes:
            raise ATVError(
                f"Task {self.name}: the answer prefixes are {list(self.answer_prefixes)}; expected at least one, each "
                "some text, or None for no prefix."
            )

    @property
    def chooses(self) -> bool:
        """Whether an answer is one of a few options, rather than a text of its own in most rows."""
        counts = Counter(row.output for split in SPLITS for row in getattr(self, split))
        repeated = sum(count > 1 for count in counts.values())
        return len(self.options) <= FEW_OPTIONS and 2 * repeated >= len(counts)

    @cached_property
    def has_lines(self) -> bool:
        """Whether an answer has several lines."""
        return any("\n" in option for option in self.options)

    def renderers(self, which: str = "all", reads: str = "query") -> dict[Variant, Renderer]:
        """Return the renderers for evaluation.

        Args:
            which: "trained": every template with the answer prefix of training; "all": every template with every
                answer prefix (the paper); "diagonal": every template once, each with the next prefix; "first": the
                first template with the prefix of training.
            reads: what the generator reads, as in `ATVConfig.reads`: "query"; "prompt", which is the query in the
                first template with the prefix of training, whatever the LLM reads; or "conversation", which is all of
                a chat's turns.
        """
        if which not in VARIANTS:
            raise unknown("variants", which, VARIANTS)
        templates, prefixes = range(len(self.templates)), self.answer_prefixes
        if which == "first":
            variants = [Variant(0, prefixes[0])]
        elif which == "diagonal":
            variants = [Variant(template, prefixes[template % len(prefixes)]) for template in templates]
        elif which == "trained":
            variants = [Variant(template, prefixes[0]) for template in templates]
        else:
            variants = [Variant(template, prefix) for template in templates for prefix in prefixes]
        return {variant: self._renderer(variant, reads) for variant in variants}

    def training_renderers(self, reads: str = "query") -> tuple[Renderer, ...]:
        """Return the renderers for training: every template with the first answer prefix; `reads` as in `renderers`."""
        return tuple(self.renderers("trained", reads).values())

    def _renderer(self, variant: Variant, reads: str) -> Renderer:
        query = query_template(reads, self.templates[0], self.answer_prefixes[0])
        made = self.renderer(self.templates[variant.template], variant.answer_prefix, query)
        if not isinstance(made, Renderer):
            raise ATVError(
                f"Task {self.name}: its renderer makes a {type(made).__name__}; expected a hashable object with the "
                "methods prompt and answer, such as a frozen dataclass (see atv.data.render.Renderer)."
            )
        return made

    def asking(self) -> dict[str, Any]:
        """Return templates, answer prefixes, renderer, and the options if it `chooses`, as a JSON-ready dictionary."""
        return {
            "templates": list(self.templates),
            "answer_prefixes": list(self.answer_prefixes),
            "renderer": described(self.renderer),
            "options": list(self.options) if self.chooses else None,
        }

    def majority(self) -> float:
        """Return the share of the most frequent test answer, which is the best score of a constant answer."""
        return Counter(row.output for row in self.test).most_common(1)[0][1] / len(self.test)

    def digest(self, *splits: str) -> str:
        """Return a short digest of the rows of these splits, to detect changed data."""
        rows = [row for split in splits for row in getattr(self, split)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    def drawn(self, train: int | None, valid: int | None, seed: int, test: int | None = None) -> "Task":
        """Return the task with at most that many rows per split, drawn at random; None keeps a split unchanged.

        The draw of training and validation rows depends on `seed` and the task's name. That of test rows depends on the
        name alone and keeps their order, so that every method is evaluated on the same ones whatever the seed.
        """
        _refuse_none(train=train, valid=valid, test=test)
        draw, kept = random.Random(f"{seed} {self.name}"), random.Random(f"test {self.name}")
        draws = [*self.prepared.get("draws", ()), {"train": train, "valid": valid, "seed": seed}]
        return replace(
            self,
            prepared=self.prepared if train is None and valid is None else {**self.prepared, "draws": draws},
            train=self.train if train is None else tuple(draw.sample(self.train, min(train, len(self.train)))),
            valid=self.valid if valid is None else tuple(draw.sample(self.valid, min(valid, len(self.valid)))),
            test=self.test
            if test is None or test >= len(self.test)
            else tuple(self.test[row] for row in sorted(kept.sample(range(len(self.test)), test))),
        )

    def first_test_rows(self, count: int) -> "Task":
        """Return the task with its first `count` test rows, for tables whose rows are fixed by the order of the file.

        Raises:
            ATVError: an answer expected ten times or more in `count` rows is not among them: the file is sorted.
        """
        _refuse_none(test=count)
        first = self.test[:count]
        taken = {row.output for row in first}
        for answer, times in Counter(row.output for row in self.test).items():
            if answer not in taken and times * count >= ENOUGH_TO_JUDGE * len(self.test):
                raise ATVError(
                    f"Task {self.name}: none of the first {count} test rows is answered {answer!r}, and {times} of all "
                    f"{len(self.test)} are; expected rows in random order. Shuffle the test split."
                )
        return replace(self, test=first)


def _checked(rows: Iterable[object], where: str) -> tuple[Example, ...]:
    """Return rows as pairs of strings; ATVError names the first invalid one."""
    checked = []
    for index, row in enumerate(rows):
        if not isinstance(row, Example) and (not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 2):
            raise ATVError(f"{where} row {index} is {row!r}; expected an input and an output, as Example makes them.")
        texts = []
        for key, value in zip(("input", "output"), row[:2], strict=True):
            if (text := text_of(value)) is None:
                raise not_text(f"{where} row {index}", key, value)
            texts.append(text)
        checked.append(Example(texts[0], texts[1], row.turns if isinstance(row, Example) else ()))
    return tuple(checked)


def _refuse_none(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ATVError(f"{name} rows is {count}; expected a whole number from 1.")
