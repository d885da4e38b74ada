"""How the next token of an answer is chosen, and what is told about it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from atv.errors import ATVError
from atv.lm.scoring import require_finite

MOST_LOGPROBS = 20
"""Most alternatives told for a token."""
MOST_STOPS = 16
"""Most stop sequences of an answer."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is made.

    Raises:
        ATVError: a value is out of range.
    """

    max_tokens: int = 256
    """Most tokens of the answer."""
    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have at least this probability together."""
    seed: int | None = None
    """Seed of sampling; the same seed draws the same numbers whatever other requests there are. None: a new one."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    logprobs: int | None = None
    """Number of likeliest tokens told for each token; 0: the token's own log-probability alone; None: nothing."""
    scored: tuple[int, ...] = ()
    """Tokens whose log-probabilities are told for each token, whether they are likely or not."""

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name, good, expected in (
            ("max_tokens", self.max_tokens >= 1, "a whole number from 1"),
            ("temperature", 0 <= self.temperature <= 2, "a number from 0 to 2"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            (
                "stop",
                len(self.stop) <= MOST_STOPS and all(self.stop),
                f"at most {MOST_STOPS} texts, none of them empty",
            ),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
        ):
            if not good:
                raise ATVError(f"{name} is {getattr(self, name)!r}; expected {expected}.")


@dataclass(frozen=True)
class Likelihood:
    """What is told about one token of an answer; log-probabilities are the LLM's own, before temperature and top_p."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)
    """The likeliest tokens with theirs, the likeliest first."""
    scored: dict[int, float] = field(default_factory=dict)
    """Those of `Sampling.scored`."""


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)

    def choose(self, logits: Tensor) -> int:
        """Return the next token, given logits (vocabulary,) float32 on the CPU.

        Raises:
            ATVError: a logit is NaN or the largest one infinite, so that no token is likelier than others.
        """
        highest = require_finite(logits).max()
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        # The highest logit becomes 0 first, so that no temperature, however small, divides to an infinite one.
        chances = ((logits.double() - highest) / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            ranked, order = chances.sort(descending=True)
            ranked[(ranked.cumsum(-1) - ranked) >= self._sampling.top_p] = 0  # the likeliest one is always kept
            return int(order[ranked.multinomial(1, generator=self._generator)])
        return int(chances.multinomial(1, generator=self._generator))

    def told(self, logits: Tensor, token: int) -> Likelihood | None:
        """Return what is told about a chosen token; None if nothing was asked for."""
        asked = self._sampling
        if asked.logprobs is None and not asked.scored:
            return None
        every = logits.log_softmax(-1)
        values, ids = every.topk(min(asked.logprobs or 0, len(every)))
        scored = dict(zip(asked.scored, every[list(asked.scored)].tolist(), strict=True))
        return Likelihood(token, float(every[token]), list(zip(ids.tolist(), values.tolist(), strict=True)), scored)
