"""Command-line options from dataclass fields: a field defines an option's name, type, default and help.

The help is the string under the field. Settings only for the command line (another spelling, a panel, a range) are in
the field's metadata, set by `option`.
"""

import ast
import inspect
import math
import textwrap
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import typer

from atv.files import local

T = TypeVar("T")
MAY_BE_EMPTY = ("system", "query")
"""Options whose empty text means something; elsewhere it would be taken for an option that was left out."""


def option(
    default: Any = MISSING,
    *,
    panel: str = "",
    flags: Iterable[str] = (),
    also: Callable[[], str] | None = None,
    argument: bool = False,
    **typer_options: Any,
) -> Any:
    """A dataclass field with command-line settings in addition to its type and docstring.

    Args:
        default: default of the field. Without one, the option is required.
        panel: panel of the help page; by default that of the field's group.
        flags: spellings; by default derived from the field's name.
        also: returns a sentence to add to the help, such as the names in a registry.
        argument: make it an argument instead of an option.
        typer_options: further arguments of `typer.Option` or `typer.Argument`.
    """
    about = {"panel": panel, "flags": tuple(flags), "also": also, "argument": argument, "typer": typer_options}
    return field(default=default, metadata=about)


def group(kind: type[T], **changed: Any) -> T:
    """A field with a group of options, whose fields become options of the command. `changed` overrides defaults."""
    made: T = field(default_factory=lambda: kind(**changed))
    return made


def unlisted(default_factory: Callable[[], Any]) -> Any:
    """A field that is not an option."""
    return field(default_factory=default_factory, metadata={"unlisted": True})


@cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and its bases, each as one line."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # a class defined interactively has no source
            continue
        for declared, text in pairwise(body):
            if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr):
                value, target = getattr(text.value, "value", None), declared.target
                if isinstance(value, str) and isinstance(target, ast.Name):
                    found[target.id] = " ".join(value.split()).replace("`", "")
    return found


class Shown(NamedTuple):
    """A dataclass field as an option of a command."""

    name: str
    type: Any
    """Type for typer."""
    default: Any
    """Default; MISSING: the option is required."""
    info: Any
    """`typer.Option` or `typer.Argument`."""


def options_of(kind: type, panel: str = "", defaults: Mapping[str, Any] | None = None) -> Iterator[Shown]:
    """The fields of a dataclass as options, with groups expanded in place.

    Args:
        kind: the dataclass. Its optional attributes PANEL and UNLISTED name the panel of its options and the fields
            that are not options.
        panel: default panel.
        defaults: override the fields' defaults.
    """
    hints, docs = get_type_hints(kind), field_docs(kind)
    panel = getattr(kind, "PANEL", panel)
    for of in fields(kind):
        if of.metadata.get("unlisted") or of.name in getattr(kind, "UNLISTED", ()):
            continue
        if is_dataclass(hints[of.name]):
            changed = vars(of.default_factory()) if of.default_factory is not MISSING else {}
            yield from options_of(hints[of.name], panel, changed)
        else:
            default = (defaults or {}).get(of.name, of.default)
            yield _shown(of, hints[of.name], docs.get(of.name, ""), panel, default)


def _shown(of: "Field[Any]", hint: Any, text: str, panel: str, default: Any) -> Shown:
    about = of.metadata
    kind, how = _typed(hint, default)
    if about.get("also"):
        text = f"{text} {about['also']()}"
    how |= {"help": text.replace("[", "\\["), **about.get("typer", {})}
    if "parser" in about.get("typer", {}):
        how["parser"] = _of_text(how["parser"])
    if about.get("argument"):
        return Shown(of.name, kind, default, typer.Argument(**how))
    flags = about.get("flags") or [f"--{of.name.replace('_', '-')}"]
    if kind in (bool, bool | None) and default is not False and len(flags) == 1 and "/" not in flags[0]:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    if default is None or default is False:
        how["show_default"] = False
    return Shown(of.name, kind, default, typer.Option(*flags, rich_help_panel=about.get("panel") or panel, **how))


def _typed(hint: Any, default: Any) -> tuple[Any, dict[str, Any]]:
    """A field's type for typer: strings for choices and for unions."""
    kinds = [kind for kind in (get_args(hint) if _is_union(hint) else [hint]) if kind is not NoneType]
    optional = NoneType in get_args(hint)
    if len(kinds) > 1:
        if int in kinds or float in kinds:
            return str, {"parser": toml_value, "metavar": "VALUE"}
        return str, {"parser": lambda value: value, "metavar": "TEXT"}  # a file may contain a list
    (kind,) = kinds
    if Path in (kind, *get_args(kind)):
        how = {"parser": _path, "metavar": "PATH"}
        return (kind | None if optional else kind), how
    if get_origin(kind) is Literal:
        return str | None if optional else str, {"metavar": f"[{'|'.join(get_args(kind))}]"}
    if optional and kind in (int, float) and default is not None:  # a value that is set by default can be switched off
        return str, {
            "parser": lambda text: None if text == "none" else _number(kind, text),
            "metavar": f"{kind.__name__.upper()}|none",
        }
    return kind | None if optional else kind, {"parser": _text} if str in (kind, *get_args(kind)) else {}


def _number(kind: type[T], text: Any) -> T:
    if isinstance(text, bool):  # of a file; would be 0 or 1
        raise typer.BadParameter(f"it is {str(text).lower()}; expected a number or none")
    return kind(text)  # type: ignore[call-arg]


def _text(value: Any) -> str:
    if isinstance(value, bool | list | dict):  # of a file; would be the text of a Python object
        raise typer.BadParameter(f"it is {value!r}; expected one text")
    return str(value)


def _of_text(parser: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: parser(_text(value))


def _is_union(hint: Any) -> bool:
    return hasattr(hint, "__args__") and get_origin(hint) not in (list, tuple, dict, Literal)


def _path(value: Any) -> Path:
    text = _text(value)
    if not text.strip():  # would be the folder that one is in
        raise typer.BadParameter("it is empty; expected a path")
    return local(text)


def toml_value(text: Any) -> Any:
    """Parse a TOML number, boolean or list; otherwise return the text itself."""
    if not isinstance(text, str):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build the dataclass and its groups from these values."""
    hints = get_type_hints(kind)
    made = {}
    for of in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[of.name]):
            made[of.name] = build(hints[of.name], values)
        elif of.name in values:
            made[of.name] = values[of.name]
    return kind(**made)


def with_signature(run: Callable[..., None], options: Iterable[Shown]) -> Callable[..., None]:
    """`run(context, **values)` as a function with a signature from which typer reads the options."""
    listed = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, kind, default, info in options:
        empty = inspect.Parameter.empty if default is MISSING else default
        listed.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=Annotated[kind, info])
        )

    def command(**values: Any) -> None:
        context = values.pop("context")
        for name, value in values.items():
            given = f"--{name.replace('_', '-')}"
            if name not in MAY_BE_EMPTY and "" in (value if isinstance(value, list) else [value]):
                raise typer.BadParameter(f"{given} is empty; expected a value. Leave it out for its default", context)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{given} is {value}; expected a finite number", context)
        run(context, **values)

    command.__signature__ = inspect.Signature(listed)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command
