"""The one error for invalid user input, and a helper for unknown names."""

from collections.abc import Iterable
from difflib import get_close_matches


class ATVError(ValueError):
    """Invalid user input. The message says what was found, what was expected and what to do.

    The command line prints only the message and exits with code 2.
    """


class Unavailable(ATVError):
    """A valid request cannot be answered: what answers it has stopped or failed. A server tells it as its own error."""


def unknown(what: str, found: str, known: Iterable[str], advice: str = "") -> ATVError:
    """Return the error for a name that is not in `known`; it suggests the closest match."""
    names = sorted(known)
    near = get_close_matches(str(found), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {advice}" if advice else ""
    return ATVError(f"Unknown {what} {found!r}; known: {', '.join(names) or 'none'}.{hint}{tail}")
