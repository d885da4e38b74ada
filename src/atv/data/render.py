"""Render examples to tokens: the prompt, demonstrations before it, and the answer after it.

A renderer determines what the LLM reads around a query, and what the generator reads. `Template` fills a text that
contains {input}; `atv.data.chat.Chat` applies the LLM's chat template. `atv.data.rendering.Rendering` names one of
them and is saved with an adapter. A custom renderer is a class with the two methods of `Renderer`; set it with
`dataclasses.replace(task, renderer=...)`, and all training and evaluation uses it.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

from atv.errors import ATVError, unknown

INPUT = "{input}"
"""Placeholder of the query in a text."""
CONVERSATION = "{conversation}"
"""As the template of the generator's input: all turns of a conversation, the query in its template included."""
NEUTRAL_ENDINGS = (":", "\n", "a")
"""An answer is encoded after one of these if the prompt's own ending merges with it, or is unknown."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str
    """Its text."""


class Example(NamedTuple):
    """One row of a task."""

    input: str
    """The query: what the user asks, without a template."""
    output: str
    """The answer that a model should give."""
    turns: tuple[Turn, ...] = ()
    """The conversation before the query, for a chat: perhaps a system message, then earlier queries and answers."""

    def __repr__(self) -> str:
        """Return its fields, without turns if there are none."""
        more = f", turns={self.turns!r}" if self.turns else ""
        return f"Example(input={self.input!r}, output={self.output!r}{more})"

    @property
    def asked(self) -> str:
        """The query and all turns before it: rows with the same text here ask for the same answer."""
        return "\n".join([*(f"{turn.role}: {turn.content}" for turn in self.turns), self.input])


class Prompt(NamedTuple):
    """The input of the LLM and of the generator for an example."""

    ids: list[int]
    """Token ids, with the tokenizer's own beginning-of-text token."""
    query: str
    """What the generator reads, without demonstrations."""
    demonstrations: int = 0
    """Number of demonstrations before the query."""
    task: str = ""
    """Name of the task, for methods that store something per task; empty: unknown."""


@runtime_checkable
class Renderer(Protocol):
    """Converts an example to tokens. It must be hashable, since tokens are cached per renderer."""

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Return the prompt of an example.

        Args:
            tokenizer: the LLM's.
            example: its output is not used.
            shots: demonstrations, which precede the query with their answers, in this order.
        """

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """Return the token ids of an answer after a prompt; they must be the same after each of its prompts.

        Args:
            tokenizer: the LLM's.
            prompt: the prompt that the answer follows.
            text: the answer.
        """

    def __hash__(self) -> int:
        """Return a hash; equal renderers must make the same tokens."""


RendererFactory = Callable[[str, str | None, str], Renderer]
"""Makes a renderer from a template's text, an answer prefix, and the generator's template, as `Template` does."""


def with_prefix(text: str, answer_prefix: str | None) -> str:
    """Return a template's text with the answer prefix on a separate line; only the text if there is none."""
    return text if answer_prefix is None else f"{text}\n{answer_prefix}"


def query_template(reads: str, text: str, answer_prefix: str | None) -> str:
    """Return the template of the generator's input: a text with {input} in it, or `CONVERSATION`.

    Args:
        reads: "query": the query alone; "prompt": the query in a template; "conversation": all turns of a chat, the
            query in the template being the last one.
        text: text of that template, the first one of a task.
        answer_prefix: the answer prefix of training.
    """
    known = {"query": INPUT, "prompt": with_prefix(text, answer_prefix), "conversation": CONVERSATION}
    if reads not in known:
        raise unknown("reads", reads, known)
    return known[reads]


