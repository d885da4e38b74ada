"""The options of every command as dataclasses. Nothing here imports torch.

The string under a field is the option's help. Options for settings of methods and their training are not here: they
come from the methods' own configurations (`atv.cli.settings_options`).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from atv.cli.dataclass_options import group, option, unlisted
from atv.config import EMBEDDED_GENERATOR, EMBEDDED_LLM, MOST_SEED, TrainConfig
from atv.evaluation.metrics import METRICS
from atv.methods import METHODS, TRAINED
from atv.paper.experiments import known_experiments
from atv.paper.profiles import PROFILES

MODEL, DATA, METHOD, TRAINING, SERVER, OUTPUT = "Model", "Data", "Method", "Training", "Server", "Output"
ENGINE = "Engine"
DEFAULT_RUNS = Path("runs")


def model(text: object) -> str:
    """A model's name with `~` expanded, since no shell does that in a config file."""
    return os.path.expanduser(str(text))


def named_model(text: object) -> str:
    """NAME=DIR or DIR, with `~` expanded in DIR."""
    name, equals, folder = str(text).rpartition("=")
    return f"{name}{equals}{model(folder)}"


def listed(what: str, names: Iterable[str]) -> str:
    """A sentence that lists names from their registry."""
    return f"{what}: {', '.join(names)}."


# ---- groups that several commands share ----


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the frozen LLM is loaded."""

    PANEL: ClassVar[str] = MODEL

    dtype: str = "auto"
    """dtype of the frozen LLM: bfloat16, float16, float32, or auto: bfloat16 if it is fast on this machine."""
    device: str | None = None
    """cpu, cuda, ..., or auto: spread over all GPUs, then main memory. Default: a GPU if available."""
    quantization: str | None = None
    """Load the LLM's weights in 8bit or 4bit (bitsandbytes). Default: as --dtype says."""
    revision: str | None = None
    """Commit, tag or branch of the LLM on the hub."""
    trust_remote_code: bool = False
    """Run code from the LLM's repository. Only for LLMs that you trust."""


@dataclass(frozen=True, kw_only=True)
class PaperTasks:
    """Which tasks, asked as in the paper."""

    PANEL: ClassVar[str] = DATA

    task: list[str] | None = None
    """Task by name; repeatable. Default: all; train leaves out the category Unseen."""
    data: str | None = option(None, parser=model)
    """CSV, TSV, JSONL, JSON or Parquet file, folder with one for each split, hub:ORG/NAME[:CONFIG], or folder of
    TASK.json files and templates.json. Default: the built-in tasks."""
    template: list[str] | None = None
    """Template with {input}, instead of the task's own; repeatable."""


@dataclass(frozen=True, kw_only=True)
class Tasks(PaperTasks):
    """Which tasks, and how they are asked."""

    input: str | None = option(None)
    """Column of the queries in a table. Default: recognised by its name."""
    output: str | None = option(None)
    """Column of the answers. Default: recognised by its name."""
    format: str | None = option(None)
    """How prompts are written: chat (the LLM's chat template), template (plain text), or auto: chat if the LLM has a
    chat template. Default: auto for a table without --template, template for others, or as the adapter was trained."""
    system: str | None = option(None)
    """System prompt of a chat."""
    chat_template_kwargs: str | None = option(None)
    """Options of the LLM's chat template as JSON, such as '{"enable_thinking": false}'."""


@dataclass(frozen=True, kw_only=True)
class FromFile:
    """Options and settings from a TOML file."""

    config: Path | None = option(None, panel=OUTPUT)
    """TOML file with tables of options for commands, such as [train], and of settings for methods, such as [lora], or
    [all]. Flags override it."""
    tables: dict[str, dict[str, Any]] = unlisted(dict)
    """The file's tables of methods."""


def llm_field() -> Any:
    """The field for the LLM of a command that needs one."""
    return option(EMBEDDED_LLM, panel=MODEL, parser=model)


def adapters_llm_field() -> Any:
    """The field for the LLM of a command with an adapter."""
    return option(None, panel=MODEL, parser=model)


def adapter_field() -> Any:
    """The field for the adapter of a command that needs one."""
    return option(panel=MODEL)


def out_field(default: Path | None) -> Any:
    """The field for the output folder or file."""
    return option(default, panel=OUTPUT)


def seed_field(panel: str) -> Any:
    """The field for a seed."""
    return option(TrainConfig.seed, panel=panel, min=0, max=MOST_SEED)


