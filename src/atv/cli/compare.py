"""`atv compare`."""

import shlex
import sys
from importlib.util import find_spec
from typing import cast

from atv.cli.loading import frozen_llm
from atv.cli.options import Compare
from atv.cli.output import print_lines, print_table
from atv.config import TrainConfig
from atv.data import load_tasks
from atv.data.rendering import Format
from atv.errors import ATVError
from atv.evaluation.compare import RECORD_FILE, Plan, compare
from atv.evaluation.records import load_runs
from atv.processes import world_size
from atv.report import FORMATS, answer, compare_tables, load_comparison, write_page, write_tables

METHODS = ("zero-shot", "probe", "lora", "fixed", "atv")
"""Methods that are compared by default."""


def compare_methods(given: Compare) -> None:
    """Train and evaluate all unfinished cells, then print and write the report."""
    if world_size() > 1:
        raise ATVError(f"atv compare runs in one process; found {world_size()}. Start it without a launcher.")
    plan = Plan(
        tuple(given.method or METHODS),
        tuple(range(TrainConfig.seed, TrainConfig.seed + given.seeds)),
        tuple(sorted(given.train_rows)) if given.train_rows else (None,),
        given.valid_rows,
        given.test_rows,
        given.shots,
    )
    tasks = [
        task
        for data in given.data
        for task in load_tasks(
            given.task,
            data,
            given.template,
            input=given.input,
            output=given.output,
            format=cast(Format | None, given.format),
            system=given.system,
        )
    ]
    runs = compare(
        plan,
        frozen_llm(given.llm, given.loading),
        tasks,
        given.out,
        given=given.file.tables,
        metrics=given.metric or None,
        batch_size=given.batch_size,
        force=given.force,
    )
    found = load_comparison(given.out / RECORD_FILE)
    size = "" if found.most is None else f" with {found.most} training rows"
    tables, said = compare_tables(found), answer(found.rows[found.most], size, "data sets")
    for table in tables:
        print_table(table)
    report = given.out / "report"
    written = [path for suffix in FORMATS for path in write_tables(tables, report.with_suffix(suffix))]
    if find_spec("matplotlib") is not None:
        command = shlex.join(["atv", *sys.argv[1:]])
        written += write_page(load_runs(runs), tables, report.with_suffix(".html"), command, answer=said)[:1]
    print_lines([said, "", *(f"Written to {path}" for path in written)])
