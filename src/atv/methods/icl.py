"""ICL, in-context learning: random demonstrations of the task, the same before every query."""

import random
from collections.abc import Sequence

from atv.data import Example, Prompt, Renderer, Task
from atv.methods.demonstrations import Demonstrated, fitted


class ICL(Demonstrated):
    """Demonstrations drawn with the run's seed and the task's name.

    All prompts of a task and renderer begin with the same demonstrations, so their keys and values are computed once.
    """

    name = "icl"

    def demonstrations(self, task: Task, examples: Sequence[Example]) -> list[list[Example]]:
        """The same demonstrations for each of `examples`; all training rows if the task has fewer than `shots`."""
        draw = random.Random(f"{self.seed} {task.name}")
        drawn = draw.sample(task.train, min(self.shots, len(task.train)))
        return [drawn] * len(examples)

    def prompts(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Prompt]:
        """Each query after as many demonstrations as fit before the longest one, so that all prompts begin alike."""
        drawn = self.demonstrations(task, examples)[0]
        longest = max(examples, key=lambda example: len(example.input))  # in characters: an estimate, corrected below
        kept = fitted(self.tokenizer, task, drawn, longest, render, self.room).demonstrations
        while True:
            shown = drawn[len(drawn) - kept :]
            prompts = [fitted(self.tokenizer, task, shown, example, render, self.room) for example in examples]
            least = min(prompt.demonstrations for prompt in prompts)
            if least == kept:
                return prompts
            kept = least
