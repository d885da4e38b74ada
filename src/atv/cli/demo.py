"""`atv demo`: the whole path on the built-in tasks with the embedded models, in a few minutes on two cores."""

from pathlib import Path
from typing import Any

from atv.artifact import read
from atv.cli.output import print_lines, print_table
from atv.cli.work import evaluate_method, prompts_of, train_adapter, unsteered
from atv.config import EMBEDDED_LLM
from atv.data import UNSEEN, builtin_task, load_tasks
from atv.evaluation.measure import Frozen
from atv.evaluation.records import load_runs
from atv.files import write_text
from atv.lm.prefix_store import PrefixStore
from atv.model import ATVModel
from atv.progress import log
from atv.report import accuracy_table, markdown

TRAINED = ("probe", "fixed", "atv")
"""What is trained: a classifier of the generator's states, one vector for all queries, and the ATV."""
QUERIES = (
    ("sentiment", "I would have paid twice the price to hear that encore again."),
    ("sentiment", "The kettle leaks, the lid sticks and the shop will not answer my letters."),
    ("topic", "Her second serve clipped the net and fell just inside the line."),
)


def run_demo(out: Path, force: bool) -> None:
    """Train an ATV and the simplest baselines, measure them, answer three queries; what is done is not done again."""
    from typer.main import get_command

    from atv.cli.app import app

    trained = [task.name for task in load_tasks() if task.category != UNSEEN]
    unseen = [task.name for task in load_tasks() if task.category == UNSEEN]
    log.info(f"Training on {', '.join(trained)}; {', '.join(unseen)} is only measured, never trained on.")
    commands = get_command(app).commands  # type: ignore[attr-defined]

    def options(command: str, **given: Any) -> dict[str, Any]:
        """The command's own defaults with `given` over them, so that the demo is what a user could type."""
        defaults = {p.name: p.default for p in commands[command].params}
        return defaults | {"force": force} | given

    few = {"train_rows": 160, "valid_rows": 20}  # what two cores learn in three minutes
    store, adapters = PrefixStore(), {}  # the prompts are read once for all methods
    for method in TRAINED:
        folder = out / ("train" if method == "atv" else f"train-{method}")
        shorter = {} if method == "probe" else {"epochs": 4}
        adapters[method] = train_adapter(
            options("train", **few, method=method, out=folder, task=trained), shorter, store
        )
    runs = []
    for method in ("zero-shot", *adapters):
        given = {"method": method, "adapter": adapters.get(method), "out": out / method, "variants": "first"}
        runs.append(evaluate_method(options("eval", **given)))
    adapter = adapters["atv"]
    table = accuracy_table(load_runs(runs))
    write_text(out / "report.md", markdown(table))
    print_table(table)
    _show_queries(adapter)
    print_lines(
        [
            f"Adapter: {adapter}    Runs: {', '.join(map(str, runs))}    Table: {out / 'report.md'}",
            "",
            "Next, with .venv/bin/ before atv if the environment is not active:",
            f'  atv generate --adapter {adapter} --task sentiment --compare "your own sentence"',
            "  atv train --data DIR --task NAME --out runs/mine       your data (see README, Your own data)",
            "  atv doctor --llm NAME                                  is steering wired right on your LLM?",
        ]
    )


def _show_queries(adapter: Path) -> None:
    templates = read(adapter).training["tasks"]
    llm, tokenizer = Frozen(EMBEDDED_LLM).load()
    atv = ATVModel.from_pretrained(adapter, llm, tokenizer=tokenizer)
    for task, query in QUERIES:
        prompts, how = prompts_of([query], templates[task][0]), {"max_new_tokens": 6, "do_sample": False}
        steered, plain = atv.generate(prompts, prompts, **how), unsteered(atv, prompts, **how)
        expected = ", ".join(builtin_task(task).options)
        lines = [f"  without steering: {plain[0].strip()!r}", f"  with steering:    {steered[0].strip()!r}", ""]
        print_lines([f"{task} ({expected}): {query}", *lines])
