"""The work behind `atv reproduce` and `atv sweep`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from atv.cli.show import print_lines, print_table
from atv.cli.work import frozen, named_tasks, recipe_for
from atv.errors import unknown
from atv.progress import note
from atv.protocol import PROFILES, Profile, read_settings, reproduce, sweep
from atv.records import load_runs
from atv.report import FORMATS, all_tables, paper_tables, write_tables


def _profile(options: Mapping[str, Any]) -> Profile:
    name = options["profile"]
    if name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    note(f"Profile {name}: {PROFILES[name].says}")
    return PROFILES[name]


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    given = read_settings(options["settings"]) if options["settings"] else {}
    return {"methods": options["method"] or (), "given": given, "recipe": recipe_for(options["llm"])}


def reproduce_tables(options: Mapping[str, Any]) -> None:
    """`atv reproduce`: everything that is not done yet, then the tables."""
    profile, out = _profile(options), Path(options["out"])
    how = _settings(options) | {"batch_size": options["batch_size"], "force": options["force"]}
    runs = reproduce(profile, frozen(options), named_tasks(options), out, **how)
    rows = load_runs(runs)
    for table in paper_tables(rows):
        print_table(table)
    for suffix in FORMATS:
        write_tables(all_tables(rows), out / "tables" / f"tables{suffix}")
    print_lines([f"Runs: {out / 'runs'}    Tables: {out / 'tables'} ({', '.join(FORMATS)})"])


def choose_settings(options: Mapping[str, Any]) -> None:
    """`atv sweep`: the trials that are not done yet, then the best of each method."""
    profile, out = _profile(options), Path(options["out"])
    rows = {name: options[name] for name in ("train_rows", "valid_rows") if options[name] is not None}
    how = _settings(options) | {"trials": options["trials"], "force": options["force"]}
    best = sweep(replace(profile, **rows), frozen(options), named_tasks(options), out, **how)
    print_lines([f"{name}: {', '.join(f'{key} {value}' for key, value in of.items())}" for name, of in best.items()])
    print_lines([f"Next: atv reproduce --settings {out / 'settings.toml'}"])
