"""Answers as classes: macro-F1, precision and recall of each label, confusions, calibration, and confident mistakes.

Rates are computed with scikit-learn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atv.data.task import FEW_OPTIONS
from atv.errors import ATVError
from atv.evaluation.metrics import GENERATED, OptionLikelihood
from atv.report.comparison import runs_of
from atv.report.statistics import Row, score_names
from atv.report.tables import MISSING, Table, labeller, marked

BINS = 10
"""Number of equally wide bins of probability, of the calibration error and the reliability table."""
MISTAKES = 20
"""Number of mistakes listed for each task and method."""
IMBALANCED = 2 / 3
"""Above this share of the most frequent answer, a table warns that accuracy misleads."""
_LONGEST = 300  # characters of a query in a cell
_SCORE = OptionLikelihood.name
_POOLED = "The rows of all variants and seeds are taken together."

Groups = dict[str, dict[str, list[Row]]]
"""Rows by task and method."""


def answered(row: Mapping[str, Any], score: str) -> str | None:
    """The answer judged by a row's score. None: it judges no answer, or only one token."""
    if score == "first_token" or score not in row["scores"]:
        return None
    found: str | None = row["outputs"].get(score, row["outputs"].get(GENERATED))
    return found


def classified(rows: Sequence[Row]) -> Groups:
    """The rows that chose one of at most `FEW_OPTIONS` options by its likelihood, by task and method.

    Options count if they are the answer of a row or were chosen in one. Other answers, of a classifier that knows none
    of the options, do not count where another row has the probabilities of the options.
    """
    label, found = labeller(rows), Groups()
    for row in rows:
        if answered(row, _SCORE) is not None:
            found.setdefault(row["task"], {}).setdefault(label(row), []).append(row)
    return {task: methods for task, methods in found.items() if _few(_all(methods))}


def _few(rows: Sequence[Row]) -> bool:
    """Whether a task has at most `FEW_OPTIONS` options."""
    recorded = any(0 < len(row.get("probabilities") or ()) <= FEW_OPTIONS for row in rows)
    return recorded or len(_labels(rows)) <= FEW_OPTIONS


