"""Which tokens does this forward call read? The bookkeeping that lets any `generate` call be steered.

`generate` calls the LLM in several ways: the whole prompt first and then one token at a time with a cache; the whole
text again at every step without one; chunks; several beams or returned sequences per prompt. A `PromptTracker` looks
at each call's own arguments and says which of its columns receive a vector.
"""

from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from atv.batching import edit_mask
from atv.config import Positions
from atv.errors import ATVError


def _attended(mask: Tensor | None, rows: int, total: int, device: torch.device) -> Tensor:
    """The call's padding as a (rows, total) mask; a 4-D causal mask (static caches) is read off its last query."""
    if mask is None:
        return torch.ones(rows, total, dtype=torch.long, device=device)
    if mask.dim() == 4:
        last = mask[:, 0, -1, :total]
        return last.long() if last.dtype == torch.bool else (last == 0).long()
    return mask[:, :total]


class PromptTracker:
    """Follows the forward calls of one steered context and keeps the edit mask of the current one.

    The first call, and any later one that does not go on from what was read before, is a new prompt: its edit mask
    comes from its padding and from `positions`. A call goes on if its cache holds the prompt already, or if it reads
    the same prompt again with more behind it. Columns behind the prompt are answer tokens.
    """

    def __init__(self, queries: int, positions: Positions) -> None:
        self.queries = queries
        self.positions = positions
        self.mask: Tensor | None = None
        """(rows, columns of this call) bool; None when this call edits nothing."""
        self._prompt_mask: Tensor | None = None  # (rows, prompt)
        self._prompt_ids: Tensor | None = None
        self._start = 0
        self._call_start = 0
        self._cache: ref[Any] | None = None  # of the latest call

    def observe(self, call: Mapping[str, Any]) -> None:
        """Look at the named arguments of a forward call that is about to run."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise ATVError("The LLM was called with neither input_ids nor inputs_embeds; a steered call needs one.")
        rows, width = tokens.shape[:2]
        past = call.get("past_key_values")
        start = int(past.get_seq_length()) if past is not None else 0
        same_cache = past is not None and self._cache is not None and self._cache() is past
        self._cache = None if past is None else ref(past)
        if not self._goes_on(ids, start, rows, same_cache):
            self._begin(tokens, call.get("attention_mask"), ids, start)
        assert self._prompt_mask is not None
        self._call_start = start
        prompt = self._prompt_mask.shape[1]
        if start >= prompt:  # answer tokens alone: known from shapes, so that a decoding step waits for no device
            answer = self.positions.answer
            self.mask = torch.ones(rows, width, dtype=torch.bool, device=tokens.device) if answer else None
            return
        known = self._prompt_mask[:, start : start + width]  # columns of the prompt in this call
        mask = torch.nn.functional.pad(known, (0, width - known.shape[1]), value=self.positions.answer)
        self.mask = mask if bool(mask.any()) else None

    def prompt_ends(self) -> Tensor | None:
        """The column of this call where each row's prompt ends, (rows,); None when the call holds no prompt's end."""
        prompt = self._prompt_mask
        if prompt is None or self._call_start >= prompt.shape[1]:
            return None
        from_end = prompt.flip(-1).int().argmax(-1)  # a prompt's last token is edited wherever vectors are added
        return prompt.shape[1] - 1 - from_end - self._call_start

    def _goes_on(self, ids: Tensor | None, start: int, rows: int, same_cache: bool) -> bool:
        prompt = self._prompt_mask
        if prompt is None or rows != prompt.shape[0]:
            return False
        if self._start < start < prompt.shape[1] and self.positions.prompt_tokens is not None:
            if not same_cache:
                return False  # another prompt, whose beginning was read before
            raise ATVError(
                "The LLM's cache was cut back into what looked like the prompt, as assisted decoding does "
                "(assistant_model, prompt_lookup_num_tokens): it reads guessed answer tokens together with the prompt, "
                "and nothing tells one from the other. Generate without it."
            )
        if start > self._start:
            return True  # the cache has grown since the prompt began: a decoding step
        seen = self._prompt_ids
        if ids is None or seen is None or start != self._start or ids.shape[1] <= seen.shape[1]:
            return False
        return bool((ids[:, : seen.shape[1]] == seen).all())

    def _begin(self, tokens: Tensor, mask: Tensor | None, ids: Tensor | None, start: int) -> None:
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
        attended = _attended(mask, rows, start + width, tokens.device)
        self._prompt_mask = edit_mask(attended, self.positions)
        self._prompt_ids, self._start = ids, start