def force_field() -> Any:
    """The field for starting over."""
    return option(False, panel=OUTPUT, flags=["--force"])


# ---- the product ----


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Of `atv demo`."""

    out: Path = out_field(DEFAULT_RUNS / "demo")
    """Folder for the adapters, the runs and the table."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Of `atv train`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    train_rows: int | None = option(None, panel=DATA)
    """Maximum number of training rows per task, drawn with the seed (paper: 90)."""
    valid_rows: int | None = option(None, panel=DATA)
    """Maximum number of validation rows per task, drawn with the seed."""
    teacher_system: Path | None = option(None, panel=DATA)
    """Distil a prompt: text file with a system prompt. The LLM with it answers the queries of --data, whose own answers
    are not read, and the method learns to make the LLM answer so without it."""
    teacher_shots: int | None = option(None, panel=DATA, min=1)
    """Distil demonstrations: that many rows of --data with their answers, which the teacher reads before each query."""
    teacher_tokens: int | None = option(None, panel=DATA, min=1)
    """Maximum number of tokens of a teacher's answer. Default: 64."""
    method: str = option("atv", panel=METHOD, also=lambda: listed("Known", TRAINED))
    """How the LLM is adapted. This panel and the next show the options of one method: atv train --method NAME --help
    shows those of another, with its defaults."""
    settings: dict[str, Any] = unlisted(dict)
    """The given settings of the method and its training: fields of its configuration and of TrainConfig."""
    seed: int = seed_field(TRAINING)
    """Seed of initialisation, order, dropout and the drawn rows."""
    prefix_memory: float | None = option(None, panel=TRAINING, min=0)
    """GiB of memory per process for the prompts' cached keys and values. Default: half of the free memory."""
    prefix_disk: float | None = option(None, panel=TRAINING, min=0)
    """GiB of files per process, in --out, for keys and values that do not fit in memory. Default: half of the free
    space."""
    out: Path = out_field(DEFAULT_RUNS / "train")
    """Folder for the adapter, the record and the checkpoints."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Of `atv eval`."""

    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's or, without an adapter, the embedded one."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    test_rows: int | None = option(None, panel=DATA)
    """Maximum number of test rows per task, drawn once for all methods and seeds (paper: 100)."""
    train_rows: int | None = option(None, panel=DATA)
    """Maximum number of training rows per task for demonstrations, drawn with the seed."""
    variants: str = option("trained", panel=DATA)
    """trained: every template with the answer prefix of training; all: with every answer prefix; diagonal: each
    template once, each with another prefix; first: only the first template, with the prefix of training."""
    metric: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METRICS))
    """Metric by name, or your own function as package.module:function; repeatable. Default: option_likelihood for tasks
    whose answers are chosen among at most 20, exact_match for others."""
    method: str | None = option(None, panel=METHOD, also=lambda: listed("Known", METHODS))
    """Method to evaluate. Default: the adapter's method or, without an adapter, zero-shot."""
    adapter: Path | None = option(None, panel=METHOD)
    """Folder written by atv train, or ORG/NAME on the Hugging Face hub."""
    shots: int | None = option(None, panel=METHOD)
    """Number of demonstrations, for methods that use them. Default: 16."""
    seed: int = seed_field(METHOD)
    """Seed of all random choices."""
    batch_size: int = option(16, panel=METHOD, min=1)
    """Prompts per call of the LLM."""
    out: Path | None = out_field(None)
    """Folder of the run. Default: runs/METHOD."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Of `atv generate`."""

    query: list[str] = option(argument=True)
    """One or more queries."""
    adapter: Path = adapter_field()
    """Folder written by atv train, or ORG/NAME on the Hugging Face hub."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    task: str | None = option(None, panel=DATA)
    """Put the query into this task's first template."""
    template: str | None = option(None, panel=DATA)
    """The LLM's prompt, with {input} where the query goes."""
    max_new_tokens: int = option(16, panel=OUTPUT, min=1)
    """Maximum number of answer tokens."""
    temperature: float = option(0.0, panel=OUTPUT, min=0, max=2)
    """0 is greedy; above 0 samples."""
    seed: int = seed_field(OUTPUT)
    """Seed of sampling."""
    compare: bool = option(False, panel=OUTPUT, flags=["--compare"])
    """Also show the answer without steering."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """What runs the LLM of `atv serve` and `atv predict`."""

    PANEL: ClassVar[str] = ENGINE

    engine: Literal["transformers", "vllm", "llamacpp"] = option("transformers")
    """What runs the LLM: transformers; vllm, which needs an environment of its own (docs/serve-vllm.md); or llamacpp
    (docs/serve-llamacpp.md)."""
    gguf: Path | None = option(None)
    """The LLM's file for llama.cpp."""
    engine_options: str | None = option(None)
    """Options of vLLM or llama.cpp as JSON, such as {"max_model_len": 4096} or {"n_threads": 4}."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Of `atv predict`."""

    file: str = option(argument=True, parser=model)
    """CSV, TSV, JSONL, JSON or Parquet file, or - for JSON lines from standard input."""
    adapter: Path = adapter_field()
    """Folder written by atv train, or ORG/NAME on the Hugging Face hub."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    input: str | None = option(None, panel=DATA)
    """Column of the queries. Default: those of the training, or recognised by its name."""
    task: str | None = option(None, panel=DATA)
    """Training task whose template and options are used. Default: the only one."""
    template: str | None = option(None, panel=DATA)
    """The LLM's prompt, with {input} where the query goes, instead of the task's first template."""
    max_new_tokens: int | None = option(None, panel=OUTPUT, min=1)
    """Maximum number of tokens of a generated answer. Default: twice those of the longest answer in training."""
    batch_size: int = option(16, panel=OUTPUT, min=1)
    """Prompts per call of the LLM; on vLLM and llama.cpp rows that are asked at the same time."""
    engines: Engines = group(Engines)
    out: str = option(panel=OUTPUT, parser=model)
    """CSV, TSV, JSONL or Parquet file to write, or - for JSON lines on standard output. All columns are kept."""
    force: bool = force_field()
    """Start over, and replace the file if it is there."""


@dataclass(frozen=True, kw_only=True)
class LMEval:
    """Of `atv lm-eval`."""

    arguments: list[str] | None = option(None, argument=True)
    """Everything else goes to lm-eval run, such as its --tasks and its --include_path."""
    adapter: str = option(panel=MODEL, parser=model)
    """Folder written by atv train, or ORG/NAME on the Hugging Face hub."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    query_field: str | None = option(None, panel=DATA)
    """Field of the tasks' documents with the query, which the generator reads as in training. Default: the generator
    reads the whole prompt."""
    training_task: str | None = option(None, panel=DATA)
    """Training task in whose first template the generator reads the query. Default: the only one."""
    scale: float | None = option(None, panel=METHOD)
    """Strength of the vectors. Default: the adapter's."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Of `atv compare`."""

    data: list[str] = option(panel=DATA, parser=model)
    """Data set, as for train; repeatable. A method is trained on each of them alone, and each is a column of the
    table."""
    input: str | None = option(None, panel=DATA)
    """Column of the queries in tables. Default: recognised by its name."""
    output: str | None = option(None, panel=DATA)
    """Column of the answers. Default: recognised by its name."""
    task: list[str] | None = option(None, panel=DATA)
    """Task of a folder with several, by name; repeatable. Default: all."""
    template: list[str] | None = option(None, panel=DATA)
    """Template with {input}, as for train; repeatable."""
    format: str | None = option(None, panel=DATA)
    """How prompts are written, as for train."""
    system: str | None = option(None, panel=DATA)
    """System prompt of a chat."""
    train_rows: list[int] | None = option(None, panel=DATA, min=1)
    """Number of training rows per data set, drawn with the seed; repeatable, for a learning curve. Default: all."""
    valid_rows: int | None = option(None, panel=DATA, min=1)
    """Maximum number of validation rows per data set, drawn with the seed."""
    test_rows: int | None = option(None, panel=DATA, min=1)
    """Maximum number of test rows per data set, the same for all methods and seeds."""
    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    method: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METHODS))
    """Method; repeatable. Default: zero-shot, probe, lora, fixed and atv."""
    metric: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METRICS))
    """Metric, as for eval; repeatable. Default: that of each data set."""
    shots: int | None = option(None, panel=METHOD)
    """Number of demonstrations, for methods that use them. Default: 16."""
    seeds: int = option(3, panel=METHOD, min=1, max=1000)
    """Number of seeds: 42, 43, 44, ..."""
    batch_size: int = option(16, panel=METHOD, min=1)
    """Prompts per call of the LLM in evaluation."""
    out: Path = out_field(DEFAULT_RUNS / "compare")
    """Folder for adapters, runs and the report."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Of `atv serve`."""

    adapter: list[str] | None = option(None, panel=MODEL, parser=named_model)
    """Adapter as NAME=DIR, or DIR alone, whose last part is the name; repeatable. A request chooses it by the name."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the first adapter's."""
    loading: Loading = group(Loading)
    adapters_from: Path | None = option(None, panel=MODEL)
    """Folder from which requests may load, replace and remove adapters while the server runs. Default: they may not."""
    training_queries: bool = option(False, panel=MODEL, flags=["--training-queries"])
    """Show clients the training queries nearest to theirs and their answers, read again from where train.json beside
    the adapter says that they came from."""
    engines: Engines = group(Engines)
    host: str = option("127.0.0.1", panel=SERVER)
    """Address to listen on. Any other than this machine's own needs an API key, in the environment as ATV_API_KEY."""
    port: int = option(8000, panel=SERVER, min=0)
    """Port; 0: a free one."""
    rows: int = option(32, panel=SERVER, min=1)
    """Maximum number of answers that are decoded together."""
    waiting: int = option(256, panel=SERVER, min=1)
    """Maximum number of requests that wait; further ones are refused with status 429."""
    tokens: int = option(2**16, panel=SERVER, min=1)
    """Maximum number of tokens of all answers being decoded, prompts and padding included; bounds memory."""
    max_tokens: int = option(1024, panel=SERVER, min=1)
    """Maximum number of tokens of one answer."""
    timeout: float = option(300.0, panel=SERVER, min=1)
    """Seconds after which a request ends, waiting included."""
    shared_memory: float = option(0.5, panel=SERVER, min=0)
    """GiB for the keys and values of beginnings that prompts share."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Of `atv inspect`."""

    query: list[str] = option(argument=True)
    """One or more queries."""
    adapter: Path = adapter_field()
    """Folder written by atv train with the method atv, or ORG/NAME on the Hugging Face hub."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    data: str | None = option(None, panel=DATA, parser=model)
    """The training data, as for train, to show the training queries nearest to the query. Default: where train.json
    beside the adapter says that they came from."""
    input: str | None = option(None, panel=DATA)
    """Column of the queries in a table. Default: recognised by its name."""
    output: str | None = option(None, panel=DATA)
    """Column of the answers. Default: recognised by its name."""
    task: str | None = option(None, panel=DATA)
    """Put the query into this task's first template."""
    template: str | None = option(None, panel=DATA)
    """The LLM's prompt, with {input} where the query goes."""


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
    """Name of the list of decoder layers, if it is not found automatically."""
    pooling: str = option("mean", panel=METHOD)
    """mean, last or cls; always last for self."""
    data: str | None = option(None, panel=DATA, parser=model)
    """Say too whether the generator can read the queries of this data, which is given as for train."""
    input: str | None = option(None, panel=DATA)
    """Column of the queries in a table. Default: recognised by its name."""
    output: str | None = option(None, panel=DATA)
    """Column of the answers. Default: recognised by its name."""


