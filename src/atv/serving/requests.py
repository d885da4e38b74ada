"""What every engine is asked and answers, and what it takes on."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from torch import nn

from atv.data.render import Prompt
from atv.errors import ATVError
from atv.lm.hooks import base_llm
from atv.model import ATVModel
from atv.serving.sampling import Likelihood, Sampling

T = TypeVar("T")
Finish = Literal["stop", "length", "timeout", "cancelled", "error"]


@dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    Raises:
        ATVError: a limit is below 1.
    """

    rows: int = 32
    """Most answers that are decoded together."""
    waiting: int = 256
    """Most requests that wait while `rows` are decoded, and most calls of `run`; further ones are refused (`Busy`)."""
    tokens: int = 2**16
    """Most tokens of all answers that are being decoded, prompts, room for answers and padding included: bounds
    memory."""
    prefill: int = 4096
    """Most prompt tokens per call, padding included; exceeded only by a single prompt."""
    answer: int = 1024
    """Most tokens of one answer."""
    seconds: float = 300.0
    """Time after which a request ends, waiting included."""
    kept: int = 2**29
    """Bytes of keys and values of shared beginnings."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("rows", "waiting", "tokens", "prefill", "answer", "seconds"):
            if getattr(self, name) < 1:
                raise ATVError(f"{name} is {getattr(self, name)}; expected at least 1.")


class Busy(ATVError):
    """Too many requests are waiting."""

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {seconds} seconds.")
        self.seconds = seconds


@dataclass(frozen=True)
class Request:
    """What an engine answers."""

    prompt: Prompt
    model: ATVModel | None = None
    """The adapter; None: the plain LLM."""
    scale: float | None = None
    """Strength of its vectors; None: the adapter's own."""
    sampling: Sampling = field(default_factory=Sampling)
    begun: tuple[int, ...] = ()
    """Tokens with which the answer begins; they are read, and not part of what is answered."""

    @property
    def tokens(self) -> int:
        """Number of tokens that its prompt and answer may have."""
        return len(self.prompt.ids) + len(self.begun) + self.sampling.max_tokens


class Piece(NamedTuple):
    """A part of an answer. The last one has `finish`."""

    text: str = ""
    tokens: tuple[Likelihood, ...] = ()
    """The new tokens, if log-probabilities were asked for."""
    finish: Finish | None = None
    """Why the answer ends; None: more follows."""
    generated: int = 0
    """Number of answer tokens so far, with the end token."""
    error: Exception | None = None
    """With `finish` "error"."""


class Serving(Protocol):
    """An engine of any kind, as the server uses it."""

    tokenizer: Any
    limits: Limits
    context: int | None
    """Most tokens of a text that the LLM reads; None: any."""

    def load(self, folder: Path) -> Any:
        """Load an adapter, as `Request.model` takes it; an object with the attribute `atv`."""

    def check(self, request: Request) -> None:
        """Raise ATVError if a request can never be answered."""

    def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; closing the iterator cancels the request. Raises `Busy`."""

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function while the LLM is not in use. Raises `Busy`."""

    def numbers(self) -> dict[str, float]:
        """Return counters and gauges by name, for metrics."""

    def healthy(self) -> bool:
        """Whether requests are being answered."""

    def close(self) -> None:
        """Stop; running requests end with an error."""


def embedded_tokens(llm: nn.Module) -> int:
    """Return the number of an LLM's embeddings of tokens."""
    return len(base_llm(llm).get_input_embeddings().weight)  # type: ignore[operator]


def check_request(request: Request, answer: int, rooms: Mapping[str, int | None], vocabulary: int) -> None:
    """Raise ATVError if a request can never be answered.

    Args:
        request: the request.
        answer: most tokens of an answer.
        rooms: most tokens of a prompt with its answer, by what says so; None: any number.
        vocabulary: number of the LLM's embeddings of tokens.
    """
    asked = request.sampling.max_tokens
    if asked > answer:
        raise ATVError(f"max_tokens is {asked}; expected at most {answer}.")
    for what, room in rooms.items():
        if room is not None and request.tokens > room:
            raise ATVError(
                f"The prompt has {request.tokens - asked} tokens, max_tokens is {asked}, and {what} is {room} tokens."
            )
    unknown = next((token for token in (*request.prompt.ids, *request.begun) if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise ATVError(f"The prompt has the token id {unknown}; the LLM's are 0 to {vocabulary - 1}.")
