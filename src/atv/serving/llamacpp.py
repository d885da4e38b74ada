"""An engine on stock llama.cpp, in which every request has task vectors of its own.

The vectors are made by the adapter's generator and expansion (`ATV`), as for vLLM, and added by
`atv.serving.llamacpp_context`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch

from atv.errors import ATVError
from atv.lm.ends import end_ids
from atv.lm.load import context_length, load_outline, load_tokenizer
from atv.progress import log
from atv.serving.batch import Row
from atv.serving.beginnings import MOST, Beginnings, Kept
from atv.serving.engine import BatchEngine
from atv.serving.gguf import check_gguf
from atv.serving.llamacpp_context import SEQUENCES, LlamaCpp, Options, Reading, libraries, sequences
from atv.serving.requests import Limits
from atv.serving.steers import Steering, Steers, load_steers


class _Sequences(Beginnings[tuple[int, int]]):
    """Beginnings as sequences of a context: number, and tokens."""

    def __init__(self, llm: LlamaCpp, limit: int) -> None:
        super().__init__(limit)
        self._llm = llm

    def _read(self, ids: tuple[int, ...]) -> tuple[int, int]:
        with self._llm.sequence() as sequence:
            self._llm.read([Reading(ids, sequence, 0, len(ids), wanted=False)])
        return sequence, len(ids)

    def _take(self, kept: Kept[tuple[int, int]], count: int) -> tuple[int, int]:
        return self._llm.copy(kept.state[0], count), count

    def _bytes(self, state: tuple[int, int]) -> int:
        return self._llm.cell_bytes * state[1]

    def _drop(self, state: tuple[int, int]) -> None:
        self._llm.drop(state[0])


class LlamaBatch:
    """Rows that llama.cpp decodes together; a `Decoded`. Each is a sequence of the context."""

    joins = True

    def __init__(self, llm: LlamaCpp, rows: Sequence[Row], beginnings: Beginnings[tuple[int, int]]) -> None:
        self._llm, self.rows, self.logits = llm, list(rows), torch.empty(len(rows), 0)
        self._steering = _steering(rows)
        known = beginnings.of([(row.prompt.ids, row.clean) for row in rows])
        begun = [(llm.take(), 0) if each is None else each for each in known]
        self._sequences = [sequence for sequence, _ in begun]
        try:
            self.logits = llm.read(
                [
                    Reading(row.prompt.ids[done:], sequence, done, len(row.prompt.ids), steering)
                    for row, (sequence, done), steering in zip(self.rows, begun, self._steering, strict=True)
                ]
            )
        except Exception:
            self.keep([])
            raise

    def step(self, tokens: Sequence[int]) -> None:
        """Read one more token of each row."""
        readings = []
        for row, token, sequence, steering in zip(self.rows, tokens, self._sequences, self._steering, strict=True):
            length = len(row.prompt.ids)
            readings.append(Reading([token], sequence, length + row.tokens, length, steering))
            row.tokens += 1
        self.logits = self._llm.read(readings)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        for index in set(range(len(self.rows))) - set(indices):
            self._llm.drop(self._sequences[index])
        for name in ("rows", "_sequences", "_steering"):
            setattr(self, name, [getattr(self, name)[index] for index in indices])
        self.logits = self.logits[list(indices)]

    def join(self, other: Self) -> None:
        """Add the rows of another batch, which must not be used again."""
        self.rows += other.rows
        self._sequences += other._sequences
        self._steering += other._steering
        self.logits = torch.cat([self.logits, other.logits])


class LlamaCppEngine(BatchEngine):
    """A `BatchEngine` on llama.cpp.

    Args:
        gguf: the LLM's file.
        llm: Hugging Face id, folder or embedded name of the same LLM: its tokenizer, chat template and an outline, with
            which the file and adapters are compared.
        limits: what it takes on. Memory for the keys and values of all of it is reserved at the start.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run code that comes with the model.
        options: of llama.cpp, by name (`Options`).

    Raises:
        ATVError: llama-cpp-python is missing or not the tested version, or the file contains another LLM or one that
            cannot be steered.
    """

    def __init__(
        self,
        gguf: Path,
        llm: str,
        limits: Limits | None = None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        limits, given = limits or Limits(), Options.of(options or {})
        libraries()
        if sequences(limits.rows) > SEQUENCES:
            raise ATVError(
                f"rows is {limits.rows}; llama.cpp decodes at most {(SEQUENCES - MOST) // 2} answers together."
            )
        tokenizer = load_tokenizer(llm, revision, trust_remote_code=trust_remote_code)
        self._outline = load_outline(llm, revision=revision, trust_remote_code=trust_remote_code)
        log.info(f"Comparing {gguf} with {llm}")
        check_gguf(gguf, self._outline)
        self._llm = LlamaCpp(gguf, limits, given)
        context = min(filter(None, (self._llm.context, context_length(self._outline))))
        shared = _Sequences(self._llm, limits.kept)
        ends = end_ids(self._outline, tokenizer)
        super().__init__(tokenizer, ends, context, self._llm.vocabulary, shared, limits)

    def load(self, folder: Path) -> Steers:
        """Load an adapter for this engine's LLM.

        Raises:
            ATVError: it is not an adapter, is for another LLM, or does more than adding vectors to the outputs of
                layers.
        """
        return load_steers(folder, self._outline, "llama.cpp")

    def _read(self, rows: Sequence[Row]) -> LlamaBatch:
        return LlamaBatch(self._llm, rows, cast(_Sequences, self._beginnings))

    def close(self) -> None:
        """Stop after the current step, and free the LLM; unfinished requests end with an error."""
        super().close()
        self._llm.close()


def _steering(rows: Sequence[Row]) -> list[Steering | None]:
    """Return what is added to each row; the rows of one adapter and strength are read by its generator together."""
    groups: dict[tuple[int, float | None], list[int]] = {}
    for index, row in enumerate(rows):
        if row.model is not None:
            groups.setdefault((id(row.model), row.scale), []).append(index)
    found: list[Steering | None] = [None] * len(rows)
    for indices in groups.values():
        first = rows[indices[0]]
        made = cast(Steers, first.model).steerings([rows[index].prompt.query for index in indices], first.scale)
        for index, steering in zip(indices, made, strict=True):
            found[index] = steering
    return found
