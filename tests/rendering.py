"""Prompts and answers without a renderer of the package: what its renderers are compared with, and rows of any text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atv.data import Example, Prompt, Task
from atv.data.collate import Row


def prompt_text(task: Task, query: str, template: int = 0, prefix: str = "A:") -> str:
    """A query in a task's template, with an answer prefix behind it."""
    return f"{task.templates[template].replace('{input}', query)}\n{prefix}"


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, for a tokenizer that puts no end token behind it."""
    return list(tokenizer(text)["input_ids"])


def encode_pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of the answer: where the whole text, with one space between, departs from it, and the
    tokenizer's end token, if it has one.
    """
    ids, joint = encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, f"{prompt} {answer}")
    assert joint[: len(ids)] == ids, "a token spans the seam"
    assert len(joint) > len(ids)
    return ids, joint[len(ids) :] + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)


class Letters:
    """A tokenizer whose tokens are the characters of a text."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    @staticmethod
    def text(ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True)
class Said:
    """A renderer whose prompt is the same text for every example, and its query too."""

    text: str
    query: str

    def prompt(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        del example, shots
        return Prompt(encode_prompt(tokenizer, self.text), self.query)

    def answer(self, tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
        del prompt
        return encode_pair(tokenizer, self.text, text)[1]


def row_of(query: str, prompts: Sequence[str], answer: str, task: str = "") -> Row:
    """A training row with these prompts, whatever the query is."""
    return Row(Example(query, answer), tuple(Said(text, query) for text in prompts), task)
