"""The contract: what the LLM reads, and what happens inside it meanwhile. A method knows no metric."""

from abc import ABC
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from atv.errors import ATVError
from atv.tasks import Example, Task, Variant


class Method(ABC):
    """A way to make a frozen LLM do a task. The base class is the plain LLM: override what differs.

    Attributes:
        name: as in the registry and in the records.
        llm: what is called: the frozen LLM, or a PEFT model around it.
        tokenizer: the LLM's.
        edited: how many of a prompt's last tokens `steer` may change; None: any. What prompts share before them is
            read once, unsteered; a method whose `steer` does nothing says 0.
    """

    name: ClassVar[str]
    edited: int | None = None

    def __init__(self, llm: nn.Module, tokenizer: Any) -> None:
        self.llm = llm
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, llm: nn.Module, tokenizer: Any, adapter: Path | None) -> Self:
        """The method on this LLM; `adapter` is the folder that its training wrote, for a method that has one."""
        if adapter is not None:
            raise ATVError(f"The method {cls.name} has no adapter; found --adapter {adapter}: leave it out.")
        return cls(llm, tokenizer)

    def describe(self) -> dict[str, Any]:
        """What identifies this method in a record, ready for JSON."""
        return {}

    def prompt(self, task: Task, example: Example, variant: Variant) -> str:
        """What the LLM reads for an example."""
        return task.prompt(example.input, variant)

    def steer(self, task: Task, examples: Sequence[Example]) -> AbstractContextManager[Any]:
        """What happens inside the LLM while it reads the prompts of `examples`, in their order."""
        del task, examples
        return nullcontext()
