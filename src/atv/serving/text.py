"""Text from tokens as they come: whole characters, and nothing after a stop sequence."""

import re
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from atv.lm.ends import decoded

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer returns for bytes that are no character, perhaps not yet."""
CONTEXT = 8
"""Tokens decoded again before new ones: some tokenizers write a token differently at the beginning of a text."""


_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""The letters by which byte-level tokenizers write bytes."""


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for, which may be a part of a character.

    Decoding the token alone would lose such a part, and with SentencePiece the space before a word.
    """
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(byte[1], 16)])
    if BROKEN in text and all(letter in _BYTES for letter in piece):
        return bytes(_BYTES[letter] for letter in piece)
    spaces = len(piece) - len(piece.lstrip("\N{LOWER ONE EIGHTH BLOCK}"))
    return (" " * spaces + text.lstrip(" ") if spaces else text).encode()


class TextStream:
    """The text of one answer.

    Text that could be the beginning of a stop sequence, or of a character, is held back until it is decided.

    Args:
        tokenizer: the LLM's.
        stop: sequences that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._tokens: list[int] = []
        self._first = 0  # tokens before it are not decoded again
        self._before = 0  # characters of the decoded tokens that are in `_held` or were returned
        self._held = ""
        self.stopped = False
        """Whether a stop sequence has been met."""

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        self._tokens.append(token)
        text = self._decoded().rstrip(BROKEN)  # it may become a character
        self._held += text[self._before :]
        self._before = max(self._before, len(text))
        if len(self._tokens) - self._first >= 2 * CONTEXT and self._decoded() == text:
            rest = self._decoded(len(self._tokens) - CONTEXT)
            if text.endswith(rest):  # not if it begins inside a character
                self._first, self._before = len(self._tokens) - CONTEXT, len(rest)
        return self._certain()

    def finish(self) -> str:
        """Return the text that was held back; there is no further token."""
        if self.stopped:
            return ""
        text = self._held + self._decoded()[self._before :]
        self._held, self._before = "", len(self._decoded())
        return text

    def _decoded(self, first: int | None = None) -> str:
        """Decode the tokens from `first`, by default those that are decoded again."""
        tokens = self._tokens[self._first if first is None else first :]
        # Cleaning up, such as " ." to ".", would shorten text that was returned already.
        return decoded(self._tokenizer, tokens, skip_special_tokens=True)

    def _certain(self) -> str:
        places = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)], ""
            return text
        waiting = max((_overlap(self._held, text) for text in self._stop), default=0)
        cut = len(self._held) - waiting
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of a text with which a stop sequence begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
