"""Answers to queries whose answers are not known, asked as in an adapter's training."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atv import artifact
from atv.data import Example, Prompt, check_chat_template, query_renderer, trained_task
from atv.data.columns import query_columns, query_of
from atv.data.render import fitting
from atv.data.task import QUERY_COLUMNS
from atv.errors import ATVError
from atv.evaluation.requests import MOST_TOKENS, Requests
from atv.evaluation.run import read_batch
from atv.lm.load import load_llm, load_tokenizer
from atv.lm.prefix import SharedPrefix
from atv.lm.scoring import encoded_options
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.methods.base import Method
from atv.model import ATVModel
from atv.progress import bar, log

ANSWER = "answer"
"""Column of the answers."""
REASONS = 5
"""Number of reasons why rows have no answer that are logged."""


class Answer(NamedTuple):
    """The answer to a query."""

    text: str
    """The likeliest option, or a generated text."""
    probabilities: dict[str, float] | None = None
    """Probability of each option, most likely first; they sum to 1. None: the answer is generated."""
    problem: str = ""
    """Why there is no answer. Empty: there is one."""
    cut: bool = False
    """Whether the query was cut at its end to fit the LLM's context."""

    @property
    def probability(self) -> float | None:
        """The probability of the answer, if it is an option."""
        return None if self.probabilities is None else self.probabilities[self.text]


