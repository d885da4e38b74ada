"""Tables of what `atv paper analysis` recorded about an adapter's vectors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from atv.errors import ATVError
from atv.report.statistics import RESAMPLES, bootstrap
from atv.report.tables import MISSING, Table, footnote, marked, meaning, undefined

SHORT = 5
"""Number of tables of an analysis that are printed, the first ones; the others are long."""
QUERY = "the one query"
"""Name of the row for the query shown layer by layer."""
ATV_POINT, ELICIT_POINT = "query", "ELICIT entry"
"""Kinds of points on the map."""
_LONGEST = 60  # characters of a text in a cell

Record = dict[str, Any]


def analysis_tables(record: Record) -> list[Table]:
    """All tables of an analysis: summary, norms, variation, neighbours, map, and the logit lens if it was read.

    Args:
        record: from `atv.paper.analysis.analyse` or `load_analyses`. In the latter case the tables name its file.

    Raises:
        ATVError: a record that was read from a file lacks something, or something in it is of another kind.
    """
    try:
        return _tables(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if "file" not in record:
            raise
        message = f"{record['file']} is damaged: {error!r}. Make it again with atv paper analysis."
        raise ATVError(message) from error


def _tables(record: Record) -> list[Table]:
    lens = [_layers_table(record), _lens_table(record)] if record["lens"] else []
    return [
        _short_table(record),
        *([_exchange_table(record)] if "vectors" in record["queries"][0] else []),  # not in older records
        _norms_table(record),
        _variation_table(record),
        _neighbours_table(record),
        _nearest_table(record),
        *lens,
        _map_table(record),
    ]


def _table(record: Record, title: str, columns: list[str], rows: list[list[str]], note: str, **how: Any) -> Table:
    file = record.get("file")
    subject = f"{record['llm']}, {file}" if file else record["llm"]
    return Table(f"{title}: {subject}", columns, rows, note, runs=(file,) if file else (), **how)


def _short_table(record: Record) -> Table:
    found, count = record["variation"], len(record["queries"])
    rows = [
        ["norm of the mean vector, % of the mean norm", _percent(found["common"]), "–", "–", _percent(count**-0.5)],
        ["variance within tasks, %", _percent(found["within"]), "–", "–", _percent(found["within_by_chance"])],
        ["mean cosine of two queries of one task", _cosine(found["cosine_within"]), "–", "–",
         _cosine(found["cosine_between"])],
        ["nearest training query is of the same task, %", *_interval(record, _same_task),
         _percent(_mean(record, "same_task_by_chance"))],
        ["nearest of the same task has the same answer, %", *_interval(record, lambda row: row["same_answer"]),
         _percent(_mean(record, "same_answer_by_chance"))],
        ["words shared with the nearest of the same task, %", *_interval(record, lambda row: row["shared_words"]),
         _percent(_mean(record, "shared_words_by_chance"))],
    ]  # fmt: skip
    lens = "" if record["lens"] else f" The logit lens is missing: {record['no_lens']}"
    note = (
        f"{_measured(record)} To compare with: random directions; vectors that do not depend on the task; two "
        "queries of different tasks; a random training query of any task, of the same task (twice). "
        "The last three rows are means over tasks. From, to: 95% percentile bootstrap interval, from "
        f"{RESAMPLES:,} draws of test queries within each task: how far the mean would vary with other queries of "
        "these tasks, not with other tasks or seeds. If all queries agree, its width is zero, which is not certainty."
        f"{lens}"
    )
    return _table(record, "Vectors in short", ["measure", "value", "from", "to", "to compare with"], rows, note, text=1)


def _exchange_table(record: Record) -> Table:
    own, *kinds = record["queries"][0]["vectors"]  # a query's own vectors come first
    left = undefined(({"task": row["task"], "scores": row["vectors"][own]} for row in record["queries"]), "first_token")
    kept = record | {
        "tasks": {task: about for task, about in record["tasks"].items() if task not in left},
        "queries": [row for row in record["queries"] if row["task"] not in left],
    }
    right = {"first_token": kept, "first_token_among_options": record}

    def share(kind: str, what: str) -> str:
        return _interval(right.get(what, record), lambda row: row["vectors"][kind][what])[0]

    def lost(kind: str, what: str) -> list[str]:
        return _interval(right[what], lambda row: row["vectors"][own][what] - row["vectors"][kind][what])

    rows = []
    for kind in (own, *kinds):
        both = [
            [share(kind, what), *([MISSING] * 3 if kind == own else lost(kind, what))]
            if right[what]["tasks"]
            else [MISSING] * 4
            for what in right
        ]
        if left:
            both[0][0] = marked(both[0][0])
        rows.append([kind, *both[0], *both[1], "–" if kind == own else share(kind, "other")])
    note = (
        f"{_measured(record)} Each prompt is answered with {own} vectors, then with others instead. "
        f"{meaning(right)} Means over tasks. Lost: the accuracy in the column before it "
        f"with {own} minus that with these, in percentage points, with a 95% percentile bootstrap interval from "
        f"{RESAMPLES:,} draws of queries within each task. Changed: the likeliest token (or, if first tokens do not "
        "tell options apart, the likeliest option) differs from that with its own. If a mean loses nothing, these "
        "queries show no effect of adapting the vector to the query or the task."
    )
    columns = [
        "vectors",
        "first_token, %",
        "lost",
        "from",
        "to",
        "among options, %",
        "lost",
        "from",
        "to",
        "changed, %",
    ]
    why = footnote([{"task": task, "llm": record["llm"], "scores": {"first_token": None}} for task in left])
    return _table(record, "Answers with other vectors", columns, rows, note, text=1, footnote=why)


def _norms_table(record: Record) -> Table:
    norms = record["norms"]
    columns = {"vector": "vector", "residual": "residual", "ratio": "vector / residual", "cosine": "cosine"}
    columns |= {"elicit": ELICIT_POINT} if "elicit" in norms else {}
    rows = [
        [str(layer), *(_spread(norms[name]["mean"][place], norms[name]["std"][place]) for name in columns)]
        for place, layer in enumerate(record["layers"])
    ]
    note = (
        f"{_measured(record)} Vector: norm of what is added to a layer's output, scale times v. Residual: norm of the "
        f"layer's output without steering, mean over the prompt tokens that would be edited (positions "
        f"{record['config']['positions']}). Cosine: of the two. Mean ± sample standard deviation over queries."
    )
    if record["elicit"]:
        note += (
            f" {ELICIT_POINT}: norm of scale {record['elicit']['scale']:g} times the states of each layer in "
            f"{len(record['elicit']['entries'])} entries of these tasks, whether added there or not."
        )
    return _table(record, "Norms per layer", ["layer", *columns.values()], rows, note, text=1, plots=("norms",))


def _variation_table(record: Record) -> Table:
    rows = []
    for task, own in record["variation"]["tasks"].items():
        share = own["distance"] / own["norm"] if own["norm"] else None
        cells = [_trained(record, task), str(own["queries"]), _three(own["norm"]), _percent(share)]
        rows.append([task, *cells, _cosine(own["cosine_within"]), _cosine(own["cosine_between"])])
    note = (
        f"{_measured(record)} The vectors of all steered layers are concatenated. Distance: root mean square "
        "distance of the task's queries to their mean, relative to their mean norm: 0 is one vector for the whole "
        "task. Cosines are means over pairs of queries: both of the task; one of the task and one of another."
    )
    columns = ["task", "trained on", "queries", "norm", "distance, %", "cosine within", "cosine to others"]
    return _table(record, "How much vectors differ", columns, rows, note, text=2)


def _neighbours_table(record: Record) -> Table:
    rows = []
    for task, about in record["tasks"].items():
        own = [row for row in record["queries"] if row["task"] == task]
        values = [
            [float(_same_task(row)), row["same_task_by_chance"], row["same_answer"], row["same_answer_by_chance"],
             row["shared_words"], row["shared_words_by_chance"]]
            for row in own
        ]  # fmt: skip
        means = [_percent(float(np.mean(column))) for column in zip(*values, strict=True)]
        rows.append([task, _trained(record, task), str(len(own)), str(about["train"]), *means])
    note = (
        f"{_measured(record)} The training query with the largest cosine to a test query's vector. Same task: among "
        "those of all tasks. Same answer, shared words (those in both texts, of those in either): of the nearest one "
        "of the same task. By chance: a random one of the same training queries."
    )
    columns = ["task", "trained on", "queries", "training queries", "same task, %", "task by chance", "same answer, %",
               "answer by chance", "shared words, %", "words by chance"]  # fmt: skip
    return _table(record, "Nearest training queries", columns, rows, note, text=2)


def _nearest_table(record: Record) -> Table:
    first: dict[str, Record] = {}
    for row in record["queries"]:
        first.setdefault(row["task"], row)
    one = record["query"]
    shown = [(row["task"], row) for row in first.values() if row["query"] != one["query"][: len(row["query"])]]
    rows = [
        [name, _cut(row["query"]), near["task"], _cut(near["query"]), near["answer"], _cosine(near["cosine"])]
        for name, row in [(QUERY, one), *shown]
        for near in row["nearest"]
    ]
    note = (
        f"{_measured(record)} The training queries with the largest cosine of vectors, for {QUERY} and the first test "
        "query of each other task."
    )
    columns = ["of", "query", "near: task", "near: query", "its answer", "cosine"]
    return _table(record, "Neighbours of single queries", columns, rows, note, text=5)


def _layers_table(record: Record) -> Table:
    one, layers = record["query"], record["query"]["layers"]
    rows = [
        [str(layer), _tokens(plain, share=True), _tokens(steered, share=True)]
        for layer, (plain, steered) in enumerate(zip(layers["unsteered"], layers["steered"], strict=True))
    ]
    note = (
        f"{_measured(record)} The residual stream after each layer at the last token of the prompt {one['prompt']!r}, "
        f"read through {record['lens']['of']}: likeliest tokens, with their probability in percent. The last row is "
        "the LLM's output. At earlier layers such a reading is only an approximation, since the head was trained for "
        "the last layer."
    )
    columns = ["layer", "unsteered", "steered"]
    return _table(record, "One query layer by layer", columns, rows, note, text=3)


def _lens_table(record: Record) -> Table:
    read = {QUERY: record["query"]["lens"], **record["lens"]["tasks"]}
    rows = [
        [name, str(layer), _tokens(tokens)]
        for name, lines in read.items()
        for layer, tokens in zip(record["layers"], lines, strict=True)
    ]
    note = (
        f"{_measured(record)} Tokens whose logits rise most when the vector alone is read through "
        f"{record['lens']['of']}, compared with no vector; for a task: its queries' mean vector. The vector's effect "
        "through later layers is left out."
    )
    return _table(record, "Tokens that vectors promote", ["vector of", "layer", "tokens"], rows, note, text=3)


def _map_table(record: Record) -> Table:
    rows = [
        [row["task"], ATV_POINT, _cut(row["query"]), *(f"{value:.4f}" for value in (*row["pca"], *row["tsne"]))]
        for row in record["queries"]
    ]
    for row in record["elicit"]["entries"] if record["elicit"] else ():
        rows.append([row["task"], ELICIT_POINT, "–", *(f"{value:.4f}" for value in (*row["pca"], *row["tsne"]))])
    one, two = (_percent(share) for share in record["explained"])
    between = ""
    if record["elicit"]:
        between = (
            f" Otherwise entries and vectors would be two groups far from each other (cosine of their means "
            f"{_cosine(record['elicit']['cosine'])})."
        )
    note = (
        f"{_measured(record)} The concatenated vectors of all steered layers, minus the mean of their kind and "
        f"scaled so that kinds are spread equally.{between} The first table shows how small the spread is compared "
        f"with the mean. PCA: the two axes explain {one}% and {two}% of the variance. t-SNE preserves neighbourhoods; "
        "distances between groups and their sizes have no meaning."
    )
    columns = ["task", "point", "query", "PCA 1", "PCA 2", "t-SNE 1", "t-SNE 2"]
    return _table(record, "Map of vectors", columns, rows, note, text=3, plots=("map",))


def _measured(record: Record) -> str:
    tasks = len(record["tasks"])
    return f"{len(record['queries'])} test queries of {tasks} task{'' if tasks == 1 else 's'}."


def _same_task(row: Record) -> bool:
    return bool(row["nearest"][0]["task"] == row["task"])


def _by_task(record: Record, value: Callable[[Record], float]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Each query's contribution to the mean over tasks."""
    tasks = record["tasks"]
    own = [[value(row) for row in record["queries"] if row["task"] == task] for task in tasks]
    return [np.array(values, dtype=float) / (len(values) * len(tasks)) for values in own]


def _mean(record: Record, key: str) -> float:
    return float(sum(part.sum() for part in _by_task(record, lambda row: row[key])))


def _interval(record: Record, value: Callable[[Record], float]) -> list[str]:
    """The mean over tasks and its interval, in percent."""
    parts = _by_task(record, value)
    low, high = np.percentile(bootstrap(parts), [2.5, 97.5])
    return [_percent(float(number)) for number in (sum(part.sum() for part in parts), low, high)]


def _trained(record: Record, task: str) -> str:
    return "yes" if record["tasks"][task]["trained"] else "no"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _three(value: float | None) -> str:
    """The significant digits, without an exponent if that is legible."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if size >= 1e-4 or size == 0 else f"{value:.1e}"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _spread(mean: float, std: float | None) -> str:
    """Both with the same number of decimals: those of the spread's first two digits."""
    if std is None or not std:
        return _three(mean)
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _tokens(tokens: Sequence[Sequence[Any]], share: bool = False) -> str:
    """Tokens in quotes, since many begin with a space."""
    return "  ".join(f"{text!r} {100 * value:.0f}" if share else repr(text) for text, value in tokens)