@dataclass(frozen=True, kw_only=True)
class ListTasks:
    """Of `atv tasks`."""

    tasks: Tasks = group(Tasks)
    audit: bool = option(False, panel=OUTPUT, flags=["--audit"])
    """Look for problems that make results misleading or need explanation."""
    llm: str | None = option(None, panel=MODEL, parser=model)
    """With --audit: also check first answer tokens and lengths for this LLM."""
    generator: str | None = option(None, panel=MODEL, parser=model)
    """With --audit: check whether this generator can read the queries. Default: the one of atv train."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of `atv report` and of `atv paper tables`."""

    runs: list[Path] = option(argument=True)
    """Folders of runs, or folders that contain runs at any depth."""
    details: bool = option(False, flags=["--details"])
    """For tasks answered by choosing an option: also print each label's precision and recall, confusion matrices,
    calibration and the most confident mistakes. Files written with --out always have these tables."""
    out: Path | None = out_field(None)
    """Write the tables to this file: .md, .tex (for booktabs), .csv (one file per table), or .html (one page with
    plots)."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """Of `atv card`."""

    adapter: Path = option(argument=True)
    """Folder written by atv train, or ORG/NAME on the Hugging Face hub."""
    results: list[Path] | None = option(None, panel=DATA)
    """Folder with runs of atv eval of this adapter; repeatable. They replace the card's former results."""
    license: str | None = option(None, panel=OUTPUT)
    """Licence by its identifier on the Hugging Face hub, such as apache-2.0."""
    language: list[str] | None = option(None, panel=OUTPUT)
    """Language of the training data by its code, such as en; repeatable."""
    dataset: list[str] | None = option(None, panel=OUTPUT)
    """Data set on the Hugging Face hub that it was trained on; repeatable."""


