"""Which tokens of a call of the LLM are edited? The three sources of that answer.

`Known`: whoever makes the call has a mask (training). `Lengths`: each row is a whole text, and the prompts have known
lengths (scoring). `Tracked`: any call, `generate` above all, which calls the LLM in several ways: the whole prompt
first and then one token at a time with a cache; the whole text again at every step without one; several beams or
returned sequences per prompt.
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
"""Names under which LLMs take what they keep of the tokens before; `use_cache` asks for it."""
GENERATES = ("generate", "generate_batch", "init_continuous_batching")
"""Methods of an LLM that decide what its calls read."""
_GUESSES = "has guessed answer tokens read together with the prompt, whose end cannot be told then"
UNTRACKED = {
    "assistant_model": _GUESSES,
    "prompt_lookup_num_tokens": _GUESSES,
    "assistant_early_exit": _GUESSES,
    "prefill_chunk_size": "has a prompt read in several calls, whose end cannot be told from the first",
    "guidance_scale": "has a second prompt read between the steps of the first, and which of them to steer is not said",
}
"""Options of `generate` with which an LLM's calls cannot be followed, and what they do."""

_CONTINUING: ContextVar[bool] = ContextVar("atv_continuing", default=False)


def continuing() -> AbstractContextManager[None]:
    """Calls inside read tokens that answer the prompt of the call before, as many at a time as one likes.

    Outside `generate` several tokens after a cached prompt are refused: they could as well be another turn.
    """
    return having(_CONTINUING, True)


def refuse_untracked(llm: Any, method: str, arguments: Mapping[str, Any]) -> None:
    """Raise ATVError if `generate` was asked for something in which prompts cannot be told from answers.

    Args:
        llm: whose method is called.
        method: one of `GENERATES`.
        arguments: of the call, by name.
    """
    if method != "generate":
        raise ATVError(
            f"{method} packs the tokens of many requests into one row, and vectors would be added elsewhere. Steer "
            "generate instead, with one query for each prompt."
        )
    sources = (arguments.get("generation_config"), getattr(llm, "generation_config", None))
    for option, does in UNTRACKED.items():
        values = (arguments.get(option), *(getattr(source, option, None) for source in sources))
        value = next((value for value in values if value is not None), None)
        if value is not None and not (option == "guidance_scale" and value == 1):
            raise ATVError(f"{option} {does}: vectors would be added elsewhere. Leave it out.")


def _attended(mask: Any, rows: int, start: int, width: int, device: torch.device) -> Tensor:
    """Which tokens of a call are no padding, (rows, width), from whatever mask it was given.

    Args:
        mask: None; (rows, tokens read so far or in this call); (rows or 1, 1, width, keys), bool or added to scores,
            where a token that is no padding sees itself; or several of these by kind of layer.
        rows: of the call.
        start: tokens that were read before it.
        width: tokens that it reads.
        device: of its tokens.
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
    """What a call reads: ids (rows, seq), or embeddings (rows, seq, hidden)."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call.get("inputs_embeds")
    if tokens is None:
        raise ATVError("The LLM was called with neither input_ids nor inputs_embeds; a steered call needs one.")
    return cast(Tensor, tokens)


def _cache(call: Mapping[str, Any]) -> Any:
    """The cache that a call was given, under whatever name; None if there is none."""
    arguments = {**call, **call.get("kwargs", {})}
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def _start(call: Mapping[str, Any]) -> int | None:
    """How many tokens were read before those of a call; None: some."""
    cache = _cache(call)
    return 0 if cache is None else _length(cache)


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds; None: some, as a recurrent state, which does not count them."""
    count = getattr(cache, "get_seq_length", None)
    try:
        return int(count())  # type: ignore[misc]
    except (TypeError, ValueError):  # no such method; a cache without an attention layer
        has_state = getattr(cache, "has_previous_state", None)
        return 0 if callable(has_state) and not has_state() else None


@dataclass(frozen=True, eq=False)
class Span:
    """One call of the LLM, seen from the prompts in it."""

    where: Tensor
    """(rows, seq) bool: the tokens of this call that are edited."""
    ends: Tensor | None = None
    """(rows,): the column of each row's last prompt token, counted from either end; None if this call holds no end."""

    @cached_property
    def first(self) -> int:
        """The first column in which a row is edited; computed once, since it waits for the device."""
        return first_edited(self.where) if self.where.shape[1] > 1 else 0


def first_edited(where: Tensor) -> int:
    """The first column of (rows, seq) in which a row is edited; seq if there is none."""
    columns = where.any(dim=0).nonzero()
    return int(columns[0]) if len(columns) else where.shape[1]


