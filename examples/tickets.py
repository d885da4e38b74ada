"""Support tickets with twelve labels of several words. `python -m examples.tickets FILE` writes 320 rows as JSON lines.

Labels are unbalanced (60 rows to 6), three contain a number, and most share their first word with others.
"""

import random

from examples import Row, write

PLACES = ("the shop", "the app", "the website", "your page", "the checkout", "the customer portal")
TIMES = ("yesterday", "on Monday", "this morning", "last week", "two days ago", "since the update", "tonight")
LABELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "billing refund": (60, (
        "I was charged twice in {place} {time} and want my money back.",
        "Please return the 20 euros that you took {time}.",
        "I cancelled in {place} {time}. When do I get the amount back?",
        "You still have not paid back what I paid {time} in {place}.",
    )),
    "billing invoice": (50, (
        "I need a document for my tax office about what I bought in {place} {time}.",
        "The bill that I got {time} has the wrong company name.",
        "Where in {place} do I find the bill for my purchase {time}?",
        "Our accounting misses the paper for the order {time}.",
    )),
    "billing payment failed": (40, (
        "My card is declined in {place}, {time} as well.",
        "I tried to pay in {place} {time} and the bank says no.",
        "Neither credit card nor transfer works in {place} {time}.",
    )),
    "account password reset": (35, (
        "I forgot my secret word for {place} {time}.",
        "I cannot log in to {place} {time}, it says wrong credentials.",
        "Please send me a link to choose a new password for {place}. I asked {time}.",
    )),
    "account deletion": (28, (
        "Remove all my data from {place}. I asked for it {time}.",
        "I do not want to be a customer of {place} any more. I decided {time}, close everything.",
        "Erase my profile in {place}, I requested it {time}.",
    )),
    "account email change": (24, (
        "I have a new address for messages {time}, please use it in {place}.",
        "My old mailbox was shut {time}. How do I enter the new one in {place}?",
    )),
    "shipping delay": (22, (
        "My parcel ordered in {place} was promised {time} and is not here.",
        "Still waiting for the box I bought in {place} {time}.",
    )),
    "shipping damage": (18, (
        "The box from {place} arrived {time} with a broken corner and a crack in the glass.",
        "What I ordered in {place} came {time} and is in pieces.",
    )),
    "error 404": (14, (
        "{place} says not found when I open my orders, {time} too.",
        "A link in {place} leads nowhere {time}.",
    )),
    "error 500": (13, (
        "{place} shows internal server error {time}.",
        "Something crashed inside {place} {time} and only a grey page came.",
    )),
    "error 503": (10, (
        "{place} says that the service is overloaded {time}, try later.",
        "{place} is down for maintenance {time} and nobody told us.",
    )),
    "feature request": (6, ("It would be nice if {place} had a dark mode, I thought {time}.",)),
}  # fmt: skip
GREETINGS = ("", "Hi, ", "Hello team, ", "Dear support, ")


def rows() -> list[Row]:
    """Return 320 tickets in random order."""
    draw, found = random.Random(7), []
    for label, (count, texts) in LABELS.items():
        every = [
            greeting + text.format(place=place, time=time)
            for text in texts
            for place in PLACES
            for time in TIMES
            for greeting in GREETINGS
        ]
        found += [{"text": text, "label": label} for text in draw.sample(sorted(set(every)), count)]
    return draw.sample(found, len(found))


if __name__ == "__main__":
    write(rows())