# ---- the paper ----


def profile_field() -> Any:
    """The field for the profile."""
    return option("small", panel=METHOD, also=lambda: listed("Known", PROFILES))


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Of `atv paper prepare`."""

    out: Path = option(panel=OUTPUT)
    """Folder for the TASK.json files; give it to the other commands as --data."""
    task: list[str] | None = option(None, argument=True)
    """Tasks of the paper by name. Default: all 25."""
    seed: int = seed_field(DATA)
    """Seed of the splits."""
    revision: str | None = option(None, panel=DATA)
    """Commit, tag or branch of the data set on the hub. Default: the current version."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Of `atv paper reproduce`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: PaperTasks = group(PaperTasks)
    profile: str = profile_field()
    """How much of the paper's protocol is run. On two CPU cores, small takes about two hours, ablation some minutes per
    condition, smoke 3 minutes."""
    experiment: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", known_experiments()))
    """Experiment to run instead of the tables, by name or as your own TOML file; repeatable."""
    method: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", METHODS))
    """Method; repeatable. Default: those of the paper's tables."""
    seed: list[int] | None = option(None, panel=METHOD, min=0, max=MOST_SEED)
    """Seed, instead of the profile's; repeatable."""
    batch_size: int = option(16, panel=METHOD, min=1)
    """Prompts per call of the LLM in evaluation."""
    out: Path = out_field(DEFAULT_RUNS / "reproduce")
    """Folder for adapters, runs and tables."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Of `atv paper sweep`."""

    llm: str = llm_field()
    """Frozen LLM: Hugging Face id, local folder, or an embedded name."""
    loading: Loading = group(Loading)
    tasks: PaperTasks = group(PaperTasks)
    train_rows: int | None = option(None, panel=DATA, min=1)
    """Training rows per task, instead of the profile's number."""
    valid_rows: int | None = option(None, panel=DATA, min=1)
    """Validation rows per task to evaluate on, and as many to choose the epoch, instead of the profile's number."""
    profile: str = profile_field()
    """How much of the paper's protocol is run."""
    method: list[str] | None = option(None, panel=METHOD, also=lambda: listed("Known", TRAINED))
    """Method; repeatable. Default: those of the paper's tables that have settings to choose from."""
    trials: int = option(4, panel=METHOD, min=1)
    """Number of settings to try for each method."""
    out: Path = out_field(DEFAULT_RUNS / "sweep")
    """Folder for the trials and settings.toml."""
    force: bool = force_field()
    """Start over, even if the folder contains results."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Of `atv paper analysis`."""

    adapter: Path = adapter_field()
    """Folder written by atv train with the method atv, or ORG/NAME on the Hugging Face hub."""
    elicit: Path | None = option(None, panel=MODEL)
    """Folder written by atv train --method elicit for the same LLM, to show for comparison."""
    llm: str | None = adapters_llm_field()
    """Frozen LLM. Default: the adapter's."""
    loading: Loading = group(Loading)
    tasks: Tasks = group(Tasks)
    rows: int = option(20, panel=DATA)
    """Maximum number of test rows per task."""
    query: str | None = option(None, panel=DATA)
    """Query to show layer by layer, as one of the first task. Default: its first test row."""
    seed: int = seed_field(DATA)
    """Seed of the map and of the drawn training rows."""
    out: Path = out_field(DEFAULT_RUNS / "analysis")
    """Folder for analysis.json, analysis.md and plots."""
    file: FromFile = group(FromFile)


@dataclass(frozen=True, kw_only=True)
class Theory:
    """Of `atv paper theory`."""

    llm: str | None = option(None, panel=MODEL, parser=model)
    """Also check the theorems on this LLM's weights and hidden states. Default: only random ones."""
    seed: int = seed_field(DATA)
    """Seed of random matrices, prefixes and starting points."""
    out: Path | None = out_field(None)
    """Write the tables to this file: .md, .tex, or .csv, one file per table."""
