"""The one error that a user can cause, and the sentence that every such error is made of."""

from collections.abc import Iterable
from difflib import get_close_matches


class ATVError(ValueError):
    """Something given by the user does not fit. The message says what was found, what was expected, what to do.

    The command line prints the message alone and exits with code 2.
    """


def unknown(what: str, found: str, known: Iterable[str], advice: str = "") -> ATVError:
    """The error for a name that is not one of the `known` ones, with the nearest of them named."""
    names = sorted(known)
    near = get_close_matches(str(found), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {advice}" if advice else ""
    return ATVError(f"Unknown {what} {found!r}; known: {', '.join(names) or 'none'}.{hint}{tail}")
