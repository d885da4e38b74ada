"""Full fine-tuning: every weight of a copy of the LLM is trained. The upper reference: what adapting it can cost."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds
from safetensors.torch import save_file
from torch import Tensor, nn

from atv import artifact
from atv.config import Checked, TrainConfig
from atv.data import Task
from atv.errors import ATVError
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, plain_loss
from atv.lm.hooks import base_llm, quantization, unregistered
from atv.lm.prefix_store import PrefixStore
from atv.methods.base import Method

WEIGHTS_FILE = "model.safetensors"


@dataclass
class FullConfig(Checked):
    """There is nothing to choose: all weights are trained."""


def copy_of(llm: nn.Module) -> nn.Module:
    """A plain LLM with weights of its own; ATVError if there is no copying its weights."""
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
    """A copy of the LLM whose weights are all trained, in float32: Adam's steps are smaller than bfloat16's rounding.

    With gradients and Adam's two means that is four times four bytes for every weight, beside the LLM itself. Where
    the LLM has dropout, it is on in training.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any = None) -> None:
        super().__init__(llm, tokenizer)
        dtype = torch.promote_types(next(llm.parameters()).dtype, torch.float32)
        unregistered(self, tuned=copy_of(llm).to(dtype).requires_grad_(True))
        self.weights = nn.ParameterList(self.tuned.parameters())  # tied ones once, as safetensors wants them

    tuned: nn.Module

    def describe(self) -> dict[str, Any]:
        """Its name: there is nothing else to choose."""
        return {"method": Full.name}

    def train(self, mode: bool = True) -> Self:
        """The copy's mode too; the frozen LLM stays in eval mode."""
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
        """The loss of the answers, read by the copy; it reads whole prompts, and no query beside them."""
        del query_input_ids, query_attention_mask, edit_mask
        return plain_loss(self.tuned, input_ids, attention_mask, position_ids, labels)

    def save_pretrained(self, path: str | Path) -> None:
        """Write all weights, rounded to the LLM's dtype: that is how they are read."""
        dtype = next(self.llm.parameters()).dtype

        def write(part: Path) -> None:
            tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.tuned.named_parameters()}
            save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})

        artifact.save(Path(path), Full.name, identity.describe_llm(self.llm), {}, self.training_summary, write)

    def load_weights(self, folder: Path) -> None:
        """Take the weights of an adapter, as they were rounded."""
        saved = artifact.read(folder, Full.name)
        artifact.check_llm(saved, self.llm, folder)
        load_weights(self.tuned, folder / WEIGHTS_FILE)
        self.training_summary = saved.training


def load_weights(llm: nn.Module, file: Path) -> None:
    """Put the weights that `FullModel` saved into a copy of their LLM; names and shapes must fit exactly."""
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
    edited_tokens = 0  # what prompts share is read by the copy as well

    def __init__(self, llm: nn.Module, tokenizer: Any, training: dict[str, Any]) -> None:
        super().__init__(llm, tokenizer)
        self.training = training

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: FullConfig,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Train all weights of a copy. Every state depends on them: no prefix can be stored."""
        from atv.training import (
            loop as training,  # the Trainer brings peft and bitsandbytes along: seconds that measuring saves
        )

        del config
        set_seed(train.seed)
        return training.train(FullModel(llm, tokenizer), tasks, out, train, force, store).adapter

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """A copy of the LLM, in its dtype, with the weights that `fit` wrote."""
        cls.wanted_shots(shots)
        folder = artifact.locate(cls.wanted_adapter(adapter))
        saved = artifact.read(folder, cls.name)
        artifact.check_llm(saved, llm, folder)
        tuned = copy_of(llm).eval().requires_grad_(False)
        load_weights(tuned, folder / WEIGHTS_FILE)
        method = cls(tuned, tokenizer, saved.training)
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """How it was trained."""
        return {"training": self.training}