def classification_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy, macro-F1 and calibration error, one row per task and method; no table if no row chose an option.

    Args:
        rows: from `load_runs`; those that `classified` returns are used.

    Raises:
        ATVError: there are such rows, and scikit-learn is not installed.
    """
    groups = classified(rows)
    if not groups:
        return []
    _require_sklearn()
    from sklearn.metrics import accuracy_score, f1_score  # here, since the import takes a second

    lines, skewed = [], dict[str, None]()
    for task, methods in groups.items():
        for method, some in methods.items():
            targets, found = _targets(some), _found(some)
            answer, count = Counter(targets).most_common(1)[0]
            accuracy = f"{100 * accuracy_score(targets, found):.1f}"
            macro = f1_score(targets, found, labels=sorted(set(targets)), average="macro", zero_division=0)
            if count > IMBALANCED * len(some):
                accuracy = marked(accuracy)
                skewed[f"{task} ({answer!r}: {100 * count / len(some):.1f}%)"] = None
            error = calibration_error(some)
            cells = [str(len(some)), str(len(set(targets))), f"{100 * count / len(some):.1f}", accuracy]
            cells += [f"{100 * macro:.1f}", MISSING if error is None else f"{100 * error:.1f}"]
            lines.append([task, method, *cells])
    note = (
        "The likeliest option (option_likelihood) as the predicted class. In percent, except rows and labels. Most "
        "frequent: the accuracy of always answering with the most frequent label. Macro-F1: mean of the labels' F1, "
        f"each label with the same weight. ECE: expected calibration error, the mean distance between the predicted "
        f"option's probability and the accuracy in {BINS} equally wide bins of that probability; a dash: "
        f"probabilities were not recorded. {_POOLED}"
    )
    why = "one answer is so frequent that accuracy alone misleads; read macro-F1: " + ", ".join(skewed) + "."
    columns = ["task", "method", "rows", "labels", "most frequent", "accuracy", "macro-F1", "ECE"]
    return [Table("Classification", columns, lines, note, text=2, footnote=why if skewed else "")]


def classification_details(rows: Sequence[Row]) -> list[Table]:
    """The long tables of a classifier: each label; for each task confusion matrix, reliability and mistakes.

    Args and errors as for `classification_tables`.
    """
    groups = classified(rows)
    if not groups:
        return []
    tables = [label_table([row for methods in groups.values() for row in _all(methods)], _SCORE)]
    for task, methods in groups.items():
        tables.append(confusion_table(task, methods))
        sure = {method: some for method, some in methods.items() if _recorded(some)}
        if sure:
            tables += [reliability_table(task, sure), mistakes_table(task, sure)]
    return tables


def label_table(rows: Sequence[Row], score: str | None = None) -> Table:
    """Macro-F1 of each task and method, and precision, recall and F1 of each label.

    Args:
        rows: from `load_runs`. Tasks with more than `FEW_OPTIONS` labels among their answers are left out.
        score: the score whose answers (likeliest option or generated answer) are compared with the labels. None: the
            rows' first score that judges whole answers.

    Raises:
        ATVError: scikit-learn is not installed, or no row has an answer for that score.
    """
    _require_sklearn()
    from sklearn.metrics import precision_recall_fscore_support  # here, since the import takes a second

    usable = [name for name in score_names(rows) if any(answered(row, name) is not None for row in rows)]
    if score is None and usable:
        score = usable[0]
    if score not in usable:
        raise ATVError(f"No row has an answer for the score {score}; expected one of: {', '.join(usable) or 'none'}.")
    groups: dict[tuple[str, str], list[Row]] = {}
    label = labeller(rows)
    for row in rows:
        if answered(row, score) is not None:
            groups.setdefault((row["task"], label(row)), []).append(row)
    lines = []
    for (task, method), some in groups.items():
        labels = sorted(set(_targets(some)))
        if len(labels) > FEW_OPTIONS:
            continue
        targets, found = _targets(some), [answered(row, score) for row in some]
        each = precision_recall_fscore_support(targets, found, labels=labels, zero_division=0)
        macro = precision_recall_fscore_support(targets, found, labels=labels, average="macro", zero_division=0)
        lines.append([task, method, "macro", *(f"{100 * value:.1f}" for value in macro[:3]), str(len(some))])
        lines += [
            [task, method, _line(name), *(f"{100 * value:.1f}" for value in values), str(int(count))]
            for name, *values, count in zip(labels, *each, strict=True)
        ]
    note = (
        f"In percent, for the answers that {score} judges; the rows of all variants and seeds together. Macro: the "
        "unweighted mean over labels. An answer that is not a label counts as a miss of the right one."
    )
    columns = ["task", "method", "label", "precision", "recall", "F1", "rows"]
    return Table(f"Labels: {score}", columns, lines, note)


def confusion_table(task: str, methods: Mapping[str, Sequence[Row]]) -> Table:
    """How often each answer (one row per method and answer) was predicted as each label (columns)."""
    _require_sklearn()
    from sklearn.metrics import confusion_matrix

    labels, lines = _labels(_all(methods)), []
    for method, some in methods.items():
        counts = confusion_matrix(_targets(some), _found(some), labels=labels)
        lines += [[method, _line(name), *map(str, row)] for name, row in zip(labels, counts, strict=True) if row.any()]
    note = f"Number of rows with the answer of the table's row, predicted as the label of the column. {_POOLED}"
    columns = ["method", "answer", *map(_line, labels)]
    runs = runs_of(_all(methods))
    return Table(f"Confusion matrix: {task}", columns, lines, note, text=2, plots=("confusion",), runs=runs)


def reliability_table(task: str, methods: Mapping[str, Sequence[Row]]) -> Table:
    """Accuracy against the predicted option's probability, one row per method and bin of probability."""
    lines = []
    for method, some in methods.items():
        counts, means, rates = _bins(some)
        for number in np.flatnonzero(counts):
            span = f"{100 * number // BINS}–{100 * (number + 1) // BINS}"
            values = (f"{100 * value:.1f}" for value in (means[number], rates[number]))
            lines.append([method, span, str(int(counts[number])), *values])
    note = (
        "In percent. The rows whose predicted option has a probability in this range, its mean there, and the share "
        "of these rows in which it is the answer. Accuracy below the probability means that the method is too sure. "
        f"{_POOLED}"
    )
    columns = ["method", "range", "rows", "probability", "accuracy"]
    runs = runs_of(_all(methods))
    return Table(f"Reliability: {task}", columns, lines, note, text=2, plots=("reliability",), runs=runs)


