"""From an example to tokens: the prompt, demonstrations before it, and the answer after it. No other place does this.

A renderer decides what surrounds a query for the LLM, and what the generator reads of it. `Template` fills a text with
{input} in it. A renderer of another kind is a class with the two methods of `Renderer`; give it to tasks with
`dataclasses.replace(task, renderer=...)`, and everything that trains and evaluates uses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

from atv.errors import ATVError

INPUT = "{input}"
"""Stands in a text where the query goes."""
NEUTRAL_ENDINGS = (":", "\n", "a")
"""An answer is encoded behind one of these where the prompt's own ending merges with it, or is not known."""


class Example(NamedTuple):
    """One row of a task."""

    input: str
    """The query: what the user asks, without a template."""
    output: str
    """The answer that a model should give."""


class Prompt(NamedTuple):
    """What the LLM reads of an example, and what the generator reads of it."""

    ids: list[int]
    """Token ids, with the tokenizer's own beginning-of-text token."""
    query: str
    """What the generator reads; no demonstration is part of it."""
    demonstrations: int = 0
    """How many stand before the query."""
    task: str = ""
    """Name of the task, for methods that keep something for each task; empty: not known."""


@runtime_checkable
class Renderer(Protocol):
    """Turns an example into tokens. It must be hashable: tokens are cached for each renderer."""

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """What is read for an example.

        Args:
            tokenizer: the LLM's.
            example: its output is not read.
            shots: demonstrations, which stand with their answers before the query, in this order.
        """

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """Token ids of an answer behind a prompt of this renderer; they are the same behind each of its prompts.

        Args:
            tokenizer: the LLM's.
            prompt: what the answer follows.
            text: the answer.
        """

    def __hash__(self) -> int:
        """Equal renderers make the same tokens."""


RendererFactory = Callable[[str, str | None, str], Renderer]
"""Makes a renderer of a template's text, an answer prefix, and what the generator reads; `Template` is one."""


def renderer_name(made: RendererFactory) -> str:
    """What stands for a renderer in records."""
    return f"{made.__module__}.{made.__qualname__}" if isinstance(made, type) else repr(made)


def with_prefix(text: str, answer_prefix: str | None) -> str:
    """A template's text with the answer prefix on a line of its own; the text alone if there is none."""
    return text if answer_prefix is None else f"{text}\n{answer_prefix}"


def query_template(reads: str, text: str, answer_prefix: str | None) -> str:
    """What the generator reads of an example, as a text with {input} in it.

    Args:
        reads: "query": the query alone; "prompt": the query in a template.
        text: of that template, the first one of a task.
        answer_prefix: that of training.
    """
    return with_prefix(text, answer_prefix) if reads == "prompt" else INPUT


@dataclass(frozen=True)
class Template:
    """A text with the query in it, then the answer prefix on a line of its own, if there is one.

    An answer follows after one space, or directly where the template ends in white space. Demonstrations are rendered
    likewise, with a blank line after each.

    Raises:
        ATVError: `text` or `query` has no {input}, or the answer prefix is blank.
    """

    text: str
    """With {input} where the query goes."""
    answer_prefix: str | None = None
    """What stands before the answer, as "A:"; None: nothing is put behind the text."""
    query: str = INPUT
    """What the generator reads, with {input} where the query goes (`query_template`)."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name, text in (("template", self.text), ("template of the query", self.query)):
            if INPUT not in text:
                raise ATVError(f"The {name} {text!r} has no {INPUT}; put {INPUT} where the query goes.")
        if self.answer_prefix is not None and not self.answer_prefix.strip():
            raise ATVError(f"The answer prefix is {self.answer_prefix!r}; expected some text, or None for no prefix.")

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """The query behind `shots`, in the same template; ATVError if all of this is blank."""
        shown = [f"{self._fill(shot)}{self._space}{shot.output}" for shot in shots]
        text = "\n\n".join([*shown, self._fill(example)])
        if not text.strip():
            raise ATVError(f"A prompt is empty ({text!r}); expected some text.")
        return Prompt(encode_text(tokenizer, text), self.query.replace(INPUT, example.input), len(shots))

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """What the tokenizer adds for the space and the answer, behind any of this template's prompts."""
        del prompt
        if not text.strip():
            raise ATVError(f"The answer is {text!r}; expected some text.")
        return list(_following(tokenizer, self._ending, self._space + text))

    def _fill(self, example: Example) -> str:
        return with_prefix(self.text.replace(INPUT, example.input), self.answer_prefix)

    @property
    def _ending(self) -> str:
        """What every prompt ends with; empty where it ends with the query."""
        # A line break parts tokens: what stands before the last line changes no token of an answer.
        return self.text.rpartition(INPUT)[2] if self.answer_prefix is None else f"\n{self.answer_prefix}"

    @property
    def _space(self) -> str:
        return "" if self._ending[-1:].isspace() else " "


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the tokenizer's own beginning-of-text token and never an end-of-text one."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and _closes(tokenizer) else ids


def _closes(tokenizer: Any) -> bool:
    """Whether it closes every text with an end token, after which no model would continue with an answer."""
    return list(tokenizer("a")["input_ids"])[-1:] == [tokenizer.eos_token_id]


@lru_cache(maxsize=256)
def _ending(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(encode_text(tokenizer, text))


@lru_cache(maxsize=2**14)
def _following(tokenizer: Any, ending: str, text: str) -> tuple[int, ...]:
    """Token ids of a text behind a prompt.

    A prompt is encoded alone, because that is what the LLM reads in use. The ids of what follows are what the tokenizer
    adds for it behind the prompt: encoding it by itself would be wrong for SentencePiece tokenizers (they put a space
    of their own before a text), and cutting the joint text at the prompt's length would be wrong where a token spans
    the seam. There a neutral ending that no token spans stands in for the prompt.
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
    """Token ids of answers behind any prompt of a renderer."""
    prompt = render.prompt(tokenizer, Example("a", ""))
    return tuple(tuple(render.answer(tokenizer, prompt, text)) for text in texts)


def plain_prompt(tokenizer: Any, text: str) -> Prompt:
    """A text that is the whole prompt already: the LLM and the generator read it as it is."""
    return Template(INPUT).prompt(tokenizer, Example(text, ""))
