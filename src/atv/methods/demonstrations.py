"""Demonstrations: training examples of the task with their answers, in the prompt before the query."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from atv.data import Example, Prompt, Renderer, Task
from atv.methods.base import Method


def fitted(
    tokenizer: Any, task: Task, shown: Sequence[Example], example: Example, render: Renderer, room: int | None
) -> Prompt:
    """A query after as many of the last demonstrations in `shown` as `room` tokens hold, possibly none.

    Args:
        tokenizer: the LLM's.
        task: the task.
        shown: its demonstrations.
        example: the query.
        render: the renderer.
        room: most tokens of the prompt; None: any number. The query alone may have more.
    """

    def prompt(kept: int) -> Prompt:
        return render.prompt(tokenizer, example, shown[len(shown) - kept :])._replace(task=task.name)

    whole = prompt(len(shown))
    if room is None or len(whole.ids) <= room:
        return whole
    # The prompt grows with each demonstration, so binary search finds the count.
    return prompt(bisect_right(range(1, len(shown)), room, key=lambda kept: len(prompt(kept).ids)))


class Demonstrated(Method):
    """The plain LLM, with demonstrations before the query. If they exceed the LLM's context, the first are dropped."""

    edited_tokens = 0
    shots = 16

    def describe(self) -> dict[str, Any]:
        """The number of demonstrations requested. The actual number is recorded in each row."""
        return {"shots": self.shots}

    @abstractmethod
    def demonstrations(self, task: Task, examples: Sequence[Example]) -> list[list[Example]]:
        """The demonstrations for each of `examples`; the last one comes right before the query."""

    def prompts(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Prompt]:
        """Each query after as many of its demonstrations as fit."""
        chosen = self.demonstrations(task, examples)
        return [
            fitted(self.tokenizer, task, shown, example, render, self.room)
            for shown, example in zip(chosen, examples, strict=True)
        ]