@dataclass(frozen=True)
class Template:
    """A text with the query in it, followed by the answer prefix on a separate line, if there is one.

    An answer follows after one space, or directly if the template ends in white space, and ends with the tokenizer's
    end-of-text token. Demonstrations are rendered the same way, with a blank line after each.

    Raises:
        ATVError: `text` or `query` has no {input}, or the answer prefix is blank.
    """

    text: str
    """The template, with {input} where the query goes."""
    answer_prefix: str | None = None
    """Text before the answer, such as "A:"; None: nothing is appended to the template."""
    query: str = INPUT
    """The generator's input, with {input} where the query goes (`query_template`)."""
    ends: bool = True
    """Whether an answer ends with the end-of-text token, so that it is trained, and scored as a whole. The paper's
    answers have no end."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        require_input(self.text, self.query)
        if self.answer_prefix is not None and not self.answer_prefix.strip():
            raise ATVError(f"The answer prefix is {self.answer_prefix!r}; expected some text, or None for no prefix.")

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Return the query after `shots`, in the same template.

        Raises:
            ATVError: all of this is blank, or an example has turns before its query.
        """
        for each in (*shots, example):
            if each.turns:
                raise ATVError(
                    f"The query {each.input[:60]!r} follows other turns of a conversation, which a plain template "
                    "cannot show. Use an LLM with a chat template, and no --template or --format template."
                )
        shown = [f"{self._fill(shot)}{self._space}{shot.output}" for shot in shots]
        text = "\n\n".join([*shown, self._fill(example)])
        if not text.strip():
            raise ATVError(f"A prompt is empty ({text!r}); expected some text.")
        query = with_prefix(self.text, self.answer_prefix) if self.query == CONVERSATION else self.query
        return Prompt(encode_text(tokenizer, text), query.replace(INPUT, example.input), len(shots))

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """Return the token ids of the space, the answer and its end, after any of this template's prompts."""
        del prompt
        require_answer(text)
        ids = list(following(tokenizer, self._ending, self._space + text))
        end = tokenizer.eos_token_id if self.ends else None
        return ids if end is None else [*ids, end]

    def _fill(self, example: Example) -> str:
        return with_prefix(self.text.replace(INPUT, example.input), self.answer_prefix)

    @property
    def _ending(self) -> str:
        """The constant end of every prompt; empty if prompts end with the query."""
        # A line break separates tokens: text before the last line does not change the tokens of an answer.
        return self.text.rpartition(INPUT)[2] if self.answer_prefix is None else f"\n{self.answer_prefix}"

    @property
    def _space(self) -> str:
        return "" if self._ending[-1:].isspace() else " "


def require_input(text: str, query: str) -> None:
    """Raise ATVError unless a template and the generator's template have a place for the query."""
    for name, each in (("template", text), ("template of the query", query)):
        if INPUT not in each and each != CONVERSATION:
            raise ATVError(f"The {name} {each!r} has no {INPUT}; put {INPUT} where the query goes.")


def require_answer(text: str) -> None:
    """Raise ATVError if an answer is blank."""
    if not text.strip():
        raise ATVError(f"The answer is {text!r}; expected some text.")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, with the tokenizer's own beginning-of-text token and never an end-of-text one."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and _closes(tokenizer) else ids


def _closes(tokenizer: Any) -> bool:
    """Whether the tokenizer appends an end token to every text, after which no model would continue with an answer."""
    return list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]


@lru_cache(maxsize=256)
def _ending(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(encode_text(tokenizer, text))


@lru_cache(maxsize=2**14)
def following(tokenizer: Any, ending: str, text: str) -> tuple[int, ...]:
    """Return the token ids of a text after a prompt.

    A prompt is encoded alone, since that is what the LLM reads at inference. The ids of the text are those that the
    tokenizer adds for it after the prompt: encoding the text alone would be wrong for SentencePiece tokenizers (they
    prepend a space), and cutting the joint text at the prompt's length would be wrong if a token spans the boundary.
    In that case a neutral ending that no token spans replaces the prompt.
    """
    for before in (ending, *NEUTRAL_ENDINGS):
        if not before:
            continue
        alone, joint = _ending(tokenizer, before), tuple(encode_text(tokenizer, before + text))
        if joint[: len(alone)] == alone and len(joint) > len(alone):
            return joint[len(alone) :]
    raise ATVError(
        f"This tokenizer ({type(tokenizer).__name__}) merges the answer {text.strip()!r} into what precedes it."
    )


@lru_cache(maxsize=256)
def answer_ids(tokenizer: Any, render: Renderer, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of answers after any prompt of a renderer."""
    prompt = render.prompt(tokenizer, Example("a", ""))
    return tuple(tuple(render.answer(tokenizer, prompt, text)) for text in texts)


class TooLong(ATVError):
    """A prompt does not fit the LLM's context, even with an empty query."""


def fitting(render: Renderer, tokenizer: Any, example: Example, room: int | None) -> Prompt:
    """Return the prompt of an example; a query that makes it too long is cut at its end.

    Args:
        render: the renderer.
        tokenizer: the LLM's.
        example: its output is not used.
        room: most tokens of the prompt; None: any number.

    Raises:
        TooLong: what stands around the query leaves it no room.
    """
    prompt = render.prompt(tokenizer, example)
    if room is None or len(prompt.ids) <= room:
        return prompt

    def cut_to(length: int) -> Prompt | None:
        text = example.input[:length].rstrip()
        return render.prompt(tokenizer, example._replace(input=text)) if text else None

    def too_long(length: int) -> bool:
        cut = cut_to(length)
        return cut is not None and len(cut.ids) > room

    # Characters per token vary along a text: the length is searched for.
    cut = cut_to(bisect_left(range(1, len(example.input)), True, key=too_long))
    if cut is None:
        raise TooLong(
            f"A prompt has {len(prompt.ids)} tokens and there is room for {room}; what stands around the query "
            f"{example.input[:60]!r} is too long. Shorten it."
        )
    return cut


def plain_prompt(tokenizer: Any, text: str) -> Prompt:
    """Return the prompt of a text that the LLM and the generator read as it is."""
    return Template(INPUT).prompt(tokenizer, Example(text, ""))
