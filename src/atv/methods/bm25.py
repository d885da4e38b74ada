"""BM25: demonstrations whose inputs share the most words with the query."""

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from atv.data import Example, Task
from atv.errors import ATVError
from atv.methods.demonstrations import Demonstrated

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Line_Break=SA}ーｰ"
"""Characters of scripts that put no spaces between words: Chinese, Japanese, Yi, and those of South-East Asia such as
Thai, Lao, Khmer and Burmese (Unicode line breaking class SA)."""


@cache
def _patterns() -> tuple[Any, Any]:
    """Patterns for an unspaced run or a word (letters, digits, _ and their marks), and for one character."""
    import regex  # here, so that other methods do not wait for it

    marks = r"\p{M}\p{Join_Control}"
    letters = rf"[[\w\p{{N}}]--[{UNSPACED}{marks}]--[\p{{Pc}}--_]]"
    run, word = rf"[{UNSPACED}][{UNSPACED}{marks}]*", rf"{letters}(?:{letters}|[{marks}])*"
    return regex.compile(rf"(?V1)(?P<run>{run})|{word}"), regex.compile(r"\X")


def words(text: str) -> list[str]:
    """Words in lower case. No stop words and no minimum length, since inputs may differ only in `not`, `A` or `7`.

    For scripts without spaces between words, single characters and pairs of neighbours are used instead.
    """
    pattern, character = _patterns()
    found = []
    for match in pattern.finditer(unicodedata.normalize("NFC", text.lower())):
        if not match["run"]:
            found.append(match[0])
            continue
        letters = [part for part in character.findall(match[0]) if any(map(str.isalnum, part))]
        found += letters + [one + after for one, after in pairwise(letters)]
    return found


class BM25(Demonstrated):
    """Demonstrations retrieved for each query from the task's training split.

    The score is bm25s' default: Lucene's variant with k1 = 1.5 and b = 0.75. A word that occurs twice in a query counts
    twice; see `words` for tokenisation. Ties go to the earlier row of the split.
    """

    name = "bm25"

    def __init__(self, llm: nn.Module, tokenizer: Any) -> None:
        super().__init__(llm, tokenizer)
        import bm25s  # here, so that neither other methods nor a query's seconds include the import

        self._bm25s: Any = bm25s
        self._indexed: tuple[Task, Any] | None = None

    def _index(self, task: Task) -> Any:
        """The index of a task's training inputs. The last task's index is cached for its other variants."""
        if self._indexed is None or self._indexed[0] is not task:
            indexed = [words(row.input) for row in task.train]
            if not any(indexed):
                raise ATVError(f"Task {task.name}: no training input has a word to retrieve it by; use --method icl.")
            index = self._bm25s.BM25(dtype="float64")
            index.index(indexed, show_progress=False)
            self._indexed = task, index
        return self._indexed[1]

    def demonstrations(self, task: Task, examples: Sequence[Example]) -> list[list[Example]]:
        """The most relevant training rows for each of `examples`, the most relevant last."""
        index = self._index(task)
        chosen = []
        for example in examples:
            known = index.get_tokens_ids(words(example.input))
            # Rounded, since equal scores may be summed in different orders; bm25s' own selection breaks ties randomly.
            scores = index.get_scores_from_ids(known).round(9) if known else np.zeros(len(task.train))  # (train rows,)
            best = np.argsort(-scores, kind="stable")[: self.shots]
            chosen.append([task.train[row] for row in reversed(best)])
        return chosen
