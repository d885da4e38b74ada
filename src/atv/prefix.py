"""The prompt before the first edited token depends on no vector: it is read once, without gradient.

Attention is causal, so with positions `last`, `last:K` and `answer` the hidden states, keys and values of every
column before the first edited one are those of the unsteered model. The loss and its gradient from the remaining
columns are exactly those of the full pass. `read_prefix` is the one place where such keys and values are made;
`store.PrefixStore` keeps them between epochs.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atv.attention import grouped
from atv.hooks import base_llm, flat_head

ReadPrefix = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]


def first_edited(edit_mask: Tensor) -> int:
    """The first column of `edit_mask` (batch, seq) with an edit in any row; its width if there is none."""
    columns = edit_mask.any(dim=0).nonzero()
    return int(columns[0]) if len(columns) else edit_mask.shape[1]


def call_llm(llm: nn.Module, *, keep: int, **inputs: Any) -> Any:
    """One forward call with what this LLM's signature accepts; logits of the last `keep` columns only.

    Returns:
        The model's output; its `logits` are (batch, keep, vocabulary).
    """
    accepted = inspect.signature(base_llm(llm).forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    with flat_head(llm):
        output = llm(**inputs)
    output.logits = output.logits[:, -keep:]
    return output


@torch.no_grad()
def read_prefix(llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
    """Keys and values of a prompt prefix, unsteered and without gradient.

    Args:
        llm: the frozen LLM.
        input_ids: (batch, prefix), like the other two.
        attention_mask: 1 where a token is.
        position_ids: explicit positions.

    Returns:
        A transformers `Cache` of `prefix` columns.
    """
    output = call_llm(
        llm,
        keep=1,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
    )
    return output.past_key_values


def steered_logits(
    llm: nn.Module,
    steer: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    edit_mask: Tensor,
    keep: int,
    read: ReadPrefix = read_prefix,
) -> Tensor:
    """Logits of the last `keep` columns, where the columns from the first edited one on are read steered.

    Args:
        llm: the frozen LLM.
        steer: called with the edit mask of the columns that are left to read; a context manager.
        input_ids: (batch, seq), like the next three.
        attention_mask: 1 where a token is.
        position_ids: explicit positions.
        edit_mask: true where a vector is added.
        keep: columns whose logits are wanted, counted from the end.
        read: where the prefix's keys and values come from: `read_prefix`, or a store's `read`.

    Returns:
        Logits (batch, keep, vocabulary).
    """
    # The columns whose logits are wanted must be read now, edited or not.
    split = min(first_edited(edit_mask), input_ids.shape[1] - keep)
    past = None
    if split > 0:
        past = read(llm, input_ids[:, :split], attention_mask[:, :split], position_ids[:, :split])
    on_cpu = input_ids.device.type == "cpu" and torch.is_grad_enabled()
    with steer(edit_mask[:, split:]), grouped(llm) if on_cpu else nullcontext():
        output = call_llm(
            llm,
            keep=keep,
            input_ids=input_ids[:, split:],
            attention_mask=attention_mask,
            position_ids=position_ids[:, split:],
            past_key_values=past,
            use_cache=past is not None,
        )
    logits: Tensor = output.logits
    return logits
