"""BM25: demonstrations whose inputs have most words in common with the query."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from atv.errors import ATVError
from atv.methods.demonstrations import Demonstrated
from atv.tasks import Example, Task


class BM25(Demonstrated):
    """Demonstrations retrieved for each query from the task's training split.

    The score is what bm25s computes by default, Lucene's variant with k1 = 1.5 and b = 0.75; a word that comes twice in
    a query counts twice. Of equal scores the earlier row of the split is the more relevant.
    """

    name = "bm25"

    def __init__(self, llm: nn.Module, tokenizer: Any) -> None:
        super().__init__(llm, tokenizer)
        import bm25s  # here: other methods need not wait for it, and no query's seconds include it

        self._bm25s: Any = bm25s
        self._indexed: tuple[Task, Any] | None = None

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        """Words in lower case; none is too common or too short, since `not`, `A` or `7` may be all that differs."""
        how = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "return_ids": False, "show_progress": False}
        found: list[list[str]] = self._bm25s.tokenize(list(texts), **how)
        return found

    def _index(self, task: Task) -> Any:
        """The index of a task's training inputs; the last task's is kept for its other variants."""
        if self._indexed is None or self._indexed[0] is not task:
            words = self._words([row.input for row in task.train])
            if not any(words):
                raise ATVError(f"Task {task.name}: no training input has a word to retrieve it by; use --method icl.")
            index = self._bm25s.BM25(dtype="float64")
            index.index(words, show_progress=False)
            self._indexed = task, index
        return self._indexed[1]

    def demonstrations(self, task: Task, examples: Sequence[Example]) -> list[list[Example]]:
        """The most relevant training rows for each of `examples`, the most relevant last."""
        index = self._index(task)
        chosen = []
        for words in self._words([example.input for example in examples]):
            known = index.get_tokens_ids(words)
            # Rounded, since equal scores may be sums in another order; bm25s' own selection leaves ties to chance.
            scores = index.get_scores_from_ids(known).round(9) if known else np.zeros(len(task.train))  # (train rows,)
            best = np.argsort(-scores, kind="stable")[: self.shots]
            chosen.append([task.train[row] for row in reversed(best)])
        return chosen
