"""Tasks whose options begin alike, or not, and a steered LLM written by hand, to compare with."""

import itertools
from contextlib import contextmanager

import torch

from atv.data import Example, Task

LABELS = {
    "digits": ("1", "2", "3", "4", "5"),
    "tens": ("10", "11"),
    "continued": ("1", "10"),
    "classes": ("class_0", "class_1"),
    "opinions": ("very good", "very bad"),
    "nested": ("very", "very good", "very bad"),
    "Chinese": ("正面", "负面"),
    "two of three": ("the boats", "the kettle", "fish"),
    "140": tuple(f"The {a}{b} {c}" for a, b, c in itertools.product("bcdfghklmn", "aeiou", ("lid", "boat", "quay")))[
        :140
    ],
}


def labelled(options, rows=12):
    words = ["quiet", "leaks", "harbour", "first boats", "lid"]
    examples = [Example(f"{words[i % 5]} number {i}", options[i * 7 % len(options)]) for i in range(3 * rows)]
    missing = [option for option in options if option not in {row.output for row in examples}]
    train = (*examples[:rows], *(Example(f"more {option}", option) for option in missing))
    templates = ("{input}\nwhich?", "Question: {input}", "Is it so? {input}")
    return Task("labels", templates, train, tuple(examples[rows : 2 * rows]), tuple(examples[2 * rows :]))


@contextmanager
def added(layers, vectors, columns):
    """Vectors (layers, hidden) added by hooks at these columns of a single row."""

    def hook(vector):
        def edit(_, __, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, columns] += vector
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return edit

    handles = [layer.register_forward_hook(hook(v)) for layer, v in zip(layers, vectors, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steered_by_hand(atv, positions):
    def read(example, prompt, answer):
        last, total = len(prompt) - 1, len(prompt) + len(answer)
        columns = {
            "last": [last],
            "last:3": [last - 2, last - 1, last],
            "answer": list(range(last, total)),
            "all": list(range(total)),
        }[positions]
        vectors = atv.config.scale * atv.task_vectors([example.input])[0]
        with torch.no_grad(), added(atv.layers, vectors, columns):
            return atv.llm(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1]

    return read
