"""The paper's numbers, to compare with ours where the tasks are the same."""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from atv.data import UNSEEN
from atv.paper.tasks import PAPER
from atv.report.comparison import COSTS, PUBLISHED, Line
from atv.report.statistics import Score

CATEGORIES = ("NLU", "Reasoning", "Knowledge", "Mathematics", "Safety")


@cache
def paper_results() -> dict[str, Any]:
    """The paper's results by table, LLM, method and column: mean and standard deviation, in percent."""
    results: dict[str, Any] = json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
    return results


class PaperNumbers:
    """The paper's numbers as an `atv.report.comparison.Published`."""

    @property
    def source(self) -> str:
        """Where the numbers were published."""
        return str(paper_results()["source"])

    @property
    def order(self) -> tuple[str, ...]:
        """Order of categories and tasks in the paper's tables."""
        return (*CATEGORIES, *PAPER)

    def lines(self, part: str, methods: Iterable[str], tasks: Mapping[str, str]) -> dict[str, Line]:
        """The paper's rows for these methods, with the columns that cover the same tasks."""
        results, columns = paper_results(), _columns(part, tasks)
        lines: dict[str, Line] = {}
        for llm in results["in-domain"]:
            for method in methods:
                cells = dict(results[part].get(llm, {}).get(method, {}))
                if part == "summary":  # the paper's table has two methods; averages of the others are in other tables
                    averages = {kind: results[kind][llm].get(method, {}).get("Avg") for kind in ("in-domain", "unseen")}
                    cells = {kind: average for kind, average in averages.items() if average} | cells
                shares = {name: (cell[0], cell[1]) for name, cell in cells.items() if name in columns}
                if shares:
                    lines[f"{PUBLISHED}{llm}: {method}"] = {
                        name: Score(mean, std) if name in COSTS else Score(mean / 100, std / 100)
                        for name, (mean, std) in shares.items()
                    }
        return lines


def _columns(part: str, tasks: Mapping[str, str]) -> set[str]:
    """The columns of a table that cover the same tasks as in the paper."""
    if part != "summary":
        return _same(tasks, unseen=part == "unseen")
    same = {kind for kind in ("in-domain", "unseen") if "Avg" in _same(tasks, unseen=kind == "unseen")}
    return same | ({"Avg"} if len(same) == 2 else set())


def _same(tasks: Mapping[str, str], unseen: bool) -> set[str]:
    ours = {name: category for name, category in tasks.items() if (category == UNSEEN) == unseen}
    theirs = {name: task.category for name, task in PAPER.items() if (task.category == UNSEEN) == unseen}
    parts = [task for task in theirs if task in ours] if unseen else [
        category for category in CATEGORIES if _members(ours, category) == _members(theirs, category)
    ]  # fmt: skip
    return {*parts, *(("Avg", "tokens") if ours == theirs else ())}


def _members(tasks: Mapping[str, str], category: str) -> set[str]:
    return {task for task, its in tasks.items() if its == category}
