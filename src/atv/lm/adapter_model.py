"""What is learned around a frozen LLM, whatever the method: the contract of the one training loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from atv.config import Positions, TrainConfig
from atv.data import Task
from atv.data.collate import IGNORED, Collator, EncodedRow, Row, left_padded, pad_id
from atv.data.render import Prompt, plain_prompt
from atv.errors import ATVError
from atv.lm.hooks import base_llm, input_device, keep_differentiable, uncompiled, unregistered
from atv.lm.load import context_length, load_tokenizer
from atv.lm.prefix import ReadPrefix, call_llm, read_prefix


@dataclass
class AnswerLoss(ModelOutput):
    """What `AdapterModel.forward` returns."""

    loss: Tensor | None = None
    """Scalar float32: mean over a row's answer tokens, then over rows (Eq. 7)."""
    losses: Tensor | None = None
    """(batch,) float32: each row's own loss, 0 for a row without labels."""
    right: Tensor | None = None
    """(batch, answer) bool: the token is the most likely one, over the whole vocabulary; false without a label."""


def answer_loss(logits: Tensor, labels: Tensor) -> AnswerLoss:
    """The loss of answers (Eq. 7) in float32 at least.

    Args:
        logits: (batch, answer, vocabulary), of the columns that predict the answer's tokens.
        labels: (batch, answer), -100 where there is no token.
    """
    labels = labels.to(logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_loss = nn.functional.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)  # (batch, answer), 0 where ignored
    losses = token_loss.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)  # (batch,)
    return AnswerLoss(loss=losses.mean(), losses=losses, right=logits.argmax(-1) == labels)


def plain_loss(
    llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor
) -> AnswerLoss:
    """The loss of answers that `llm` reads in one pass, whole prompts, with nothing kept of them.

    Args:
        llm: with what is learned in it.
        input_ids: (batch, seq), like the next two.
        attention_mask: 1 where a token is.
        position_ids: explicit positions.
        labels: (batch, answer), -100 where there is no token.
    """
    output = call_llm(
        llm,
        keep=labels.shape[1],
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    )
    return answer_loss(output.logits, labels)


