"""Replies of a help desk in its house style, as chats. `python -m examples.house_style FILE` writes 480 rows as JSONL.

Every reply greets, names the customer's product in its second sentence, gives the step for this kind of request, and
ends with the same two lines. Requests vary in kind, product, wording and detail; kinds are not named anywhere.
"""

import json
import random
import sys
from pathlib import Path

PRODUCTS = (
    *("kettle", "desk lamp", "bread maker", "door lock", "heater", "camera", "blender", "headset", "printer", "scale"),
    *("vacuum cleaner", "coffee grinder", "air purifier", "smoke alarm", "thermostat", "electric toothbrush"),
)
DAYS = ("Monday", "last week", "the second day", "my birthday", "this morning", "the weekend", "Friday", "day one")
REQUESTS = {
    "broken": (
        "The {product} stopped working on {day}.",
        "My {product} makes a grinding noise since {day}.",
        "Since {day} the {product} will not switch on.",
        "I think my {product} is faulty. It died on {day}.",
        "there is smoke coming out of the {product}, since {day}",
    ),
    "late": (
        "I ordered a {product} and was promised it by {day}. Where is it?",
        "The tracking for my {product} has not moved since {day}.",
        "Still no {product}. Your mail said {day}.",
        "When will the {product} arrive? It should have come on {day}.",
        "My neighbour got his {product} on {day} and I am still waiting for mine.",
    ),
    "return": (
        "I would like to send the {product} back, I got it on {day}.",
        "The {product} is too big for us. Can I return it? It came on {day}.",
        "Please take the {product} back and give me my money, I bought it on {day}.",
        "How do I get a refund for the {product} from {day}?",
        "We do not need the {product} after all. It has been in its box since {day}.",
    ),
    "how": (
        "How do I clean the {product}? I have had it since {day}.",
        "I lost the manual of the {product} on {day}.",
        "Which settings are best for the {product}? I set it up on {day}.",
        "Can the {product} be used outdoors? We have a party on {day}.",
        "What does the red light on the {product} mean? It came on {day}.",
    ),
}
STEPS = {
    "broken": "Please unplug it and send us a photo of the label, so that we can replace it free of charge.",
    "late": "We have asked the carrier for its whereabouts and will write to you within one working day.",
    "return": "You will find a prepaid label in your account; we refund the price as soon as the parcel is scanned.",
    "how": "You will find the full guide with pictures on our help pages, under the name of the product.",
}
OPENINGS = {
    "broken": "We are sorry that your {product} is not working.",
    "late": "We are sorry that your {product} is late.",
    "return": "We are happy to take back your {product}.",
    "how": "We are happy to help with your {product}.",
}
ENDING = "If anything is unclear, just reply to this message.\nYour Brightside team"
SYSTEM = "You answer for the help desk of Brightside."


def reply(kind: str, product: str) -> str:
    """Return the reply in the house style."""
    return f"Hello and thank you for writing! {OPENINGS[kind].format(product=product)} {STEPS[kind]}\n{ENDING}"


def rows() -> list[dict[str, list[dict[str, str]]]]:
    """Return 480 chats with different requests, in random order."""
    draw = random.Random(7)
    every = [
        (text.format(product=product, day=day), reply(kind, product))
        for kind, texts in REQUESTS.items()
        for text in texts
        for product in PRODUCTS
        for day in draw.sample(DAYS, 2)
    ]
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }
        for request, answer in draw.sample(every, 480)
    ]


if __name__ == "__main__":
    with Path(sys.argv[1]).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
