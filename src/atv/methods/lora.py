"""LoRA: a learned product of two thin matrices is added to each query and value projection (with PEFT)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from atv.config import Checked, TrainConfig
from atv.data import Task
from atv.errors import ATVError
from atv.lm.hooks import text_config
from atv.methods.learn_once import at_least_one
from atv.methods.peft_model import Adapted, PEFTMethod, PEFTModel


@dataclass
class LoRAConfig(Checked):
    """The configuration of a LoRA adapter. The defaults are the paper's (section 3)."""

    rank: int = 8
    """Inner dimension of the two matrices."""
    alpha: int = 32
    """Their product is multiplied by alpha / rank."""
    dropout: float = 0.05
    """Share of a projection's inputs hidden from the adapter in training."""
    targets: list[str] | None = None
    """Names of the adapted modules; none: the query and value projections, if PEFT knows the LLM's architecture."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        at_least_one(self, "rank", "alpha")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ATVError(f"dropout is {self.dropout!r}; expected a number from 0 to below 1.")
        named = isinstance(self.targets, list) and all(isinstance(name, str) for name in self.targets)
        if self.targets is not None and not (named and self.targets):
            raise ATVError(f"targets is {self.targets!r}; expected names of modules, such as q_proj and v_proj.")


def query_and_value(llm: nn.Module) -> list[str] | str:
    """The names of an LLM's query and value projections according to PEFT: two, or one fused projection.

    A fused projection also makes the keys, which are then adapted too.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = text_config(llm).model_type
    names = cast(list[str] | str, KNOWN.get(kind, []))
    if isinstance(names, str) or len(names) == 1:  # a pattern, or a fused projection
        return names
    chosen = [name for name in names if re.fullmatch(r"(q|query|v|value)(_proj)?", name)]
    if len(chosen) != 2:
        parts = {name.rpartition(".")[2] for name, part in llm.named_modules() if hasattr(part, "weight")}
        raise ATVError(
            f"PEFT does not know the query and value projections of the architecture {kind}; name them with targets. "
            f"Its modules with weights are: {', '.join(sorted(parts))}."
        )
    return chosen


class AdaptedByLoRA(Adapted):
    """The LLM. While it is called, each target module is wrapped in a PEFT layer."""

    def __init__(self, llm: nn.Module, config: Any) -> None:
        from peft.tuners.lora import LoraLayer

        super().__init__(llm, config)
        self.places: list[tuple[nn.Module, str, Any]] = [
            (parent, name, child)
            for parent in llm.modules()
            for name, child in parent.named_children()
            if isinstance(child, LoraLayer)
        ]
        """Each target: its parent, its name, and PEFT's layer around it."""
        self.peft.unload()

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Insert PEFT's layers into the LLM for the duration of the context."""
        try:
            for parent, name, layer in self.places:
                setattr(parent, name, layer)
            yield
        finally:
            for parent, name, layer in self.places:
                setattr(parent, name, layer.base_layer)

    def learned(self) -> nn.Module:
        """The two matrices of each target module and the dropout before them."""
        return nn.ModuleList(
            nn.ModuleList([layer.lora_dropout, layer.lora_A, layer.lora_B]) for _, _, layer in self.places
        )

    def forward(self, **inputs: Any) -> Any:
        """Call the LLM with the adapter inserted."""
        with self.inserted():
            return self.peft(**inputs)


class LoRA(PEFTMethod):
    """Low-rank adapters on the query and value projections of all layers."""

    name = "lora"
    config_class = LoRAConfig
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 4e-4}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"learning_rate": (4e-4, 1e-3, 2e-3, 2e-4)}

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: LoRAConfig, train: TrainConfig
    ) -> PEFTModel:
        """The adapter around the frozen LLM.

        Raises:
            ATVError: a target has no input to multiply, such as an embedding: PEFT's matrices for it would not be
                trained.
        """
        model = super().untrained(llm, tokenizer, tasks, config, train)
        for _, name, layer in cast(AdaptedByLoRA, model.adapted).places:
            if not layer.lora_A:
                raise ATVError(
                    f"targets includes {name}, a module of the type {type(layer.base_layer).__name__}; expected linear "
                    "or convolutional modules, such as q_proj and v_proj. Leave it out."
                )
        return model

    @classmethod
    def adapt(cls, llm: nn.Module, config: LoRAConfig) -> Adapted:
        """New matrices, whose product is initially 0."""
        from peft import LoraConfig

        made = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=config.targets or query_and_value(llm),
        )
        try:
            return AdaptedByLoRA(llm, made)
        except ValueError as error:  # no such module, or a type that PEFT cannot adapt
            raise ATVError(f"PEFT refuses these targets: {' '.join(str(error).split())[:300]}") from error
