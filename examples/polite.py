"""Blunt messages and polite ones that say the same. `python -m examples.polite FILE` writes 336 rows as JSON lines.

Demands, criticism, refusals and reminders are rewritten each in its own way; the thing and the time must be kept.
"""

import random

from examples import Row, write

THINGS = ("report", "budget", "contract", "draft", "offer", "schedule", "presentation", "survey", "invoice", "summary",
          "translation", "drawing", "leaflet", "test plan")  # fmt: skip
TIMES = ("today", "by noon", "tomorrow", "on Friday", "this week", "before the meeting")
KINDS = {
    "Could you please send me the {thing} {time}? Thank you very much.": (
        "Send me the {thing} {time}.",
        "I want the {thing} {time}, no excuses.",
        "the {thing}. {time}. now move",
        "Get that {thing} to me {time} or else.",
    ),
    "Thank you for the {thing}. Would you mind having another look at it {time}?": (
        "The {thing} is useless. Fix it {time}.",
        "Did a child write this {thing}? Do it again {time}.",
        "I have never seen such a bad {thing}. New version {time}!",
        "Your {thing} is a mess, clean it up {time}.",
    ),
    "Thank you for asking. Unfortunately I cannot work on the {thing} {time}. Could we find another time?": (
        "No. I will not touch the {thing} {time}.",
        "Do your {thing} yourself, I am busy {time}.",
        "Forget it, no {thing} from me {time}.",
        "Do not bother me with the {thing} {time}.",
    ),
    "I know that you have a lot to do. Could you let me know {time} when the {thing} will be ready?": (
        "Why is the {thing} still not done? Tell me {time}.",
        "You are late with the {thing} again. I expect a date {time}.",
        "How long can one {thing} take? Answer {time}.",
        "Still waiting for that {thing}. Say something {time}.",
    ),
}


def rows() -> list[Row]:
    """Return 336 different messages in random order."""
    draw = random.Random(7)
    every = [
        {"prompt": text.format(thing=thing, time=time), "completion": polite.format(thing=thing, time=time)}
        for polite, texts in KINDS.items()
        for text in texts
        for thing in THINGS
        for time in TIMES
    ]
    return draw.sample(every, 336)


if __name__ == "__main__":
    write(rows())
