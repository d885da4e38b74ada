"""`atv demo`: the whole workflow on the built-in tasks with the embedded models, in a few minutes on two cores."""

from pathlib import Path
from typing import Any

from atv.cli.evaluate import evaluate_method
from atv.cli.generate import unsteered
from atv.cli.options import Demo, Evaluate, Tasks, Train
from atv.cli.output import print_lines, print_table
from atv.cli.train import train_adapter
from atv.config import EMBEDDED_LLM
from atv.data import UNSEEN, builtin_task, load_tasks
from atv.evaluation.measure import Frozen
from atv.evaluation.records import load_runs
from atv.files import write_text
from atv.lm.prefix_store import PrefixStore
from atv.model import ATVModel
from atv.progress import log
from atv.report import markdown, score_table

TRAINED = ("probe", "fixed", "atv")
"""Trained methods: a classifier on the generator's states, one vector for all queries, and the ATV."""
QUERIES = (
    ("sentiment", "I would have paid twice the price to hear that encore again."),
    ("sentiment", "The kettle leaks, the lid sticks and the shop will not answer my letters."),
    ("topic", "Her second serve clipped the net and fell just inside the line."),
)


def run_demo(given: Demo) -> None:
    """Train an ATV and the simplest baselines, evaluate them, answer three queries; finished steps are skipped."""
    trained = [task.name for task in load_tasks() if task.category != UNSEEN]
    unseen = [task.name for task in load_tasks() if task.category == UNSEEN]
    log.info(f"Training on {', '.join(trained)}; {', '.join(unseen)} is only evaluated, never trained on.")
    out, store = given.out, PrefixStore()  # the prompts are read once for all methods
    adapters = {}
    for method in TRAINED:
        adapters[method] = train_adapter(
            Train(
                method=method,
                settings={} if method == "probe" else {"epochs": 4},
                tasks=Tasks(task=trained),
                train_rows=160,  # three minutes of training on two cores
                valid_rows=20,
                out=out / ("train" if method == "atv" else f"train-{method}"),
                force=given.force,
            ),
            store,
        )
    runs = [
        evaluate_method(
            Evaluate(method=method, adapter=adapters.get(method), out=out / method, variants="first", force=given.force)
        )
        for method in ("zero-shot", *adapters)
    ]
    adapter = adapters["atv"]
    table = score_table(load_runs(runs))
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
            "  atv doctor --llm NAME                                  does steering work correctly on your LLM?",
        ]
    )


def _show_queries(adapter: Path) -> None:
    llm, tokenizer = Frozen(EMBEDDED_LLM).load()
    atv = ATVModel.from_pretrained(adapter, llm, tokenizer=tokenizer)
    for task, query in QUERIES:
        prompts = atv.render([query], task)
        how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        steered, plain = atv.generate(prompts, **how), unsteered(atv, prompts, **how)
        expected = ", ".join(builtin_task(task).options)
        lines = [f"  without steering: {plain[0].strip()!r}", f"  with steering:    {steered[0].strip()!r}", ""]
        print_lines([f"{task} ({expected}): {query}", *lines])
