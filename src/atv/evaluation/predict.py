"""Answers to queries whose answers are not known, asked as in an adapter's training."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atv import artifact
from atv.data import Example, Prompt, check_chat_template, query_renderer, trained_task
from atv.data.render import fitting
from atv.data.table import query_columns, query_of
from atv.errors import ATVError
from atv.evaluation.requests import MOST_TOKENS, Requests
from atv.evaluation.run import read_batch
from atv.lm.load import context_length, load_llm, load_tokenizer
from atv.lm.prefix import SharedPrefix
from atv.lm.scoring import encoded_options
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.methods.base import Method
from atv.model import ATVModel
from atv.progress import bar, log

ANSWER = "answer"
"""Column of the answers."""


class Answer(NamedTuple):
    """The answer to a query."""

    text: str
    """The likeliest option, or a generated text."""
    probabilities: dict[str, float] | None = None
    """Probability of each option, most likely first; they sum to 1. None: the answer is generated."""
    problem: str = ""
    """Why there is no answer. Empty: there is one."""

    @property
    def probability(self) -> float | None:
        """The probability of the answer, if it is an option."""
        return None if self.probabilities is None else self.probabilities[self.text]


class Predictor:
    """Answers queries with a trained method, in prompts written as in its training.

    If the training task has options, the answer is the likeliest of them as a whole; otherwise it is generated
    greedily. Probabilities are the softmax of the options' log-probabilities, divided by the temperature that was
    calibrated on validation rows in training.

    Args:
        method: a trained method on its LLM.
        training: the training summary of its adapter.
        task: name of the training task. None: the only one; if there are several, the query alone is asked and answers
            are generated.
        template: used instead of the task's first one.
        max_new_tokens: most tokens of a generated answer. None: twice those of the longest answer in training.
        batch_size: prompts per call of the LLM.

    Raises:
        ATVError: the task is unknown, the LLM's chat template is not that of training, or the method does not answer
            single queries with the LLM.
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
        check_chat_template(training, method.tokenizer)
        self.method, self.batch_size = method, batch_size
        self.render = query_renderer(training, method.reads, task, template)
        self.task, asked = trained_task(training, task)
        options: Sequence[str] | None = asked.get("options")
        self.temperature = float(asked.get("temperature") or 1.0)
        self.requests = Requests(
            method.llm,
            method.tokenizer,
            self.render,
            {"generate" if options is None else "loglikelihood"},
            options=None if options is None else encoded_options(method.tokenizer, self.render, tuple(options)),
            limit=max_new_tokens or 2 * int(asked.get("answer_tokens") or MOST_TOKENS // 2),
            lines=options is None or any("\n" in option for option in options),
        )

    @property
    def options(self) -> list[str] | None:
        """The options of the task, if it has any."""
        return None if self.requests.options is None else self.requests.options.texts

    @torch.no_grad()
    def answers(self, examples: Sequence[Example]) -> Iterator[list[tuple[int, Answer]]]:
        """Answer queries in batches of prompts of like lengths.

        A query that does not fit the LLM's context is cut at its end. One that is empty, or that the chat template
        refuses, has a `problem` instead of an answer.

        Args:
            examples: their outputs are not used.

        Yields:
            Indices in `examples`, each with its answer; each index once.
        """
        prompts: dict[int, Prompt] = {}
        problems = []
        limit = context_length(self.method.llm)
        room = None if limit is None else limit - self.requests.read_after
        for index, example in enumerate(examples):
            if not example.input.strip():
                problems.append((index, Answer("", problem="The query is empty.")))
                continue
            try:
                prompt = fitting(self.render, self.method.tokenizer, example, room)
            except ATVError as error:
                problems.append((index, Answer("", problem=str(error))))
            else:
                prompts[index] = prompt._replace(task=self.task)
        if problems:
            yield problems
        if not prompts:
            return
        shared = SharedPrefix(self.method.llm, [prompt.ids for prompt in prompts.values()], self.method.edited_tokens)
        by_length = sorted(prompts, key=lambda index: len(prompts[index].ids))
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            found = read_batch(self.method, self.requests, shared, [prompts[index] for index in batch])
            yield [(index, self._answer(outputs)) for index, outputs in zip(batch, found, strict=True)]

    def _answer(self, outputs: Mapping[Any, Any]) -> Answer:
        if "generate" in outputs:
            return Answer(outputs["generate"])
        scores = outputs["loglikelihood"]
        chances = (torch.tensor(scores.values, dtype=torch.float64) / self.temperature).softmax(0).tolist()
        ranked = sorted(zip(scores.options, chances, strict=True), key=lambda pair: -pair[1])
        return Answer(ranked[0][0], dict(ranked))


def answer_columns(options: Sequence[str] | None) -> list[str]:
    """Return the names of the columns with an answer and the probability of each option."""
    return [ANSWER, *(f"p({option})" for option in options or ())]


class RowAnswers:
    """Answers the rows of a table as new columns, and counts the rows without an answer.

    Args:
        predictor: answers queries.
        columns: those that make a query (`query_columns`).
    """

    def __init__(self, predictor: Predictor, columns: Sequence[str]) -> None:
        self.predictor, self.columns = predictor, columns
        self.problems: Counter[str] = Counter()

    def __call__(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Yield batches of row numbers, each with its new columns: None in all of them if there is no answer.

        Args:
            rows: their numbers from 0, and the rows.
        """
        examples, numbers, failed = [], [], []
        for number, row in rows:
            try:
                examples.append(query_of(f"row {number}", dict(row), self.columns))
                numbers.append(number)
            except ATVError as error:
                failed.append((number, self._columns(Answer("", problem=str(error)))))
        if failed:
            yield failed
        for batch in self.predictor.answers(examples):
            yield [(numbers[index], self._columns(answer)) for index, answer in batch]

    def _columns(self, answer: Answer) -> dict[str, Any]:
        options = self.predictor.options
        if answer.problem:
            self.problems[answer.problem] += 1
            return dict.fromkeys(answer_columns(options))
        chances = answer.probabilities or {}
        values = [answer.text, *(float(f"{chances[option]:.6g}") for option in options or ())]
        return dict(zip(answer_columns(options), values, strict=True))

    def report(self) -> None:
        """Log how many rows have no answer, and why."""
        for problem, count in self.problems.most_common(5):
            log.warning(f"{count} {'row has' if count == 1 else 'rows have'} no answer: {problem}")


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
        input: column of the queries; by default recognised.
        task: as for `Predictor`, like the next three.
        template: used instead of the task's first one.
        max_new_tokens: most tokens of a generated answer.
        batch_size: prompts per call of the LLM.
        progress: show a progress bar.

    Returns:
        Each row with the new columns `answer` and, for a task with options, `p(OPTION)`: its calibrated probability.
        They are None for a row that cannot be answered; how many and why is logged.

    Raises:
        ATVError: as for `Predictor`; or a column is not there, or has the name of a new one.
    """
    given = [{"input": row} if isinstance(row, str) else dict(row) for row in rows]
    if not given:
        return []
    there = list(dict.fromkeys(column for row in given for column in row))
    columns = query_columns("The table", there, input)
    method, training = loaded_method(adapter, llm)
    options: dict[str, Any] = {"task": task, "template": template, "max_new_tokens": max_new_tokens}
    answers = RowAnswers(Predictor(method, training, batch_size=batch_size, **options), columns)
    if taken := set(there) & set(answer_columns(answers.predictor.options)):
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
