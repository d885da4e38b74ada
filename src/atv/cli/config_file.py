"""Configuration in TOML: a table of options for each command, and a table of settings for each method.

[train]
data = "mydata"

[paper.reproduce]
profile = "paper"

[all]
epochs = 3

[lora]
rank = 16
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from atv.errors import ATVError, unknown
from atv.files import read_toml
from atv.methods import TRAINED
from atv.methods.settings import ALL

PAPER = "paper"
"""The table that contains those of the commands `atv paper ...`."""


class ConfigFile:
    """A file with checked table names; `options` reads a command's table.

    Args:
        file: the TOML file.
        commands: the names of all commands that take such a file, such as `train` and `paper.reproduce`.

    Raises:
        ATVError: the file does not exist, or a table in it is neither a command's nor a method's.
    """

    def __init__(self, file: Path, commands: Iterable[str]) -> None:
        self.file, self.commands = file, tuple(commands)
        methods = (ALL, *TRAINED)
        found = read_toml(file, "a TOML file with a table for each command, such as [train], or method, such as [lora]")
        found |= {f"{PAPER}.{name}": table for name, table in self._table(found, PAPER).items()}
        found.pop(PAPER, None)
        for name in found:
            self._table(found, name)
            if name not in (*self.commands, *methods):
                raise unknown(f"table in {file}:", name, (*self.commands, *methods))
        self.found = {name: found[name] for name in self.commands if name in found}
        """Options of commands, as they are in the file."""
        self.tables = {name: _spelled(found[name]) for name in methods if name in found}
        """Settings of methods."""

    def _table(self, tables: Mapping[str, Any], name: str) -> dict[str, Any]:
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise ATVError(f"{self.file}: {name} is not in a table; put it under a command's table, such as [train].")
        return table

    def options(self, command: str, spellings: Mapping[str, str]) -> dict[str, Any]:
        """The options of a command by name; ATVError for an unknown key.

        Args:
            command: one of `commands`.
            spellings: every spelling of an option, with its name.
        """
        values: dict[str, Any] = {}
        for key, value in self.found.get(command, {}).items():
            name = spellings.get(key.replace("-", "_"))
            if name is None:
                raise unknown(f"option in [{command}] of {self.file}:", key, spellings)
            if name in values:
                raise ATVError(
                    f"{self.file}: {name} is given twice under [{command}], the second time as {key}; leave one out."
                )
            values[name] = value
        return values

    def value(self, command: str, name: str) -> Any:
        """One option of a command; None if it is not in the file."""
        return self.found.get(command, {}).get(name)


def _spelled(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in table.items()}
