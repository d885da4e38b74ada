"""The straightforward loop of the paper's released code: every prompt is read whole, all logits are computed.

Hooks on all layers add the vector at the last prompt token, so the loss is the same as the library's. The generator and
the expansion are the library's modules. Nothing is cached between steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from atv.data.collate import EncodedRow, pad
from atv.lm.hooks import decoder_layers
from atv.model import ATVModel


@contextmanager
def steered(layers: Sequence[nn.Module], vectors: Tensor, last: Tensor, scale: float) -> Iterator[None]:
    """Add `vectors` (rows, layers, hidden) to the outputs of `layers` at each row's token `last` (rows,)."""

    def hook(index: int, _: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        rows, added = torch.arange(len(hidden), device=hidden.device), hidden.clone()
        added[rows, last] = (hidden[rows, last] + scale * vectors[:, index]).to(hidden.dtype)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    handles = [layer.register_forward_hook(partial(hook, index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_loss(atv: ATVModel, row: EncodedRow) -> Tensor:
    """The loss of one row, its prompts one after the other, computed by Hugging Face from `labels`."""
    device, layers, losses = atv.generator.device, decoder_layers(atv.llm), []
    query = torch.tensor([row.query], device=device)
    vectors = atv.atv(query, torch.ones_like(query))  # (1, layers, hidden)
    for prompt, answer in row.pairs:
        tokens = torch.tensor([prompt + answer], device=device)
        labels = torch.tensor([[-100] * len(prompt) + answer], device=device)
        with steered(layers, vectors, torch.tensor([len(prompt) - 1], device=device), atv.config.scale):
            losses.append(atv.llm(input_ids=tokens, labels=labels, use_cache=False).loss)
    return torch.stack(losses).mean()


def batch_loss(atv: ATVModel, rows: Sequence[EncodedRow]) -> Tensor:
    """The loss of several rows, all prompts in one call: Hugging Face's loss, but as the mean of each prompt's mean."""
    device = atv.generator.device
    query, query_mask = pad([row.query for row in rows], 0, "right")
    pairs = [pair for row in rows for pair in row.pairs]
    tokens, mask = pad([prompt + answer for prompt, answer in pairs], 0, "right")
    labels, _ = pad([[-100] * len(prompt) + answer for prompt, answer in pairs], -100, "right")
    labels = labels.to(device)
    vectors = atv.atv(query.to(device), query_mask.to(device))
    vectors = vectors.repeat_interleave(len(pairs) // len(rows), dim=0)  # (prompts, layers, hidden)
    last = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], device=device)
    with steered(decoder_layers(atv.llm), vectors, last, atv.config.scale):
        logits = atv.llm(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits.float()
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]  # (prompts, seq): each token's next one
    loss = cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="none").view_as(shifted)
    return (loss.sum(1) / (shifted != -100).sum(1)).mean()


def train_rows(atv: ATVModel, rows: Sequence[EncodedRow], optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step for each row."""
    for row in rows:
        update(row_loss(atv, row), optimizer)


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Backward pass and optimiser step."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
