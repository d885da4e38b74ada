"""The tokens at which an LLM's answer ends, and its text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from atv.data.chat import Chat, has_chat_template
from atv.errors import ATVError
from atv.lm.hooks import base_llm


def end_ids(llm: nn.Module, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, in ascending order.

    They are those of the LLM's generation config, the tokenizer's end-of-text token, and the token with which the chat
    template ends a turn, which the other two do not always name.
    """
    known = getattr(getattr(base_llm(llm), "generation_config", None), "eos_token_id", None)
    ids = {*known} if isinstance(known, list | tuple) else {known}
    ids |= {tokenizer.eos_token_id, _end_of_turn(tokenizer) if has_chat_template(tokenizer) else None}
    return sorted(int(token) for token in ids if token is not None)


def decoded(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    """Return the text of tokens as it was generated: some tokenizers otherwise remove spaces before punctuation."""
    how = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(ids, **how))


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Any) -> int | None:
    try:
        return Chat().end(tokenizer)
    except ATVError:  # the chat template wants more than one user's message; a task that uses it says so
        return None