class QueryAnswers(ABC):
    """Answers queries with a trained adapter, in prompts written as in its training.

    If the training task has options, the answer is the likeliest of them as a whole; otherwise it is generated
    greedily. Probabilities are the softmax of the options' log-probabilities, divided by the temperature that was
    calibrated on validation rows in training. Subclasses say what runs the LLM.

    Args:
        tokenizer: the LLM's.
        training: the training summary of the adapter.
        reads: what the generator reads, as in `ATVConfig.reads`.
        task: name of the training task. None: the only one; if there are several, the query alone is asked and answers
            are generated.
        template: used instead of the task's first one.
        max_new_tokens: most tokens of a generated answer. None: twice those of the longest answer in training.

    Raises:
        ATVError: the task is unknown, or the LLM's chat template is not that of training.
    """

    def __init__(
        self,
        tokenizer: Any,
        training: Mapping[str, Any],
        reads: str,
        task: str | None = None,
        template: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        check_chat_template(training, tokenizer)
        self.tokenizer, self.render = tokenizer, query_renderer(training, reads, task, template)
        self.task, asked = trained_task(training, task)
        options: Sequence[str] | None = asked.get("options")
        self.options = None if options is None else encoded_options(tokenizer, self.render, tuple(options))
        self.temperature = float(asked.get("temperature") or 1.0)
        self.limit = max_new_tokens or 2 * int(asked.get("answer_tokens") or MOST_TOKENS // 2)
        self.lines = options is None or any("\n" in option for option in options)

    @property
    @abstractmethod
    def room(self) -> int | None:
        """Most tokens of a prompt; None: any number."""

    @abstractmethod
    def ask(self, prompts: Mapping[int, Prompt]) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the answer to each prompt, in batches in any order."""

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> Iterator[list[tuple[int, Answer]]]:
        """Answer queries.

        A query that does not fit the LLM's context is cut at its end, as its answer says. One that is empty, or that
        the chat template refuses, has a `problem` instead of an answer.

        Args:
            examples: their outputs are not used.

        Yields:
            Indices in `examples`, each with its answer; each index once.
        """
        prompts: dict[int, Prompt] = {}
        problems, cut, room = [], set(), self.room
        for index, example in enumerate(examples):
            if not example.input.strip():
                problems.append((index, Answer("", problem="The query is empty.")))
                continue
            try:
                prompt = self.render.prompt(self.tokenizer, example)
                if room is not None and len(prompt.ids) > room:
                    prompt = fitting(self.render, self.tokenizer, example, room)
                    cut.add(index)
            except ATVError as error:
                problems.append((index, Answer("", problem=str(error))))
            else:
                prompts[index] = prompt._replace(task=self.task)
        if problems:
            yield problems
        if prompts:
            for batch in self.ask(prompts):
                yield [(index, answer._replace(cut=index in cut)) for index, answer in batch]

    def chosen(self, values: Sequence[float]) -> Answer:
        """Return the answer, given the options' log-probabilities."""
        assert self.options is not None
        chances = (torch.tensor(values, dtype=torch.float64) / self.temperature).softmax(0).tolist()
        ranked = sorted(zip(self.options.texts, chances, strict=True), key=lambda pair: -pair[1])
        return Answer(ranked[0][0], dict(ranked))


class Predictor(QueryAnswers):
    """Answers queries with a trained method on a transformers model.

    Args:
        method: a trained method on its LLM.
        training: as for `QueryAnswers`, like `task`, `template` and `max_new_tokens`.
        batch_size: prompts per call of the LLM, of like lengths.

    Raises:
        ATVError: as for `QueryAnswers`; or the method does not answer single queries with the LLM.
    """

    def __init__(
        self,
        method: Method,
        training: Mapping[str, Any],
        *,
        task: str | None = None,
        template: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> None:
        if type(method).choose is not Method.choose or method.shots:
            raise ATVError(
                f"The method {method.name} does not answer single queries with the LLM; expected a method that is "
                "trained and steers or adapts the LLM, such as atv, fixed or lora."
            )
        super().__init__(method.tokenizer, training, method.reads, task, template, max_new_tokens)
        self.method, self.batch_size = method, batch_size
        self.requests = Requests(
            method.llm,
            method.tokenizer,
            self.render,
            {"generate" if self.options is None else "loglikelihood"},
            options=self.options,
            limit=self.limit,
            lines=self.lines,
        )

    @property
    def room(self) -> int | None:
        """Most tokens of a prompt; None: any number."""
        limit = self.method.context
        return None if limit is None else limit - self.requests.read_after

    def ask(self, prompts: Mapping[int, Prompt]) -> Iterator[list[tuple[int, Answer]]]:
        """Yield the answer to each prompt, in batches of prompts of like lengths."""
        shared = SharedPrefix(self.method.llm, [prompt.ids for prompt in prompts.values()], self.method.edited_tokens)
        by_length = sorted(prompts, key=lambda index: len(prompts[index].ids))
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            found = read_batch(self.method, self.requests, shared, [prompts[index] for index in batch])
            yield [
                (
                    index,
                    self.chosen(outputs["loglikelihood"].values)
                    if self.options
                    else Answer(outputs["generate"].strip()),
                )
                for index, outputs in zip(batch, found, strict=True)
            ]


def answer_columns(options: Sequence[str] | None) -> list[str]:
    """Return the names of the columns with an answer and the probability of each option."""
    return [ANSWER, *(f"p({option})" for option in options or ())]


class RowAnswers:
    """Answers the rows of a table as new columns; counts the rows without an answer and those with a cut query.

    Args:
        predictor: answers queries.
        columns: those that make a query (`query_columns`).
    """

    def __init__(self, predictor: QueryAnswers, columns: Sequence[str]) -> None:
        self.predictor, self.columns = predictor, columns
        self.rows = 0
        self.problems: Counter[str] = Counter()
        """Number of rows by the reason why they have no answer."""
        self.cut: list[int] = []
        """Numbers of the rows whose queries were cut at their end."""
        self.options = None if predictor.options is None else predictor.options.texts

    def __call__(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Yield batches of row numbers, each with its new columns: None in all of them if there is no answer.

        Args:
            rows: their numbers from 0, and the rows.
        """
        examples, numbers, failed = [], [], []
        self.rows += len(rows)
        for number, row in rows:
            try:  # without the row's number, so that rows of one reason are counted together
                examples.append(query_of("The row", dict(row), self.columns))
                numbers.append(number)
            except ATVError as error:
                failed.append((number, self._columns(Answer("", problem=str(error)))))
        if failed:
            yield failed
        for batch in self.predictor.answers(examples):
            self.cut += [numbers[index] for index, answer in batch if answer.cut]
            yield [(numbers[index], self._columns(answer)) for index, answer in batch]

    def _columns(self, answer: Answer) -> dict[str, Any]:
        options = self.options
        if answer.problem:
            self.problems[answer.problem] += 1
            return dict.fromkeys(answer_columns(options))
        chances = answer.probabilities or {}
        values = [answer.text, *(float(f"{chances[option]:.6g}") for option in options or ())]
        return dict(zip(answer_columns(options), values, strict=True))

    def report(self) -> None:
        """Log how many queries were cut, how many rows have no answer, and the most frequent reasons."""
        if self.cut:
            log.warning(
                f"The queries of {len(self.cut)} of {self.rows} rows are cut at their end to fit the LLM's context "
                f"(room for {self.predictor.room} prompt tokens), the first of them row {min(self.cut)}."
            )
        if not self.problems:
            return
        log.warning(f"{self.problems.total()} of {self.rows} rows have no answer, for these reasons:")
        for problem, count in self.problems.most_common(REASONS):
            log.warning(f"{count} {'row' if count == 1 else 'rows'}: {problem}")
        if len(self.problems) > REASONS:
            log.warning(f"and {len(self.problems) - REASONS} other reasons")


def predict(
    adapter: str | Path | ATVModel | Method,
    rows: Iterable[str | Mapping[str, Any]],
    *,
    llm: Any = None,
    input: str | None = None,
    task: str | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer queries with an adapter, asked as in its training.

    Args:
        adapter: folder or hub id of an adapter, or an `ATVModel` that has been trained or loaded.
        rows: queries; or rows of a table as mappings, such as a `datasets.Dataset`.
        llm: the LLM of an adapter that is given by its folder; by default the one that it names is loaded.
        input: column of the queries; by default that of training, or recognised if that one is not there.
        task: as for `Predictor`, like the next three.
        template: used instead of the task's first one.
        max_new_tokens: most tokens of a generated answer.
        batch_size: prompts per call of the LLM.
        progress: show a progress bar.

    Returns:
        Each row with the new columns `answer` and, for a task with options, `p(OPTION)`: its calibrated probability.
        They are None for a row that cannot be answered; how many and why is logged, and how many queries were cut at
        their end to fit the LLM's context.

    Raises:
        ATVError: as for `Predictor`; or a column is not there, or has the name of a new one.
    """
    asked = list(rows)
    given = [{"input": row} if isinstance(row, str) else dict(row) for row in asked]
    if not given:
        return []
    there = list(dict.fromkeys(column for row in given for column in row))
    method, training = loaded_method(adapter, llm)
    texts = any(isinstance(row, str) for row in asked)  # have a column of their own
    trained = None if texts else trained_task(training, task)[1].get(QUERY_COLUMNS)
    columns = query_columns("The table", there, input, trained)
    options: dict[str, Any] = {"task": task, "template": template, "max_new_tokens": max_new_tokens}
    answers = RowAnswers(Predictor(method, training, batch_size=batch_size, **options), columns)
    if taken := set(there) & set(answer_columns(answers.options)):
        raise ATVError(f"The rows have a column {min(taken)!r} already, which is the name of a new one; rename it.")
    found: dict[int, dict[str, Any]] = {}
    with bar("predict", len(given)) if progress else nullcontext() as shown:
        for batch in answers(list(enumerate(given))):
            found |= batch
            if shown is not None:
                shown.advance(len(batch))
    answers.report()
    return [row | found[number] for number, row in enumerate(given)]


def loaded_method(adapter: str | Path | ATVModel | Method, llm: Any = None) -> tuple[Method, Mapping[str, Any]]:
    """Return a method on its LLM, and the training summary of its adapter; arguments as for `predict`."""
    if isinstance(adapter, ATVModel):
        return ATVMethod(adapter), adapter.training_summary
    if isinstance(adapter, Method):
        return adapter, adapter.describe().get("training", {})
    folder = artifact.locate(adapter)
    saved = artifact.read(folder)
    loaded = load_llm(saved.base_llm["name"]) if llm is None else llm
    tokenizer = load_tokenizer(str(loaded.name_or_path))
    return METHODS[saved.method].load(loaded, tokenizer, folder), saved.training
