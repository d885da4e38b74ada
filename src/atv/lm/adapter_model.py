"""The base class of everything learned around a frozen LLM, as the training loop expects it."""

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
from atv.data.render import Prompt, fitting, plain_prompt
from atv.errors import ATVError
from atv.lm.hooks import base_llm, input_device, keep_differentiable, uncompiled, unregistered
from atv.lm.load import context_length, load_tokenizer
from atv.lm.prefix import ReadPrefix, call_llm, read_prefix


@dataclass
class AnswerLoss(ModelOutput):
    """The output of `AdapterModel.forward`."""

    loss: Tensor | None = None
    """Scalar float32: mean over a row's answer tokens, then over rows (Eq. 7)."""
    losses: Tensor | None = None
    """(batch,) float32: each row's own loss, 0 for a row without labels."""
    right: Tensor | None = None
    """(batch, answer) bool: the token is the most likely one, over the whole vocabulary; false without a label."""
    logits: Tensor | None = None
    """(batch, answer, vocabulary), of the columns that predict the answer's tokens."""


def answer_loss(logits: Tensor, labels: Tensor) -> AnswerLoss:
    """Return the loss of answers (Eq. 7), computed in at least float32.

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
    return AnswerLoss(loss=losses.mean(), losses=losses, right=logits.argmax(-1) == labels, logits=logits)


def plain_loss(
    llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, labels: Tensor
) -> AnswerLoss:
    """Return the loss of answers from one pass of `llm` over prompts and answers, without a cache.

    Args:
        llm: the LLM with the learned parts in it.
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

    Its `parameters`, `state_dict` and `train` cover only what is learned: the LLM is not a submodule. The LLM is set to
    eval mode; its weights get no gradient and are never modified.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not, in any dtype.
        tokenizer: the LLM's; by default the one saved with it.
    """

    llm: nn.Module
    dependent_tokens: int | None = None
    """Number of a prompt's last tokens whose states depend on what is learned; None: all may. The tokens before them
    are read once for the whole training."""

    read_per_task = 0
    """Rows of each task that a training reads by default, at least, each as often as it is read."""
    writes = True
    """Whether answers are the LLM's tokens, rather than the classes of a model without an LLM."""

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its answer; None: any number."""
        return context_length(self.llm)

    @property
    def reads(self) -> str:
        """What the generator reads, as in `Task.renderers`: "query" or "prompt"."""
        return "query"

    def __init__(self, llm: nn.Module, tokenizer: Any = None) -> None:
        super().__init__()
        llm = uncompiled(llm)  # compiled code ignores hooks
        unregistered(self, llm=llm.eval().requires_grad_(False))
        keep_differentiable(llm)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(base_llm(llm).name_or_path))
        self.training_summary: dict[str, Any] = {}
        """How it was trained; saved with the adapter."""
        self.read_prefix: ReadPrefix = read_prefix
        """Where `forward` gets the prompt's unsteered keys and values; training sets it to a store's `read`."""
        if hasattr(base_llm(llm), "hf_device_map"):  # spread over devices: Trainer must not move it
            self.hf_device_map = base_llm(llm).hf_device_map

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the settings that determine the weights, apart from the training's own, as a JSON-ready dictionary."""

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
        """Return the loss of the answers (Eq. 7) for the tensors that `collator()` makes.

        Args:
            query_input_ids: (queries, query seq), `EncodedRow.query` of `encode_row`.
            query_attention_mask: (queries, query seq).
            input_ids: (batch, seq), prompt and answer without its last token; batch = queries * prompts per row.
            attention_mask: (batch, seq).
            position_ids: (batch, seq).
            edit_mask: (batch, seq) bool, the tokens that receive a vector.
            labels: (batch, answer), answer tokens, -100 where there is none.

        Returns:
            `loss`, `losses`, `right` and `logits`; training uses `loss`, `losses` with class weights, or `logits` with
            a teacher.
        """

    @abstractmethod
    def save_pretrained(self, path: str | Path) -> None:
        """Write what is learned to a folder, atomically."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Load what a model with the same configuration has saved, including `training_summary`.

        Raises:
            ATVError: it is damaged, belongs to another method or LLM, or its weights have other names or shapes.
        """

    def require_savable(self) -> None:
        """Raise ATVError if what `save_pretrained` writes could not be loaded as this model."""

    @contextmanager
    def in_training(self, config: TrainConfig, read: ReadPrefix, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """Prepare for training and validation on `rows`; inside this context `forward` gets prefixes from `read`."""
        del config, rows
        self.llm.eval()  # in case its `train` was called
        self.read_prefix = read
        try:
            yield
        finally:
            self.read_prefix = read_prefix

    def calibrate(self, rows: Sequence[EncodedRow]) -> None:
        """Compute values that are measured on training rows rather than learned, before training."""

    def set_gate(self, rows: Sequence[EncodedRow], valid: Sequence[EncodedRow]) -> None:
        """Determine from training and validation rows where what was learned is useful, after training."""

    def settle(self, tasks: Sequence[Task]) -> None:
        """Set options whose default depends on the training tasks; later calls change nothing."""

    def reach(self, share: float) -> None:
        """Called before each step with the share of the steps that are done."""

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups; "start" is the share of the steps after which a group is trained."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": config.learning_rate}]

    # ---- texts to tensors ----

    def encode_query(self, query: str, task: str) -> list[int]:
        """Return what the generator reads of a row, as token ids; a placeholder for methods without a generator.

        Args:
            query: `Prompt.query`.
            task: name of the row's task.
        """
        del query, task
        return [0]

    def encode_row(self, row: Row) -> EncodedRow:
        """Encode a training row. A query that does not fit the LLM's context is cut at its end (`EncodedRow.cut`).

        Raises:
            TooLong: the answer and what stands around the query leave it no room.
        """
        prompts, pairs, cut, limit = [], [], False, self.context
        for render in row.renderers:
            whole = render.prompt(self.tokenizer, row.example)
            answer = render.answer(self.tokenizer, whole, row.example.output)
            room = None if limit is None else limit - len(answer)
            prompt = (
                whole if room is None or len(whole.ids) <= room else fitting(render, self.tokenizer, row.example, room)
            )
            self._check_length(prompt, len(answer))
            cut = cut or prompt is not whole
            prompts.append(prompt)
            pairs.append((prompt.ids, answer))
        query = self.encode_query(prompts[0].query, row.task)
        return EncodedRow(query, pairs, task=row.task, answer=row.example.output, cut=cut)

    def encode_prompts(self, prompts: Sequence[Prompt | str]) -> dict[str, Tensor]:
        """Return left-padded model inputs on the LLM's device: `input_ids`, `attention_mask`, `position_ids`.

        Args:
            prompts: from a renderer, or strings that are read as they are.
        """
        read = [plain_prompt(self.tokenizer, each) if isinstance(each, str) else each for each in prompts]
        for prompt in read:
            self._check_length(prompt)
        device = input_device(self.llm)
        inputs = left_padded([prompt.ids for prompt in read], pad_id(self.tokenizer))
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _check_length(self, prompt: Prompt, more: int = 0) -> None:
        limit, tokens = self.context, len(prompt.ids) + more
        if limit is not None and tokens > limit:
            raise ATVError(
                f"A prompt has {tokens} tokens and the LLM's context is {limit}; shorten or drop it. The generator "
                f"reads of it: {prompt.query[:60]!r}."
            )
        if tokens == 0:
            raise ATVError("A prompt is empty; expected some text.")

    def collator(self) -> Collator:
        """Return the collator that makes batches for `forward` from rows of `encode_row`."""
        return Collator(Positions.parse("all"), pad_id(self.tokenizer), 0)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters and of frozen LLM parameters."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in base_llm(self.llm).parameters() if not p.requires_grad)
        print(  # noqa: T201 - printing is what this is for, as in PEFT
            f"trainable params: {trained:,} || frozen LLM params: {frozen:,} || ratio: {100 * trained / frozen:.2f}%"
        )
