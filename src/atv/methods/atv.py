"""ATV: the plain prompt, and vectors made from the query inside the LLM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from atv.config import GENERATOR_OPTIONS, ATVConfig, Checked, TrainConfig
from atv.data import Prompt, Task
from atv.doctor import model_summary
from atv.methods.base import Method
from atv.model import ATVModel
from atv.progress import log
from atv.steer import Edit


class ATVMethod(Method):
    """A trained adapter. Its generator reads an example's input unless the configuration says otherwise."""

    name = "atv"
    config_class: ClassVar[type[Checked] | None] = ATVConfig
    model_class: ClassVar[type[ATVModel]] = ATVModel
    generator_options: ClassVar[frozenset[str]] = GENERATOR_OPTIONS
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"learning_rate": (0.1, 0.03, 0.3, 0.01)}
    paper_search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "scale": (0.001, 0.01, 0.1),
        "learning_rate": (5e-4, 2e-3, 1e-2),
    }
    """The grid for the paper's parametrisation, whose vectors have no size of their own."""

    def __init__(self, atv: ATVModel) -> None:
        super().__init__(atv.llm, atv.tokenizer)
        self.atv = atv.eval()
        self.edited_tokens, self.reads = atv.positions.prompt_tokens, atv.reads

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: ATVConfig, train: TrainConfig
    ) -> ATVModel:
        """Generator and expansion, which are trained together."""
        del train
        atv = cls.model_class(llm, config, tokenizer=tokenizer)
        atv.settle(tasks)
        log.info(model_summary(atv))
        return atv

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the adapter onto the LLM."""
        shots = cls.wanted_shots(shots)
        atv = cls.model_class.from_pretrained(cls.wanted_adapter(adapter), llm, tokenizer=tokenizer)
        atv.vector_cache.limit = 0  # seconds per query are measured for queries that are not cached
        method = cls(atv)
        method.shots, method.seed = shots, seed
        return method

    def describe(self) -> dict[str, Any]:
        """The configuration and how the adapter was trained."""
        return {"config": self.atv.config.to_dict(), "training": self.atv.training_summary}

    def edit(self, prompts: Sequence[Prompt]) -> Edit:
        """Vectors made from the prompts' queries. The generator `self` makes them while the LLM reads."""
        return self.atv.edit(self.atv.own_vectors([prompt.query for prompt in prompts]))
