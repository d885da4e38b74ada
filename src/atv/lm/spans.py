"""Determine which tokens of an LLM call are edited, from one of three sources.

`Known`: a given mask (training). `Lengths`: each row is a whole text, with a prompt of known length (scoring).
`Tracked`: any call, above all those of `generate`, which reads the whole prompt first and then one token at a time with
a cache; the whole text at every step without one; and several rows per prompt for beams or returned sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor

from atv.config import Positions
from atv.data.collate import edit_mask
from atv.errors import ATVError
from atv.lm.calls import having

CACHES = ("past_key_values", "cache_params", "past_buckets_states", "state", "mems")
"""Names of the arguments by which LLMs take their cache of previous tokens (requested by `use_cache`)."""
GENERATES = ("generate", "generate_batch", "init_continuous_batching")
"""Methods of an LLM that call it repeatedly."""
_GUESSES = "makes the LLM read guessed answer tokens together with the prompt, which hides where the prompt ends"
UNTRACKED = {
    "assistant_model": _GUESSES,
    "prompt_lookup_num_tokens": _GUESSES,
    "assistant_early_exit": _GUESSES,
    "prefill_chunk_size": "splits the prompt over several calls, the first of which does not show where it ends",
    "guidance_scale": "reads a second prompt between the steps of the first, and it is unknown which of them to steer",
}
"""Options of `generate` with which its calls cannot be tracked, and the reason."""

_CONTINUING: ContextVar[bool] = ContextVar("atv_continuing", default=False)


def continuing() -> AbstractContextManager[None]:
    """Inside this context calls may read several answer tokens at once after a cached prompt.

    Otherwise, outside `generate`, several tokens after a cached prompt raise ATVError: they could be another turn.
    """
    return having(_CONTINUING, True)


def refuse_untracked(llm: Any, method: str, arguments: Mapping[str, Any]) -> None:
    """Raise ATVError if `generate` was called with options that prevent telling prompts from answers.

    Args:
        llm: the LLM whose method is called.
        method: one of `GENERATES`.
        arguments: arguments of the call, by name.
    """
    if method != "generate":
        raise ATVError(
            f"{method} packs the tokens of many requests into one row, so vectors would be added to wrong tokens. "
            "Steer generate instead, with one query for each prompt."
        )
    sources = (arguments.get("generation_config"), getattr(llm, "generation_config", None))
    for option, does in UNTRACKED.items():
        values = (arguments.get(option), *(getattr(source, option, None) for source in sources))
        value = next((value for value in values if value is not None), None)
        if value is not None and not (option == "guidance_scale" and value == 1):
            raise ATVError(f"{option} {does}: vectors would be added to wrong tokens. Leave it out.")


def _attended(mask: Any, rows: int, start: int, width: int, device: torch.device) -> Tensor:
    """Return which tokens of a call are not padding, (rows, width), from any kind of mask.

    Args:
        mask: None; (rows, tokens read so far or in this call); (rows or 1, 1, width, keys), bool or added to scores,
            in which tokens other than padding see themselves; or a mapping from kinds of layers to such masks.
        rows: rows of the call.
        start: tokens read before the call.
        width: tokens read by the call.
        device: device of its tokens.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones(rows, width, dtype=torch.long, device=device)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 3, 4):
        raise ATVError(f"The LLM was called with an attention_mask of type {type(mask).__name__}; expected a tensor.")
    if mask.dim() == 2:
        known = mask[:, start : start + width] if mask.shape[1] >= start + width else mask[:, -width:]
    else:
        # A window's keys end with this call's; those of a static cache extend to its full length.
        first = min(start, mask.shape[-1] - width)
        seen = mask.flatten(1, -3)[:, :1].squeeze(1) if mask.dim() == 4 else mask
        known = seen.diagonal(first, dim1=1, dim2=2)
        known = known if known.dtype == torch.bool else known == 0
    if known.shape[1] != width or len(known) not in (1, rows):
        raise ATVError(
            f"The LLM was called with {rows} rows of {width} tokens after {start} and an attention_mask of shape "
            f"{tuple(mask.shape)}; expected one value for each token."
        )
    return known.long().expand(rows, width)