class AdapterModel(nn.Module, ABC):
    """Something learned around one frozen LLM.

    Its parameters, its `state_dict` and its `train` are those of what is learned alone: the LLM is not a submodule. It
    is put into eval mode, its weights take no gradient and are never written to.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not, in any dtype.
        tokenizer: the LLM's; by default the one saved with it.
    """

    llm: nn.Module
    dependent_tokens: int | None = None
    """How many of a prompt's last tokens have states that depend on what is learned; None: any may. The tokens before
    them are read once for the whole training."""

    @property
    def reads(self) -> str:
        """What is read of an example beside its prompt, as `Task.renderers` takes it."""
        return "query"

    def __init__(self, llm: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        llm = uncompiled(llm)  # what torch has compiled takes no notice of hooks
        unregistered(self, llm=llm.eval().requires_grad_(False))
        keep_differentiable(llm)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(base_llm(llm).name_or_path))
        self.training_summary: dict[str, Any] = {}
        """How it was trained; saved with the adapter."""
        self.read_prefix: ReadPrefix = read_prefix
        """Where `forward` takes the prompt's unsteered keys and values from; training puts a store here."""
        if hasattr(base_llm(llm), "hf_device_map"):  # spread over devices: then Trainer must copy it to no other
            self.hf_device_map = base_llm(llm).hf_device_map

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What decides the weights beside the training's own settings, ready for JSON."""

    @abstractmethod
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
        """The loss of the answers (Eq. 7), from the tensors that `collator()` makes.

        Args:
            query_input_ids: (queries, query seq), what `encode_row` put into `EncodedRow.query`.
            query_attention_mask: (queries, query seq).
            input_ids: (batch, seq), prompt and answer without its last token; batch = queries * prompts per row.
            attention_mask: (batch, seq).
            position_ids: (batch, seq).
            edit_mask: (batch, seq) bool, the tokens that receive a vector.
            labels: (batch, answer), answer tokens, -100 where there is none.

        Returns:
            `loss`, `losses` and `right`; in training only `loss` is used.
        """

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write what is learned to a folder, whole or not at all."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Take what a model made alike has written to a folder, `training_summary` included.

        Raises:
            ATVError: it is damaged, of another method or LLM, or its weights have other names or shapes.
        """

    def require_savable(self) -> None:
        """Raise ATVError if what `save_pretrained` would write cannot be read back as this model."""

    @contextmanager
    def in_training(self, config: TrainConfig, read: ReadPrefix, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """While it is trained and validated on `rows` as `config` says, `forward` takes prefixes from `read`."""
        del config, rows
        self.llm.eval()  # whoever called its `train` in between
        self.read_prefix = read
        try:
            yield
        finally:
            self.read_prefix = read_prefix

    def calibrate(self, rows: Sequence[EncodedRow]) -> None:
        """Take from training rows what is computed rather than learned, before training on them."""

    def set_gate(self, rows: Sequence[EncodedRow], valid: Sequence[EncodedRow]) -> None:
        """Take from training and validation rows where what was learned is of use, after training."""

    def settle(self, tasks: Sequence[Task]) -> None:
        """Decide what the configuration leaves to the tasks that are trained on; once decided it stays so."""

    def reach(self, share: float) -> None:
        """Told before each step which share of the steps is done."""

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """What the optimiser trains, and at which rate; "start": the share of the steps after which it begins."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": config.learning_rate}]

    # ---- texts to tensors ----

    def encode_query(self, query: str, task: str) -> list[int]:
        """What is read of a row beside its prompts, as ids; nothing, unless a method says otherwise.

        Args:
            query: `Prompt.query`.
            task: name of the row's task.
        """
        del query, task
        return [0]

    def encode_row(self, row: Row) -> EncodedRow:
        """A training row as token ids; raises ATVError if a prompt and its answer exceed the LLM's context."""
        prompts = [render.prompt(self.tokenizer, row.example) for render in row.renderers]
        pairs = []
        for render, prompt in zip(row.renderers, prompts, strict=True):
            answer = render.answer(self.tokenizer, prompt, row.example.output)
            self._check_length(prompt, len(answer))
            pairs.append((prompt.ids, answer))
        return EncodedRow(self.encode_query(prompts[0].query, row.task), pairs)

    def encode_prompts(self, prompts: Sequence[Prompt | str]) -> dict[str, Tensor]:
        """Prompts as left-padded model inputs on the LLM's device: `input_ids`, `attention_mask`, `position_ids`.

        Args:
            prompts: from a renderer, or texts that are read as they are.
        """
        read = [plain_prompt(self.tokenizer, each) if isinstance(each, str) else each for each in prompts]
        for prompt in read:
            self._check_length(prompt)
        device = input_device(self.llm)
        inputs = left_padded([prompt.ids for prompt in read], pad_id(self.tokenizer))
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _check_length(self, prompt: Prompt, more: int = 0) -> None:
        limit, tokens = context_length(self.llm), len(prompt.ids) + more
        if limit is not None and tokens > limit:
            raise ATVError(
                f"A prompt has {tokens} tokens and the LLM's context is {limit}; shorten or drop it. The generator "
                f"reads of it: {prompt.query[:60]!r}."
            )
        if tokens == 0:
            raise ATVError("A prompt is empty; expected some text.")

    def collator(self) -> Collator:
        """Makes the batches that `forward` takes from `encode_row`'s rows."""
        return Collator(Positions.parse("all"), pad_id(self.tokenizer), 0)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, beside those of the frozen LLM."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in base_llm(self.llm).parameters() if not p.requires_grad)
        print(  # noqa: T201 - printing is what this is for, as in PEFT
            f"trainable params: {trained:,} || frozen LLM params: {frozen:,} || ratio: {100 * trained / frozen:.2f}%"
        )
