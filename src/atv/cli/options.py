"""The options of every command as dataclasses: what a command is given. Nothing here imports torch.

The string under a field is the option's help. Settings of methods and of their training are no fields here: their
options come from the methods' own configurations (`atv.cli.settings_options`).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from atv.cli.dataclass_options import group, option, unlisted
from atv.config import EMBEDDED_GENERATOR, EMBEDDED_LLM, MOST_SEED, TrainConfig
from atv.evaluation.metrics import METRICS
from atv.methods import METHODS, TRAINED
from atv.paper.experiments import known_experiments
from atv.paper.profiles import PROFILES

MODEL, DATA, METHOD, TRAINING, OUTPUT = "Model", "Data", "Method", "Training", "Output"
DEFAULT_RUNS = Path("runs")


def model(text: object) -> str:
    """A model's name, which may be a folder below `~`, in a config file too, where no shell expands it."""
    return os.path.expanduser(str(text))


def listed(what: str, names: Iterable[str]) -> str:
    """A sentence that lists names from their registry."""
    return f"{what}: {', '.join(names)}."


# ---- groups that several commands share ----


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the frozen LLM is loaded."""

    PANEL: ClassVar[str] = MODEL

    dtype: str = "auto"
    """dtype of the frozen LLM: bfloat16, float16, float32, or auto: bfloat16 where the machine is fast with it."""
    device: str | None = None
    """cpu, cuda, ..., or auto: spread over all GPUs, then main memory. Default: a GPU if there is one."""
    quantization: str | None = None
    """Load the LLM's weights in 8bit or 4bit (bitsandbytes). Default: as --dtype says."""
    revision: str | None = None
    """Commit, tag or branch of the LLM on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the LLM. Only for one that you trust."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Which tasks."""

    PANEL: ClassVar[str] = DATA

    task: list[str] | None = None
    """Task by name; give it once for each. Default: all; train leaves out the category Unseen."""
    data: str | None = option(None)
    """CSV, TSV, JSONL, JSON or Parquet file, folder with one for each split, hub:ORG/NAME[:CONFIG], or folder of
    TASK.json files and templates.json. Default: the built-in tasks."""
    input: str | None = option(None)
    """Column of the queries in a table. Default: recognised by its name."""
    output: str | None = option(None)
    """Column of the answers. Default: recognised by its name."""
    template: list[str] | None = None
    """Template with {input}, instead of templates.json; give three."""


@dataclass(frozen=True, kw_only=True)
class FromFile:
    """Options and settings that are in a TOML file."""

    config: Path | None = option(None, panel=OUTPUT)
    """TOML file with a table of options for each command, as [train], and of settings for each method, as [lora], or
    [all]. Flags win."""
    tables: dict[str, dict[str, Any]] = unlisted(dict)
    """The methods' tables of that file."""


def llm_field() -> Any:
    """The field of the LLM of a command that needs one."""
    return option(EMBEDDED_LLM, panel=MODEL, parser=model)


def adapters_llm_field() -> Any:
    """The field of the LLM of a command with an adapter."""
    return option(None, panel=MODEL, parser=model)


def adapter_field() -> Any:
    """The field of a command that needs an adapter."""
    return option(panel=MODEL)


def out_field(default: Path | None) -> Any:
    """The field of a folder or file that is written."""
    return option(default, panel=OUTPUT)


def seed_field(panel: str) -> Any:
    """The field of a seed."""
    return option(TrainConfig.seed, panel=panel, min=0, max=MOST_SEED)


def force_field() -> Any:
    """The field of starting over."""
    return option(False, panel=OUTPUT, flags=["--force"])


