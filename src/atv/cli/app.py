"""Subcommands: demo, train, eval, reproduce, sweep, generate, doctor, analysis, theory, tasks, prepare, report."""

import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from atv.cli import options as opt
from atv.config import EMBEDDED_GENERATOR, EMBEDDED_LLM
from atv.errors import ATVError
from atv.processes import is_main, leave, wait_turn_to_fail

RESUMED = ("demo", "train", "eval", "reproduce", "sweep", "prepare")
"""Commands that keep what is done when they are interrupted."""


class Interrupted(Exception):
    """Ctrl-C, which typer would turn into a silent exit."""


class Commands(TyperGroup):
    """The subcommands; one that is interrupted says so."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumed = ctx.invoked_subcommand in RESUMED
            raise Interrupted("; run the same command again to resume." if resumed else ".") from None


app = typer.Typer(
    name="atv",
    cls=Commands,
    help="Adaptive Task Vectors: adapt a frozen large language model to each query.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast at every call of every layer
    try:
        app()
    except SystemExit as end:
        if not end.code:
            leave()
        raise
    except (ATVError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # a library's; the system's are a full disk and the like
            raise
        wait_turn_to_fail()
        print(f"atv: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (Interrupted, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if is_main():
            print(f"\natv: interrupted{str(error) or '.'}", file=sys.stderr)  # noqa: T201
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(130)


def _say(text: str) -> None:
    print(text)  # noqa: T201 - results go to standard output


@app.command()
def demo(
    out: Annotated[Path, typer.Option(parser=opt.path, help="Folder for the adapter and the runs.")] = Path(
        "runs/demo"
    ),
    force: opt.Force = False,
) -> None:
    """Train on the built-in tasks with the embedded models, measure beside zero-shot, answer three queries."""
    from atv.cli.demo import run_demo

    run_demo(out, force)


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(parser=opt.path, help="Folder for the adapter, the record and the checkpoints.")
    ] = Path("runs/train"),
    method: Annotated[
        str,
        typer.Option(
            help="atv, fixed, learned-tv, elicit, i2cl, linear, lora, prefix, full, probe or encoder; the options "
            "below are those of atv."
        ),
    ] = "atv",
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A setting of the method that has no option of its own, as rank=16."),
    ] = None,
    llm: opt.LLM = EMBEDDED_LLM,
    generator: Annotated[
        str,
        typer.Option(
            parser=opt.model,
            help="Model that reads the query: Hugging Face id, folder or embedded name; self: the LLM's own lower "
            "layers; random:LAYERSxWIDTH: a new decoder.",
        ),
    ] = EMBEDDED_GENERATOR,
    parametrisation: Annotated[
        str,
        typer.Option(
            help="calibrated, or paper: the paper's form, with the paper's values for what is not given here, whatever "
            "the defaults below say."
        ),
    ] = "calibrated",
    reads: Annotated[
        str, typer.Option(help="The generator is given the prompt (the query in its task's template), or the query.")
    ] = "prompt",
    task: opt.TaskNames = None,
    data: opt.Data = None,
    template: opt.Templates = None,
    positions: Annotated[str, typer.Option(help="last, last:K, answer or all.")] = "last",
    layers: Annotated[str, typer.Option(help="all, bottom, middle, top, or indices as in 0,1,2 or 0-9.")] = "all",
    scale: Annotated[float, typer.Option(help="Strength of the injection (lambda).")] = 0.05,
    pooling: Annotated[str, typer.Option(help="Generator's state: mean, last or cls; of self always last.")] = "mean",
    gate: Annotated[
        float,
        typer.Option(
            help="Fade the query's own part out far from the training queries, beginning with this share of them, and "
            "leave it out where it did harm to validation rows; 0: never."
        ),
    ] = 0.05,
    train_generator: Annotated[
        bool | None,
        typer.Option(
            "--train-generator/--freeze-generator",
            help="Train the generator too, or the expansion alone; by default trained from 200 rows per task on.",
        ),
    ] = None,
    expansion_rank: Annotated[int | None, typer.Option(help="Rank of the expansion; by default full.")] = None,
    query_template: Annotated[
        str, typer.Option(help="What stands around what the generator reads, with {query}.")
    ] = "{query}",
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training rows; by default about 400 steps, 4 to 100 epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per optimiser step, over all processes.")] = 16,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Parts that each process reads its share of a batch in, for less memory.")
    ] = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Highest learning rate; by default the method's (atv: 0.1)."),
    ] = None,
    lr_schedule: Annotated[
        str, typer.Option(help="linear: up over the first 5% of the steps, then down to zero; or constant.")
    ] = "linear",
    optimizer: Annotated[str, typer.Option(help="adamw or adam.")] = "adamw",
    generator_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--generator-learning-rate",
            "--generator-lr",
            help="Highest learning rate of the generator; by default 5e-5.",
        ),
    ] = None,
    generator_start: Annotated[
        float, typer.Option(help="Share of the steps after which a trained generator begins to learn.")
    ] = 0.5,
    weight_decay: Annotated[float, typer.Option(help="Weight decay; of adam an L2 penalty.")] = 0.0,
    max_grad_norm: Annotated[float | None, typer.Option(help="Clip the gradient to this norm.")] = 1.0,
    adaptive_dropout: Annotated[
        float, typer.Option(help="Share of a step's rows that the common vector answers alone.")
    ] = 0.3,
    state_dropout: Annotated[float, typer.Option(help="Dropout of the standardised states.")] = 0.5,
    best_epoch: Annotated[
        str, typer.Option(help="Keep the epoch with the best validation accuracy, or loss.")
    ] = "accuracy",
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after this many epochs without a better one; by default a third of them, at least 5."),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="The generator's matrix products in bfloat16.")] = False,
    templates_per_row: Annotated[
        int, typer.Option(help="Prompts that share a row's vector in a step; 1 takes the templates in turn.")
    ] = 1,
    train_rows: Annotated[
        int | None, typer.Option(help="Maximum number of training rows per task, drawn by the seed (paper: 90).")
    ] = None,
    valid_rows: Annotated[
        int | None, typer.Option(help="Maximum number of validation rows per task, drawn likewise.")
    ] = None,
    prefix_memory: Annotated[
        float | None,
        typer.Option(
            min=0, help="GiB of memory per process for the prompts' keys and values; default: half of what is free."
        ),
    ] = None,
    prefix_disk: Annotated[
        float | None,
        typer.Option(
            min=0, help="GiB of files per process, in --out, for those beyond it; default: half of what is free."
        ),
    ] = None,
    seed: opt.Seed = 42,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    config: opt.Config = None,
) -> None:
    """Train an ATV, or another method, for a frozen LLM. Interrupted, the same command resumes it."""
    from atv.cli.work import train_adapter

    train_adapter(context.params, opt.given_settings(context))


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    method: Annotated[
        str,
        typer.Option(
            help="zero-shot, icl, bm25, elicit, i2cl, linear, lora, prefix, full, probe, encoder, learned-tv, fixed, "
            "atv or icl+atv; by default the adapter's method, without one zero-shot."
        ),
    ] = "",
    adapter: Annotated[Path | None, typer.Option(parser=opt.path, help="Folder that atv train wrote.")] = None,
    shots: Annotated[int | None, typer.Option(help="Demonstrations, for methods with some; by default 16.")] = None,
    llm: Annotated[
        str, typer.Option(parser=opt.model, help="Frozen LLM; by default the adapter's, else the embedded one.")
    ] = "",
    task: opt.TaskNames = None,
    data: opt.Data = None,
    template: opt.Templates = None,
    test_rows: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of test rows per task, drawn, the same for every method and seed (paper: 100)."
        ),
    ] = None,
    train_rows: Annotated[
        int | None,
        typer.Option(help="Maximum number of training rows per task that demonstrations come from, drawn by the seed."),
    ] = None,
    variants: opt.Variants = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per call of the LLM.")] = 16,
    out: Annotated[
        Path | None, typer.Option(parser=opt.path, help="Folder of the run; by default runs/METHOD.")
    ] = None,
    seed: opt.Seed = 42,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    config: opt.Config = None,
) -> None:
    """Measure a method on the test rows of tasks, and record every prediction."""
    from atv.cli.work import evaluate_method

    evaluate_method(context.params)


@app.command()
def reproduce(
    context: typer.Context,
    out: Annotated[Path, typer.Option(parser=opt.path, help="Folder for adapters, runs and tables.")] = Path(
        "runs/reproduce"
    ),
    profile: opt.ProfileName = "small",
    experiment: Annotated[
        list[str] | None,
        typer.Option(
            help="A question instead of the tables, or several: in-domain, unseen, lora, generators, regions, "
            "norms, map, positions, pooling, scale, rank, rows, length, full, adaptive, baselines, sources, or a TOML "
            "file of your own."
        ),
    ] = None,
    method: opt.MethodNames = None,
    llm: opt.LLM = EMBEDDED_LLM,
    task: opt.TaskNames = None,
    data: opt.Data = None,
    template: opt.Templates = None,
    settings: opt.SettingsFile = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per call of the LLM when measuring.")] = 16,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    config: opt.Config = None,
) -> None:
    """Train and measure every method of the paper on the same rows, and write its tables; or run an experiment."""
    from atv.cli.paper import reproduce_tables

    reproduce_tables(context.params)


@app.command()
def sweep(
    context: typer.Context,
    out: Annotated[Path, typer.Option(parser=opt.path, help="Folder for the trials and settings.toml.")] = Path(
        "runs/sweep"
    ),
    profile: opt.ProfileName = "small",
    method: opt.MethodNames = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try, as many for every method.")] = 4,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Per task, instead of the profile's.")] = None,
    valid_rows: Annotated[
        int | None, typer.Option(min=1, help="Per task to measure on, and as many to choose the epoch; as above.")
    ] = None,
    llm: opt.LLM = EMBEDDED_LLM,
    task: opt.TaskNames = None,
    data: opt.Data = None,
    template: opt.Templates = None,
    settings: opt.SettingsFile = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    force: opt.Force = False,
    config: opt.Config = None,
) -> None:
    """Choose the settings of trained methods on validation rows, with as many trials for each."""
    from atv.cli.paper import choose_settings

    choose_settings(context.params)


@app.command()
def generate(
    context: typer.Context,
    query: Annotated[list[str], typer.Argument(help="One or more queries.")],
    adapter: Annotated[Path, typer.Option(parser=opt.path, help="Folder that atv train wrote.")],
    task: Annotated[str | None, typer.Option(help="Put the query into this task's first template.")] = None,
    template: Annotated[str | None, typer.Option(help="What the LLM reads, with {input} where the query goes.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of answer tokens.")] = 16,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy; above 0 samples.")] = 0.0,
    compare: Annotated[bool, typer.Option("--compare", help="Show the answer without steering beside it.")] = False,
    llm: Annotated[str, typer.Option(parser=opt.model, help="Frozen LLM; by default the adapter's.")] = "",
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    seed: opt.Seed = 42,
) -> None:
    """Answer queries with an adapter."""
    from atv.cli.work import answer

    answer(context.params)


@app.command()
def doctor(
    context: typer.Context,
    llm: opt.LLM = EMBEDDED_LLM,
    generator: Annotated[
        str, typer.Option(parser=opt.model, help="Model that reads the query, as for train.")
    ] = EMBEDDED_GENERATOR,
    positions: Annotated[str, typer.Option(help="last, last:K, answer or all.")] = "last",
    layers: Annotated[str, typer.Option(help="all, bottom, middle, top, or indices.")] = "all",
    layer_path: Annotated[str | None, typer.Option(help="Name of the list of decoder layers, if not found.")] = None,
    pooling: Annotated[str, typer.Option(help="mean, last or cls; of self always last.")] = "mean",
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
) -> None:
    """Test on a model that steering does what it says: gradient, positions, scale 0, batch, padding, cache."""
    from atv.cli.work import examine

    if not examine(context.params):
        raise typer.Exit(1)


@app.command()
def analysis(
    context: typer.Context,
    adapter: Annotated[Path, typer.Option(parser=opt.path, help="Folder that atv train wrote, of the method atv.")],
    elicit: Annotated[
        Path | None,
        typer.Option(
            parser=opt.path, help="Folder that atv train --method elicit wrote for the same LLM, to show beside."
        ),
    ] = None,
    task: opt.TaskNames = None,
    data: opt.Data = None,
    template: opt.Templates = None,
    rows: Annotated[int, typer.Option(help="Maximum number of test rows per task.")] = 20,
    query: Annotated[
        str | None,
        typer.Option(help="Looked at layer by layer, as one of the first task; by default its first test row."),
    ] = None,
    out: Annotated[Path, typer.Option(parser=opt.path, help="Folder for analysis.json, analysis.md and plots.")] = Path(
        "runs/analysis"
    ),
    llm: Annotated[str, typer.Option(parser=opt.model, help="Frozen LLM; by default the adapter's.")] = "",
    seed: opt.Seed = 42,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    quantization: opt.Quantization = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.Trust = False,
    config: opt.Config = None,
) -> None:
    """What an adapter's vectors are like: how large, how adaptive, near which others, which tokens they promote."""
    from atv.cli.analysis import analyse_adapter

    analyse_adapter(context.params)


