"""Prefill of the prompt before the first edited token, which does not depend on the vectors and needs no gradient.

Attention is causal, so with positions `last`, `last:K` and `answer` the hidden states, keys and values of every
column before the first edited one are those of the unsteered model. The loss and its gradient from the remaining
columns equal those of the full pass. Only `read_prefix` computes such keys and values;
`prefix_store.PrefixStore` caches them between epochs.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from atv.data.collate import left_padded, position_ids
from atv.lm.attention import grouped, shared
from atv.lm.hooks import accepted, base_llm, flat_head, input_device, require_eval, text_config
from atv.lm.prefix_tree import common
from atv.lm.spans import first_edited

ReadPrefix = Callable[[nn.Module, Tensor, Tensor, Tensor], Any]


def call_llm(llm: nn.Module, *, keep: int, **inputs: Any) -> Any:
    """Call the LLM with the inputs that its signature accepts; keep only the logits of the last `keep` columns.

    Returns:
        The model's output; its `logits` are (batch, keep, vocabulary).
    """
    with flat_head(llm):
        output = llm(**accepted(llm, inputs | {"logits_to_keep": keep}))
    output.logits = output.logits[:, -keep:]
    return output


@torch.no_grad()
def read_prefix(
    llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Any = None
) -> Any:
    """Return the keys and values of a prompt prefix, unsteered and without gradient.

    Args:
        llm: the frozen LLM.
        input_ids: (batch, new), like `position_ids`.
        attention_mask: 1 where a token is, (batch, past + new).
        position_ids: explicit positions.
        past: keys and values of what comes before, of `past` columns; None: nothing does.

    Returns:
        A transformers `Cache` of `past + new` columns; None from an LLM without one (a recurrent LLM).
    """
    output = call_llm(
        llm,
        keep=1,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past,
        use_cache=True,
    )
    return getattr(output, "past_key_values", None)


class KeptLayer(DynamicLayer):
    """A filled cache layer that moves to the device of the LLM's layer."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append like any cache layer."""
        self.keys, self.values = self.keys.to(key_states.device), self.values.to(key_states.device)
        return super().update(key_states, value_states, *args, **kwargs)


def as_cache(sides: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a cache of each layer's keys and values (batch, heads, seq, head width), without copying."""
    cache = DynamicCache()
    cache.layers = [KeptLayer(keys, values) for keys, values in sides]
    return cache


def attention_alone(cache: Any) -> bool:
    """Whether a cache contains only keys and values: some LLMs ignore a recurrent state if many tokens follow."""
    plain = {DynamicLayer, DynamicSlidingWindowLayer, KeptLayer}
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= plain


def full_sides(cache: Any, width: int) -> list[tuple[Tensor, Tensor]] | None:
    """Return each layer's keys and values; None unless every layer has exactly these, for all `width` columns."""
    if not attention_alone(cache):
        return None
    sides = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if any(side is None or side.shape[2] != width for pair in sides for side in pair):
        return None
    return cast(list[tuple[Tensor, Tensor]], sides)


def counts_positions(llm: nn.Module, columns: float = math.inf) -> bool:
    """Whether distances between tokens follow `position_ids` even with padding among that many columns."""
    config = text_config(llm)
    windows = ("sliding_window", "window_size", "attention_chunk_size")
    return "position_ids" in inspect.signature(base_llm(llm).forward).parameters and all(
        columns <= (getattr(config, name, None) or math.inf) for name in windows
    )


class SharedPrefix:
    """The common beginning of a set of prompts (a task's instruction, demonstrations), read once for all of them.

    The columns of a batch are then: the shared tokens, padding, each prompt's own tokens. A sliding window, or
    positions counted by the LLM itself, would count that padding, so LLMs with either share nothing.

    Args:
        llm: the frozen LLM, or a PEFT model around it.
        prompts: token ids of every prompt.
        edited: number of a prompt's last tokens that may be edited, and are not shared; None: all, share nothing.
        least: fewer shared tokens than this are not worth a call.
    """

    def __init__(self, llm: nn.Module, prompts: Sequence[Sequence[int]], edited: int | None, least: int = 8) -> None:
        self.length = 0
        self._sides: list[tuple[Tensor, Tensor]] = []
        if edited is None or len(prompts) < 2 or not counts_positions(llm):
            return
        ordered = list(map(tuple, prompts))
        length = common(min(ordered), max(ordered))  # of the first and the last in order, and so of all
        length = min(length, min(map(len, prompts)) - max(1, edited))
        if length < least:
            return
        inputs = left_padded([prompts[0][:length]], 0)
        device = input_device(llm)
        cache = read_prefix(llm, **{name: value.to(device) for name, value in inputs.items()})
        sides = full_sides(cache, length)
        if sides is not None and not any(layer.is_sliding for layer in cache.layers):
            self.length, self._sides = length, sides

    def inputs(self, prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[dict[str, Tensor], DynamicCache | None]:
        """Return model inputs for some of the prompts, with all columns, and a cache of the first `length` columns.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, each (batch, seq), on the CPU; and the cache, None if nothing
            is shared.
        """
        own = left_padded([prompt[self.length :] for prompt in prompts], pad_id)
        if not self.length:
            return own, None
        shared = torch.tensor([prompt[: self.length] for prompt in prompts])  # (batch, length)
        mask = torch.cat([torch.ones_like(shared), own["attention_mask"]], dim=1)
        ids = torch.cat([shared, own["input_ids"]], dim=1)
        size = (len(prompts), -1, -1, -1)
        cache = as_cache((keys.expand(size), values.expand(size)) for keys, values in self._sides)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}, cache

    def attention(self) -> AbstractContextManager[None]:
        """Inside this context attention reads the shared part of the cache once for all rows, not once per row."""
        return shared(self.length) if self.length else nullcontext()


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
    """Return the logits of the last `keep` columns; columns from the first edited one on are read steered.

    Args:
        llm: the frozen LLM.
        steer: called with the edit mask of the columns after the prefix; returns a context manager.
        input_ids: (batch, seq), like the next three.
        attention_mask: 1 where a token is.
        position_ids: explicit positions.
        edit_mask: true where a vector is added.
        keep: number of columns, from the end, whose logits are returned.
        read: source of the prefix's keys and values: `read_prefix`, or a store's `read`.

    Returns:
        Logits (batch, keep, vocabulary).
    """
    require_eval(llm)
    # Columns whose logits are returned must be read now, edited or not.
    split = min(first_edited(edit_mask), input_ids.shape[1] - keep)
    past = None
    if split > 0:
        past = read(llm, input_ids[:, :split], attention_mask[:, :split], position_ids[:, :split])
        if not attention_alone(past):  # then all columns are read steered: slower, but correct
            split, past = 0, None
    on_cpu = input_ids.device.type == "cpu" and torch.is_grad_enabled()
    with steer(edit_mask[:, split:]), grouped() if on_cpu else nullcontext():
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
