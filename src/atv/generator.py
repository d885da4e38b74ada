"""The generator: a small language model that reads the query and returns one hidden state."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig

from atv.config import SELF, ATVConfig, random_sizes
from atv.data.collate import like_lengths, pad, pad_id, position_ids
from atv.data.render import encode_text
from atv.errors import ATVError
from atv.lm.hooks import decoder_layers, read_up_to, text_config, unregistered
from atv.lm.load import (
    ENCODER_FILE,
    context_length,
    load_encoder,
    load_saved_encoder,
    load_tokenizer,
    new_model,
    read_sizes,
    reading_part,
    save_reading_part,
)
from atv.lm.quiet import quiet_libraries
from atv.progress import bar, log

CONSTANT = "constant"
"""Name of the generator that reads nothing."""
READ_TOKENS = 2048
"""Tokens per call when queries are read ahead."""


def check_queries(queries: Sequence[str]) -> None:
    """Raise ATVError for an empty list, a blank query, or a string instead of a list."""
    if isinstance(queries, str):
        raise ATVError("queries is a string; expected a list of strings: put it in brackets.")
    if not queries:
        raise ATVError("There is no query; expected at least one.")
    for query in queries:
        if not isinstance(query, str) or not query.strip():
            raise ATVError(f"A query is {query!r}; expected some text for the generator to read.")


class Generator(nn.Module):
    """Any Hugging Face encoder or decoder, with pooling on top.

    Args:
        encoder: a model without a head, in float32; of an encoder-decoder only the encoder is used.
        tokenizer: its tokenizer.
        pooling: "last" (the paper), "mean" or "cls".
        query_template: text with {query}: what the generator reads, in training and inference.
        trainable: False freezes its weights and keeps its dropout off.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, pooling: str, query_template: str, trainable: bool = True
    ) -> None:
        super().__init__()
        config: Any = copy.deepcopy(encoder.config)
        config.architectures = [type(encoder).__name__]  # some configurations serve several classes
        self.model_config = config
        """Configuration of the whole model, even if the encoder is only part of it."""
        self.encoder = reading_part(encoder)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.query_template = query_template
        self.set_trainable(trainable)
        self.name_or_path: str = encoder.name_or_path  # type: ignore[assignment]
        self.revision: str | None = getattr(config, "_commit_hash", None)
        self.hidden_size, self.context = read_sizes(self.encoder, self.name_or_path or type(encoder).__name__)
        self.loaded_by: tuple[str, str | None] | None = None
        """Name and revision by which exactly this generator can be loaded; None: unknown."""
        self.waits = False
        """Trainable, but frozen until its training starts (`TrainConfig.generator_start`)."""
        self.bf16 = False
        """Matrix products in bfloat16 (torch's autocast); weights, sums and outputs keep their dtype."""
        self._told_of_cut = False
        self._read: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def load(cls, config: ATVConfig, llm: nn.Module | None = None, tokenizer: Any = None) -> "Generator":
        """Load the generator that `config` names.

        Args:
            config: configuration of the ATV.
            llm: the frozen LLM, for a generator that needs it.
            tokenizer: the LLM's, for a generator that needs it.
        """
        sizes = random_sizes(config.generator)
        if sizes is not None:
            return new_generator(config, *sizes, *_needed(config, llm, tokenizer))
        encoder = load_encoder(config.generator, config.generator_revision)
        tokenizer = load_tokenizer(config.generator, config.generator_revision)
        generator = cls(encoder, tokenizer, config.pooling, config.query_template, bool(config.train_generator))
        generator.name_or_path = config.generator
        generator.loaded_by = config.generator, config.generator_revision
        return generator

    @classmethod
    def load_saved(cls, config: ATVConfig, folder: Path) -> "Generator":
        """Load a generator written by `save`; `config` is that of its ATV.

        Raises:
            ATVError: the folder's configuration describes no model, or one that other weights belong to.
        """
        _require_sizes_of_file(folder)
        encoder, tokenizer = load_saved_encoder(folder), load_tokenizer(str(folder))
        generator = cls(encoder, tokenizer, config.pooling, config.query_template, bool(config.train_generator))
        generator.name_or_path = config.generator
        return generator

    @property
    def savable(self) -> bool:
        """Whether it has weights that an adapter can store."""
        return True

    def set_trainable(self, trainable: bool) -> None:
        """Set whether it is trained together with the expansion."""
        self.trainable = trainable
        self.requires_grad_(trainable)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.encoder.parameters()).device

    def describe(self) -> str:
        """Return a short description."""
        return self.name_or_path

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless it is frozen: then dropout stays off."""
        return super().train(mode and self.trainable)

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """Encode queries, each in the query template; cut those longer than the generator's context, with one warning.

        Raises:
            ATVError: a query is blank.
        """
        check_queries(queries)
        texts = [self.query_template.replace("{query}", query) for query in queries]
        encoded = self._tokenize(texts)
        limit = self.context
        if limit is not None and not self._told_of_cut and any(len(ids) > limit for ids in encoded):
            self._told_of_cut = True
            log.warning(f"Queries longer than the generator's context of {limit} tokens are cut to it (logged once).")
        return [ids[:limit] for ids in encoded]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states (queries, seq, state) of encoded queries, float32."""
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with mixed:
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return cast(Tensor, states.to(next(self.encoder.parameters()).dtype))

    @contextmanager
    def read_ahead(self, queries: Set[tuple[int, ...]]) -> Iterator[None]:
        """Cache the states of these encoded queries inside this context, until training of the generator starts.

        They are read in a fixed order, so that a resumed training gets exactly the same states, and without dropout,
        which would give each query the same wrong state in every epoch and in validation.
        """
        try:
            if self.waits or not self.trainable:
                self._read = self._states_of(queries)
            yield
        finally:
            self._read = {}

    @torch.no_grad()
    def _states_of(self, queries: Set[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        found, was_training = dict[tuple[int, ...], Tensor](), self.training
        self.eval()
        try:
            with bar("read queries", len(queries)) as progress:
                for batch in like_lengths(queries, READ_TOKENS):
                    ids, mask = pad(batch, pad_id(self.tokenizer), "right")
                    found |= zip(batch, self(ids.to(self.device), mask.to(self.device)), strict=True)
                    progress.advance(len(batch))
        finally:
            self.train(was_training)
        return found

    def learn(self) -> None:
        """Start its training, if it waits for that; states that were read ahead are discarded."""
        if self.waits:
            self.waits, self._read = False, {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map encoded queries (queries, seq), padded on the right, to pooled states (queries, state), float32."""
        if self._read:
            rows = zip(input_ids.tolist(), attention_mask.sum(1).tolist(), strict=True)
            known = [self._read.get(tuple(row[:length])) for row, length in rows]
            if all(state is not None for state in known):
                return torch.stack(cast(list[Tensor], known))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable and not self.waits):
            return self._pool(self.states(input_ids, attention_mask), attention_mask)

    def _pool(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(states.dtype)  # (queries, seq, 1)
            return (states * weights).sum(1) / weights.sum(1)
        rows = torch.arange(len(states), device=states.device)
        return states[rows, attention_mask.sum(1) - 1]

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder; of an encoder-decoder only the encoder's weights."""
        save_reading_part(self.encoder, self.model_config, folder)
        self.tokenizer.save_pretrained(folder)


class Constant(Generator):
    """A constant state of width 0, which ignores the query. It has no weights and needs no tokenizer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("state", torch.empty(1, 0), persistent=False)
        self.hidden_size, self.trainable, self.waits, self.bf16, self._read = 0, False, False, False, {}
        self.name_or_path, self.revision, self.tokenizer = CONSTANT, None, None
        self.context, self.loaded_by = None, None
        self.pooling, self.query_template = "mean", "{query}"

    state: Tensor

    @classmethod
    def load(cls, config: ATVConfig, llm: nn.Module | None = None, tokenizer: Any = None) -> "Constant":
        """Return the same generator for every configuration and LLM."""
        del config, llm, tokenizer
        return cls()

    @property
    def savable(self) -> bool:
        """False: it has no weights."""
        return False

    @property
    def device(self) -> torch.device:
        """The device of its state."""
        return self.state.device

    def encode(self, queries: Sequence[str]) -> list[list[int]]:
        """Return one placeholder token per query; a blank query raises ATVError."""
        check_queries(queries)
        return [[0] for _ in queries]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the same state for each query: (queries, 0)."""
        del attention_mask
        return self.state.expand(len(input_ids), 0)


class Itself(Generator):
    """The frozen LLM's own lower layers: there is no second model, and nothing is read twice.

    The state is one decoder layer's output for the prompt's last token. That layer and those below it are not steered,
    so one pass over the prompt both produces the state and is steered by it further up (`ATVModel.steer`, `forward`).
    Called on its own, as in `ATVModel.task_vectors`, it takes prompts and runs the LLM up to that layer. It is neither
    trained nor saved.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        config: configuration with the generator `self`.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any, config: ATVConfig) -> None:
        nn.Module.__init__(self)
        layers = decoder_layers(llm, config.layer_path)
        self.index = cast(int, config.read_layer(len(layers)))  # below all steered layers (config.layer_indices)
        unregistered(self, encoder=llm, layer=layers[self.index])
        self.register_buffer("like", torch.empty(0), persistent=False)  # dtype and device of states
        self.hidden_size = text_config(llm).hidden_size
        self.tokenizer, self.pooling, self.query_template = tokenizer, "last", "{query}"
        self.name_or_path, self.revision = SELF, None
        self.context, self.loaded_by = context_length(llm), None
        self.trainable, self.waits, self.bf16, self._told_of_cut, self._read = False, False, False, False, {}

    encoder: nn.Module
    layer: nn.Module
    like: Tensor

    @classmethod
    def load(cls, config: ATVConfig, llm: nn.Module | None = None, tokenizer: Any = None) -> "Itself":
        """Return the lower layers of `llm`."""
        return cls(*_needed(config, llm, tokenizer), config)

    @property
    def savable(self) -> bool:
        """False: its weights are the LLM's."""
        return False

    @property
    def device(self) -> torch.device:
        """The device of the LLM's inputs."""
        return self.like.device

    def describe(self) -> str:
        """Return a short description."""
        return f"{SELF}: the LLM's own state after decoder layer {self.index}"

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return [encode_text(self.tokenizer, text) for text in texts]

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the layer's output: (queries, seq, hidden), float32."""
        places = position_ids(attention_mask)
        states = read_up_to(
            self.encoder,
            self.layer,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=places,
            use_cache=False,
        )
        return states.to(self.like)


def new_generator(config: ATVConfig, layers: int, width: int, llm: nn.Module, tokenizer: Any) -> Generator:
    """Return a small Llama-style decoder that reads the LLM's tokens, with weights drawn from torch's random state."""
    shape = LlamaConfig(
        vocab_size=text_config(llm).vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=context_length(llm) or 2048,
    )
    encoder: nn.Module = AutoModel.from_config(shape, dtype=torch.float32)
    generator = Generator(encoder, tokenizer, config.pooling, config.query_template)
    generator.name_or_path = config.generator
    return generator


def _require_sizes_of_file(folder: Path) -> None:
    """Raise ATVError unless a saved generator's configuration describes the weights beside it.

    This takes no memory for weights. Sizes that a stranger has written may be larger than any memory.
    """
    file = folder / ENCODER_FILE
    try:
        with quiet_libraries(), torch.device("meta"):
            part = reading_part(new_model(AutoConfig.from_pretrained(folder, trust_remote_code=False)))
        with safe_open(file, "pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except ATVError:
        raise
    except Exception as error:  # each library and each architecture has its own kinds
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"The generator in {folder} cannot be read: {reason}. Restore it or train again.") from error
    names: dict[int, list[str]] = defaultdict(list)  # tied weights are in the file once
    weights = part.state_dict(keep_vars=True)
    for name, weight in weights.items():
        names[id(weight)].append(name)
    for tied in names.values():
        expected = tuple(weights[tied[0]].shape)
        if {found.get(name, expected) for name in tied} != {expected} or not found.keys() & tied:
            shape = next((found[name] for name in tied if name in found), "missing")
            raise ATVError(
                f"{file} does not fit the config.json beside it: {tied[0]} is {shape}; expected {expected}. Restore "
                "the generator or train again."
            )


def _needed(config: ATVConfig, llm: nn.Module | None, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Return the LLM and its tokenizer; raise ATVError if there is no LLM."""
    if llm is None:
        raise ATVError(
            f"The generator {config.generator} needs the frozen LLM, but none was given. Load it with the LLM."
        )
    return llm, tokenizer


GENERATORS: dict[str, type[Generator]] = {CONSTANT: Constant, SELF: Itself}
"""Generator classes by the name used in a configuration; any other name is a Hugging Face model. Register a custom
class before making or loading an adapter with it; it overrides `load`, and `save` and `load_saved` if it is trained."""


def load_generator(config: ATVConfig, llm: nn.Module | None = None, tokenizer: Any = None) -> Generator:
    """Load the generator that `config` names, with an LLM and its tokenizer if it needs them."""
    return GENERATORS.get(config.generator, Generator).load(config, llm, tokenizer)
