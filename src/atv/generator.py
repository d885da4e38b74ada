"""The generator: a small language model that reads the query and gives back one hidden state."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from atv.config import ATVConfig
from atv.errors import ATVError
from atv.models import context_length, load_encoder, load_tokenizer
from atv.progress import note

CONSTANT = "constant"
"""Names the generator that reads nothing."""


def check_queries(queries: Sequence[str]) -> None:
    """Raise ATVError if there is no query, or one without text."""
    if not queries:
        raise ATVError("There is no query; expected at least one.")
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise ATVError(f"A query is {query!r}; expected some text for the generator to read.")


class Generator(nn.Module):
    """Any Hugging Face encoder or decoder with a pooling on top.

    Args:
        encoder: a model without head, float32; of an encoder-decoder only the encoder is used.
        tokenizer: its tokenizer.
        pooling: "last" (the paper), "mean" or "cls".
        query_template: text with {query}; what the generator reads, in training and in use.
        trainable: False keeps its weights as they are and its dropout off.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, pooling: str, query_template: str, trainable: bool = True
    ) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = cast(Any, encoder).get_encoder() if config.is_encoder_decoder else encoder
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.query_template = query_template
        self.trainable = trainable
        self.hidden_size: int = config.get_text_config().hidden_size
        self.name_or_path: str = encoder.name_or_path  # type: ignore[assignment]
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.bf16 = False
        """Matrix products in bfloat16 (torch's autocast); weights, sums and what comes out stay as they are."""
        self._told_of_cut = False
        self.requires_grad_(trainable)
        # A BERT pooler and its like feed nothing here; without a gradient they would only be dead weight to save.
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None

    @classmethod
    def load(cls, config: ATVConfig, source: str | None = None) -> "Generator":
        """Load the generator that `config` names; `source` names another place for the same model."""
        if config.generator == CONSTANT:
            return Constant()
        revision = config.generator_revision if source is None else None
        encoder = load_encoder(source or config.generator, revision)
        tokenizer = load_tokenizer(source or config.generator, revision)
        generator = cls(encoder, tokenizer, config.pooling, config.query_template, config.train_generator)
        generator.name_or_path = config.generator
        return generator

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.encoder.parameters()).device

    def train(self, mode: bool = True) -> Self:
        """Training mode, unless it is frozen: then dropout stays off."""
        return super().train(mode and self.trainable)

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """Queries as token ids, each in its template; longer than the generator's context is cut, said once.

        Raises:
            ATVError: a query without text.
        """
        check_queries(queries)
        texts = [self.query_template.replace("{query}", query) for query in queries]
        encoded = [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        limit = context_length(self.encoder)
        if limit is not None and not self._told_of_cut and any(len(ids) > limit for ids in encoded):
            self._told_of_cut = True
            note(f"Queries longer than the generator's context of {limit} tokens are cut to it (said once).")
        return [ids[:limit] for ids in encoded]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encoded queries (queries, seq), padded on the right, to their pooled states (queries, state), float32."""
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable), mixed:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = states.to(next(self.encoder.parameters()).dtype)  # (queries, seq, state)
        if self.pooling == "cls":
            return cast(Tensor, states[:, 0])
        if self.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(states.dtype)  # (queries, seq, 1)
            return cast(Tensor, (states * weights).sum(1) / weights.sum(1))
        rows = torch.arange(len(states), device=states.device)
        return cast(Tensor, states[rows, attention_mask.sum(1) - 1])

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as an ordinary Hugging Face folder."""
        cast(Any, self.encoder).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Constant(Generator):
    """Says the same of every query: its state is one 1. It reads nothing, has no weights and needs no tokenizer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("state", torch.ones(1, 1), persistent=False)
        self.hidden_size, self.trainable, self.bf16 = 1, False, False
        self.name_or_path, self.revision, self.tokenizer = CONSTANT, None, None
        self.pooling, self.query_template = "last", "{query}"

    state: Tensor

    @property
    def device(self) -> torch.device:
        """Where its state is."""
        return self.state.device

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """One token for each query, which stands for it; an empty one is refused as everywhere."""
        check_queries(queries)
        return [[0] for _ in queries]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The same state for each query: (queries, 1)."""
        del attention_mask
        return self.state.expand(len(input_ids), 1)
