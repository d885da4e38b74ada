"""Demonstrations: training examples of the task, asked and answered in the prompt before the query."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import nn

from atv.data import Example, Prompt, Renderer, Task
from atv.lm.load import context_length
from atv.lm.scoring import longest_answer
from atv.methods.base import Method


def fitted(
    llm: nn.Module, tokenizer: Any, task: Task, shown: Sequence[Example], example: Example, render: Renderer
) -> Prompt:
    """A query behind the last of the demonstrations in `shown`, as many as the LLM's context holds, if need be none."""

    def prompt(kept: int) -> Prompt:
        return render.prompt(tokenizer, example, shown[len(shown) - kept :])._replace(task=task.name)

    whole, limit = prompt(len(shown)), context_length(llm)
    if limit is None:
        return whole
    limit -= longest_answer(tokenizer, task, render)  # there must be room for any answer
    if len(whole.ids) <= limit:
        return whole
    # Each demonstration makes a prompt longer: few of the counts need to be tried.
    return prompt(bisect_right(range(1, len(shown)), limit, key=lambda kept: len(prompt(kept).ids)))


class Demonstrated(Method):
    """The plain LLM behind demonstrations. Those that the LLM's context has no room for are dropped from the front."""

    edited_tokens = 0
    shots = 16

    def describe(self) -> dict[str, Any]:
        """How many demonstrations were asked for; how many there were stands in each row."""
        return {"shots": self.shots}

    @abstractmethod
    def demonstrations(self, task: Task, examples: Sequence[Example]) -> list[list[Example]]:
        """The training examples to stand before each of `examples`; the last one is the nearest to the query."""

    def prompts(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Prompt]:
        """Each query behind as many of its demonstrations as fit."""
        chosen = self.demonstrations(task, examples)
        return [
            fitted(self.llm, self.tokenizer, task, shown, example, render)
            for shown, example in zip(chosen, examples, strict=True)
        ]
