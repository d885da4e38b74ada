"""Render examples with an LLM's own chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

from atv.data.render import CONVERSATION, INPUT, Example, Prompt, Turn, following, require_answer, require_input
from atv.errors import ATVError


@dataclass(frozen=True)
class Chat:
    """A conversation in the LLM's chat template: system message, earlier turns, the query, and the answer's beginning.

    The ids of a prompt are those of `tokenizer.apply_chat_template` with a generation prompt, and of what the chat
    template then writes before any answer, such as the empty thoughts of an LLM that can think. The ids of an answer
    are those that the chat template adds for an assistant's message after it, up to the token that ends the turn.
    Demonstrations are earlier turns.

    Raises:
        ATVError: `text` or `query` has no {input}.
    """

    text: str = INPUT
    """What the user's turn says, with {input} where the query goes."""
    system: str | None = None
    """System message of conversations that do not begin with one. None: what the chat template does without."""
    template_kwargs: str = "{}"
    """JSON object of options of the chat template, such as {"enable_thinking": false}."""
    query: str = INPUT
    """The generator's input, with {input} where the query goes (`query_template`)."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        require_input(self.text, self.query)

    def messages(self, example: Example, shots: Sequence[Example] = ()) -> list[dict[str, str]]:
        """Return the messages up to the query; raise ATVError if it is blank."""
        if not self._said(example).strip():
            raise ATVError(f"A query is empty ({example.input!r}); expected some text.")
        return [{"role": role, "content": content} for role, content in self._turns(example, shots)]

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Return the conversation up to where the answer begins; raise ATVError if the chat template refuses it."""
        ids = _ids(tokenizer, self, self.messages(example, shots), opening(tokenizer, self))
        return Prompt(ids, self._read(example), len(shots))

    def asks(self, tokenizer: Any, example: Example) -> Prompt:
        """Return the conversation with a generation prompt alone, after which an LLM that can think does so."""
        return Prompt(_ids(tokenizer, self, self.messages(example), ""), self._read(example))

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """Return the token ids of the answer and the end of its turn, after any of these prompts."""
        del prompt
        require_answer(text)
        return list(_answer(tokenizer, self, text))

    def end(self, tokenizer: Any) -> int:
        """Return the token that ends an answer; the answer's own last one if nothing else does."""
        return _answer(tokenizer, self, "a")[-1]

    def _turns(self, example: Example, shots: Sequence[Example]) -> list[Turn]:
        own = list(example.turns)
        system = [own.pop(0)] if own and own[0].role == "system" else []
        if not system and self.system is not None:
            system = [Turn("system", self.system)]
        shown = [
            turn
            for shot in shots
            for turn in (
                *(turn for turn in shot.turns if turn.role != "system"),
                Turn("user", self._said(shot)),
                Turn("assistant", shot.output),
            )
        ]
        return [*system, *shown, *own, Turn("user", self._said(example))]

    def _said(self, example: Example) -> str:
        return self.text.replace(INPUT, example.input)

    def _read(self, example: Example) -> str:
        if self.query != CONVERSATION:
            return self.query.replace(INPUT, example.input)
        return "\n".join(f"{role}: {content}" for role, content in self._turns(example, ()))

    def _rendered(self, tokenizer: Any, messages: list[dict[str, str]], **how: Any) -> Any:
        """Return the token ids of a conversation, or its text with `tokenize = False`."""
        if not has_chat_template(tokenizer):
            raise ATVError(
                f"This LLM's tokenizer ({tokenizer.name_or_path}) has no chat template; use plain templates (--format "
                "template), or an LLM that is trained for chat."
            )
        options = json.loads(self.template_kwargs)
        try:
            return tokenizer.apply_chat_template(messages, return_dict=False, **options | how)
        except Exception as error:  # the chat template is a program of the LLM's authors and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise ATVError(
                f"The LLM's chat template refuses a conversation of the turns {roles}: {' '.join(str(error).split())}"
            ) from error


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


