"""Metrics. A metric knows nothing about models: it declares what it needs and receives the example and that output.

Metrics that need the same output share one request to the LLM. All scores are from 0 to 1, or None if a score is not
defined for an example.
"""

import importlib
import json
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from atv.data import Example, Task
from atv.data.task import FEW_OPTIONS
from atv.errors import ATVError, unknown
from atv.files import sha256
from atv.words import words

if TYPE_CHECKING:
    from atv.lm.scoring import Options

Need = Literal["next_token", "loglikelihood", "generate"]
GENERATED = "generated"
"""Key of the generated answer in rows, however many metrics judge it."""


class NextToken(NamedTuple):
    """The output for metrics that need `next_token`."""

    token: int
    """The most likely next token over the whole vocabulary."""
    text: str
    """The same as text."""
    option: str
    """The most likely of the task's options, judged by their tokens up to where they differ."""
    options: "Options"
    """The task's options, tokenised."""

    def texts(self) -> dict[str, str]:
        """The texts recorded in a row, by score."""
        return {"first_token": self.text, "first_token_among_options": self.option}


class Likelihoods(NamedTuple):
    """The output for metrics that need `loglikelihood`."""

    options: Sequence[str]
    values: Sequence[float]
    """Log-probability of each option as a whole."""
    sums: bool = True
    """The values are sums over tokens, so lower for longer options. False for the scores of a classifier."""

    def best(self) -> str:
        """The most likely option; the first one if tied."""
        return self._highest(self.values)

    def best_per_byte(self) -> str:
        """The option with the highest log-probability per UTF-8 byte. A classifier's scores are used unchanged."""
        if not self.sums:
            return self.best()
        sizes = [len(option.encode()) for option in self.options]
        return self._highest([value / size for value, size in zip(self.values, sizes, strict=True)])

    def probabilities(self) -> dict[str, float] | None:
        """Probability of each option among the options: the softmax of `values`, to six significant digits.

        None for more than `FEW_OPTIONS` options, which would make records large, and if no option has a finite value.
        """
        highest = max(self.values)
        shares = [math.exp(value - highest) for value in self.values]
        total = math.fsum(shares)
        if len(self.options) > FEW_OPTIONS or not math.isfinite(total):
            return None
        return {option: float(f"{share / total:.6g}") for option, share in zip(self.options, shares, strict=True)}

    def _highest(self, values: Sequence[float]) -> str:
        return self.options[max(range(len(values)), key=values.__getitem__)]

    def texts(self) -> dict[str, str]:
        """The texts recorded in a row, by score."""
        return {"option_likelihood": self.best(), "option_likelihood_per_byte": self.best_per_byte()}


def reads_whole(metric: "Metric") -> bool:
    """Whether a metric judges all lines of a generated answer, and not the first one alone: it has `whole = True`.

    If the task's own answers have several lines, every metric does.
    """
    return bool(getattr(metric, "whole", False))


@runtime_checkable
class Metric(Protocol):
    """Judges one answer."""

    @property
    def name(self) -> str:
        """Its name on the command line and in records."""

    @property
    def needs(self) -> Need:
        """What it needs from the LLM: `output` is a `NextToken`, `Likelihoods`, or the generated text."""

    def __call__(self, example: Example, output: Any) -> Mapping[str, float | None]:
        """Scores by name, each from 0 to 1, or None if not defined."""


class FirstToken:
    """The paper's accuracy (section 3): the most likely next token over the whole vocabulary begins the answer.

    It is not defined (None) if first tokens do not tell the task's options apart. A second score says whether the
    answer is the most likely option, each judged by its tokens up to where it differs from all others.
    """

    name = "first_token"
    needs: Need = "next_token"

    def __call__(self, example: Example, output: NextToken) -> dict[str, float | None]:
        """`first_token` and `first_token_among_options`."""
        begins = output.options.begins(output.token, example.output)
        return {
            "first_token": None if begins is None else float(begins),
            "first_token_among_options": float(output.option == example.output),
        }


