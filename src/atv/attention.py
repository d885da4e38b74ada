"""Attention of a few new tokens over many cached ones, differentiated quickly on a CPU.

Torch's fused CPU attention is slow in the backward when keys come from a cache, and transformers copies keys and values
once per query head before any of torch's attentions sees them. Plain matrix products over grouped heads do neither: the
LLM's part of a training step takes two thirds of the time for 24 short prompts with 4 edited tokens each, and a third
of it for prompts of 500 tokens and more (docs/lab-notes.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MOST_SCORES = 2**17
"""New tokens x keys beyond which torch's own attention is used: it is slower, but keeps no table of scores for the
backward, which grows with their product (8 prompts of 777 tokens: several GiB)."""
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")  # arguments of single models, that the library's own knows


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls an attention function; equal to its `sdpa` up to rounding.

    Args:
        module: the attention layer.
        query: (batch, heads, new, width).
        key: (batch, key heads, seq, width), the new tokens last.
        value: (batch, key heads, seq, value width).
        attention_mask: (batch, 1, new, seq) bool, true where a token is seen; or what is added to the scores.
        dropout: the frozen LLM has none.
        scaling: of the scores; by default 1 / sqrt(width).
        options: what else a model hands on.

    Returns:
        (batch, new, heads, value width), and no weights.
    """
    batch, heads, new, width = query.shape
    causal = attention_mask is None and new > 1
    too_many = new * key.shape[2] > MOST_SCORES
    if causal or dropout or too_many or any(options.get(name) is not None for name in _UNKNOWN):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = (batch, key.shape[1], heads // key.shape[1] * new, width)  # the queries of one key head stand together
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = (scaled.reshape(groups) @ key.transpose(2, 3)).view(batch, heads, new, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).view(*groups[:3], -1)
    return (weights @ value).view(batch, heads, new, -1).transpose(1, 2).contiguous(), None


@contextmanager
def grouped() -> Iterator[None]:
    """Let models that attend through transformers' `sdpa` function use `grouped_attention` meanwhile.

    The function is exchanged and not the models' setting: some build their mask and choose their code by that name.
    """
    former = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = former
