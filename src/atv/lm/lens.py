"""The logit lens: what the LLM's final norm and head make of a vector, or of the residual stream at any layer."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from atv.errors import ATVError
from atv.lm.hooks import base_llm, capture_outputs, decoder_layers
from atv.lm.prefix import call_llm

TOP = 5
"""Tokens that are named at each layer."""


class Readout:
    """An LLM's own way from the residual stream to logits: what it calls between its last layer and its head, and that.

    Found by watching one call, not by names: the outermost modules that begin after the last decoder layer has ended.
    Whether they are all that happens there is seen from what the head is given.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        inputs: of the call that is watched: `input_ids`, `attention_mask`, `position_ids`, each (batch, seq).
        layer_path: name of the list of decoder layers, where structure does not decide.

    Raises:
        ATVError: there is no head, or something else than modules lies in front of it.
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
                f"Between its last layer and its head, {type(base_llm(llm)).__name__} does something that is not in "
                f"the modules that it calls there ({self.described(llm)}): the logit lens cannot be read."
            )

    def described(self, llm: nn.Module) -> str:
        """The names of its modules in the LLM, in the order in which they are called."""
        names = {module: name for name, module in base_llm(llm).named_modules()}
        return " > ".join(names.get(module, type(module).__name__) for module in [*self._norms, self._head])

    def _normed(self, residual: Tensor) -> Tensor:
        for module in self._norms:
            residual = module(residual)
        return residual

    @torch.no_grad()
    def __call__(self, residual: Tensor) -> Tensor:
        """Residual streams (..., hidden) to logits (..., vocabulary), float32 at least, on the CPU.

        What an LLM does to the logits afterwards (some cap them, none in a way that changes their order) is left out.
        """
        logits: Tensor = self._head(self._normed(residual.to(self._like)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()

    def promoted(self, vectors: Tensor) -> Tensor:
        """How much a vector alone raises each logit over those of no vector: (..., hidden) to (..., vocabulary).

        Without the subtraction the biases of a norm or a head would name the same tokens for every vector.
        """
        return self(vectors) - self(torch.zeros_like(vectors[..., :1, :]))


@torch.no_grad()
def _between(
    llm: nn.Module, layers: list[nn.Module], head: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[list[nn.Module], Tensor, Tensor]:
    """The modules called between the last layer and the head; the former's output, the latter's last column."""
    called: list[nn.Module] = []
    open_now: list[nn.Module] = []  # at most one: the outermost
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
    """The likeliest tokens of each row: [text, value], the first one on top.

    Args:
        logits: (rows, vocabulary).
        tokenizer: the LLM's.
        values: (rows, vocabulary), what stands beside a token; by default its logit.
    """
    values = logits if values is None else values
    rows = logits.topk(min(TOP, logits.shape[-1])).indices
    return [
        [[tokenizer.decode([token]), float(values[row, token])] for token in tokens]
        for row, tokens in enumerate(rows.tolist())
    ]
