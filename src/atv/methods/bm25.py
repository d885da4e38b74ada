"""BM25: demonstrations whose inputs share the most words with the query."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from atv.data import Example, Task
from atv.errors import ATVError
from atv.methods.demonstrations import Demonstrated
from atv.words import words


class BM25(Demonstrated):
    """Demonstrations retrieved for each query from the task's training split.

    The score is bm25s' default: Lucene's variant with k1 = 1.5 and b = 0.75. All words count (`atv.words.words`), since
    inputs may differ only in `not`, `A` or `7`; one that occurs twice in a query counts twice. Ties go to the earlier
    row of the split.
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
