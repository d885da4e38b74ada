"""An adapter's model card: what only its maker knows, and its results on test rows."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atv.errors import ATVError
from atv.evaluation.records import load_runs, read_run
from atv.files import write_text
from atv.methods import METHODS
from atv.progress import log
from atv.report.formats import markdown
from atv.report.statistics import Row, score_names, scored, scores
from atv.report.tables import score_table

START, END = "<!-- results -->", "<!-- end of results -->"
"""Around what is replaced when results are written again."""
_FORMS = {
    "license": (r"[a-z0-9][a-z0-9.+-]*", "an identifier as on the Hugging Face hub, such as apache-2.0"),
    "language": (r"[a-z]{2,3}(-[A-Za-z0-9]+)*", "a code such as en or zh"),
    "datasets": (r"[\w.-]+(/[\w.-]+)?", "a data set on the Hugging Face hub, such as stanfordnlp/sst2"),
}


def write_card(file: Path, title: str, adapter: str, about: Mapping[str, Any], runs: Sequence[Path]) -> None:
    """Add metadata and results to a model card, or to a new one. The rest of its text is kept.

    Results are both a table in the text and metadata, the `model-index` that model hubs read.

    Args:
        file: the card, Markdown with a YAML block at its beginning.
        title: the heading of a new card, for an adapter that has none.
        adapter: the adapter's digest, as runs record it.
        about: metadata by the hub's names: `license`, `language` and `datasets`. An empty value leaves the card's own.
        runs: folders of runs of this adapter, or folders that contain them. They replace the card's former results.
            Runs of another method that uses the adapter, such as `icl+atv`, are left out.

    Raises:
        ATVError: the card cannot be read, a value is malformed, a run is of another adapter, or the runs differ in more
            than their seeds, so that their mean would be the result of none of them.
    """
    from huggingface_hub import ModelCard

    for name, found in about.items():
        _require_form(name, found)
    new = f"---\nlibrary_name: adaptive-task-vectors\n---\n\n# {title}\n"
    try:
        card: Any = ModelCard(file.read_text(encoding="utf-8") if file.exists() else new)
    except Exception as error:  # also the YAML parser's own
        reason = " ".join(str(error).split())[:200]
        raise ATVError(f"{file} is not a model card: {reason}. Mend its first lines, or delete it.") from error
    for name, found in about.items():
        if found:
            setattr(card.data, name, found)
    if runs:
        rows = load_runs(_own_runs(adapter, load_runs(runs)))
        _require_one_way(rows)
        card.data.model_name = card.data.model_name or title
        card.data.metrics = score_names(rows)
        card.data.eval_results = _results(rows, card.data.datasets)
        card.text = _with_results(card.text, adapter, rows)
    write_text(file, str(card))


def _require_form(name: str, found: Any) -> None:
    form, expected = _FORMS[name]
    for each in [found] if isinstance(found, str) else found or ():
        if re.fullmatch(form, each) is None:
            raise ATVError(f"{name.removesuffix('s')} is {each!r}; expected {expected}.")


def _own_runs(adapter: str, rows: Sequence[Row]) -> list[str]:
    """The folders of the rows' runs, all of this adapter, without those of other methods that use it."""
    methods = {folder: _method_of(adapter, folder) for folder in dict.fromkeys(row["run"] for row in rows)}
    trained = {method: METHODS[method].trained_as() if method in METHODS else method for method in methods.values()}
    others = {folder: method for folder, method in methods.items() if method != trained[method]}
    if len(others) == len(methods):
        raise ATVError(
            f"There is no run of the adapter's own method; found {', '.join(trained) or 'no rows'}. Make one with: "
            "atv eval --adapter DIR --out NEW"
        )
    for folder, method in others.items():
        log.warning(f"{folder} is a run of {method}, not of {trained[method]}; it is left out of the results.")
    return [folder for folder in methods if folder not in others]


def _method_of(adapter: str, folder: str) -> str:
    """The method of a run, which must be one of this adapter."""
    settings = read_run(Path(folder)).get("settings", {})
    found = settings.get("adapter")
    if found != adapter:
        of = f"another adapter ({found})" if found else "a method without an adapter"
        raise ATVError(
            f"{folder} is a run of {of}; expected runs of this one ({adapter}). An adapter that was trained again "
            "is another one: evaluate it with atv eval --adapter DIR --out NEW."
        )
    return str(settings["method"])


def _require_one_way(rows: Sequence[Row]) -> None:
    ways = {(row["llm"], row["method"]): row["run"] for row in rows}
    if len(ways) > 1:
        raise ATVError(
            f"The runs {', '.join(ways.values())} differ in more than their seeds (LLM, dtype, prompts, variants or "
            "label). Name runs with the same settings after --results."
        )


def _results(rows: Sequence[Row], datasets: Any) -> list[Any]:
    """One result for each task and score that all of the task's rows have."""
    from huggingface_hub import EvalResult

    named = datasets[0] if isinstance(datasets, list) and len(datasets) == 1 else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=named or task,
            dataset_name=task,
            dataset_split="test",
            metric_type=key,
            metric_value=round(found.mean, 4),
        )
        for key in score_names(rows)
        for task, found in scores(scored(rows, key), key).tasks.items()
        if found is not None
    ]


def _with_results(text: str, adapter: str, rows: Sequence[Row]) -> str:
    """The text with a table of results, in the place of the former ones or at its end."""
    run = read_run(Path(rows[0]["run"]))
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers") if "versions" in run)
    _, _, table = markdown(score_table(rows)).partition("\n")
    measured = f"Measured on the adapter with the digest {adapter}, with {versions or 'unrecorded versions'}."
    section = f"{START}\n## Results on test rows\n{table}\n{measured}\n{END}"
    former = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
    if former.search(text):
        return former.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"
