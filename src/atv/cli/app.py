"""The commands. Each does its imports inside its function, so that `--help` does not wait for torch."""

import logging
import os
import signal
import sys

import typer

from atv import __version__
from atv.cli import options
from atv.cli.commands import HELP, Group, Interrupted, command, train_command
from atv.errors import ATVError
from atv.processes import is_main, leave, wait_turn_to_fail

UsageError = typer.BadParameter.__base__  # typer exports only BadParameter

app = typer.Typer(
    name="atv",
    cls=Group,
    help="Adaptive Task Vectors: adapt a frozen large language model to each query.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
paper = typer.Typer(
    cls=Group,
    help="Reproduce the paper: its tasks, tables, experiments and theorems.",
    no_args_is_help=True,
    context_settings=HELP,
)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)  # noqa: T201
        raise typer.Exit


@app.callback()
def every(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Adaptive Task Vectors: adapt a frozen large language model to each query."""


def main() -> None:
    """Run the command line; a user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no hints about generation and the like
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast in every call of every layer
    try:
        code = app(prog_name="atv", standalone_mode=False)
        leave()
        sys.exit(code or 0)
    except (ATVError, OSError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not from the system, as a full disk is
            raise
        _refuse(str(error))
    except UsageError as error:  # type: ignore[misc]
        if not error.format_message():  # no command was given: the help has been shown
            sys.exit(2)
        where = f" See {error.ctx.command_path} --help." if error.ctx else ""
        _refuse(f"{error.format_message().rstrip('.')}.{where}")
    except (Interrupted, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if is_main():
            print(f"\natv: interrupted{str(error) or '.'}", file=sys.stderr)  # noqa: T201
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.exit(130)


def _refuse(message: str) -> None:
    wait_turn_to_fail()
    print(f"atv: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


# ---- the product ----


@command(app, "demo")
def demo(given: options.Demo) -> None:
    """Train on the built-in tasks with the embedded models, compare with other methods, answer three queries."""
    from atv.cli.demo import run_demo

    run_demo(given)


@train_command(app)
def train(given: options.Train) -> None:
    """Train an ATV, or another method, for a frozen LLM. After an interruption, the same command resumes."""
    from atv.cli.train import train_adapter

    train_adapter(given)


@command(app, "eval", table="eval")
def evaluate(given: options.Evaluate) -> None:
    """Evaluate a method on the test rows of tasks and record every prediction."""
    from atv.cli.evaluate import evaluate_method

    evaluate_method(given)


@command(app, "compare", table="compare")
def compare(given: options.Compare) -> None:
    """Compare methods on your own data sets with several seeds: one table, one plot, paired differences.

    After an interruption, the same command resumes. More methods, seeds or training rows can be added later.
    """
    from atv.cli.compare import compare_methods

    compare_methods(given)


@command(app, "generate")
def generate(given: options.Generate) -> None:
    """Answer queries with an adapter."""
    from atv.cli.generate import answer

    answer(given)


@command(app, "predict")
def predict(given: options.Predict) -> None:
    """Answer every row of a file with an adapter. After an interruption, the same command resumes.

    The rows are written with all their columns and new ones: answer and, for a task with options, the probability of
    each option, calibrated on the validation rows of training.
    """
    from atv.cli.predict import predict_file

    predict_file(given)


@command(app, "serve")
def serve(given: options.Serve) -> None:
    """Serve adapters over HTTP, with OpenAI's API: the model's name in a request chooses the adapter."""
    from atv.cli.serve import serve_adapters

    serve_adapters(given)


@command(app, "lm-eval", passes_on=True)
def lm_eval(given: options.LMEval) -> None:
    """Evaluate an adapter on tasks of lm-eval, the Language Model Evaluation Harness; needs the extra 'lm-eval'."""
    from atv.cli.lm_eval import run_lm_eval

    run_lm_eval(given)


@command(app, "inspect")
def inspect(given: options.Inspect) -> None:
    """Say what an adapter does for queries: how near training they are, what the vectors promote and from which layer.

    Then follows a table of all layers: the answer that is likeliest there, without and with the vectors.
    """
    from atv.cli.inspect import inspect_queries

    inspect_queries(given)


@command(app, "doctor")
def doctor(given: options.Doctor) -> None:
    """Check that steering works correctly on a model: gradient, positions, scale 0, batch, padding, cache.

    With --data, say too whether the generator can read the queries.
    """
    from atv.cli.doctor import examine

    if not examine(given):
        raise typer.Exit(1)


@command(app, "tasks")
def tasks(given: options.ListTasks) -> None:
    """List tasks with their sizes, options and majority rate; --audit checks them for problems."""
    from atv.cli.tasks import list_tasks

    list_tasks(given)


@command(app, "report")
def report(given: options.Report) -> None:
    """Print the tables of runs: accuracy per task and, with several methods, averages and differences.

    Runs of an experiment, in a folder with its record, get the experiment's tables. Results of atv paper analysis in
    these folders follow; their long tables are only written with --out.
    """
    from atv.cli.report import show_tables

    show_tables(given, "report")


@command(app, "card")
def card(given: options.Card) -> None:
    """Complete an adapter's model card before you share it: results on test rows, licence, language, data sets."""
    from atv.cli.card import complete_card

    complete_card(given)


# ---- the paper ----


@command(paper, "prepare")
def prepare(given: options.Prepare) -> None:
    """Write the paper's tasks from their public data sets; needs network access and the extra 'data'."""
    from atv.cli.output import print_lines
    from atv.paper.prepare import prepare as write_tasks

    print_lines(write_tasks(given.task or [], given.out, revision=given.revision, seed=given.seed, force=given.force))


@command(paper, "reproduce", table="paper.reproduce")
def reproduce(given: options.Reproduce) -> None:
    """Train and evaluate every method of the paper on the same rows and write its tables, or run an experiment."""
    from atv.cli.paper.reproduce import reproduce_tables

    reproduce_tables(given)


@command(paper, "sweep", table="paper.sweep")
def sweep(given: options.Sweep) -> None:
    """Choose the settings of trained methods on validation rows, with equally many trials for each."""
    from atv.cli.paper.sweep import choose_settings

    choose_settings(given)


@command(paper, "tables")
def tables(given: options.Report) -> None:
    """Print the tables of runs like atv report, together with the paper's numbers."""
    from atv.cli.report import show_tables
    from atv.paper.published import PaperNumbers

    show_tables(given, "paper tables", PaperNumbers())


@command(paper, "theory")
def theory(given: options.Theory) -> None:
    """Check the paper's theorems numerically: what holds, under which conditions, and what does not."""
    from atv.cli.paper.theory import show_theorems

    show_theorems(given)


@command(paper, "analysis", table="paper.analysis")
def analysis(given: options.Analysis) -> None:
    """Analyse an adapter's vectors: their size, adaptivity, neighbours, and the tokens that they promote."""
    from atv.cli.paper.analysis import analyse_adapter

    analyse_adapter(given)


app.add_typer(paper, name="paper")
