"""The shape of the answers of OpenAI's API."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from atv.serving.requests import Finish, Piece
from atv.serving.sampling import Likelihood
from atv.serving.text import token_bytes


class Choice(NamedTuple):
    """A finished answer."""

    text: str
    tokens: list[Likelihood]
    finish: Finish
    generated: int


class Form:
    """The shape of OpenAI's answers."""

    def __init__(self, id: str, model: str, chat: bool, tokenizer: Any, told: bool, prompt_tokens: int) -> None:
        self.id, self.model, self._chat, self._tokenizer, self._told = id, model, chat, tokenizer, told
        self._prompt_tokens, self._created = prompt_tokens, int(time.time())
        self._said: defaultdict[int, bytes] = defaultdict(bytes)  # by choice, what its tokens so far stand for

    def head(self, chunk: bool) -> dict[str, Any]:
        """Return the fields before the choices."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def usage(self, generated: int) -> dict[str, int]:
        """Return the numbers of tokens."""
        read = self._prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return a finished answer."""
        found = []
        for index, choice in enumerate(choices):
            said = {"message": {"role": "assistant", "content": choice.text}} if self._chat else {"text": choice.text}
            likely = self._likelihoods(index, choice.tokens) if self._told else None
            found.append({"index": index, **said, "logprobs": likely, "finish_reason": choice.finish})
        return self.head(False) | {
            "choices": found,
            "usage": self.usage(sum(choice.generated for choice in choices)),
        }

    def parts(self, index: int, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """Yield the chunks of one piece."""
        likely = self._likelihoods(index, piece.tokens) if self._told and piece.tokens else None
        if not self._chat:
            choice = {"index": index, "text": piece.text, "logprobs": likely, "finish_reason": piece.finish}
            yield self.head(True) | {"choices": [choice]}
            return
        deltas: list[tuple[dict[str, str], Any, Finish | None]] = []
        if first:
            deltas.append(({"role": "assistant", "content": ""}, None, None))
        if piece.text or likely:
            deltas.append(({"content": piece.text}, likely, None))
        if piece.finish is not None:
            deltas.append(({}, None, piece.finish))
        for delta, told, finish in deltas:
            choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}
            yield self.head(True) | {"choices": [choice]}

    def _likelihoods(self, index: int, tokens: Sequence[Likelihood]) -> dict[str, Any]:
        if self._chat:
            return {
                "content": [
                    self._entry(told.token, told.logprob)
                    | {"top_logprobs": [self._entry(token, value) for token, value in told.top]}
                    for told in tokens
                ]
            }
        offsets = []
        for told in tokens:
            offsets.append(len(self._said[index].decode(errors="ignore")))
            self._said[index] += token_bytes(self._tokenizer, told.token)
        return {
            "tokens": [self._text(told.token) for told in tokens],
            "token_logprobs": [told.logprob for told in tokens],
            "top_logprobs": [self._by_text(told.top) for told in tokens],
            "text_offset": offsets,
        }

    def _by_text(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by text: of tokens with the same text that of the likeliest, which is first."""
        found: dict[str, float] = {}
        for token, value in top:
            found.setdefault(self._text(token), value)
        return found

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self._text(token),
            "logprob": value,
            "bytes": list(token_bytes(self._tokenizer, token)),
        }

    def _text(self, token: int) -> str:
        """Return a token's text, or its bytes if they are a part of a character, as OpenAI's API writes them."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