# ---- the product ----


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Of `atv demo`."""

    out: Path = out_field(DEFAULT_RUNS / "demo")
    """Folder for the adapters, the runs and the table."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Of `atv train`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    train_rows: int | None = option(None, panel=DATA)
    """Maximum number of training rows per task, drawn by the seed (paper: 90)."""
    valid_rows: int | None = option(None, panel=DATA)
    """Maximum number of validation rows per task, drawn likewise."""
    method: str = option("atv", panel=METHOD, also=lambda: listed("Known", TRAINED))
    """How the LLM is adapted. The options shown in this panel and the next are those of one method: atv train --method
    NAME --help shows those of another, with the values that it uses."""
    settings: dict[str, Any] = unlisted(dict)
    """What was said of the method and its training: fields of its configuration and of TrainConfig."""
    seed: int = seed_field(TRAINING)
    """Seed of initialisation, order, dropout and of the rows that are drawn."""
    prefix_memory: float | None = option(None, panel=TRAINING, min=0)
    """GiB of memory per process for the prompts' cached keys and values. Default: half of what is free."""
    prefix_disk: float | None = option(None, panel=TRAINING, min=0)
    """GiB of files per process, in --out, for those beyond it. Default: half of what is free."""
    out: Path = out_field(DEFAULT_RUNS / "train")
    """Folder for the adapter, the record and the checkpoints."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Of `atv eval`."""

    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's, without one the embedded one."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    test_rows: int | None = option(None, panel=DATA)
    """Maximum number of test rows per task, drawn, the same for every method and seed (paper: 100)."""
    train_rows: int | None = option(None, panel=DATA)
    """Maximum number of training rows per task that demonstrations come from, drawn by the seed."""
    variants: str = option("all", panel=DATA)
    """all: every template with every answer prefix; diagonal: each template once, each with another prefix; first: the
    first template with A: alone."""
    metric: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METRICS))
    """What is scored; once for each: a metric by name, or your own function as package.module:function. Default:
    option_likelihood for tasks with at most 20 options, exact_match for others."""
    method: str | None = option(None, panel=METHOD, also=lambda: listed("Known", METHODS))
    """What is measured. Default: the adapter's method, without an adapter zero-shot."""
    adapter: Path | None = option(None, panel=METHOD)
    """Folder that atv train wrote."""
    shots: int | None = option(None, panel=METHOD)
    """Demonstrations, for methods with some. Default: 16."""
    seed: int = seed_field(METHOD)
    """Seed of what is drawn."""
    batch_size: int = option(16, panel=METHOD, min=1)
    """Prompts per call of the LLM."""
    out: Path | None = out_field(None)
    """Folder of the run. Default: runs/METHOD."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Of `atv generate`."""

    query: list[str] = option(argument=True)
    """One or more queries."""
    adapter: Path = adapter_field()
    """Folder that atv train wrote."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    task: str | None = option(None, panel=DATA)
    """Put the query into this task's first template."""
    template: str | None = option(None, panel=DATA)
    """What the LLM reads, with {input} where the query goes."""
    max_new_tokens: int = option(16, panel=OUTPUT, min=1)
    """Maximum number of answer tokens."""
    temperature: float = option(0.0, panel=OUTPUT, min=0)
    """0 is greedy; above 0 samples."""
    seed: int = seed_field(OUTPUT)
    """Seed of sampling."""
    compare: bool = option(False, panel=OUTPUT, flags=["--compare"])
    """Show the answer without steering beside it."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Of `atv inspect`."""

    query: list[str] = option(argument=True)
    """One or more queries."""
    adapter: Path = adapter_field()
    """Folder that atv train wrote, of the method atv."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    task: str | None = option(None, panel=DATA)
    """Put the query into this task's first template."""
    template: str | None = option(None, panel=DATA)
    """What the LLM reads, with {input} where the query goes."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Of `atv doctor`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    generator: str = option(EMBEDDED_GENERATOR, panel=METHOD, parser=model)
    """Model that reads the query, as for train."""
    positions: str = option("last", panel=METHOD)
    """last, last:K, answer or all."""
    layers: str = option("all", panel=METHOD)
    """all, bottom, middle, top, or indices."""
    layer_path: str | None = option(None, panel=METHOD)
    """Name of the list of decoder layers, if it is not found."""
    pooling: str = option("mean", panel=METHOD)
    """mean, last or cls; of self always last."""


@dataclass(frozen=True, kw_only=True)
class ListTasks:
    """Of `atv tasks`."""

    tasks: Tasks = group(Tasks)
    audit: bool = option(False, panel=OUTPUT, flags=["--audit"])
    """Look for what makes a number dishonest or in need of a word beside it."""
    llm: str | None = option(None, panel=MODEL, parser=model)
    """With --audit: look at first answer tokens and lengths for this LLM too."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of `atv report` and of `atv paper tables`."""

    runs: list[Path] = option(argument=True)
    """Folders of runs, or folders that hold runs at any depth."""
    out: Path | None = out_field(None)
    """Write the tables to this file: .md, .tex (for booktabs), .csv (one file per table), or .html (one page with
    plots)."""


