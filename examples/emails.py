"""Orders by e-mail, and their fields as JSON. `python -m examples.emails FILE` writes 360 rows as JSON lines.

Names, things, numbers and days stand in different places of different sentences; numbers may be words.
"""

import json
import random

from examples import Row, write

NAMES = ("Anna Berg", "Tom Okafor", "Li Wen", "Carla Rossi", "Jan Novak", "Maya Singh", "Omar Haddad", "Eva Lind")
THINGS = (
    "desk lamps",
    "office chairs",
    "notebooks",
    "coffee mugs",
    "headsets",
    "monitors",
    "pens",
    "folders",
    "keyboards",
)
COUNTS = {"two": 2, "3": 3, "five": 5, "8": 8, "a dozen": 12, "15": 15, "twenty": 20, "40": 40}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "next week", "the end of May")
MAILS = (
    "Hello,\nwe need {count} {thing} by {day}. Please confirm.\nBest regards,\n{name}",
    "Good morning, {name} here. Could you deliver {count} {thing} until {day}? Thanks",
    "Hi there, our new colleagues start soon, so I want to order {thing}: {count} of them, for {day}. Yours, {name}",
    "Dear team,\nplease send {count} more {thing}. We can wait until {day}, but no longer.\n{name}",
    "Subject: {thing}\nAs agreed on the phone, {count} pieces for {day}.\nKind regards\n{name}",
    "To whom it may concern: the last delivery was fine. Now it is {count} {thing}, and {day} would be best. {name}",
)


def rows() -> list[Row]:
    """Return 360 different e-mails in random order."""
    draw = random.Random(7)
    every = [(mail, name, thing, count, day) for mail in MAILS for name in NAMES for thing in THINGS
             for count in COUNTS for day in DAYS]  # fmt: skip
    return [
        {
            "input": mail.format(name=name, thing=thing, count=count, day=day),
            "output": json.dumps({"name": name, "item": thing, "quantity": COUNTS[count], "due": day}),
        }
        for mail, name, thing, count, day in draw.sample(every, 360)
    ]


if __name__ == "__main__":
    write(rows())