def _tokens(call: Mapping[str, Any]) -> Tensor:
    """Return what a call reads: ids (rows, seq), or embeddings (rows, seq, hidden)."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    if tokens is None:
        raise ATVError("The LLM was called with neither input_ids nor inputs_embeds; a steered call needs one.")
    return cast(Tensor, tokens)


def _cache(call: Mapping[str, Any]) -> Any:
    """Return the cache that was passed to a call, under any of its names; None if there is none."""
    arguments = {**call, **call.get("kwargs", {})}
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def _start(call: Mapping[str, Any]) -> int | None:
    """Return how many tokens were read before those of a call; None: an unknown number above 0."""
    cache = _cache(call)
    return 0 if cache is None else _length(cache)


def _length(cache: Any) -> int | None:
    """Return how many tokens a cache contains; None: an unknown number above 0, as in a recurrent state."""
    count = getattr(cache, "get_seq_length", None)
    try:
        return int(count())  # type: ignore[misc]
    except (TypeError, ValueError):  # no such method; a cache without an attention layer
        has_state = getattr(cache, "has_previous_state", None)
        return 0 if callable(has_state) and not has_state() else None


@dataclass(frozen=True, eq=False)
class Span:
    """The edited tokens and the prompt ends in one call of the LLM."""

    where: Tensor
    """(rows, seq) bool: the tokens of this call that are edited."""
    ends: Tensor | None = None
    """(rows,): the column of each row's last prompt token, from either end; None if no prompt ends in this call."""

    @cached_property
    def first(self) -> int:
        """The first column in which a row is edited; computed once, since it synchronises with the device."""
        return first_edited(self.where) if self.where.shape[1] > 1 else 0

    @property
    def edited(self) -> "Span":
        """Only `where`, without the columns before the first edited one; `ends` would count from another column."""
        return Span(self.where[:, self.first :])


def first_edited(where: Tensor) -> int:
    """Return the first column of (rows, seq) in which a row is edited; seq if there is none."""
    columns = where.any(dim=0).nonzero()
    return int(columns[0]) if len(columns) else where.shape[1]


