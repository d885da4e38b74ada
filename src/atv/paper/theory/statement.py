"""One statement of the paper, with its measured residuals and the verdict."""

from dataclasses import dataclass

HOLDS = "holds to rounding"
CONDITIONS = "holds under these conditions"
FAILS = "does not hold as stated"
ROUNDING = 1e-9
"""Relative residual in float64 above which a difference is not rounding."""


@dataclass(frozen=True)
class Statement:
    """A claim with its residuals, relative to the target."""

    number: str
    text: str
    verdict: str
    residual: float | None
    """Residual where the statement holds, if necessary under its condition. None: it holds nowhere."""
    counter: float | None
    """Residual of the counter-example. None: none was found."""
    condition: str = ""


def equality(
    number: str, text: str, residual: float | None = None, counter: float | None = None, condition: str = ""
) -> Statement:
    """A claim that two things are equal: it holds where the residual is rounding, and not where it is larger."""
    numbers = [found for found in (residual, counter) if found is not None]
    if max(numbers) <= ROUNDING:  # the intended counter-example confirms it
        return Statement(number, text, HOLDS, max(numbers), None)
    if residual is None or residual > ROUNDING:
        return Statement(number, text, FAILS, None, max(numbers))
    return Statement(number, text, CONDITIONS, residual, counter, condition)


def beyond_reach(number: str, text: str, reached: float, missed: float | None = None, condition: str = "") -> Statement:
    """A claim that something is impossible: a counter-example achieves it, with a residual of rounding.

    Args:
        number: number of the statement.
        text: the claim.
        reached: residual of the attempt to refute it.
        missed: smallest residual where it is impossible.
        condition: condition under which it is impossible.
    """
    if reached > ROUNDING:
        return Statement(number, text, HOLDS, reached, None)
    if missed is not None and missed > ROUNDING:
        return Statement(number, text, CONDITIONS, missed, reached, condition)
    return Statement(number, text, FAILS, None, reached)
