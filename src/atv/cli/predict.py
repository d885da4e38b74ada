"""`atv predict`."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from atv import artifact
from atv.cli.engines import check_engine, start_engine
from atv.cli.loading import frozen_llm
from atv.cli.options import Predict
from atv.cli.output import print_lines
from atv.data import query_renderer, trained_task
from atv.data.columns import query_columns
from atv.data.rows import Row
from atv.data.stream import STANDARD, predict_stream
from atv.data.task import QUERY_COLUMNS
from atv.errors import ATVError
from atv.evaluation.predict import Predictor, RowAnswers, answer_columns
from atv.methods import METHODS
from atv.serving.predict import EngineAnswers
from atv.serving.requests import Limits, Serving


class _Lazy:
    """Answers rows; the LLM is loaded when the first ones come, since a finished file needs none."""

    def __init__(self, given: Predict, folder: Any, saved: artifact.Saved) -> None:
        self.given, self.folder, self.saved = given, folder, saved
        self.llm = frozen_llm(given.llm or saved.base_llm["name"], given.loading)
        self.columns: tuple[str, ...] = ()

    @cached_property
    def answers(self) -> RowAnswers:
        given = self.given
        options: dict[str, Any] = {
            "task": given.task,
            "template": given.template,
            "max_new_tokens": given.max_new_tokens,
            "batch_size": given.batch_size,
        }
        if given.engines.engine != "transformers":
            return RowAnswers(EngineAnswers(self.engine, self.adapter, self.saved.training, **options), self.columns)
        llm, tokenizer = self.llm.load()
        method = METHODS[self.saved.method].load(llm, tokenizer, self.folder)
        return RowAnswers(Predictor(method, self.saved.training, **options), self.columns)

    @cached_property
    def engine(self) -> Serving:
        # Answers are as long as --max-new-tokens says.
        limits = Limits(rows=min(self.given.batch_size, 64), answer=2**31, seconds=3600.0)
        return start_engine(self.llm.llm, self.given.engines, self.given.loading, limits)

    @cached_property
    def adapter(self) -> Any:
        return self.engine.load(self.folder)

    def close(self) -> None:
        if "engine" in vars(self):
            self.engine.close()  # vLLM's processes would outlive this one

    def choose(self, there: list[str]) -> tuple[str, ...]:
        """The columns that make a query, among those that the rows have; ATVError if they were others so far."""
        trained = trained_task(self.saved.training, self.given.task)[1].get(QUERY_COLUMNS)
        found = query_columns(self.given.file, there, self.given.input, trained)
        if self.columns and found != self.columns:
            raise ATVError(
                f"Later rows have other columns: queries were read from {' and '.join(self.columns)}, and would now be "
                f"read from {' and '.join(found)}. Name the column with --input, or save the input to a file first."
            )
        self.columns = found
        return found

    def __call__(self, rows: list[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
        yield from self.answers(rows)

    def report(self) -> None:
        if "answers" in vars(self):
            self.answers.report()


def predict_file(given: Predict) -> None:
    """Answer the rows of a file. Everything that can be checked without a model is checked before one is loaded."""
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder)
    if saved.method not in METHODS:
        raise ATVError(f"{folder} is an adapter of the method {saved.method}, which is not known here.")
    query_renderer(saved.training, saved.config.get("reads", "query"), given.task, given.template)
    options = trained_task(saved.training, given.task)[1].get("options")
    if options is not None and given.max_new_tokens is not None:
        raise ATVError(
            "--max-new-tokens is for generated answers, and the adapter chooses among the options of its training "
            "task; leave it out."
        )
    check_engine(given.engines, given.loading)
    answers = _Lazy(given, folder, saved)
    settings = {
        "adapter": artifact.identity(folder),
        **answers.llm.described(),
        "task": given.task,
        "template": given.template,
        "max_new_tokens": given.max_new_tokens,
    }
    if given.engines.engine != "transformers":
        file = given.engines.gguf
        if file is not None and not file.is_file():
            raise ATVError(f"The GGUF file {file} does not exist.")
        settings |= {"engine": given.engines.engine, "gguf": file and [file.name, file.stat().st_size]}
        settings |= {"engine_options": given.engines.engine_options}
    columns = answer_columns(options)
    try:
        asked = predict_stream(given.file, given.out, columns, answers, settings, given.force, answers.choose)
        answers.report()
    finally:
        answers.close()
    if str(given.out) != STANDARD:
        print_lines([f"Answers: {given.out} ({asked} rows answered now)"])