class Spans(ABC):
    """Gives the span of each call of a steered LLM."""

    finished = False
    """Inside `generate`: no later call edits anything."""

    @abstractmethod
    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """The span of a call that is about to run, from its arguments by name; None: nothing in it is edited."""

    def generating(self, llm: Any, method: str, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Around a call of one of `GENERATES`; ATVError if its calls cannot be followed."""
        del llm, arguments
        raise ATVError(
            f"{method} was called where the edited tokens are given by {type(self).__name__}, which holds for single "
            "calls of the LLM. Use Tracked for generate."
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
        """The span that is known."""
        del call
        return self._span


class Lengths(Spans):
    """Calls that read whole texts: in each row a prompt, its continuation, and padding on the right.

    Args:
        lengths: tokens of each row's prompt.
        positions: the tokens that are edited.
    """

    def __init__(self, lengths: Sequence[int], positions: Positions) -> None:
        self._lengths, self._positions = list(lengths), positions

    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """The span of a call with `input_ids` or `inputs_embeds`, with or without `attention_mask`.

        Raises:
            ATVError: other rows than lengths, a prompt that is longer than its row, padding on the left, or a cache
                that holds tokens already.
        """
        tokens = _tokens(call)
        rows, width = tokens.shape[:2]
        if rows != len(self._lengths) or not all(0 < length <= width for length in self._lengths):
            raise ATVError(
                f"The LLM was called with {rows} rows of {width} tokens and the prompts have {self._lengths[:8]} "
                "tokens; expected one row per prompt, as long as its prompt at least."
            )
        if _start(call):
            raise ATVError("The LLM was called with a cache that holds tokens; expected calls that read whole texts.")
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
    """Follows the calls of one steered context.

    Inside `generate` the first call reads the prompt and every other one its answer. Outside, the first call, and any
    later one that does not continue what was read before, is a new prompt. A call continues if its cache holds the
    prompt already, or if it reads the same prompt again with more tokens after it. The edit mask of a prompt comes from
    its padding and from `positions`; columns after the prompt are answer tokens.
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
        """The next call reads a prompt, and those after it inside this context its answer."""
        refuse_untracked(llm, method, arguments)
        former, self._expected = self._expected, "prompt"
        try:
            yield
        finally:
            self._expected = former

    def __call__(self, call: Mapping[str, Any]) -> Span | None:
        """The span of a call, which either begins a prompt or continues the one before."""
        ids, tokens = call.get("input_ids"), _tokens(call)
        rows, width = tokens.shape[:2]
        cache, start = _cache(call), _start(call)
        place = self._continued(ids, rows, width, cache, start)
        if place is None:
            self._begin(tokens, call.get("attention_mask"), ids, start or 0)
            place = self._start
        self._expected = None if self._expected is None else "answer"
        # An LLM that is given a cache which its signature does not name ignores it and reads the whole text again.
        taken = any(call.get(name) is not None for name in CACHES)
        self.finished = self._expected is not None and taken and not self.positions.answer
        self._cache = None if cache is None else _weak(cache)
        assert self._prompt_mask is not None
        prompt = self._prompt_mask.shape[1]
        if place >= prompt:  # answer tokens alone: known from shapes, so that a decoding step waits for no device
            answer = torch.ones(rows, width, dtype=torch.bool, device=tokens.device)
            return Span(answer) if self.positions.answer else None
        known = self._prompt_mask[:, place : place + width]  # columns of the prompt in this call
        where = torch.nn.functional.pad(known, (0, width - known.shape[1]), value=self.positions.answer)
        return Span(where, self._ends(place)) if bool(where.any()) else None

    def _ends(self, place: int) -> Tensor:
        """The column where each row's prompt ends, (rows,), in a call that begins at the prompt's column `place`."""
        prompt = cast(Tensor, self._prompt_mask)
        from_end = prompt.flip(-1).int().argmax(-1)  # a prompt's last token is edited wherever vectors are added
        return prompt.shape[1] - 1 - from_end - place

    def _continued(self, ids: Tensor | None, rows: int, width: int, cache: Any, start: int | None) -> int | None:
        """The column of the prompt's text at which this call begins; None: it is a new prompt."""
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
                    "turn or the rest of the prompt, and nothing tells which. Open a new context for another turn, "
                    "use generate, or read an answer inside atv.lm.spans.continuing()."
                )
            return prompt.shape[1] if start is None else start
        return self._read_again(ids, cache, start)

    def _read_again(self, ids: Tensor | None, cache: Any, start: int) -> int | None:
        """As `_continued`, for a call that reads columns of the prompt."""
        if start > self._start:
            if self.positions.prompt_tokens is None:
                return start
            if self._cache is None or self._cache() is not cache:
                return None  # another prompt, whose beginning was read before
            raise ATVError(
                "The LLM's cache was cut back into the prompt: nothing tells whether this call reads the rest of it "
                "again or another prompt that begins alike. Open a new context for another prompt."
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
                "expected one query per prompt (beams and returned sequences repeat a prompt's rows by themselves)."
            )
        edited = edit_mask(_attended(mask, rows, start, width, tokens.device), self.positions)
        self._prompt_mask = torch.nn.functional.pad(edited, (start, 0))
        self._prompt_ids, self._start = ids, start


def _weak(cache: Any) -> ref[Any] | None:
    """A weak reference; None to what allows none, as a list of tensors."""
    try:
        return ref(cache)
    except TypeError:
        return None
