"""Adapters for engines that run the LLM outside torch: what is added to a request's hidden states, as plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from atv import adapter, artifact
from atv.config import SELF, Positions
from atv.errors import ATVError
from atv.lm.hooks import decoder_layers
from atv.vectors import ATV

LAYERS = "model.layers"
"""Name of the list of decoder layers in most LLMs."""


@dataclass(frozen=True)
class Steering:
    """What is added to one request's hidden states.

    Raises:
        ATVError: vectors or layers are malformed, or a value is not finite.
    """

    vectors: Tensor
    """(vectors, hidden) float32 on the CPU, multiplied by the scale."""
    layers: tuple[int, ...]
    """The decoder layer of each vector, in ascending order."""
    positions: Positions
    prompt: int | None = None
    """Tokens of the prompt, if what the engine reads first is longer: also the beginning of the answer."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.vectors.dim() != 2 or self.vectors.dtype != torch.float32 or len(self.vectors) != len(self.layers):
            raise ATVError(
                f"The vectors have the shape {tuple(self.vectors.shape)} and {self.vectors.dtype}; expected float32, "
                f"with a row for each of the {len(self.layers)} layers."
            )
        if list(self.layers) != sorted({int(layer) for layer in self.layers if layer >= 0}):
            raise ATVError(f"The layers are {list(self.layers)}; expected different ones in ascending order.")
        if not bool(self.vectors.isfinite().all()):
            raise ATVError("A task vector has a value that is not finite.")

    def payload(self) -> dict[str, Any]:
        """Return it as plain values, to be sent to another process."""
        return {
            "vectors": self.vectors.numpy().tobytes(),
            "layers": list(self.layers),
            "prompt_tokens": self.positions.prompt_tokens,
            "answer": self.positions.answer,
            "prompt": self.prompt,
        }

    @classmethod
    def of(cls, payload: Any, num_layers: int, hidden_size: int) -> Self:
        """Return what a payload contains, which must fit an LLM of this many layers and this width.

        Raises:
            ATVError: it does not fit or is malformed in any way.
        """
        if not isinstance(payload, Mapping):
            raise ATVError(f"The vectors of a request are a {type(payload).__name__}; expected a mapping.")
        values, layers, tokens, prompt = (
            payload.get(name) for name in ("vectors", "layers", "prompt_tokens", "prompt")
        )
        if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
            raise ATVError(f"A request's layers are {layers!r:.100}; expected a list of whole numbers.")
        if not isinstance(values, bytes) or len(values) != 4 * hidden_size * len(layers):
            raise ATVError(f"A request's vectors are not {len(layers)} times {hidden_size} float32 numbers as bytes.")
        if max(layers) >= num_layers:
            raise ATVError(f"A request steers layers {layers}; the LLM has layers 0 to {num_layers - 1}.")
        for name, value in {"prompt_tokens": tokens, "prompt": prompt}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ATVError(f"A request's {name} is {value!r:.100}; expected a whole number from 1, or none.")
        vectors = torch.frombuffer(bytearray(values), dtype=torch.float32).view(-1, hidden_size)
        return cls(vectors, tuple(layers), Positions(tokens, payload.get("answer") is True), prompt)

    def dense(self, num_layers: int) -> Tensor:
        """Return the vectors of all layers, (layers, hidden); those of other layers are zero."""
        every = torch.zeros(num_layers, self.vectors.shape[1])
        every[list(self.layers)] = self.vectors
        return every


class Part(NamedTuple):
    """The tokens of one request in a step: rows `start` to `start + new` of the engine's flat batch."""

    start: int
    new: int
    done: int
    """Tokens of the request's text before them, whose keys and values are cached."""
    prompt: int
    """Tokens of its prompt."""


def edited_rows(part: Part, positions: Positions) -> range:
    """Return the rows of a step's flat batch at which a request is edited.

    They depend only on the places of the tokens in the request's text. Therefore a prompt may be read in several steps,
    start after a cached prefix, or be read once more after a preemption, together with the answer so far.
    """
    first = 0 if positions.prompt_tokens is None else max(0, part.prompt - positions.prompt_tokens)
    end = part.done + part.new if positions.answer else part.prompt
    shift = part.start - part.done
    return range(max(first, part.done) + shift, max(min(end, part.done + part.new), first, part.done) + shift)


@dataclass(frozen=True, eq=False)
class Steers:
    """An adapter without its LLM, as the requests of these engines name it."""

    atv: ATV
    layer_numbers: tuple[int, ...]
    """The decoder layer of each vector."""

    @property
    def positions(self) -> Positions:
        """The edited tokens."""
        return Positions.parse(self.atv.config.positions)

    def steerings(self, queries: Sequence[str], scale: float | None = None) -> list[Steering]:
        """Return what is added for each query.

        Args:
            queries: what the generator reads.
            scale: strength. None: the adapter's own.
        """
        vectors = self.atv.task_vectors(list(queries)).cpu() * (self.atv.config.scale if scale is None else scale)
        return [Steering(own.contiguous(), self.layer_numbers, self.positions) for own in vectors]


def load_steers(folder: Path, outline: nn.Module, engine: str) -> Steers:
    """Load an adapter without its LLM.

    Args:
        folder: of the adapter.
        outline: the LLM that the engine runs, from `load_outline`: the adapter's is compared with it.
        engine: its name, for errors.

    Raises:
        ATVError: it is not an adapter, is for another LLM, or does more than adding vectors to the outputs of layers.
    """
    saved = artifact.read(folder)
    if saved.method not in ("atv", "fixed"):
        raise ATVError(
            f"{folder} is an adapter of the method {saved.method}, which {engine} cannot be steered with; expected atv "
            "or fixed."
        )
    config = adapter.read_config(saved, folder)
    for name, found, expected in (
        ("site", config.site, ("layer",)),
        ("edit", config.edit, ("add",)),
        ("layer_path", config.layer_path, (None, LAYERS)),
    ):
        if found not in expected:
            raise ATVError(
                f"The adapter {folder} has the {name} {found!r}; on {engine} only {expected[-1]!r} can be steered. "
                "Serve it with --engine transformers."
            )
    if config.generator == SELF:
        raise ATVError(
            f"The generator of the adapter {folder} is {SELF}: the LLM would make the vectors while it reads the "
            f"prompt, which {engine} cannot do. Serve it with --engine transformers."
        )
    artifact.check_llm(saved, outline, folder)
    atv = ATV.load(folder, method=saved.method)
    return Steers(atv, tuple(config.layer_indices(len(decoder_layers(outline)))))
