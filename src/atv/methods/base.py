"""The contract: what the LLM reads, and what happens inside it while it reads. A method knows no metric."""

from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from torch import nn

from atv.config import Checked, TrainConfig
from atv.data import Example, Prompt, Renderer, Task
from atv.errors import ATVError
from atv.lm.prefix_store import PrefixStore
from atv.steer import Edit


class Choice(NamedTuple):
    """What a method that does not ask the LLM answers to an example."""

    answer: str
    """The likeliest of all answers that it knows for the task."""
    scores: Mapping[str, float] | None = None
    """Log-probabilities of answers; one that is missing has none. None: the method has no scores."""
    prompt_tokens: int = 0
    """Tokens that the LLM read for it."""


class Method(ABC):
    """A way to make a frozen LLM do a task. The base class is the plain LLM: override what differs.

    Attributes:
        name: as in the registry and in the records.
        config_class: the options of a method that is trained; None: there is nothing to train.
        train_defaults: fields of TrainConfig that the method's own paper sets otherwise; None: it is learnt without a
            training loop, and of TrainConfig takes the seed alone.
        search: what a sweep may choose from: fields of `config_class` or TrainConfig, each with values.
        serves: what metrics may need of it: `next_token`, `loglikelihood` and `generate`, all of which the LLM gives.
            A method whose `choose` gives answers without scores says `generate` alone.
        llm: what is called: the frozen LLM, or a PEFT model around it.
        tokenizer: the LLM's.
        edited_tokens: how many of a prompt's last tokens its edits may change; None: any. What prompts share before
            them is read once, unsteered; a method without edits says 0.
        reads: what `edit` reads of a prompt (`Prompt.query`), as `Task.renderers` takes it: "query" or "prompt".
        shots: demonstrations asked for before each query; 0 on the class: a method that has none.
        seed: of what the method draws.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Checked] | None] = None
    train_defaults: ClassVar[dict[str, Any] | None] = {}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {}
    serves: ClassVar[frozenset[str]] = frozenset({"next_token", "loglikelihood", "generate"})
    edited_tokens: int | None = None
    reads: str = "query"
    shots: int = 0
    seed: int = 42

    def __init__(self, llm: nn.Module, tokenizer: Any) -> None:
        self.llm = llm
        self.tokenizer = tokenizer

    @classmethod
    def trained_as(cls) -> str | None:
        """Name of the method whose adapter this one needs, its own or another's; None: it needs none."""
        return None if cls.config_class is None else cls.name

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: Any,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Learn once from the training splits of all `tasks`, choosing on their validation splits.

        A training that `out` holds is returned if it is finished and resumed if it was interrupted; one with
        other settings is refused, unless `force` starts over.

        Args:
            llm: the frozen LLM; as it was when this returns.
            tokenizer: the LLM's.
            tasks: what is learned serves all of them, and tasks that are not among them.
            out: gets `train.json` and the folder `adapter`.
            config: a `config_class`.
            train: how it is trained; a method without a training loop takes its seed alone.
            force: start over.
            store: prompt prefixes that were read already, for methods that use such.

        Returns:
            The adapter's folder, for `load`.
        """
        del llm, tokenizer, tasks, out, config, train, force, store
        raise ATVError(f"The method {cls.name} learns nothing: measure it with atv eval --method {cls.name}.")

    @classmethod
    def wanted_adapter(cls, adapter: Path | None) -> Path:
        """The adapter that was given, or ATVError if there is none."""
        if adapter is None:
            made_by = f"atv train --method {cls.trained_as()}"
            raise ATVError(
                f"The method {cls.name} needs an adapter; give --adapter DIR, the folder that {made_by} wrote."
            )
        return adapter

    @classmethod
    def wanted_shots(cls, shots: int | None) -> int:
        """Demonstrations for each query: `shots`, or the method's own number if that is None."""
        if shots is not None and not cls.shots:
            raise ATVError(f"The method {cls.name} has no demonstrations; found --shots {shots}: leave it out.")
        if shots is not None and shots < 1:
            raise ATVError(f"shots is {shots}; expected a whole number from 1 (without demonstrations: zero-shot).")
        return cls.shots if shots is None else shots

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """The method on this LLM.

        Args:
            llm: what is called.
            tokenizer: the LLM's.
            adapter: the folder that its training wrote, for a method that has one.
            shots: demonstrations, for a method that has them; None: its own number. What a method cannot use is
                refused here, so that whoever loads one by name hands on what the user gave.
            seed: of what the method draws.
        """
        if adapter is not None:
            raise ATVError(f"The method {cls.name} has no adapter; found --adapter {adapter}: leave it out.")
        method = cls(llm, tokenizer)
        method.shots, method.seed = cls.wanted_shots(shots), seed
        return method

    def describe(self) -> dict[str, Any]:
        """What identifies this method in a record, ready for JSON."""
        return {}

    def choose(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Choice] | None:
        """The answers of a method that needs no next token of the LLM; None: the LLM answers its prompts.

        Called once for all examples that a task is asked with a renderer, as `prompts` is, which is then not called.
        """
        del task, examples, render
        return None

    def prompts(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Prompt]:
        """What the LLM reads for each of `examples`, which are all that a task is asked with this renderer.

        Of all at once, because what all of them begin with is read once: a method that must shorten one prompt can
        shorten them all alike. As token ids, because only those tell whether a prompt fits the LLM's context. The
        time that this takes is part of a query's seconds.
        """
        return [render.prompt(self.tokenizer, example)._replace(task=task.name) for example in examples]

    def edit(self, prompts: Sequence[Prompt]) -> Edit | None:
        """What happens inside the LLM while it reads these prompts, in this order; None: nothing."""
        del prompts
        return None
