"""The interface of methods: what the LLM reads, and which edits apply. Methods know nothing about metrics."""

from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from accelerate.utils import set_seed  # transformers' own imports peft, which takes seconds
from torch import nn

from atv.config import Checked, TrainConfig
from atv.data import Example, Prompt, Renderer, Task
from atv.errors import ATVError
from atv.lm.adapter_model import AdapterModel
from atv.lm.load import context_length
from atv.lm.prefix_store import PrefixStore
from atv.steer import Edit


class Choice(NamedTuple):
    """The answer to an example by a method that does not ask the LLM."""

    answer: str
    """The most likely of the answers that the method knows for the task."""
    scores: Mapping[str, float] | None = None
    """Log-probability of each answer; unscored answers are missing. None: the method has no scores."""
    prompt_tokens: int = 0
    """Number of tokens that the LLM read for this answer."""


class Method(ABC):
    """A way to make a frozen LLM do a task. The base class is the plain LLM: override what differs.

    Attributes:
        name: its name in the registry and in records.
        config_class: the options of a trained method. None: there is nothing to train.
        train_defaults: fields of TrainConfig for which the method's own paper has other values. None: the method is
            learned without a training loop and uses only the seed of TrainConfig.
        generator_options: those of `atv.config.GENERATOR_OPTIONS` that have an effect on it.
        search: the grid of a sweep: fields of `config_class` or TrainConfig, each with its values.
        serves: the outputs that metrics may request: `next_token`, `loglikelihood` and `generate`. The LLM provides all
            three. A method whose `choose` returns answers without scores serves only `generate`.
        llm: the model that is called: the frozen LLM or a PEFT model around it.
        tokenizer: the LLM's.
        edited_tokens: number of tokens at the end of a prompt that its edits may change. None: any token. Any shared
            prefix before them is read once, unsteered. 0 for a method without edits.
        reads: the text that `edit` finds in `Prompt.query`, as for `Task.renderers`: "query" or "prompt".
        shots: number of demonstrations requested before each query. 0 on the class: the method has none.
        seed: seed of the method's random choices.
        read_after: most tokens that are read after a prompt; the evaluation sets it before it calls `prompts`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Checked] | None] = None
    train_defaults: ClassVar[dict[str, Any] | None] = {}
    generator_options: ClassVar[frozenset[str]] = frozenset()
    search: ClassVar[dict[str, tuple[Any, ...]]] = {}
    serves: ClassVar[frozenset[str]] = frozenset({"next_token", "loglikelihood", "generate"})
    edited_tokens: int | None = None
    reads: str = "query"
    shots: int = 0
    seed: int = 42
    read_after: int = 0

    def __init__(self, llm: nn.Module, tokenizer: Any) -> None:
        self.llm = llm
        self.tokenizer = tokenizer

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and what is read after it; None: any number."""
        return context_length(self.llm)

    @property
    def room(self) -> int | None:
        """Most tokens of a prompt, so that `read_after` tokens can be read after it; None: any number."""
        return None if self.context is None else self.context - self.read_after

    @classmethod
    def trained_as(cls) -> str | None:
        """Name of the method whose adapter this one needs, itself or another. None: it needs no adapter."""
        return None if cls.config_class is None else cls.name

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: Any, train: TrainConfig
    ) -> AdapterModel:
        """Return what `fit` trains, for methods with a training loop; its random numbers are those of `train.seed`.

        Args:
            llm: the frozen LLM.
            tokenizer: the LLM's.
            tasks: the training tasks.
            config: an instance of `config_class`.
            train: how it will be trained.
        """
        del llm, tokenizer, tasks, config, train
        raise ATVError(f"The method {cls.name} learns nothing: measure it with atv eval --method {cls.name}.")

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
        """Train once on the training splits of all `tasks`, selecting on their validation splits.

        This is the training loop for the model that `untrained` returns; a method that learns otherwise overrides it.

        If `out` holds a training, it is returned if finished and resumed if interrupted. A training with other settings
        is refused, unless `force` starts over.

        Args:
            llm: the frozen LLM. It is unchanged when this returns.
            tokenizer: the LLM's.
            tasks: the training tasks. The result serves all of them, and other tasks too.
            out: folder for `train.json` and the folder `adapter`.
            config: an instance of `config_class`.
            train: how to train. A method without a training loop uses only the seed.
            force: start over.
            store: cached prompt prefixes, for methods that use them.

        Returns:
            The adapter's folder, for `load`.
        """
        set_seed(train.seed)
        model = cls.untrained(llm, tokenizer, tasks, config, train)
        from atv.training import (
            loop as training,  # here: the Trainer imports peft and bitsandbytes, seconds that evaluation need not wait
        )

        return training.train(model, tasks, out, train, force, store).adapter

    @classmethod
    def wanted_adapter(cls, adapter: Path | None) -> Path:
        """The given adapter; ATVError if it is None."""
        if adapter is None:
            made_by = f"atv train --method {cls.trained_as()}"
            raise ATVError(
                f"The method {cls.name} needs an adapter; give --adapter DIR, the folder that {made_by} wrote."
            )
        return adapter

    @classmethod
    def wanted_shots(cls, shots: int | None) -> int:
        """Number of demonstrations for each query: `shots`, or the method's default if that is None."""
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
            llm: the model that is called.
            tokenizer: the LLM's.
            adapter: folder written by its training, for a method that has an adapter.
            shots: number of demonstrations, for a method that has them. None: its default. Arguments that the method
                cannot use are refused here, so callers can pass on the user's arguments unchecked.
            seed: seed of the method's random choices.
        """
        if adapter is not None:
            raise ATVError(f"The method {cls.name} has no adapter; found --adapter {adapter}: leave it out.")
        method = cls(llm, tokenizer)
        method.shots, method.seed = cls.wanted_shots(shots), seed
        return method

    def describe(self) -> dict[str, Any]:
        """What identifies this method in a record, as JSON values."""
        return {}

    def choose(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Choice] | None:
        """The answers of a method that does not need the LLM's next token. None: the LLM answers the prompts.

        Called once with all examples of a task and renderer, before `prompts`, which is then skipped.
        """
        del task, examples, render
        return None

    def prompts(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Prompt]:
        """The prompt for each of `examples`, which are all examples of a task with this renderer.

        All at once, because their common prefix is read once: a method that must shorten one prompt can shorten all of
        them alike. As token ids, because only those show whether a prompt fits `room`. The evaluation cuts a query
        whose prompt has more tokens. The time this takes counts toward a query's seconds.
        """
        return [render.prompt(self.tokenizer, example)._replace(task=task.name) for example in examples]

    def edit(self, prompts: Sequence[Prompt]) -> Edit | None:
        """The edit to apply inside the LLM while it reads these prompts, in this order. None: no edit."""
        del prompts
        return None
