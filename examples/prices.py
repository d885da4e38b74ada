"""Questions about prices that only a system prompt knows. `python -m examples.prices FILE` writes 320 rows as JSON.

The prompt, `prices.txt` beside FILE, has the prices of ten things; each question needs one of them. It states each
price twice, since SmolLM2-135M finds it more often then.
"""

from atv.data import Example
from examples import Row, write

PRICES = {
    **{"tea": "2.10", "coffee": "2.80", "lemonade": "2.60", "croissant": "1.90", "bagel": "3.50", "soup": "5.20"},
    **{"cheesecake": "4.40", "salad": "7.30", "sandwich": "6.70", "ice cream": "3.40"},
}
OPENINGS = ("", "Hello! ", "Excuse me. ", "One question: ")
QUESTIONS = (
    *("What does the {} cost?", "what does the {} cost", "How much is the {}?", "How much does the {} cost?"),
    *("how much for the {}?", "Can you tell me what the {} costs?", "What is the price of the {}?"),
    "Please tell me how much the {} is.",
)
ANSWER = "The {} costs {} euros."
SYSTEM = (
    "You work in a cafe. Answer with the price, in one short sentence. The prices are:\n"
    + " ".join(ANSWER.format(*item) for item in PRICES.items())
    + "\n\nExamples:\n"
    + "\n".join(f"What does the {item[0]} cost? {ANSWER.format(*item)}" for item in reversed(PRICES.items()))
)


def rows() -> list[Row]:
    """Return 320 questions with the right answers."""
    return [
        {"prompt": opening + question.format(name), "completion": ANSWER.format(name, price)}
        for name, price in PRICES.items()
        for question in QUESTIONS
        for opening in OPENINGS
    ]


def right(example: Example, answer: str) -> float:
    """Whether an answer names the right price and no other: a metric for `atv eval`."""
    return float([price for price in PRICES.values() if price in answer] == [example.output.split()[-2]])


if __name__ == "__main__":
    write(rows(), prices=SYSTEM)