@lru_cache(maxsize=64)
def opening(tokenizer: Any, chat: Chat) -> str:
    """Return what a chat template writes between its generation prompt and any answer; empty for most of them."""
    asked = chat.messages(Example("a", ""))
    prompt = chat._rendered(tokenizer, asked, tokenize=False, add_generation_prompt=True)
    said = [chat._rendered(tokenizer, [*asked, _assistant(text)], tokenize=False) for text in ("a", "b")]
    if not all(text.startswith(prompt) for text in said):
        return ""  # `_added` says so
    pairs = zip(*(text[len(prompt) :] for text in said), strict=False)
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return shared.rstrip(" ") if shared.strip() else ""  # a space belongs to the answer's first token


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _ids(tokenizer: Any, chat: Chat, messages: list[dict[str, str]], opened: str) -> list[int]:
    if not opened:
        return list(chat._rendered(tokenizer, messages, add_generation_prompt=True))
    text = chat._rendered(tokenizer, messages, tokenize=False, add_generation_prompt=True) + opened
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # as `apply_chat_template` does


@lru_cache(maxsize=2**14)
def _answer(tokenizer: Any, chat: Chat, text: str) -> tuple[int, ...]:
    """Return the ids of an answer and its end."""
    added, (after, end) = tuple(_added(tokenizer, chat, text)), _end(tokenizer, chat)
    kept = len(added) - len(after)
    if kept < 1 or added[kept:] != after:  # the tokenizer merges the answer's last characters with what follows
        added = following(tokenizer, "", _written(tokenizer, chat, text).removesuffix(_tail(tokenizer, chat)))
        kept = len(added)
    return (*added[:kept], *end)


@lru_cache(maxsize=64)
def _end(tokenizer: Any, chat: Chat) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens after an answer that do not belong to it, and those that end it in their place.

    The chat template writes the same after any text. The first control token of it ends the turn and belongs to the
    answer; what follows (a line break, say) separates it from the next turn. If there is none, the tokenizer's
    end-of-text token takes its place. Tokens without a control token before them may be others after another text, if
    the tokenizer merges the text's last characters with them.
    """
    one, other = (_added(tokenizer, chat, text)[::-1] for text in ("a", "b"))
    after = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))][::-1]
    control = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    place = next((place for place, token in enumerate(after, 1) if token in control), None)
    if place is not None:
        return tuple(after[place:]), ()
    return tuple(after), () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


@lru_cache(maxsize=64)
def _tail(tokenizer: Any, chat: Chat) -> str:
    """Return what the chat template writes after any answer."""
    one, other = (_written(tokenizer, chat, text)[::-1] for text in ("a", "b"))
    pairs = zip(one, other, strict=False)
    return "".join(character for character, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]


def _added(tokenizer: Any, chat: Chat, text: str) -> list[int]:
    """Return the ids that an assistant's message adds after a prompt that asks for it.

    They are cut off the ids of the whole conversation. If a token spans the place where the answer begins, the LLM
    never reads that token at inference: then the text is encoded as it follows a neutral ending (`following`).
    """
    asked, opened = chat.messages(Example("a", "")), opening(tokenizer, chat)
    before, whole = _ids(tokenizer, chat, asked, opened), chat._rendered(tokenizer, [*asked, _assistant(text)])
    if whole[: len(before)] == before and len(whole) > len(before):
        return list(whole[len(before) :])
    return list(following(tokenizer, "", _written(tokenizer, chat, text)))


def _written(tokenizer: Any, chat: Chat, text: str) -> str:
    """Return what an assistant's message adds to the text of a prompt; ATVError if the prompt is not its beginning."""
    asked = chat.messages(Example("a", ""))
    prompt = chat._rendered(tokenizer, asked, tokenize=False, add_generation_prompt=True) + opening(tokenizer, chat)
    whole = str(chat._rendered(tokenizer, [*asked, _assistant(text)], tokenize=False))
    if not whole.startswith(prompt) or len(whole) == len(prompt):
        raise ATVError(
            f"The LLM's chat template does not begin the answer {text[:60]!r} where it asks for one: {prompt[-60:]!r} "
            "is followed by something else in a finished conversation. If the answer has thoughts in it, leave them "
            "out. Options of the chat template may also change that (--chat-template-kwargs), or use --format template."
        )
    return whole[len(prompt) :]