def mistakes_table(task: str, methods: Mapping[str, Sequence[Row]]) -> Table:
    """The test rows answered wrongly with the highest probability, for each method, with their queries."""
    lines = []
    for method, some in methods.items():
        asked = Counter(row["example"] for row in some)
        wrong = sorted((row for row in some if answered(row, _SCORE) != row["target"]), key=_confidence, reverse=True)
        times, first = Counter(row["example"] for row in wrong), dict[int, Row]()
        for row in wrong:
            first.setdefault(row["example"], row)
        for example, row in list(first.items())[:MISTAKES]:
            texts = (row["query"], row["target"], str(answered(row, _SCORE)))
            cells = [f"{100 * _confidence(row):.1f}", f"{times[example]} of {asked[example]}"]
            lines.append([method, *map(_line, texts), *cells])
    note = (
        f"Up to {MISTAKES} test rows for each method, those with the highest probability (in percent) of a wrong "
        "option, each in the prompt where that is highest. Wrong in: number of prompts (variants and seeds) with a "
        f"wrong option. White space is collapsed, and queries are cut after {_LONGEST} characters."
    )
    columns = ["method", "query", "answer", "predicted", "probability", "wrong in"]
    return Table(f"Most confident mistakes: {task}", columns, lines, note, text=4)


def calibration_error(rows: Sequence[Row]) -> float | None:
    """Expected calibration error, from 0 to 1; None if the probabilities of some rows were not recorded.

    The distance between mean probability and accuracy in each of `BINS` equally wide bins of the predicted option's
    probability, averaged with the bins' numbers of rows as weights (Guo et al. 2017, arXiv 1706.04599).
    """
    if not _recorded(rows):
        return None
    counts, means, rates = _bins(rows)
    return float(np.sum(counts * np.abs(means - rates)) / np.sum(counts))


def _bins(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Number of rows, mean probability and accuracy of each bin, each of shape (BINS,); 0 in empty bins."""
    sure = [_confidence(row) for row in rows]
    right = [float(answered(row, _SCORE) == row["target"]) for row in rows]
    counts, sums, hits = (
        np.histogram(sure, BINS, (0, 1), weights=weights)[0].astype(float) for weights in (None, sure, right)
    )
    there = np.maximum(counts, 1)
    return counts, sums / there, hits / there


def _confidence(row: Row) -> float:
    """The probability of the predicted option."""
    return float(row["probabilities"][answered(row, _SCORE)])


def _recorded(rows: Sequence[Row]) -> bool:
    """Whether all rows have probabilities."""
    return all(row.get("probabilities") is not None for row in rows)


def _targets(rows: Sequence[Row]) -> list[str]:
    return [row["target"] for row in rows]


def _found(rows: Sequence[Row]) -> list[str]:
    return [str(answered(row, _SCORE)) for row in rows]


def _labels(rows: Sequence[Row]) -> list[str]:
    """All answers and predictions, sorted."""
    return sorted({*_targets(rows), *_found(rows)})


def _all(methods: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for some in methods.values() for row in some]


def _line(text: str) -> str:
    """A text on one line, cut if it is long."""
    whole = " ".join(text.split())
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}…"


def _require_sklearn() -> None:
    if find_spec("sklearn") is None:
        raise ATVError(
            "Macro-F1 needs the package scikit-learn, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[report]'"
        )
