"""Full fine-tuning: all weights of a copy of the LLM are trained. An upper bound on the cost of adapting it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atv import artifact
from atv.config import Checked, TrainConfig
from atv.data import Task
from atv.errors import ATVError
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, plain_loss
from atv.lm.hooks import base_llm, quantization, unregistered
from atv.methods.base import Method

WEIGHTS_FILE = "model.safetensors"


@dataclass
class FullConfig(Checked):
    """No options: all weights are trained."""


def copy_of(llm: nn.Module) -> nn.Module:
    """A copy of a plain LLM with its own weights; ATVError if the weights cannot be copied."""
    if base_llm(llm) is not llm or hasattr(llm, "peft_config"):
        raise ATVError("The LLM has a PEFT adapter, and the method full trains all weights itself: give the plain LLM.")
    if quantization(llm) is not None:
        raise ATVError(
            f"The LLM is in {quantization(llm)}, and quantised weights cannot be trained: leave --quantization out, or "
            "train an adapter (--method lora or atv)."
        )
    devices = sorted({str(p.device) for p in llm.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ATVError(
            f"The LLM is spread over {', '.join(devices)}; the method full expects it on one device: leave --device "
            "auto out, or train an adapter (--method lora or atv)."
        )
    return copy.deepcopy(llm)


class FullModel(AdapterModel):
    """A copy of the LLM with all weights trained, in float32 because Adam's steps are smaller than bfloat16's rounding.

    With gradients and Adam's two moments this takes 4 x 4 bytes per weight, in addition to the LLM itself. If the LLM
    has dropout, it is active in training.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any = None) -> None:
        super().__init__(llm, tokenizer)
        dtype = torch.promote_types(next(llm.parameters()).dtype, torch.float32)
        unregistered(self, tuned=copy_of(llm).to(dtype).requires_grad_(True))
        self.weights = nn.ParameterList(self.tuned.parameters())  # tied weights once, as safetensors requires

    tuned: nn.Module

    def describe(self) -> dict[str, Any]:
        """Only the name: there are no options."""
        return {"method": Full.name}

    def train(self, mode: bool = True) -> Self:
        """Set the copy's mode too; the frozen LLM stays in eval mode."""
        self.tuned.train(mode)
        return super().train(mode)

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        edit_mask: Tensor,
        labels: Tensor,
    ) -> AnswerLoss:
        """The loss of the answers, read by the copy. It reads only the whole prompts; the query inputs are ignored."""
        del query_input_ids, query_attention_mask, edit_mask
        return plain_loss(self.tuned, input_ids, attention_mask, position_ids, labels)

    def save_pretrained(self, path: str | Path) -> None:
        """Write all weights, rounded to the LLM's dtype, in which they are loaded."""
        dtype = next(self.llm.parameters()).dtype

        def write(part: Path) -> None:
            tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.tuned.named_parameters()}
            save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})

        artifact.save(Path(path), Full.name, identity.describe_llm(self.llm), {}, self.training_summary, write)

    def load_weights(self, folder: Path) -> None:
        """Load the (rounded) weights of an adapter."""
        saved = artifact.read(folder, Full.name)
        artifact.check_llm(saved, self.llm, folder)
        load_weights(self.tuned, folder / WEIGHTS_FILE)
        self.training_summary = saved.training


def load_weights(llm: nn.Module, file: Path) -> None:
    """Load weights saved by `FullModel` into a copy of their LLM; names and shapes must match exactly."""
    own = dict(llm.named_parameters())
    given = artifact.load_tensors(file, own)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(given[name])


class Full(Method):
    """The plain prompt, read by a fine-tuned copy of the LLM."""

    name = "full"
    config_class: ClassVar[type[Checked] | None] = FullConfig
    train_defaults: ClassVar[dict[str, Any] | None] = {"learning_rate": 3e-5}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"learning_rate": (3e-5, 1e-5, 1e-4, 3e-4)}
    edited_tokens = 0  # the copy reads a shared prompt prefix too

    def __init__(self, llm: nn.Module, tokenizer: Any, training: dict[str, Any]) -> None:
        super().__init__(llm, tokenizer)
        self.training = training

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: FullConfig, train: TrainConfig
    ) -> FullModel:
        """All weights of a copy. Every state depends on them, so no prefix can be cached."""
        del tasks, config, train
        return FullModel(llm, tokenizer)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the weights that `fit` wrote into a copy of the LLM, in its dtype."""
        cls.wanted_shots(shots)
        folder, saved = artifact.read_for(cls.wanted_adapter(adapter), cls.name, llm)
        tuned = copy_of(llm).eval().requires_grad_(False)
        load_weights(tuned, folder / WEIGHTS_FILE)
        method = cls(tuned, tokenizer, saved.training)
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """How it was trained."""
        return {"training": self.training}
