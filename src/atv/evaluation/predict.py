"""Answers to queries whose answers are not known, asked as in an adapter's training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from atv.data import Example, Prompt, query_renderer
from atv.data.render import fitting
from atv.errors import ATVError
from atv.evaluation.requests import MOST_TOKENS, Requests
from atv.evaluation.run import read_batch
from atv.lm.load import context_length
from atv.lm.prefix import SharedPrefix
from atv.lm.scoring import encoded_options
from atv.methods.base import Method


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
        ATVError: the task is unknown, or the method does not answer single queries with the LLM.
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
        self.method, self.batch_size = method, batch_size
        self.render = query_renderer(training, method.reads, task, template)
        trained: Mapping[str, Any] = training.get("tasks", {})
        self.task = task or (next(iter(trained)) if len(trained) == 1 else "")
        asked = trained.get(self.task, {})
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
