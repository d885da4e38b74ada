"""Making commands from a function, a dataclass of options and a TOML file."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from atv.cli.config_file import ConfigFile
from atv.cli.dataclass_options import Shown, build, options_of, with_signature
from atv.cli.options import METHOD, TRAINING, Train
from atv.config import TrainConfig
from atv.errors import ATVError
from atv.files import local
from atv.methods.settings import Tables, check_tables, learned, method_settings

T = TypeVar("T")
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
TABLES: dict[str, str] = {}
"""The commands that take a TOML file, with the tables of their options."""
DECIDE = ("generator", "parametrisation")
"""Settings that affect other settings' defaults, which the help must show."""
RESUMED = ("demo", "train", "eval", "compare", "predict", "reproduce", "sweep", "prepare")
"""Commands that can be resumed after an interruption."""


class Interrupted(Exception):
    """Ctrl-C, which typer would turn into a silent exit otherwise."""


class Group(TyperGroup):
    """Subcommands that report an interruption."""

    def invoke(self, ctx: Any) -> Any:
        """Run the given subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumed = ctx.invoked_subcommand in RESUMED
            raise Interrupted("; run the same command again to resume." if resumed else ".") from None


class FromFile(TyperCommand):
    """A command with --config, whose file overrides the options' defaults."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the file before the options, except for shell completion."""
        file = None if extra.get("resilient_parsing") else _file(args)
        return self.context(info_name, args, parent, file, extra)

    def context(
        self, info_name: Any, args: list[str], parent: Any, file: ConfigFile | None, extra: dict[str, Any]
    ) -> Any:
        """The context with the values of the arguments and the file."""
        if file is not None:
            values = file.options(TABLES[str(self.name)], _spellings(self))
            _require_numbers(self, values, file)
            extra |= {"default_map": values, "obj": file}
        return super().make_context(info_name, args, parent, **extra)


class ForMethod(FromFile):
    """`atv train`, whose options depend on the method."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Find the method, then parse the arguments with that method's command."""
        file = None if extra.get("resilient_parsing") else _file(args)

        def asked(name: str) -> Any:
            in_file = file.value(TABLES[str(self.name)], name) if file else None
            return _said(args, f"--{name}") or in_file

        method = str(asked("method") or Train.method)
        own = learned(method).own()
        others = {name: asked(name) for name in DECIDE if name in own and asked(name) is not None}
        tables = [*([file.tables] if file else []), {method: others}]
        command = for_method(self.run, method, tables)
        return command.context(info_name, args, parent, file, extra)

    run: Callable[[Train], None]


def command(
    app: typer.Typer, name: str, table: str = "", *, passes_on: bool = False
) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Register a function that takes one dataclass of options as the command `name`.

    Args:
        app: the app to which the command is added.
        name: name of the command.
        table: the TOML table with its options, for a command that takes a file.
        passes_on: whether options that it does not have are words of its argument, for another program.
    """

    def register(run: Callable[[T], None]) -> Callable[[T], None]:
        kind = next(iter(get_type_hints(run).values()))
        if table:
            TABLES[name] = table
        settings = HELP | {"ignore_unknown_options": passes_on}
        app.command(name, cls=FromFile if table else TyperCommand, context_settings=settings)(
            with_signature(_calling(run, kind), options_of(kind))
        )
        return run

    return register


def train_command(app: typer.Typer) -> Callable[[Callable[[Train], None]], Callable[[Train], None]]:
    """Register `atv train`. If no method is given, it has the options of the default method."""

    def register(run: Callable[[Train], None]) -> Callable[[Train], None]:
        TABLES["train"] = "train"
        made = type("TrainCommand", (ForMethod,), {"run": staticmethod(run)})
        app.command("train", cls=made, context_settings=HELP)(
            with_signature(_calling(run, Train), _with_settings(Train.method, ()))
        )
        return run

    return register


def for_method(run: Callable[[Train], None], method: str, tables: Sequence[Tables]) -> FromFile:
    """The command `atv train` for one method.

    Args:
        run: the function to run.
        method: the method whose options it has.
        tables: settings that determine the defaults shown in the help, as for `method_settings`.
    """
    app = typer.Typer(add_completion=False)
    app.command("train", cls=FromFile, context_settings=HELP)(
        with_signature(_calling(run, Train), _with_settings(method, tables))
    )
    return cast(FromFile, get_command(app))


def _with_settings(method: str, tables: Sequence[Tables]) -> Iterator[Shown]:
    """The options of `atv train`, with those of a method and its training after --method."""
    of, settings = learned(method), method_settings(method, tables, Train.seed)
    values = settings.config.to_dict() | settings.train.to_dict()
    for shown in options_of(Train):
        yield shown._replace(default=method) if shown.name == "method" else shown
        if shown.name == "method":
            yield from options_of(of.config, METHOD, values)
            yield from (own for own in options_of(TrainConfig, TRAINING, values) if own.name in of.options())


def _calling(run: Callable[[T], None], kind: type[T]) -> Callable[..., None]:
    """Wrap `run` so that its options are built from the values that typer parsed."""

    def call(context: typer.Context, **values: Any) -> None:
        plain = {shown.name for shown in options_of(kind)}
        settings = {name: value for name, value in values.items() if name not in plain and _given(context, name)}
        tables = context.obj.tables if context.obj is not None else {}
        if context.obj is not None:
            check_tables(tables, context.obj.file)
        run(build(kind, values | {"settings": settings, "tables": tables}))

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    return call


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _said(args: Sequence[str], flag: str) -> str | None:
    """The value of an option in unparsed arguments; the last one if repeated."""
    found = None
    for place, word in enumerate(args):
        if word == flag and place + 1 < len(args):
            found = args[place + 1]
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
    return found


def _file(args: Sequence[str]) -> ConfigFile | None:
    file = _said(args, "--config")
    return None if file is None else ConfigFile(local(file), TABLES.values())


def _require_numbers(command: Any, values: dict[str, Any], file: ConfigFile) -> None:
    """Raise ATVError for a boolean where a number belongs: it would be read as 0 or 1."""
    for option in command.params:
        value = values.get(option.name)
        if isinstance(value, bool) and option.type_descriptor.annotation in (int, float):
            raise ATVError(f"{file.file}: {option.name} is {str(value).lower()}; expected a number.")


def _spellings(command: Any) -> dict[str, str]:
    """Every spelling of a command's options in a file, with the option's name."""
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in ("config", "help")]
    return {spelled.lstrip("-").replace("-", "_"): str(p.name) for p in options for spelled in (p.name, *p.opts)}
