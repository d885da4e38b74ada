"""Options that several subcommands share, and the config file that may hold them."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from atv.config import MOST_SEED
from atv.errors import ATVError, unknown
from atv.files import local, read_toml


def path(text: str) -> Path:
    """A path, with `~` as the home folder in a config file too, where no shell expands it."""
    return local(str(text))


def model(text: str) -> str:
    """A model's name, which may be a folder below `~`."""
    return os.path.expanduser(str(text))


def spellings(command: Any) -> dict[str, str]:
    """Every way to spell an option of a command in a config file, and the option's name."""
    options = [p for p in command.params if p.name not in ("config", "help")]
    return {spelled.lstrip("-").replace("-", "_"): str(p.name) for p in options for spelled in (p.name, *p.opts)}


def read_config(file: Path, command: str, options: dict[str, str]) -> dict[str, Any]:
    """The table `[command]` of a TOML file, as option values; a key that is no option raises ATVError.

    Args:
        file: in TOML.
        command: names the table.
        options: from `spellings`.
    """
    tables = read_toml(file, f"a TOML file with a table [{command}]")
    for table in tables:
        if not isinstance(tables[table], dict):
            raise ATVError(f"{file}: {table} stands outside a table; put it under [{command}].")
    values: dict[str, Any] = {}
    for key, value in tables.get(command, {}).items():
        spelled = key.replace("-", "_")
        if spelled not in options:
            raise unknown(f"option in [{command}] of {file}:", key, options)
        if (name := options[spelled]) in values:
            raise ATVError(f"{file}: {name} stands twice under [{command}], the second time as {key}; leave one out.")
        values[name] = value
    return values


SETTINGS = {
    **{name: name for name in ("generator", "positions", "layers", "scale", "pooling", "expansion_rank")},
    **{name: name for name in ("parametrisation", "reads", "gate", "lr_schedule", "optimizer", "adaptive_dropout")},
    **{name: name for name in ("best_epoch", "patience")},
    **{name: name for name in ("query_template", "epochs", "batch_size", "gradient_accumulation_steps")},
    **{name: name for name in ("learning_rate", "generator_learning_rate", "weight_decay", "max_grad_norm")},
    **{name: name for name in ("bf16", "templates_per_row", "train_generator", "generator_start", "state_dropout")},
}
"""Options of `atv train` that are settings of a method or of its training, and the fields that they set."""


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def given_settings(context: typer.Context) -> dict[str, Any]:
    """What the user said of the method and its training, by flags or a config file: fields of its configurations."""
    given = {
        field: context.params[name]
        for name, field in SETTINGS.items()
        if _given(context, name) and context.params[name] is not None
    }
    for text in context.params["set"] or ():
        name, is_there, value = text.partition("=")
        if not is_there:
            raise ATVError(f"--set {text}: expected NAME=VALUE, as in --set rank=16.")
        given[name.strip().replace("-", "_")] = _value(value.strip())
    return given


def _value(text: str) -> Any:
    """A number, a truth value or a list as TOML writes them; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _from_file(context: typer.Context, file: Path | None) -> Path | None:
    """Make the file's options the command's defaults, so that flags win."""
    if file is not None and not context.resilient_parsing:
        values = read_config(file, str(context.info_name), spellings(context.command))
        context.default_map = {**(context.default_map or {}), **values}
    return file


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        parser=path,
        callback=_from_file,
        is_eager=True,
        help="TOML file with the options of this command in a table of its name; flags win.",
    ),
]
LLM = Annotated[str, typer.Option(parser=model, help="Frozen LLM: Hugging Face id, local folder, or an embedded name.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="dtype of the frozen LLM: bfloat16, float16, float32, or auto: bfloat16 where the machine is fast with it."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, ..., or auto: spread over all GPUs, then main memory. Default: a GPU if there is one."
    ),
]
Quantization = Annotated[
    str | None, typer.Option(help="Load the LLM's weights in 8bit or 4bit (bitsandbytes); by default as --dtype says.")
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of the LLM on the hub.")]
Data = Annotated[
    Path | None,
    typer.Option(parser=path, help="Folder of TASK.json files and templates.json; by default the built-in tasks."),
]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--task", help="Task by name; give it once for each. Default: all; train leaves out the category Unseen."
    ),
]
Templates = Annotated[
    list[str] | None, typer.Option("--template", help="Template with {input}, instead of templates.json; give three.")
]
Variants = Annotated[
    str,
    typer.Option(
        help="all: every template with every answer prefix; diagonal: each template once, each with another prefix; "
        "first: the first template with A: alone."
    ),
]
ProfileName = Annotated[
    str,
    typer.Option(
        help="paper, small (two CPU cores, 90 minutes), ablation (some minutes a condition) or smoke (3 minutes)."
    ),
]
MethodNames = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="Method; once for each. Default: all but full, linear, probe, encoder and learned-tv."
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        parser=path, help="TOML file with settings of methods, as atv sweep writes; stronger than the profile's."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_SEED, help="Seed of initialisation, order, dropout and of what is drawn.")
]
Force = Annotated[bool, typer.Option("--force", help="Start over, even if the folder holds results already.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the LLM. Only for one that you trust.")
]
