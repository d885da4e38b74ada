"""`atv paper sweep`."""

from dataclasses import replace
from typing import Any

from atv.cli.loading import frozen_llm
from atv.cli.options import Sweep
from atv.cli.output import print_lines
from atv.cli.paper.reproduce import chosen_profile, paper_tasks
from atv.paper.sweep import SETTINGS_FILE, sweep


def choose_settings(given: Sweep) -> None:
    """Run the unfinished trials, then print the best of each method."""
    rows: dict[str, Any] = {"train_rows": given.train_rows, "valid_rows": given.valid_rows}
    profile = replace(
        chosen_profile(given.profile), **{name: count for name, count in rows.items() if count is not None}
    )
    best = sweep(
        profile,
        frozen_llm(given.llm, given.loading),
        paper_tasks(given.tasks),
        given.out,
        methods=given.method or (),
        trials=given.trials,
        given=given.file.tables,
        force=given.force,
    )
    print_lines([f"{name}: {', '.join(f'{key} {value}' for key, value in of.items())}" for name, of in best.items()])
    print_lines([f"Next: atv paper reproduce --config {given.out / SETTINGS_FILE}"])
