"""Options that several subcommands share, and the config file that may hold them."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from atv.errors import ATVError, unknown

EMBEDDED_LLM = "embedded:smollm2-135m"
EMBEDDED_GENERATOR = "embedded:minilm-l6"
EMBEDDED_CONFIG = Path(__file__).parent / "embedded.toml"


def read_config(path: Path, command: str, known: list[str]) -> dict[str, Any]:
    """The table `[command]` of a TOML file, as option values; a key that is no option raises ATVError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ATVError(f"No config file {path}; expected a TOML file with a table [{command}].") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ATVError(f"{path} is not a TOML file ({error}); expected a table [{command}].") from None
    for name in tables:
        if not isinstance(tables[name], dict):
            raise ATVError(f"{path}: {name} stands outside a table; put it under [{command}].")
    options = {key.replace("-", "_"): value for key, value in tables.get(command, {}).items()}
    for key in options:
        if key not in known:
            raise unknown(f"option in [{command}] of {path}:", key, known)
    return options


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def with_recipe(context: typer.Context) -> dict[str, Any]:
    """The options of `train`; with the embedded models, those not given come from `embedded.toml`."""
    options = dict(context.params)
    other_generator = _given(context, "generator") and options["generator"] != EMBEDDED_GENERATOR
    if options["llm"] != EMBEDDED_LLM or other_generator:
        return options
    recipe = read_config(EMBEDDED_CONFIG, "train", list(options))
    taken = {key: value for key, value in recipe.items() if not _given(context, key)}
    from atv.progress import note

    note(f"Embedded models: {', '.join(f'{key} {value}' for key, value in taken.items())} (embedded.toml; flags win)")
    return options | taken


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's options the command's defaults, so that flags win."""
    if path is not None and not context.resilient_parsing:
        known = [str(p.name) for p in context.command.params if p.name not in ("config", "help")]
        values = read_config(path, str(context.info_name), known)
        context.default_map = {**(context.default_map or {}), **values}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=_from_file,
        is_eager=True,
        help="TOML file with the options of this command in a table of its name; flags win.",
    ),
]
LLM = Annotated[str, typer.Option(help="Frozen LLM: Hugging Face id, local folder, or an embedded name.")]
Dtype = Annotated[str, typer.Option(help="dtype of the frozen LLM: bfloat16, float16 or float32.")]
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
    Path | None, typer.Option(help="Folder of TASK.json files and templates.json; by default the built-in tasks.")
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
Seed = Annotated[int, typer.Option(help="Seed of initialisation, order, dropout and of what is drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Begin anew, even if the folder holds this already.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the LLM. Only for one that you trust.")
]


def parse_layers(text: str) -> str | list[int]:
    """`all`, `bottom`, `middle`, `top`, or indices as in `0,1,2` and `0-9`."""
    indices: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if not all(end.strip().isdigit() for end in ends) or len(ends) > 2:
            return text  # a region, or a mistake that the configuration names
        indices.extend(range(int(ends[0]), int(ends[-1]) + 1))
    return indices
