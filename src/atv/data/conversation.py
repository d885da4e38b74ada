"""Conversations of a table's rows: lists of {"role": ..., "content": ...}, as in TRL's data formats."""

from collections.abc import Mapping, Sequence
from typing import Any

from atv.data.render import Example, Turn
from atv.data.task import shown, whole
from atv.errors import ATVError

ROLES = ("system", "user", "assistant")


def turns_of(where: str, column: str, value: Any) -> list[Turn]:
    """Return the turns of a cell.

    Args:
        where: names the row in errors.
        column: its column.
        value: a list of objects with role and content, the content being a text or a list of text parts.

    Raises:
        ATVError: it is something else, has another role, or calls tools.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ATVError(f"{where} has {column} {value!r:.80}; expected a list of messages with role and content.")
    return [_turn(f"{where}, {column} {number}", message) for number, message in enumerate(value)]


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ATVError(f"{where} is {message!r:.80}; expected an object with role and content.")
    role, content = message["role"], message["content"]
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if role not in ROLES or message.get("tool_calls"):
        what = f"the role {role!r}" if role not in ROLES else "tool calls"
        raise ATVError(f"{where} has {what}; expected messages of {', '.join(ROLES)} alone. Leave such rows out.")
    if not isinstance(content, str) or not whole(content):
        raise ATVError(f"{where} has content {shown(content)}; expected a text. Leave rows with images or sound out.")
    return Turn(role, content.strip())


def example_of(where: str, turns: Sequence[Turn]) -> Example:
    """Return the example of a conversation: the last user turn is the query, the assistant's turn after it the answer.

    The answer is empty if the user has the last turn, and so is the query if there is no turn.

    Raises:
        ATVError: the answer does not follow a user's turn, or a system message is not the first turn.
    """
    if any(turn.role == "system" for turn in turns[1:]):
        raise ATVError(f"{where} has a system message after other turns; expected it first.")
    *before, last = turns or [Turn("user", "")]
    answer = ""
    if last.role == "assistant":
        answer = last.content
        *before, last = before or [last]
    if last.role != "user":
        raise ATVError(
            f"{where} ends with the turns {', '.join(turn.role for turn in turns[-2:])}; expected user, then assistant."
        )
    return Example(last.content, answer, tuple(before))