class OptionLikelihood:
    """The answer is the most likely of the task's options as a whole, and the most likely per byte."""

    name = "option_likelihood"
    needs: Need = "loglikelihood"

    def __call__(self, example: Example, output: Likelihoods) -> dict[str, float | None]:
        """`option_likelihood` and `option_likelihood_per_byte`."""
        return {
            "option_likelihood": float(output.best() == example.output),
            "option_likelihood_per_byte": float(output.best_per_byte() == example.output),
        }


class ExactMatch:
    """The generated answer equals the answer, ignoring surrounding white space."""

    name = "exact_match"
    needs: Need = "generate"

    def __call__(self, example: Example, output: str) -> dict[str, float | None]:
        """`exact_match`."""
        return {"exact_match": float(output.strip() == example.output.strip())}


def normalized_words(text: str) -> list[str]:
    """Words as compared by SQuAD: lower case, without punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


class TokenF1:
    """F1 of the words shared by the generated answer and the answer, counted as in SQuAD."""

    name = "token_f1"
    needs: Need = "generate"

    def __call__(self, example: Example, output: str) -> dict[str, float | None]:
        """`token_f1`."""
        found, expected = normalized_words(output), normalized_words(example.output)
        if not found or not expected:
            return {"token_f1": float(found == expected)}
        shared = (Counter(found) & Counter(expected)).total()
        return {"token_f1": 2 * shared / (len(found) + len(expected))}


class _Words:
    """The tokenizer that rouge-score is given: its own one keeps Latin letters without accents and digits alone."""

    def tokenize(self, text: str) -> list[str]:
        return words(text.replace("_", " "), pairs=False)


class RougeL:
    """ROUGE-L (F-measure) of the generated answer, computed with rouge-score without stemming, for any script."""

    name = "rouge_l"
    needs: Need = "generate"

    def __init__(self) -> None:
        if find_spec("rouge_score") is None:
            raise ATVError(
                "The metric rouge_l needs the package rouge-score, which is not installed. Install it with: "
                "pip install 'adaptive-task-vectors[rouge]'"
            )

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rougeL"], tokenizer=_Words())

    def __call__(self, example: Example, output: str) -> dict[str, float | None]:
        """`rouge_l`."""
        return {"rouge_l": float(self._scorer.score(example.output, output)["rougeL"].fmeasure)}


class JSONMatch:
    """The generated answer as JSON, compared with the answer's top-level fields.

    The text may be a Markdown code block (three backticks, optionally followed by `json`). Numbers are compared by
    value, so 1 equals 1.0; the order of fields does not matter.
    """

    name = "json"
    needs: Need = "generate"
    whole = True

    def __call__(self, example: Example, output: str) -> dict[str, float | None]:
        """`json_valid` and `json_fields`."""
        found, expected = _read_json(output), _read_json(example.output)
        return {"json_valid": float(found is not None), "json_fields": _shared_fields(found, expected)}


class _JSON(NamedTuple):
    """A parsed text, to tell the value null from a text that is not JSON."""

    value: Any


def _read_json(text: str) -> _JSON | None:
    """The value of a text or of the code block that it is; None if it is not JSON."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*)```", text.strip(), flags=re.DOTALL | re.IGNORECASE)
    try:
        return _JSON(json.loads(fenced[1] if fenced else text, parse_constant=_not_json))
    except (ValueError, RecursionError):  # the latter: brackets nested deeper than the parser's stack
        return None


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # Python's parser takes NaN and Infinity


def _shared_fields(found: _JSON | None, expected: _JSON | None) -> float | None:
    """Share of the expected top-level fields with equal values; for values without fields, whether they are equal."""
    if expected is None:
        return None
    if found is None:
        return 0.0
    fields = expected.value
    if not isinstance(fields, dict) or not fields:
        return float(_same(found.value, fields))
    if not isinstance(found.value, dict):
        return 0.0
    return sum(key in found.value and _same(found.value[key], value) for key, value in fields.items()) / len(fields)


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal. In Python True equals 1, in JSON it does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