class Spans(ABC):
    """Provides the span of each call of a steered LLM."""

    finished = False
    """Whether, inside `generate`, no later call edits anything."""

    @abstractmethod
    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """Return the span of a call that is about to run, from its arguments by name; None: it edits nothing."""

    def generating(self, llm: Any, method: str, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return the context for a call of one of `GENERATES`; raise ATVError if its calls cannot be tracked."""
        del llm, arguments
        raise ATVError(
            f"{method} was called while the edited tokens are given by {type(self).__name__}, which is valid only for "
            "single calls of the LLM. Use Tracked for generate."
        )


class Known(Spans):
    """The same tokens in every call.

    Args:
        where: (rows, seq) bool.
        ends: as in `Span`.
    """

    def __init__(self, where: Tensor, ends: Tensor | None = None) -> None:
        self._span = Span(where, ends)

    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """Return the given span."""
        del call
        return self._span


class Lengths(Spans):
    """Calls that read whole texts: each row is a prompt, its continuation, and padding on the right.

    Args:
        lengths: number of tokens of each row's prompt.
        positions: the edited tokens.
    """

    def __init__(self, lengths: Sequence[int], positions: Positions) -> None:
        self._lengths, self._positions = list(lengths), positions

    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """Return the span of a call with `input_ids` or `inputs_embeds`, with or without `attention_mask`.

        Raises:
            ATVError: the numbers of rows and lengths differ, a prompt is longer than its row, padding is on the left,
                or the cache already contains tokens.
        """
        tokens = _tokens(call)
        rows, width = tokens.shape[:2]
        if rows != len(self._lengths) or not all(0 < length <= width for length in self._lengths):
            raise ATVError(
                f"The LLM was called with {rows} rows of {width} tokens, but the prompts have {self._lengths[:8]} "
                "tokens; expected one row per prompt, at least as long as the prompt."
            )
        if _start(call):
            raise ATVError("The LLM was called with a filled cache; expected calls that read whole texts.")
        attended = _attended(call.get("attention_mask"), rows, 0, width, tokens.device).bool()
        if not bool(attended[:, 0].all()):
            raise ATVError("The LLM was called with padding on the left; expected it on the right, after the texts.")
        length = torch.tensor(self._lengths, device=tokens.device)[:, None]  # (rows, 1)
        columns = torch.arange(width, device=tokens.device)
        where = edit_mask(columns < length, self._positions)
        if self._positions.answer:
            where = where | (columns >= length)
        return Span(where & attended, length[:, 0] - 1)


class Tracked(Spans):
    """Tracks the calls of one steered context.

    Inside `generate` the first call reads the prompt and all others its answer. Outside, a call is a new prompt unless
    it continues the previous one: its cache already contains the prompt, or it reads the same prompt again with more
    tokens after it. The edit mask of a prompt follows from its padding and `positions`; columns after the prompt are
    answer tokens.
    """

    def __init__(self, queries: int, positions: Positions) -> None:
        self.queries = queries
        self.positions = positions
        self._prompt_mask: Tensor | None = None  # (rows, columns up to the prompt's end)
        self._prompt_ids: Tensor | None = None
        self._start = 0
        self._cache: ref[Any] | None = None  # of the latest call
        self._expected: str | None = None  # "prompt" or "answer" inside generate

    @contextmanager
    def generating(self, llm: Any, method: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        """Inside this context the next call reads a prompt, and later calls its answer."""
        refuse_untracked(llm, method, arguments)
        former, self._expected = self._expected, "prompt"
        try:
            yield
        finally:
            self._expected = former

    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """Return the span of a call, which either starts a prompt or continues the previous one."""
        ids, tokens = call.get("input_ids"), _tokens(call)
        rows, width = tokens.shape[:2]
        cache, start = _cache(call), _start(call)
        place = self._continued(ids, rows, width, cache, start)
        if place is None:
            self._begin(tokens, call.get("attention_mask"), ids, start or 0)
            place = self._start
        self._expected = None if self._expected is None else "answer"
        # An LLM whose signature does not name the given cache ignores it and reads the whole text again.
        taken = any(call.get(name) is not None for name in CACHES)
        self.finished = self._expected is not None and taken and not self.positions.answer
        self._cache = None if cache is None else _weak(cache)
        assert self._prompt_mask is not None
        prompt = self._prompt_mask.shape[1]
        if place >= prompt:  # only answer tokens: known from shapes, so decoding does not synchronise with the device
            answer = torch.ones(rows, width, dtype=torch.bool, device=tokens.device)
            return Span(answer) if self.positions.answer else None
        known = self._prompt_mask[:, place : place + width]  # columns of the prompt in this call
        where = torch.nn.functional.pad(known, (0, width - known.shape[1]), value=self.positions.answer)
        return Span(where, self._ends(place)) if bool(where.any()) else None

    def _ends(self, place: int) -> Tensor:
        """Return the column where each row's prompt ends, (rows,), in a call that starts at the prompt's `place`."""
        prompt = cast(Tensor, self._prompt_mask)
        from_end = prompt.flip(-1).int().argmax(-1)  # a prompt's last token is always edited
        return prompt.shape[1] - 1 - from_end - place

    def _continued(self, ids: Tensor | None, rows: int, width: int, cache: Any, start: int | None) -> int | None:
        """Return the column of the current prompt's text at which this call starts; None: it is a new prompt."""
        prompt = self._prompt_mask
        if prompt is None or self._expected == "prompt":
            return None
        if self._expected == "answer" or _CONTINUING.get():
            if rows != len(prompt) and (self._expected or rows % self.queries):
                raise ATVError(f"The LLM was called with {len(prompt)} rows for the prompt and {rows} for its answer.")
            whole = start == 0 and width > prompt.shape[1] - self._start  # the prompt again, without a cache
            return start or (self._start if whole else prompt.shape[1])
        if rows != len(prompt):
            return None
        if start is None or start >= prompt.shape[1]:
            if width > 1:
                raise ATVError(
                    f"The LLM was called with {width} tokens after a cached prompt: they may be an answer, another "
                    "turn or the rest of the prompt. Open a new context for another turn, use generate, or read an "
                    "answer inside atv.lm.spans.continuing()."
                )
            return prompt.shape[1] if start is None else start
        return self._read_again(ids, cache, start)

    def _read_again(self, ids: Tensor | None, cache: Any, start: int) -> int | None:
        """Like `_continued`, for a call that reads columns of the prompt."""
        if start > self._start:
            if self.positions.prompt_tokens is None:
                return start
            if self._cache is None or self._cache() is not cache:
                return None  # another prompt with a cached beginning
            raise ATVError(
                "The LLM's cache was cropped to a part of the prompt: this call may read the rest again, or another "
                "prompt with the same beginning. Open a new context for another prompt."
            )
        seen = self._prompt_ids
        if ids is None or seen is None or start != self._start or ids.shape[1] <= seen.shape[1]:
            return None
        return start if bool((ids[:, : seen.shape[1]] == seen).all()) else None

    def _begin(self, tokens: Tensor, mask: Any, ids: Tensor | None, start: int) -> None:
        rows, width = tokens.shape[:2]
        repeats, rest = divmod(rows, self.queries)
        groups_differ = False
        if rest == 0 and repeats > 1 and ids is not None:
            grouped = ids.view(self.queries, repeats, width)
            groups_differ = bool((grouped != grouped[:, :1]).any())
        if rest or repeats == 0 or groups_differ:
            raise ATVError(
                f"The LLM was given {rows} rows of prompts and steering was opened with {self.queries} queries; "
                "expected one query per prompt (generate repeats rows for beams and returned sequences itself)."
            )
        edited = edit_mask(_attended(mask, rows, start, width, tokens.device), self.positions)
        self._prompt_mask = torch.nn.functional.pad(edited, (start, 0))
        self._prompt_ids, self._start = ids, start


def _weak(cache: Any) -> ref[Any] | None:
    """Return a weak reference; None if the object does not allow one, such as a list of tensors."""
    try:
        return ref(cache)
    except TypeError:
        return None
