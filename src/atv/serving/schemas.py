"""The requests that the server accepts, in the form of OpenAI's API. Unknown fields are refused, not ignored."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from atv.errors import ATVError
from atv.serving.sampling import MOST_LOGPROBS, MOST_STOPS, Sampling

DEFAULT_TOKENS = 256
MOST_ANSWERS = 64
"""Most answers of one request."""
MOST_CHOICES = 8
SURROGATE = "surrogate"
MOST_MESSAGES = 512
"""Most messages of a conversation, and most parts of one."""


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @field_validator("*")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        """Refuse texts that JSON can write and nothing can read: half of a surrogate pair, from a text cut in two."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (half := re.search(r"[\ud800-\udfff]", text)):
                raise PydanticCustomError(
                    SURROGATE,
                    "the text has the lone surrogate {half} at character {place}; expected text that UTF-8 can encode",
                    {"half": ascii(half[0]), "place": half.start()},
                )
        return value


Number = Annotated[float, Field(strict=False, allow_inf_nan=False)]


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False


class ResponseFormat(Body):
    """The form of the answer: text alone."""

    type: Literal["text"]


class Ask(Body):
    """What both kinds of completions have."""

    model: str
    """The plain LLM's name, or an adapter's."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    """Accepted and not used."""
    scale: Annotated[Number, Field(ge=-10, le=10)] | None = None
    """Not in OpenAI's API: factor of the adapter's own strength; 0: unsteered."""

    def sampling(self, choice: int, logprobs: int | None, max_tokens: int) -> Sampling:
        """Return how one of the choices is made."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            logprobs=logprobs,
        )


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MOST_MESSAGES, fail_fast=True)]
    name: str | None = None
    """Accepted and not used."""

    def turn(self) -> dict[str, str]:
        """Return it as renderers take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatCompletion(Ask):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    task: str | None = None
    """Not in OpenAI's API: name of a training task of the adapter, for one with several."""

    def told(self) -> int | None:
        """Return the number of alternatives per token; None: no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ATVError("top_logprobs is given without logprobs; set logprobs to true.")
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Ask):
    """Of /v1/completions."""

    prompt: (
        str
        | Annotated[list[int], Field(fail_fast=True)]
        | Annotated[list[str], Field(max_length=MOST_ANSWERS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    query: str | None = None
    """Not in OpenAI's API: what the generator reads. Default: the prompt."""


class Steer(Body):
    """Of /v1/steer."""

    model: str
    query: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] | None = None
    task: str | None = None
    """Name of a training task of the adapter, for one with several."""
    scale: Annotated[Number, Field(ge=-10, le=10)] | None = None
    """Factor of the adapter's own strength."""


class Load(Body):
    """Of POST /v1/adapters."""

    name: str
    folder: str
    """Inside the folder that the server loads adapters from."""


def explained(problems: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Return the field and a message for one of the problems that pydantic found."""
    # The first one says of a list that is wrong inside that it is no text, where there may be either.
    problem = next((each for each in problems if each["type"] == SURROGATE), problems[0])
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    if problem["type"] == "extra_forbidden":
        return where, f"{where} is not supported; leave it out."
    if problem["type"] == "json_invalid":
        return "", f"The body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}."
    return where, f"{where or 'The body'}: {problem['msg']}."
