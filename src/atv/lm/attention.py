"""Attention of a few new tokens over many cached ones: differentiated quickly on a CPU, and read once for many rows.

Torch's fused CPU attention is slow in the backward when keys come from a cache, and transformers copies keys and values
once per query head before any of torch's attentions sees them. Plain matrix products over grouped heads do neither: the
LLM's part of a training step takes two thirds of the time for 24 short prompts with 4 edited tokens each, and a third
of it for prompts of 500 tokens and more (docs/lab-notes.md).

Where the cached tokens are the same in all rows of a batch, as demonstrations are, `shared_attention` reads them once.
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
    attended = (weights @ value).view(batch, heads, new, -1)
    if (
        attention_mask is not None and attention_mask.dtype == torch.bool
    ):  # padding that sees nothing attends to nothing
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
    """The same for a batch whose first `columns` keys and values are those of every row.

    Softmax over shared and own keys is the mean of both attentions, weighted by the sums of their exponentials, whose
    logarithms torch's CPU attention returns. So the queries of all rows can read the shared keys as those of one row,
    and nothing of them is copied for a row or a query head.
    """
    batch, heads, new, width = query.shape
    mask = attention_mask
    if (
        mask is None
        or mask.dtype != torch.bool  # one that is added may hold distances to the shared columns
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
    rows = query.reshape(batch, key.shape[1], -1, width)  # the queries of one key head stand together
    together = rows.transpose(0, 1).reshape(1, key.shape[1], -1, width)
    theirs, log_sums = attend(together, key[:1, :, :columns], value[:1, :, :columns], scale=scaling)
    # The least number and not -inf: padding sees nothing of its own part, which must weigh nothing and not be nan.
    hidden = torch.zeros(batch, 1, new, key.shape[2] - columns, dtype=query.dtype)
    hidden = hidden.masked_fill(~mask[..., columns:], torch.finfo(query.dtype).min).repeat(
        1, 1, rows.shape[2] // new, 1
    )
    own, own_log_sums = attend(rows, key[:, :, columns:], value[:, :, columns:], attn_mask=hidden, scale=scaling)
    log_sums = log_sums.reshape(key.shape[1], batch, -1).transpose(0, 1)  # (batch, key heads, queries), as the own ones
    share = torch.sigmoid(log_sums - own_log_sums)[..., None]
    theirs = theirs.reshape(key.shape[1], batch, -1, width).transpose(0, 1)
    merged = torch.lerp(own.to(share.dtype), theirs.to(share.dtype), share).to(query.dtype)
    return merged.reshape(batch, heads, new, width).transpose(1, 2).contiguous(), None


_CHOSEN: ContextVar[Callable[..., Any] | None] = ContextVar("atv_attention", default=None)
"""What attends instead of `sdpa` in this thread or task."""
_LOCK = Lock()
_replaced: list[Callable[..., Any]] = []
"""What the table had under `sdpa`, once for each context that is open."""


def _chosen_attention(*args: Any, **options: Any) -> Any:
    return (_CHOSEN.get() or (_replaced or [sdpa_attention_forward])[0])(*args, **options)


@contextmanager
def _instead_of_sdpa(function: Callable[..., Any]) -> Iterator[None]:
    """Let models that attend through transformers' `sdpa` function use another one inside this context.

    The function is replaced and not the models' setting: some build their mask and choose their code by that name. It
    is one table for all threads; those that did not ask for another function keep `sdpa`.
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
    """`grouped_attention` in the models inside this context."""
    return _instead_of_sdpa(grouped_attention)


def shared(columns: int) -> AbstractContextManager[None]:
    """`shared_attention` in the models inside this context; the first `columns` of a cache are alike in all rows."""
    return _instead_of_sdpa(partial(shared_attention, columns))
