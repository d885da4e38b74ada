"""One way to check an error that a user can cause: its kind, and every part that the message must name."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from atv.errors import ATVError


@contextmanager
def refused(*parts: object) -> Iterator[pytest.ExceptionInfo[ATVError]]:
    """Expect an ATVError of one line whose message holds all `parts`."""
    with pytest.raises(ATVError) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message
    missing = [part for part in parts if str(part) not in message]
    assert not missing, f"{message!r} does not name {missing}"
