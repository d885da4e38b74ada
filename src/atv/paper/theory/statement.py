"""One statement of the paper, what was measured of it, and what follows."""

from dataclasses import dataclass

HOLDS = "holds to rounding"
CONDITIONS = "holds under these conditions"
FAILS = "does not hold as stated"
ROUNDING = 1e-9
"""In float64; more than this share is not rounding."""


@dataclass(frozen=True)
class Statement:
    """A claim with its numbers, each a share of what was to be reached."""

    number: str
    text: str
    verdict: str
    residual: float | None
    """Where the statement holds, or holds under its condition; None: nowhere."""
    counter: float | None
    """Of the counter-example; None: none was found."""
    condition: str = ""


def equality(
    number: str, text: str, residual: float | None = None, counter: float | None = None, condition: str = ""
) -> Statement:
    """A claim that two things are the same: it holds where the residual is rounding, and not where it is more."""
    numbers = [found for found in (residual, counter) if found is not None]
    if max(numbers) <= ROUNDING:  # what was to be a counter-example confirms it
        return Statement(number, text, HOLDS, max(numbers), None)
    if residual is None or residual > ROUNDING:
        return Statement(number, text, FAILS, None, max(numbers))
    return Statement(number, text, CONDITIONS, residual, counter, condition)


def beyond_reach(number: str, text: str, reached: float, missed: float | None = None, condition: str = "") -> Statement:
    """A claim that something cannot be made: a counter-example makes it, with a residual of rounding.

    Args:
        number: of the statement.
        text: what is claimed.
        reached: residual of what was made to refute it.
        missed: least residual where it cannot be made.
        condition: under which that is so.
    """
    if reached > ROUNDING:
        return Statement(number, text, HOLDS, reached, None)
    if missed is not None and missed > ROUNDING:
        return Statement(number, text, CONDITIONS, missed, reached, condition)
    return Statement(number, text, FAILS, None, reached)