class UserMetric:
    """A user-defined metric: a function of an example and the generated answer.

    Args:
        name: its name in records.
        function: takes an `Example` and the text. Returns a number from 0 to 1, recorded under the function's name, or
            a dictionary of such numbers (None: not defined for this example).
    """

    needs: Need = "generate"
    whole = True

    def __init__(self, name: str, function: Callable[[Example, str], Any]) -> None:
        self.name, self.function = name, function
        self.score = getattr(function, "__name__", name)

    def __call__(self, example: Example, output: str) -> dict[str, float | None]:
        """The function's checked return value."""
        try:
            found = self.function(example, output)
        except Exception as error:
            raise ATVError(
                f"The metric {self.name} raised {type(error).__name__} ({error}) for the answer {output[:60]!r} to "
                f"{example.input[:60]!r}."
            ) from error
        scores = dict(found) if isinstance(found, Mapping) else {self.score: found}
        return {str(key): self._checked(value) for key, value in scores.items()}

    def _checked(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ATVError(
                f"The metric {self.name} returned {value!r}; expected a number from 0 to 1, None, or a dictionary of "
                "these by name."
            )
        return number


def recorded_name(metric: Metric) -> str:
    """Return a metric's name in a run's settings: a user's has the digest of its module's file.

    A run that is resumed must have the scores of one version of a function.
    """
    made_by = metric.function if isinstance(metric, UserMetric) else type(metric)
    module = sys.modules.get(made_by.__module__)
    file = getattr(module, "__file__", None)
    if made_by.__module__ == __name__ or file is None:
        return metric.name
    return f"{metric.name} ({sha256(Path(file))[:16]})"


METRICS: dict[str, Callable[[], Metric]] = {
    each.name: each for each in (FirstToken, OptionLikelihood, ExactMatch, TokenF1, RougeL, JSONMatch)
}
"""Constructors of the built-in metrics."""

SCORES = {
    "first_token": "the most likely next token over the whole vocabulary is the first token of the answer",
    "first_token_among_options": "the likeliest of the task's options, by their tokens up to where they differ, is the "
    "answer",
    "option_likelihood": "the option with the highest log-probability, summed over its tokens, is the answer",
    "option_likelihood_per_byte": "the option with the highest log-probability per byte is the answer",
    "exact_match": "the generated answer is the answer",
    "token_f1": "F1 of the words that the generated answer and the answer share",
    "rouge_l": "ROUGE-L F-measure of the generated answer",
    "json_valid": "the generated answer is JSON",
    "json_fields": "share of the answer's top-level JSON fields that the generated answer has with the same value",
}
"""Descriptions of these metrics' scores."""


def load_metric(named: "str | Metric | Callable[[Example, str], Any]") -> Metric:
    """Load a metric by name, or a user-defined one.

    Args:
        named: a key of `METRICS`; `package.module:function` (modules in the current folder are found too); a `Metric`;
            or a function as for `UserMetric`.

    Raises:
        ATVError: the metric, module or function does not exist, or a package that it needs is missing.
    """
    if not isinstance(named, str):
        return _as_metric(f"{getattr(named, '__module__', '')}:{getattr(named, '__name__', named)}", named)
    if ":" not in named:
        if named not in METRICS:
            raise unknown("metric", named, METRICS, "Or give your own function, as package.module:function.")
        return METRICS[named]()
    module, _, name = named.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ATVError(
            f"The metric {named!r}: importing {module!r} raised {type(error).__name__} ({error}); expected "
            "package.module:function, with a module that can be imported from here."
        ) from error
    return _as_metric(named, found)


def _as_metric(name: str, found: Any) -> Metric:
    made = found() if isinstance(found, type) and hasattr(found, "needs") else found
    if isinstance(made, Metric):
        if made.needs not in ("next_token", "loglikelihood", "generate"):
            raise ATVError(f"The metric {name!r} needs {made.needs!r}; expected next_token, loglikelihood or generate.")
        return made
    if hasattr(made, "needs") or not callable(made):
        raise ATVError(
            f"The metric {name!r} is {made!r}; expected a function of an example and the generated text, as "
            "package.module:function, or a metric with a name, needs and __call__."
        )
    return UserMetric(name, made)


def default_metric(task: Task) -> str:
    """A task's default metric: the likelihood of its options if it `chooses` among a few, else exact match."""
    return OptionLikelihood.name if task.chooses else ExactMatch.name