# ---- the paper ----


def profile_field() -> Any:
    """The field of how much of the paper's protocol is run."""
    return option("small", panel=METHOD, also=lambda: listed("Known", PROFILES))


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Of `atv paper prepare`."""

    out: Path = option(panel=OUTPUT)
    """Folder for the TASK.json files; give it to the others as --data."""
    task: list[str] | None = option(None, argument=True)
    """Tasks of the paper by name. Default: all 25."""
    seed: int = seed_field(DATA)
    """Seed of the splits."""
    revision: str | None = option(None, panel=DATA)
    """Commit, tag or branch of the data set on the hub. Default: what it has now."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Of `atv paper reproduce`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    profile: str = profile_field()
    """How much of the paper's protocol is run: small takes two CPU cores about two hours, ablation some minutes for
    each condition, smoke 3 minutes."""
    experiment: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", known_experiments()))
    """A question instead of the tables, or several; or a TOML file of your own."""
    method: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METHODS))
    """Method; once for each. Default: those of the paper's tables."""
    seed: list[int] | None = option(None, panel=METHOD)
    """Seed, instead of the profile's; once for each."""
    batch_size: int = option(16, panel=METHOD, min=1)
    """Prompts per call of the LLM when measuring."""
    out: Path = out_field(DEFAULT_RUNS / "reproduce")
    """Folder for adapters, runs and tables."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Of `atv paper sweep`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    train_rows: int | None = option(None, panel=DATA, min=1)
    """Training rows per task, instead of the profile's number."""
    valid_rows: int | None = option(None, panel=DATA, min=1)
    """Validation rows per task to measure on, and as many to choose the epoch, instead of the profile's number."""
    profile: str = profile_field()
    """How much of the paper's protocol is run."""
    method: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", TRAINED))
    """Method; once for each. Default: those of the paper's tables that have settings to choose from."""
    trials: int = option(4, panel=METHOD, min=1)
    """Settings to try, as many for every method."""
    out: Path = out_field(DEFAULT_RUNS / "sweep")
    """Folder for the trials and settings.toml."""
    force: bool = force_field()
    """Start over, even if the folder holds results already."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Of `atv paper analysis`."""

    adapter: Path = adapter_field()
    """Folder that atv train wrote, of the method atv."""
    elicit: Path | None = option(None, panel=MODEL)
    """Folder that atv train --method elicit wrote for the same LLM, to show beside."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    rows: int = option(20, panel=DATA)
    """Maximum number of test rows per task."""
    query: str | None = option(None, panel=DATA)
    """Looked at layer by layer, as one of the first task. Default: its first test row."""
    seed: int = seed_field(DATA)
    """Seed of the map and of the training rows that are drawn."""
    out: Path = out_field(DEFAULT_RUNS / "analysis")
    """Folder for analysis.json, analysis.md and plots."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Theory:
    """Of `atv paper theory`."""

    llm: str | None = option(None, panel=MODEL, parser=model)
    """Try the theorems on this LLM's weights and hidden states too. Default: random ones alone."""
    seed: int = seed_field(DATA)
    """Seed of random matrices, prefixes and starts."""
    out: Path | None = out_field(None)
    """Write the tables to this file: .md, .tex, or .csv, one file per table."""
