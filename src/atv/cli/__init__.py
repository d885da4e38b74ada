"""The command `atv`. Every subcommand does its imports inside its function, so that `--help` is instant."""

from atv.cli.app import main

__all__ = ["main"]
