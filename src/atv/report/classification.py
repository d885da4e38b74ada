"""Answers as classes: macro-F1, and precision and recall of each label, computed with scikit-learn."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from atv.data.task import FEW_OPTIONS
from atv.errors import ATVError
from atv.evaluation.metrics import GENERATED
from atv.report.statistics import Row, score_names
from atv.report.tables import Table


def answered(row: Mapping[str, Any], score: str) -> str | None:
    """The answer judged by a row's score. None: it judges no answer, or only one token."""
    if score == "first_token" or score not in row["scores"]:
        return None
    found: str | None = row["outputs"].get(score, row["outputs"].get(GENERATED))
    return found


def label_table(rows: Sequence[Row], score: str | None = None) -> Table:
    """Macro-F1 of each task and method, and precision, recall and F1 of each label.

    Args:
        rows: from `load_runs`. Tasks with more than `FEW_OPTIONS` labels among their answers are left out.
        score: the score whose answers (likeliest option or generated answer) are compared with the labels. None: the
            rows' first score that judges whole answers.

    Raises:
        ATVError: scikit-learn is not installed, or no row has an answer for that score.
    """
    if find_spec("sklearn") is None:
        raise ATVError(
            "Macro-F1 needs the package scikit-learn, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[report]'"
        )
    from sklearn.metrics import precision_recall_fscore_support  # here, since the import takes a second

    usable = [name for name in score_names(rows) if any(answered(row, name) is not None for row in rows)]
    if score is None and usable:
        score = usable[0]
    if score not in usable:
        raise ATVError(f"No row has an answer for the score {score}; expected one of: {', '.join(usable) or 'none'}.")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if answered(row, score) is not None:
            groups.setdefault((row["task"], row["llm"], row["method"]), []).append(row)
    several = len({llm for _, llm, _ in groups}) > 1
    lines = []
    for (task, llm, method), some in groups.items():
        labels = sorted({row["target"] for row in some})
        if len(labels) > FEW_OPTIONS:
            continue
        targets, found = [row["target"] for row in some], [answered(row, score) for row in some]
        name = f"{method}, {llm}" if several else method
        each = precision_recall_fscore_support(targets, found, labels=labels, zero_division=0)
        macro = precision_recall_fscore_support(targets, found, labels=labels, average="macro", zero_division=0)
        lines.append([task, name, "macro", *(f"{100 * value:.1f}" for value in macro[:3]), str(len(some))])
        lines += [
            [task, name, label, *(f"{100 * value:.1f}" for value in values), str(int(count))]
            for label, *values, count in zip(labels, *each, strict=True)
        ]
    note = (
        f"In percent, for the answers that {score} judges; the rows of all variants and seeds together. Macro: the "
        "unweighted mean over labels. An answer that is not a label counts as a miss of the right one."
    )
    columns = ["task", "method", "label", "precision", "recall", "F1", "rows"]
    return Table(f"Labels: {score}", columns, lines, note)