@app.command()
def theory(
    llm: Annotated[
        str | None,
        typer.Option(
            parser=opt.model, help="Try them on this LLM's weights and hidden states too; by default random ones."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=opt.path, help="Write the tables to this file: .md, .tex, or .csv, one file per table."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=opt.MOST_SEED, help="Seed of random matrices, prefixes and starts.")
    ] = 42,
) -> None:
    """The paper's theorems in numbers: what holds, under which conditions, and what does not."""
    from atv.cli.theory import show_theorems

    show_theorems(llm, out, seed)


@app.command()
def tasks(
    context: typer.Context,
    data: opt.Data = None,
    task: opt.TaskNames = None,
    template: opt.Templates = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Look for what makes a number dishonest or in need of a word beside it.")
    ] = False,
    llm: Annotated[
        str | None,
        typer.Option(parser=opt.model, help="With --audit: look at first answer tokens and lengths for this LLM too."),
    ] = None,
) -> None:
    """List tasks with their sizes, options and majority rate; --audit says what to know about them."""
    from atv.cli.work import list_tasks

    list_tasks(context.params)


@app.command()
def prepare(
    out: Annotated[
        Path, typer.Option(parser=opt.path, help="Folder for the TASK.json files; give it to the others as --data.")
    ],
    task: Annotated[list[str] | None, typer.Argument(help="Tasks of the paper by name; by default all 25.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=opt.MOST_SEED, help="Seed of the splits.")] = 42,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the data set on the hub; by default what it has now.")
    ] = None,
    force: opt.Force = False,
) -> None:
    """Write the paper's tasks from their public data sets; needs a network and the extra 'data'."""
    from atv.paper.prepare import prepare as write_tasks

    for line in write_tasks(task or [], out, revision=revision, seed=seed, force=force):
        _say(line)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(parser=opt.path, help="Folders of runs, or folders that hold runs at any depth.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=opt.path,
            help="Write the tables to this file: .md, .tex (for booktabs), .csv (one file per table), or .html (one "
            "page with plots).",
        ),
    ] = None,
) -> None:
    """Print the tables of runs: accuracy per task; of several methods averages and differences too.

    Runs of an experiment, in a folder with its record, have the experiment's tables. What atv analysis found about
    adapters in these folders comes after; its long tables are only written, with --out.
    """
    from atv.cli.output import print_table
    from atv.evaluation.records import load_analyses
    from atv.paper.published import PaperNumbers
    from atv.report import FORMATS, analysis_tables, check_format, report_tables, write_page, write_tables
    from atv.report.analysis import SHORT

    if out is not None:
        check_format(out, page=True)
    analyses = load_analyses(runs)
    rows, tables = report_tables(runs, PaperNumbers())
    found = [analysis_tables(record) for record in analyses]
    for table in [*tables, *(table for some in found for table in some[:SHORT])]:
        print_table(table)
    if out is None:
        _say("Write the tables to a file with --out report.html, or .md, .tex or .csv.")
        return
    tables += [table for some in found for table in some]
    command = shlex.join(["atv", "report", *map(str, runs), "--out", str(out)])
    written = write_tables(tables, out) if out.suffix in FORMATS else write_page(rows, tables, out, command, analyses)
    for path in written:
        _say(f"Written to {path}")
