"""`atv eval`."""

from pathlib import Path

from atv import artifact
from atv.cli.loading import frozen_llm, named_tasks
from atv.cli.options import DEFAULT_RUNS, Evaluate
from atv.cli.output import print_lines
from atv.config import EMBEDDED_LLM
from atv.data import check_test_rows
from atv.evaluation.measure import measure


def evaluate_method(given: Evaluate) -> Path:
    """Evaluate a method; an interrupted run is resumed, a finished one kept. Returns the run's folder."""
    saved = artifact.read(artifact.locate(given.adapter)) if given.adapter else None
    name = given.method or (saved.method if saved else "zero-shot")
    out = given.out or DEFAULT_RUNS / name
    tasks = named_tasks(given.tasks, saved.training if saved else None)
    if saved is not None:
        for task in tasks:
            check_test_rows(task, saved.training)
    tasks = [task.drawn(given.train_rows, None, given.seed, test=given.test_rows) for task in tasks]
    for task in tasks:
        task.renderers(given.variants)  # raises before the LLM is loaded
    llm = frozen_llm(given.llm or (saved.base_llm["name"] if saved else EMBEDDED_LLM), given.loading)
    new = measure(
        name,
        llm,
        tasks,
        out,
        metrics=given.metric or None,
        adapter=given.adapter,
        shots=given.shots,
        seed=given.seed,
        variants=given.variants,
        batch_size=given.batch_size,
        force=given.force,
    )
    if new:
        print_lines([f"Run: {out}", f"Next: atv report {out}"])
    else:
        print_lines([f"{out} holds this run already, finished. Show it with: atv report {out}"])
    return out
