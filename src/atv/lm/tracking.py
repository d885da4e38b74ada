"""Which tokens does this forward call read? The bookkeeping that lets any `generate` call be steered.

`generate` calls the LLM in several ways: the whole prompt first and then one token at a time with a cache; the whole
text again at every step without one; several beams or returned sequences per prompt. A `PromptTracker` looks at each
call's own arguments and says which of its columns receive a vector.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any
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


def _length(cache: Any) -> int | None:
    """How many tokens a cache holds; None: some, as a recurrent state, which does not count them."""
    count = getattr(cache, "get_seq_length", None)
    try:
        return int(count())  # type: ignore[misc]
    except (TypeError, ValueError):  # no such method; a cache without an attention layer
        has_state = getattr(cache, "has_previous_state", None)
        return 0 if callable(has_state) and not has_state() else None


class PromptTracker:
    """Follows the forward calls of one steered context and keeps the edit mask of the current one.

    Inside `generate` the first call reads the prompt and every other one its answer. Outside, the first call, and any
    later one that does not continue what was read before, is a new prompt. A call continues if its cache holds the
    prompt already, or if it reads the same prompt again with more tokens after it. The edit mask of a prompt comes from
    its padding and from `positions`; columns after the prompt are answer tokens.
    """

    def __init__(self, queries: int, positions: Positions) -> None:
        self.queries = queries
        self.positions = positions
        self.mask: Tensor | None = None
        """(rows, columns of this call) bool; None when this call edits nothing."""
        self._prompt_mask: Tensor | None = None  # (rows, columns up to the prompt's end)
        self._prompt_ids: Tensor | None = None
        self._start = 0
        self._call_start = 0
        self._cache: ref[Any] | None = None  # of the latest call
        self._expected: str | None = None  # "prompt" or "answer" inside generate
        self.finished = False
        """Inside `generate`, no later call edits anything: the prompt is cached, and its answer is not edited."""

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The next call reads a prompt, and those after it inside this context its answer."""
        former, self._expected = self._expected, "prompt"
        try:
            yield
        finally:
            self._expected = former

    def observe(self, call: Mapping[str, Any]) -> None:
        """Look at the named arguments of a forward call that is about to run."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ATVError("The LLM was called with neither input_ids nor inputs_embeds; a steered call needs one.")
        rows, width = tokens.shape[:2]
        arguments = {**call, **call.get("kwargs", {})}
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        start = _length(cache) if cache is not None else 0
        place = self._continued(ids, rows, width, cache, start)
        if place is None:
            self._begin(tokens, call.get("attention_mask"), ids, start or 0)
            place = self._start
        self._expected = None if self._expected is None else "answer"
        # An LLM that is handed a cache which its signature does not name ignores it and reads the whole text again.
        taken = any(call.get(name) is not None for name in CACHES)
        self.finished = self._expected is not None and taken and not self.positions.answer
        self._cache = None if cache is None else _weak(cache)
        assert self._prompt_mask is not None
        self._call_start = place
        prompt = self._prompt_mask.shape[1]
        if place >= prompt:  # answer tokens alone: known from shapes, so that a decoding step waits for no device
            answer = self.positions.answer
            self.mask = torch.ones(rows, width, dtype=torch.bool, device=tokens.device) if answer else None
            return
        known = self._prompt_mask[:, place : place + width]  # columns of the prompt in this call
        mask = torch.nn.functional.pad(known, (0, width - known.shape[1]), value=self.positions.answer)
        self.mask = mask if bool(mask.any()) else None

    def prompt_ends(self) -> Tensor | None:
        """The column of this call where each row's prompt ends, (rows,); None when the call holds no prompt's end."""
        prompt = self._prompt_mask
        if prompt is None or self._call_start >= prompt.shape[1]:
            return None
        from_end = prompt.flip(-1).int().argmax(-1)  # a prompt's last token is edited wherever vectors are added
        return prompt.shape[1] - 1 - from_end - self._call_start

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
                    "use generate, or read an answer inside atv.lm.tracking.continuing()."
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
