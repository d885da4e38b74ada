"""Which renderer a task uses: the LLM's chat template or a plain text template. Saved with an adapter."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from atv.data.chat import Chat, has_chat_template
from atv.data.render import Example, Prompt, Renderer, RendererFactory, Template
from atv.errors import ATVError, unknown

Format = Literal["auto", "chat", "template"]


@dataclass(frozen=True)
class ByModel:
    """The renderer of the format `auto`: a chat if the LLM has a chat template, a plain template otherwise."""

    chat: Chat
    template: Template

    def of(self, tokenizer: Any) -> Renderer:
        """Return the renderer for a tokenizer."""
        if has_chat_template(tokenizer):
            return self.chat
        if self.chat.system is not None:
            raise ATVError(
                f"There is a system prompt, and this LLM's tokenizer ({tokenizer.name_or_path}) has no chat template "
                "to put it in. Put its text into a template (--template), or use an LLM that is trained for chat."
            )
        return self.template

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Return the prompt of an example."""
        return self.of(tokenizer).prompt(tokenizer, example, shots)

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        """Return the token ids of an answer after a prompt."""
        return self.of(tokenizer).answer(tokenizer, prompt, text)


@dataclass(frozen=True)
class Rendering:
    """How the prompts of a task are written: a `RendererFactory`.

    Raises:
        ATVError: the format is unknown, a plain template is to have a system prompt or options of a chat template, or
            these options are not a JSON object.
    """

    format: Format = "auto"
    """chat: the LLM's chat template; template: a plain text; auto: chat if the LLM has a chat template."""
    system: str | None = None
    """System prompt of a chat. None: what the chat template does without."""
    template_kwargs: str = "{}"
    """JSON object of options of the chat template, such as {"enable_thinking": false}."""
    ends: bool = True
    """Whether answers in a plain template end with the end-of-text token, as in a chat they always do."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.format not in get_args(Format):
            raise unknown("format", self.format, get_args(Format))
        try:
            options = json.loads(self.template_kwargs)
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise ATVError(
                f"The options of the chat template are {self.template_kwargs!r}; expected a JSON object, such as "
                '{"enable_thinking": false}.'
            )
        if self.format == "template" and (self.system is not None or options):
            what = "a system prompt" if self.system is not None else "options of the chat template"
            raise ATVError(f"A plain template has no place for {what}; leave it out, or choose the format chat.")
        if self.system is not None and not self.system.strip():
            raise ATVError(f"The system prompt is {self.system!r}; expected some text, or leave it out.")

    def __call__(self, text: str, answer_prefix: str | None, query: str) -> Renderer:
        """Return the renderer of a template; ATVError for a chat with an answer prefix."""
        template = Template(text, answer_prefix, query, self.ends)
        if self.format == "template":
            return template
        if answer_prefix is not None:
            raise ATVError(
                f"The answer prefix is {answer_prefix!r}; expected None: in a chat the answer is a turn of its own."
            )
        chat = Chat(text, self.system, self.template_kwargs, query)
        return chat if self.format == "chat" else ByModel(chat, template)


def described(made: RendererFactory) -> dict[str, Any]:
    """Return a task's renderer as it is recorded, JSON-ready: a `Rendering`'s fields, or the name of a custom one."""
    if isinstance(made, Rendering):
        return asdict(made)
    return {"custom": f"{made.__module__}.{made.__qualname__}" if isinstance(made, type) else repr(made)}


def recorded(found: Mapping[str, Any]) -> Rendering:
    """Return the rendering that `described` recorded; ATVError for a custom renderer, or a damaged record."""
    if "custom" in found:
        raise ATVError(
            f"The adapter was trained on prompts of a custom renderer, {found['custom']}, which is not saved with it. "
            "Set it in Python: dataclasses.replace(task, renderer=...), or give ATVModel.generate its prompts."
        )
    try:
        return Rendering(**found)
    except TypeError as error:
        raise ATVError(f"The recorded rendering {dict(found)!r} is damaged: {error}.") from error


def chat_template_digest(tokenizer: Any) -> str | None:
    """Return a short digest of a tokenizer's chat template, to detect a changed one; None if it has none."""
    found = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16] if found else None
