"""The prompt before the first edited token depends on no vector: it is read once, without gradient.

Attention is causal, so with positions `last`, `last:K` and `answer` the hidden states, keys and values of every
column before the first edited one are those of the unsteered model. The loss and its gradient from the remaining
columns are exactly those of the full pass. `read_prefix` is the one place where such keys and values come from.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from atv.batching import left_padded
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


class PrefixStore:
    """Keeps the keys and values of prompt prefixes in main memory, so that no epoch reads them again.

    A prefix is known by its token ids. What does not fit the budget is read anew each time; so is everything on a model
    whose cache is not one full pair of tensors per layer (sliding windows, recurrent states).

    Args:
        budget: most bytes to keep; None: half of the memory that is available.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = psutil.virtual_memory().available // 2 if budget is None else budget
        self.used = 0
        self.full = False
        self._kept: dict[bytes, Tensor] = {}  # token ids -> (layers * 2, heads, tokens, head width)

    def fill(self, llm: nn.Module, prefixes: Iterable[Sequence[int]], advance: Callable[[int], None]) -> None:
        """Read prefixes (token ids) in order of length, in batches that do not depend on the order of training.

        Rounding depends on what else is in a batch; filled before the first step, a resumed training finds the very
        keys and values that the interrupted one had. `advance` is told of each prefix that is done.
        """
        rows = sorted({tuple(prefix) for prefix in prefixes if prefix})
        rows.sort(key=len)
        device = next(llm.parameters()).device
        while rows and not self.full:
            count = max(1, 2048 // len(rows[0]))  # tokens per call: enough to keep two cores or a GPU busy
            inputs = left_padded(rows[:count], 0)
            self.read(llm, **{name: value.to(device) for name, value in inputs.items()})
            advance(len(rows[:count]))
            rows = rows[count:]
        advance(len(rows))

    def read(self, llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        """As `read_prefix`, from what is kept; all rows are read if one of them cannot be kept."""
        attended = attention_mask.bool()
        keys = [ids[mask].cpu().numpy().tobytes() for ids, mask in zip(input_ids, attended, strict=True)]
        new = [row for row, key in enumerate(keys) if key and key not in self._kept]
        if new and not self.full:
            cache = read_prefix(llm, input_ids[new], attention_mask[new], position_ids[new])
            self.full = not self._keep(cache, attended[new], [keys[row] for row in new])
        if new and self.full:
            return read_prefix(llm, input_ids, attention_mask, position_ids)
        return self._gather(keys, input_ids.shape[1], input_ids.device)

    def _keep(self, cache: Any, attended: Tensor, keys: list[bytes]) -> bool:
        """Keep each row without its padding; false if one does not fit."""
        stacked = _stack(cache, attended.shape[1])  # (layers * 2, batch, heads, seq, head width)
        if stacked is None:
            return False
        for row, (key, length) in enumerate(zip(keys, attended.sum(1).tolist(), strict=True)):
            tokens = stacked[:, row, :, stacked.shape[3] - length :]  # (layers * 2, heads, tokens, head width)
            if self.used + tokens.nbytes > self.budget:
                return False
            self.used += tokens.nbytes
            self._kept[key] = tokens.to("cpu", copy=True)  # a copy of its own, or the whole batch would stay
        return True

    def _gather(self, keys: list[bytes], width: int, device: torch.device) -> Any:
        """Kept prefixes as one left-padded cache of `width` columns; padding is zero and masked."""
        kept = [self._kept.get(key) for key in keys]
        like = next(tokens for tokens in kept if tokens is not None)
        sides, heads, _, head = like.shape
        batch = like.new_zeros(sides, len(keys), heads, width, head)
        for row, tokens in enumerate(kept):
            if tokens is not None:
                batch[:, row, :, width - tokens.shape[2] :] = tokens
        batch = batch.to(device)
        return DynamicCache([(batch[side], batch[side + 1]) for side in range(0, sides, 2)])


def _stack(cache: Any, width: int) -> Tensor | None:
    """A cache as (layers * 2, batch, heads, width, head width); None if its layers are not alike or not full."""
    sides: list[Tensor] = []
    for layer in cache.layers:
        for side in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if side is None or side.shape[2] != width or (sides and side.shape != sides[0].shape):
                return None
            sides.append(side)
    return torch.stack(sides) if sides else None


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
    # With keys from a cache torch's fused CPU attention is slow to differentiate: 7 ms a layer, 8 rows of 4 tokens.
    on_cpu = input_ids.device.type == "cpu" and torch.is_grad_enabled()
    with steer(edit_mask[:, split:]), sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext():
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
