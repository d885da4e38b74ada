"""From a raw row of a public data set to a task's query and answer: one pure function per source."""

import random
import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from atv.data.render import Example
from atv.errors import ATVError

Row = Mapping[str, Any]


def lettered(question: str, options: Sequence[str], right: Any) -> Example:
    """A question with its options below it, answered by the letter of option number `right`."""
    letters = ascii_uppercase[: len(options)]
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return Example(f"{question}\nOptions:\n{listed}", _labelled(letters, right))


def _labelled(answers: Sequence[str], label: Any) -> str:
    """The answer for a label; data sets encode a hidden label as -1 or leave it empty."""
    if not isinstance(label, int) or not 0 <= label < len(answers):
        raise ATVError(
            f"A row has the label {label!r}; expected 0 to {len(answers) - 1} (a hidden label looks like this)."
        )
    return answers[label]


def _place(labels: Sequence[str], label: str) -> int:
    return list(labels).index(label) if label in labels else -1


def _choices(question: str, row: Row) -> Example:
    """Options as `{"label": [...], "text": [...]}`, re-lettered, since a few ARC questions use numbers."""
    return lettered(question, row["choices"]["text"], _place(row["choices"]["label"], row["answerKey"]))


def commonsense_qa(row: Row) -> Example:
    """CommonsenseQA and ARC, which have the same columns."""
    return _choices(row["question"], row)


def openbookqa(row: Row) -> Example:
    """OpenBookQA without its facts."""
    return _choices(row["question_stem"], row)


def hellaswag(row: Row) -> Example:
    """HellaSwag: a text and four endings; the label is a digit in a string."""
    return lettered(row["ctx"], row["endings"], int(row["label"] or -1))


def boolq(row: Row) -> Example:
    """BoolQ: a passage and a question about it."""
    return Example(
        f"context: {row['passage']}\nquestion: {row['question']}", _labelled(("False", "True"), row["answer"])
    )


def bbh(row: Row) -> Example:
    """BIG-Bench Hard: `(A) option` becomes `A. option`, and the target `(A)` the letter."""
    text = re.sub(r"^\(([A-Z])\) ", r"\1. ", row["input"], flags=re.MULTILINE)
    return Example(text, re.sub(r"^\(([A-Z])\)$", r"\1", row["target"]))


def math_qa(row: Row) -> Example | None:
    """MathQA: options in one string, `a ) 38 , b ) 27 , ...`; None for rows without exactly five options."""
    options = re.findall(r"[a-e] \) (.*?)(?= , [b-e] \) |$)", row["options"].strip())
    if len(options) != 5:
        return None
    return lettered(row["Problem"], [option.strip() for option in options], _place("abcde", row["correct"]))


def mmlu(row: Row) -> Example:
    """MMLU: the answer is the option's number."""
    return lettered(row["question"], row["choices"], row["answer"])


def mmlu_pro_math(row: Row) -> Example | None:
    """MMLU-Pro, only the mathematical questions: up to ten options."""
    if row["category"] != "math":
        return None
    return lettered(row["question"], row["options"], row["answer_index"])


def aqua(row: Row) -> Example:
    """AQuA: options as `A)21`."""
    options = [re.sub(r"^[A-E]\)", "", option).strip() for option in row["options"]]
    return lettered(row["question"], options, _place("ABCDE", row["correct"]))


def crows_pairs(row: Row) -> Example:
    """CrowS-Pairs: which of two sentences is more stereotypical. The text seeds the choice of sentence A."""
    more, less = row["sent_more"], row["sent_less"]
    first, second, answer = (more, less, "A") if random.Random(more).random() < 0.5 else (less, more, "B")
    return Example(f"sentence A: {first}\nsentence B: {second}", answer)


def bbq(row: Row) -> Example:
    """BBQ: three options."""
    question = f"context: {row['context']}\nquestion: {row['question']}"
    return lettered(question, [row[f"ans{number}"] for number in range(3)], row["label"])


def ethics_commonsense(row: Row) -> Example:
    """ETHICS, commonsense: label 1 means wrong; the templates ask whether it is wrong."""
    return Example(row["input"], _labelled(("No", "Yes"), int(row["label"])))


def ethics_justice(row: Row) -> Example:
    """ETHICS, justice: label 1 means reasonable."""
    return Example(row["scenario"], _labelled(("No", "Yes"), int(row["label"])))


def rte(row: Row) -> Example:
    """RTE: label 0 is entailment."""
    return Example(_premise(row), _labelled(("True", "False"), row["label"]))


def wic(row: Row) -> Example:
    """WiC: label 1 means the same meaning in both sentences."""
    text = f"word: {row['word']}\nsentence 1: {row['sentence1']}\nsentence 2: {row['sentence2']}"
    return Example(text, _labelled(("No", "Yes"), row["label"]))


def qnli(row: Row) -> Example:
    """QNLI: label 0 means that the sentence answers the question."""
    text = f"question: {row['question']}\nresponse: {row['sentence']}"
    return Example(text, _labelled(("Yes", "No"), row["label"]))


def sst2(row: Row) -> Example:
    """SST-2: the unchanged sentence, including the data set's trailing space."""
    return Example(f"sentence: {row['sentence']}", _labelled(("negative", "positive"), row["label"]))


def mnli(row: Row) -> Example:
    """MNLI: labels 0, 1, 2 are entailment, neutral, contradiction."""
    return Example(_premise(row), _labelled(("True", "Neither", "False"), row["label"]))


def cola(row: Row) -> Example:
    """CoLA: label 1 is acceptable."""
    return Example(row["sentence"], _labelled(("No", "Yes"), row["label"]))


def _premise(row: Row) -> str:
    return f"premise: {row['premise']}\nhypothesis: {row['hypothesis']}"
