"""The models that a server names: the plain LLM, and adapters that come and go."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from atv import artifact
from atv.data import check_chat_template, query_renderer
from atv.data.chat import Chat, has_chat_template
from atv.data.conversation import example_of, turns_of
from atv.data.render import Example, Prompt, encode_text
from atv.errors import ATVError, unknown
from atv.vectors import ATV

NAME = re.compile(r"[\w.:=@/-]{1,100}")


class Loaded(Protocol):
    """An adapter as an engine has loaded it."""

    @property
    def atv(self) -> ATV:
        """Its generator and expansion."""


class UnknownModel(ATVError):
    """No model has this name."""


@dataclass(frozen=True, eq=False)
class Served:
    """A model by its name."""

    name: str
    adapter: Any = None
    """As the engine has loaded it (`Loaded`); None: the plain LLM."""
    folder: Path | None = None
    """The adapter's folder."""
    digest: str = ""
    """The adapter's identity (`artifact.identity`)."""
    chat: bool = True
    """Whether it can be asked in a conversation: not the plain LLM without chat template."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the adapter was trained on."""
        return [] if self.adapter is None else list(self.adapter.atv.training_summary.get("tasks", {}))

    def describe(self) -> dict[str, Any]:
        """Return it as an entry of a list of models."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "atv"}
        if self.adapter is None:
            about["chat"] = self.chat
        else:
            about |= {"adapter": self.digest, "tasks": self.tasks}
        return about


class Models:
    """The models of a server, and how a request becomes a prompt.

    Args:
        base: name of the plain LLM.
        tokenizer: the LLM's.
        load: loads an adapter's folder for the engine.
        within: run-time requests may load adapters from this folder only; None: from nowhere.
    """

    def __init__(self, base: str, tokenizer: Any, load: Callable[[Path], Loaded], within: Path | None = None) -> None:
        self.base, self.tokenizer, self._load = base, tokenizer, load
        self.within = None if within is None else within.resolve()
        self._served = {base: Served(base, chat=has_chat_template(tokenizer))}

    def __iter__(self) -> Any:
        return iter(list(self._served.values()))

    def __getitem__(self, name: str) -> Served:
        try:
            return self._served[name]
        except KeyError:
            raise UnknownModel(str(unknown("model", name, self._served))) from None

    def add(self, name: str, folder: str | Path) -> Served:
        """Load an adapter; one with the same name is replaced, and requests that have begun keep the former one.

        Raises:
            ATVError: the name is the plain LLM's or not one, or it is not an adapter for this LLM.
        """
        if name == self.base or not NAME.fullmatch(name):
            raise ATVError(
                f"An adapter cannot be called {name!r}; expected 1 to 100 letters, digits and . : = @ / _ -, and not "
                f"{self.base}, which is the plain LLM."
            )
        found = artifact.locate(folder)
        digest = artifact.identity(found)
        adapter = self._load(found)
        check_chat_template(adapter.atv.training_summary, self.tokenizer)
        served = Served(name, adapter, found, digest)
        self.put(served)
        return served

    def put(self, served: Served) -> None:
        """Serve an adapter that is loaded, in place of one with the same name."""
        self._served[served.name] = served

    def allowed(self, folder: str) -> Path:
        """Return the folder that a run-time request names; ATVError unless it is one from which adapters may be loaded.

        Args:
            folder: relative to `within`, or absolute and inside it.
        """
        if self.within is None:
            raise ATVError("This server loads no adapters at run time; start it with --adapters-from DIR to allow it.")
        try:
            path = Path(os.path.realpath(self.within / folder))
            if inside := path.is_relative_to(self.within) and path != self.within:
                path.stat()
        except (OSError, ValueError) as error:  # too long a name, a loop of links, a NUL
            reason = error.strerror if isinstance(error, OSError) else error  # without the server's paths
            raise ATVError(
                f"The adapter {folder!r:.200} cannot be read: {reason}. Expected its path inside the folder that this "
                "server loads adapters from."
            ) from error
        if not inside:
            raise ATVError(
                f"The adapter {folder!r:.200} is not inside the folder that this server loads adapters from."
            )
        return path

    def remove(self, name: str) -> None:
        """Forget an adapter; requests that have begun keep it."""
        if self[name].adapter is None:
            raise ATVError(f"{name} is the plain LLM, which cannot be removed.")
        del self._served[name]

    # ---- prompts ----

    def chat(self, served: Served, messages: Sequence[Mapping[str, Any]], task: str | None = None) -> Prompt:
        """Return the prompt of a conversation, written as in the adapter's training.

        Args:
            served: the model.
            messages: {"role": ..., "content": ...}, the last one from the user.
            task: name of a training task. None: the only one; if there are several, the query alone.

        Raises:
            ATVError: the conversation is not one, or the adapter's prompts cannot show it.
        """
        turns = turns_of("messages", "messages", list(messages))
        if not turns or turns[-1].role != "user":
            raise ATVError("messages must end with a message of the user.")
        example = example_of("messages", turns)
        if served.adapter is None:
            if task is not None:
                raise ATVError(f"task is given, and {served.name} is the plain LLM, which has no training tasks.")
            return Chat().asks(self.tokenizer, example)
        atv = served.adapter.atv
        return query_renderer(atv.training_summary, atv.config.reads, task).prompt(self.tokenizer, example)

    def text(self, served: Served, text: str | Sequence[int], query: str | None = None) -> Prompt:
        """Return the prompt that is a text, as it is.

        Args:
            served: the model.
            text: what the LLM reads, or its token ids.
            query: what the generator reads; needed if the adapter was trained on prompts with more in them.

        Raises:
            ATVError: the text is empty or has unknown tokens, or `query` is missing or would not be read.
        """
        atv = None if served.adapter is None else served.adapter.atv
        if query is not None and (atv is None or atv.own is not None):
            why = "the plain LLM" if atv is None else "an adapter whose generator is the LLM, which reads the prompt"
            raise ATVError(f"query is given, and {served.name} is {why}; leave it out.")
        if isinstance(text, str):
            ids = encode_text(self.tokenizer, text)
        else:
            ids = list(text)
            most = len(self.tokenizer)
            if any(not 0 <= token < most for token in ids):
                raise ATVError(f"prompt has a token id outside 0 to {most - 1}.")
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if not ids:
            raise ATVError("prompt is empty; expected some text.")
        if atv is None or query is not None:
            return Prompt(ids, text if query is None else query)
        if atv.own is None and _wrapped(atv, self.tokenizer):
            raise ATVError(
                f"The prompts of {served.name} have text around the query that its generator does not read, and "
                "which cannot be told from the query. Send the query to /v1/chat/completions, or give it here "
                "as `query` beside the prompt."
            )
        return Prompt(ids, text)


def _wrapped(atv: ATV, tokenizer: Any) -> bool:
    """Whether the prompts of an adapter's training differ from what its generator reads of them."""
    if not atv.training_summary.get("tasks"):
        return False
    if len(atv.training_summary["tasks"]) > 1:
        return True
    prompt = query_renderer(atv.training_summary, atv.config.reads).prompt(tokenizer, Example("a b", ""))
    return prompt.ids != encode_text(tokenizer, prompt.query)
