"""The 25 tasks of the paper: category, answers and templates (its Table 8). The package does not contain their rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from atv.data import Rendering, Task, load_tasks
from atv.data.audit import listed
from atv.data.folder import Known
from atv.progress import log_once

YES_NO = ("Yes", "No")
TRUE_FALSE = ("True", "False")


RENDERING = Rendering("template", ends=False)
"""The paper's prompts are plain templates, and its answers have no end: one token is judged."""


class PaperTask(NamedTuple):
    """The paper's description of one task."""

    category: str
    """Knowledge, Reasoning, Mathematics, Safety, NLU, or Unseen: the paper does not train on Unseen tasks."""
    options: tuple[str, ...] | None
    """The answers. None: each row has its own options, answered by letter."""


PAPER = {
    "commonsense_qa": PaperTask("Knowledge", None),
    "openbookqa": PaperTask("Knowledge", None),
    "hellaswag": PaperTask("Knowledge", None),
    "boolq": PaperTask("Knowledge", TRUE_FALSE),
    "bbh_boolean_expressions": PaperTask("Reasoning", TRUE_FALSE),
    "bbh_date_understanding": PaperTask("Reasoning", None),
    "bbh_reasoning_about_colored_objects": PaperTask("Reasoning", None),
    "bbh_temporal_sequences": PaperTask("Reasoning", None),
    "arc_challenge": PaperTask("Reasoning", None),
    "math_qa": PaperTask("Mathematics", None),
    "mmlu_pro_math": PaperTask("Mathematics", None),
    "crows_pairs": PaperTask("Safety", ("A", "B")),
    "bbq_age": PaperTask("Safety", None),
    "ethics_commonsense": PaperTask("Safety", YES_NO),
    "ethics_justice": PaperTask("Safety", YES_NO),
    "superglue_rte": PaperTask("NLU", TRUE_FALSE),
    "superglue_wic": PaperTask("NLU", YES_NO),
    "glue_qnli": PaperTask("NLU", YES_NO),
    "glue_sst2": PaperTask("NLU", ("negative", "positive")),
    "glue_mnli": PaperTask("NLU", ("True", "Neither", "False")),
    "glue_cola": PaperTask("Unseen", YES_NO),
    "bbq_religion": PaperTask("Unseen", None),
    "deepmind": PaperTask("Unseen", None),
    "mmlu_high_school_psychology": PaperTask("Unseen", None),
    "bbh_logical_deduction_five_objects": PaperTask("Unseen", None),
}


@cache
def paper_templates() -> dict[str, list[str]]:
    """Three templates for each of the 25 tasks, with {input} where the query goes."""
    text = files(__package__).joinpath("templates.json").read_text(encoding="utf-8")
    templates: dict[str, list[str]] = json.loads(text)
    return templates


def load_paper_tasks(
    names: Sequence[str] | None = None, data: str | Path | None = None, templates: Sequence[str] | None = None
) -> list[Task]:
    """Load tasks, rendered as in the paper; its tasks get its categories and templates unless their folder has others.

    Otherwise like `atv.data.load_tasks`. Warns about answers that the paper's task does not have.
    """
    known = {name: Known(task.category, paper_templates()[name]) for name, task in PAPER.items()}
    tasks = [replace(task, renderer=RENDERING) for task in load_tasks(names, data, templates, known)]
    for task in tasks:
        theirs = PAPER[task.name].options if task.name in PAPER else None
        others = [option for option in task.options if theirs is not None and option not in theirs]
        if theirs is not None and others:
            log_once(f"{task.name}: answers {listed(others)}, where the paper's task has {listed(theirs)}.")
    return tasks
