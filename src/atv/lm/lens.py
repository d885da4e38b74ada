"""The logit lens: the LLM's final norm and head applied to a vector, or to the residual stream at any layer."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from atv.errors import ATVError
from atv.lm.hooks import base_llm, capture_outputs, decoder_layers
from atv.lm.prefix import call_llm

TOP = 5
"""Number of tokens listed per layer."""


class Readout:
    """An LLM's map from the residual stream to logits: the modules between its last layer and its head, and the head.

    They are found by watching one call, not by name: the outermost modules that start after the last decoder layer has
    ended. Comparing their output to the head's input shows whether anything else happens in between.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        inputs: inputs of the watched call: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq).
        layer_path: name of the list of decoder layers, if the structure is ambiguous.

    Raises:
        ATVError: there is no head, or the LLM does more than call modules before it.
    """

    def __init__(self, llm: nn.Module, inputs: Mapping[str, Tensor], layer_path: str | None = None) -> None:
        head: nn.Module | None = base_llm(llm).get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ATVError(f"{type(base_llm(llm)).__name__} names no output embeddings: there is no head to read with.")
        self._head = head
        layers = decoder_layers(llm, layer_path)
        self._norms, residual, given = _between(llm, layers, head, inputs)
        self._like = residual[..., :0]  # dtype and device
        found = self._normed(residual[:, -1])
        if found.shape != given.shape or not torch.allclose(found.float(), given.float(), rtol=1e-2, atol=1e-3):
            raise ATVError(
                f"Between its last layer and its head, {type(base_llm(llm)).__name__} does more than call modules "
                f"({self.described(llm)}): the logit lens is not available."
            )

    def described(self, llm: nn.Module) -> str:
        """Return the names of its modules in the LLM, in the order of their calls."""
        names = {module: name for name, module in base_llm(llm).named_modules()}
        return " > ".join(names.get(module, type(module).__name__) for module in [*self._norms, self._head])

    def _normed(self, residual: Tensor) -> Tensor:
        for module in self._norms:
            residual = module(residual)
        return residual

    @torch.no_grad()
    def __call__(self, residual: Tensor) -> Tensor:
        """Map residual streams (..., hidden) to logits (..., vocabulary), at least float32, on the CPU.

        What an LLM does to the logits afterwards is left out (some cap them, which does not change their order).
        """
        logits: Tensor = self._head(self._normed(residual.to(self._like)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()

    def promoted(self, vectors: Tensor) -> Tensor:
        """Return how much a vector alone raises each logit above those of zero: (..., hidden) to (..., vocabulary).

        Without the subtraction, biases of a norm or head would promote the same tokens for every vector.
        """
        return self(vectors) - self(torch.zeros_like(vectors[..., :1, :]))


@torch.no_grad()
def _between(
    llm: nn.Module, layers: list[nn.Module], head: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[list[nn.Module], Tensor, Tensor]:
    """Return the modules called between last layer and head, the layer's output, and the head's last input column."""
    called: list[nn.Module] = []
    open_now: list[nn.Module] = []  # at most one: the outermost module
    given: list[Tensor] = []
    inside = {module for layer in layers for module in layer.modules()}
    with ExitStack() as hooks, capture_outputs(layers[-1:]) as captured:

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is head:
                given.append(args[0][:, -1])
            elif captured and not open_now and not given:
                open_now.append(module)

        def after(module: nn.Module, *_: Any) -> None:
            if open_now == [module]:
                called.append(open_now.pop())

        for module in llm.modules():
            if module not in inside:
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        call_llm(llm, keep=1, **inputs, use_cache=False)
        if not given:
            raise ATVError(f"{type(base_llm(llm)).__name__} never calls its output embeddings: no head to read with.")
        return called, captured[0], given[0]


def top_tokens(logits: Tensor, tokenizer: Any, values: Tensor | None = None) -> list[list[list[Any]]]:
    """Return the likeliest tokens of each row as [text, value], the likeliest first.

    Args:
        logits: (rows, vocabulary).
        tokenizer: the LLM's.
        values: (rows, vocabulary), the value of each token; by default its logit.
    """
    values = logits if values is None else values
    rows = logits.topk(min(TOP, logits.shape[-1])).indices
    return [
        [[tokenizer.decode([token]), float(values[row, token])] for token in tokens]
        for row, tokens in enumerate(rows.tolist())
    ]
