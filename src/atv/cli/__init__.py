"""The command `atv`. Every subcommand imports what it needs inside its function, so that `--help` is instant."""

from atv.cli.app import main

__all__ = ["main"]
