"""Attention of a few new tokens over many cached ones: a fast backward pass on CPUs, and keys shared between rows.

Torch's fused CPU attention has a slow backward pass if keys come from a cache, and transformers copies keys and values
once per query head before calling any of torch's attentions. Plain matrix products over grouped heads avoid both: the
LLM's part of a training step takes two thirds of the time for 24 short prompts with 4 edited tokens each, and a third
of it for prompts of 500 tokens and more (docs/lab-notes.md).

If the cached tokens are the same in all rows of a batch, as demonstrations are, `shared_attention` reads them once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from atv.lm.calls import having

MOST_SCORES = 2**17
"""New tokens x keys above which torch's own attention is used: it is slower, but stores no scores for the backward
pass, whose size grows with this product (8 prompts of 777 tokens: several GiB)."""
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")  # arguments of single models, left to transformers


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
    """An attention function in the sense of transformers; equals its `sdpa` up to rounding.

    Args:
        module: the attention layer.
        query: (batch, heads, new, width).
        key: (batch, key heads, seq, width), the new tokens last.
        value: (batch, key heads, seq, value width).
        attention_mask: (batch, 1, new, seq) bool, true where a token is visible; or floats added to the scores.
        dropout: unused by a frozen LLM.
        scaling: factor of the scores; by default 1 / sqrt(width).
        options: further arguments that a model passes.

    Returns:
        The output (batch, new, heads, value width), and None instead of weights.
    """
    batch, heads, new, width = query.shape
    causal = attention_mask is None and new > 1
    too_many = new * key.shape[2] > MOST_SCORES
    if causal or dropout or too_many or any(options.get(name) is not None for name in _UNKNOWN):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    groups = (batch, key.shape[1], heads // key.shape[1] * new, width)  # the queries of one key head together
    scaled = query * (width**-0.5 if scaling is None else scaling)
    scores = (scaled.reshape(groups) @ key.transpose(2, 3)).view(batch, heads, new, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).view(*groups[:3], -1)
    attended = (weights @ value).view(batch, heads, new, -1)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # padding that sees no token gets zeros
        attended = attended * attention_mask.any(-1, keepdim=True)
    return attended.transpose(1, 2).contiguous(), None


def shared_attention(
    columns: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Like `grouped_attention`, for a batch in which all rows have the same first `columns` keys and values.

    Softmax over shared and own keys is the mean of both attentions, weighted by the sums of their exponentials, whose
    logarithms torch's CPU attention returns. So the queries of all rows attend to the shared keys like those of a
    single row, without copies per row or query head.
    """
    batch, heads, new, width = query.shape
    mask = attention_mask
    if (
        mask is None
        or mask.dtype != torch.bool  # an additive mask may contain distances to the shared columns
        or mask.shape[:3] != (batch, 1, new)
        or not mask[..., :columns].all()
        or query.device.type != "cpu"
        or value.shape[-1] != width
        or torch.is_grad_enabled()
        or dropout
        or any(options.get(name) is not None for name in _UNKNOWN)
    ):
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **options)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the public function hides the logarithms
    rows = query.reshape(batch, key.shape[1], -1, width)  # the queries of one key head together
    together = rows.transpose(0, 1).reshape(1, key.shape[1], -1, width)
    theirs, log_sums = attend(together, key[:1, :, :columns], value[:1, :, :columns], scale=scaling)
    # The lowest number rather than -inf: padding sees no own key, and its weight must be zero rather than NaN.
    hidden = torch.zeros(batch, 1, new, key.shape[2] - columns, dtype=query.dtype)
    hidden = hidden.masked_fill(~mask[..., columns:], torch.finfo(query.dtype).min).repeat(
        1, 1, rows.shape[2] // new, 1
    )
    own, own_log_sums = attend(rows, key[:, :, columns:], value[:, :, columns:], attn_mask=hidden, scale=scaling)
    log_sums = log_sums.reshape(key.shape[1], batch, -1).transpose(0, 1)  # (batch, key heads, queries), as own_log_sums
    share = torch.sigmoid(log_sums - own_log_sums)[..., None]
    theirs = theirs.reshape(key.shape[1], batch, -1, width).transpose(0, 1)
    merged = torch.lerp(own.to(share.dtype), theirs.to(share.dtype), share).to(query.dtype)
    return merged.reshape(batch, heads, new, width).transpose(1, 2).contiguous(), None


_CHOSEN: ContextVar[Callable[..., Any] | None] = ContextVar("atv_attention", default=None)
"""The function that replaces `sdpa` in this thread or task."""
_LOCK = Lock()
_replaced: list[Callable[..., Any]] = []
"""The original `sdpa` entry of the table, once per open context."""


def _chosen_attention(*args: Any, **options: Any) -> Any:
    return (_CHOSEN.get() or (_replaced or [sdpa_attention_forward])[0])(*args, **options)


@contextmanager
def _instead_of_sdpa(function: Callable[..., Any]) -> Iterator[None]:
    """Make models with transformers' `sdpa` attention use `function` inside this context.

    The function is replaced rather than the models' setting, since some build their mask and choose their code by that
    name. The table is shared by all threads; those outside such a context keep `sdpa`.
    """
    with _LOCK:
        _replaced.append(_replaced[0] if _replaced else ALL_ATTENTION_FUNCTIONS["sdpa"])
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _chosen_attention
    try:
        with having(_CHOSEN, function):
            yield
    finally:
        with _LOCK:
            replaced = _replaced.pop()
            if not _replaced:
                ALL_ATTENTION_FUNCTIONS["sdpa"] = replaced


def grouped() -> AbstractContextManager[None]:
    """Use `grouped_attention` inside this context."""
    return _instead_of_sdpa(grouped_attention)


def shared(columns: int) -> AbstractContextManager[None]:
    """Use `shared_attention` inside this context; the first `columns` of a cache must be the same in all rows."""
    return _instead_of_sdpa(partial(shared_attention, columns))
