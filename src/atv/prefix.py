"""The prompt before the first edited token depends on no vector: it is read once, without gradient.

Attention is causal, so with positions `last`, `last:K` and `answer` the hidden states, keys and values of every
column before the first edited one are those of the unsteered model. The loss and its gradient from the remaining
columns are exactly those of the full pass. `read_prefix` is the one place where such keys and values come from.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

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
    """Keeps the keys and values of prompt prefixes in memory, so that later epochs do not read them again.

    A prefix is known by its token ids. Once the budget is used up, further prefixes are read anew each time; so are
    those of a model whose cache is not one full pair of tensors per layer (sliding windows, recurrent states).

    Args:
        llm: the frozen LLM.
        budget: most bytes to keep.
    """

    def __init__(self, llm: nn.Module, budget: int) -> None:
        self.llm, self.budget, self.used = llm, budget, 0
        self._kept: dict[bytes, Tensor] = {}  # token ids -> (layers * 2, heads, tokens, head width)

    def read(self, llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        """As `read_prefix`, from what is kept as far as it goes."""
        attended = attention_mask.bool()
        keys = [ids[mask].cpu().numpy().tobytes() for ids, mask in zip(input_ids, attended, strict=True)]
        new = [row for row, key in enumerate(keys) if key and key not in self._kept]
        if new:
            cache = read_prefix(llm, input_ids[new], attention_mask[new], position_ids[new])
            stacked = _stack(cache, input_ids.shape[1])
            if len(new) == len(keys) and (stacked is None or self.used >= self.budget):
                return cache
            if stacked is None or not self._keep(stacked, attended[new], [keys[row] for row in new]):
                return read_prefix(llm, input_ids, attention_mask, position_ids)
        return self._gather(keys, input_ids.shape[1])

    def _keep(self, stacked: Tensor, attended: Tensor, keys: list[bytes]) -> bool:
        """Keep each row without its padding; false if the budget did not last for all of them."""
        for row, key in enumerate(keys):
            tokens = stacked[:, row][:, :, attended[row]].contiguous()  # (layers * 2, heads, tokens, head width)
            if self.used + tokens.nbytes > self.budget:
                return False
            self.used += tokens.nbytes
            self._kept[key] = tokens
        return True

    def _gather(self, keys: list[bytes], width: int) -> Any:
        """Kept prefixes as one left-padded cache of `width` columns; padding is zero and masked."""
        kept = [self._kept.get(key) for key in keys]
        like = next(tokens for tokens in kept if tokens is not None)
        sides, heads, _, head = like.shape
        batch = like.new_zeros(sides, len(keys), heads, width, head)
        for row, tokens in enumerate(kept):
            if tokens is not None:
                batch[:, row, :, width - tokens.shape[2] :] = tokens
        return DynamicCache([(batch[side], batch[side + 1]) for side in range(0, sides, 2)])


def _stack(cache: Any, width: int) -> Tensor | None:
    """A cache as (layers * 2, batch, heads, width, head width); None if its layers are not alike or not full."""
    sides = [side for layer in cache.layers for side in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    first = sides[0]
    if first is None or any(side is None or side.shape != first.shape or side.shape[2] != width for side in sides):
        return None
    return torch.stack(sides)


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
    with steer(edit_mask[:, split:]):
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
