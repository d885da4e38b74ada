"""Shared by LoRA and prefix-tuning: training, saving and loading a PEFT adapter around the frozen LLM."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import ModelCard
from torch import Tensor, nn

from atv import artifact
from atv.config import Checked, TrainConfig
from atv.data import Task
from atv.errors import ATVError
from atv.lm import identity
from atv.lm.adapter_model import AdapterModel, AnswerLoss, plain_loss
from atv.lm.hooks import base_llm, unregistered
from atv.lm.load import context_length
from atv.lm.quiet import quiet_libraries
from atv.methods.base import Method

WEIGHTS_FILE = "adapter_model.safetensors"
"""PEFT's own file name, so that PEFT can read the folder too."""


class Adapted(nn.Module, ABC):
    """The frozen LLM with a PEFT adapter. Calls of the LLM itself are not affected.

    Several methods share one LLM in a process, but PEFT modifies the LLM that it is given. Here the adapter is inserted
    only for the duration of a call.

    Args:
        llm: the plain LLM.
        config: PEFT's configuration.
    """

    def __init__(self, llm: nn.Module, config: Any) -> None:
        super().__init__()
        import peft

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT warns when it corrects its own default
            warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
            self.peft: Any = peft.get_peft_model(llm, config)
        self.config = llm.config

    def get_base_model(self) -> nn.Module:
        """The LLM, as for any PEFT model."""
        llm: nn.Module = self.peft.get_base_model()
        return llm

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer; None: any number."""
        return context_length(self)

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """Put the adapter where PEFT expects it for the duration of the context."""
        yield

    @abstractmethod
    def learned(self) -> nn.Module:
        """The module with only the trained parameters."""

    @abstractmethod
    def forward(self, **inputs: Any) -> Any:
        """Call the LLM with the adapter; keyword arguments only."""


class PEFTModel(AdapterModel):
    """A PEFT adapter in training.

    Args:
        llm: the plain LLM.
        tokenizer: the LLM's.
        method: the class that makes the adapter.
        config: the method's configuration.
    """

    adapted: Adapted

    def __init__(self, llm: nn.Module, tokenizer: Any, method: type["PEFTMethod"], config: Checked) -> None:
        if base_llm(llm) is not llm or hasattr(llm, "peft_config"):
            raise ATVError(
                f"The LLM has a PEFT adapter already, and the method {method.name} adds one: give the plain LLM."
            )
        super().__init__(llm, tokenizer)
        self.method, self.config = method.name, config
        self._about_llm = identity.describe_llm(llm)
        with quiet_libraries():  # PEFT imports bitsandbytes
            unregistered(self, adapted=method.adapt(llm, config))
        self.learned = self.adapted.learned()

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer that the adapter leaves room for; None: any number."""
        return self.adapted.context

    def describe(self) -> dict[str, Any]:
        """The method's configuration."""
        return {"method": self.method, **self.config.to_dict()}

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
        """The loss of the answers. Only the whole prompts are read; the query inputs are ignored."""
        del query_input_ids, query_attention_mask, edit_mask
        return plain_loss(self.adapted, input_ids, attention_mask, position_ids, labels)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `load` and PEFT's `PeftModel.from_pretrained` can read."""

        def write(part: Path) -> None:
            with self.adapted.inserted():  # "auto" would query the hub about the LLM
                self.adapted.peft.save_pretrained(part, safe_serialization=True, save_embedding_layers=False)
            _hide_local_path(part / artifact.CARD_FILE, str(self._about_llm["name"]))

        artifact.save(Path(path), self.method, self._about_llm, self.config.to_dict(), self.training_summary, write)

    def load_weights(self, folder: Path) -> None:
        """Load an adapter's weights; names and shapes must match exactly."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        saved = artifact.read(folder, self.method)
        artifact.check_llm(saved, self.llm, folder)
        peft = self.adapted.peft
        with self.adapted.inserted():
            own = get_peft_model_state_dict(peft, save_embedding_layers=False)
            set_peft_model_state_dict(peft, artifact.load_tensors(folder / WEIGHTS_FILE, own))
        self.training_summary = saved.training


def _hide_local_path(card: Path, name: str) -> None:
    """PEFT's model card contains the path from which the LLM was loaded: keep only the folder's own name."""
    public = identity.public_name(name)
    if public == name:
        return
    written = ModelCard.load(card)
    written.data.base_model = None  # not a repository on the hub
    written.data.tags = [tag for tag in written.data.tags or [] if name not in tag]
    written.text = written.text.replace(name, public)
    written.save(card)


class PEFTMethod(Method):
    """The plain prompt, read by the LLM with a trained PEFT adapter."""

    config_class: ClassVar[type[Checked]]
    edited_tokens = 0  # a shared prompt prefix is read with the adapter too: `llm` includes it

    def __init__(self, model: PEFTModel) -> None:
        super().__init__(model.eval().adapted.eval(), model.tokenizer)
        self.model = model

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and what is read after it that the adapter leaves room for; None: any number."""
        return self.model.context

    @classmethod
    @abstractmethod
    def adapt(cls, llm: nn.Module, config: Any) -> Adapted:
        """A new adapter around the LLM."""

    @classmethod
    def untrained(
        cls, llm: nn.Module, tokenizer: Any, tasks: Sequence[Task], config: Any, train: TrainConfig
    ) -> PEFTModel:
        """The adapter, in float32, around the frozen LLM."""
        del tasks, train
        return PEFTModel(llm, tokenizer, cls, config)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the adapter that `fit` wrote."""
        cls.wanted_shots(shots)
        folder, saved = artifact.read_for(cls.wanted_adapter(adapter), cls.name, llm)
        try:
            config = cls.config_class.from_dict(saved.config)
        except TypeError as error:
            raise artifact.damaged(folder, str(error)) from error
        model = PEFTModel(llm, tokenizer, cls, config)
        model.load_weights(folder)
        method = cls(model)
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """The configuration and how the adapter was trained."""
        return {"config": self.model.config.to_dict(), "training": self.model.training_summary}
