"""Keys and values of the training prompts' prefixes, computed once and cached for all epochs.

They do not depend on the vectors (`prefix`), so later epochs cost the LLM only the edited tokens and the answer.
They are cached in the LLM's dtype, without loss: in main memory up to its budget, then in memory-mapped safetensors
files. What fits in neither is read again each time.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import DynamicCache

from atv.data.collate import left_padded, like_lengths
from atv.files import write_bytes
from atv.lm.hooks import input_device
from atv.lm.identity import llm_digest
from atv.lm.prefix import as_cache, full_sides, read_prefix
from atv.progress import log

READ_TOKENS = 2048
"""Prompt tokens per call when the store is filled: enough to keep two cores or a GPU busy."""


class PrefixStore:
    """Caches the keys and values of prompt prefixes by their token ids.

    For a model whose cache is not one full pair of tensors per layer (sliding windows shorter than the prompt,
    recurrent states) nothing is cached, and all prefixes are read again each time.

    Args:
        memory: maximum bytes in main memory; None: this process's share of half of the available memory.
        disk: maximum bytes in files; None: this process's share of half of the free disk space there.
    """

    def __init__(self, memory: int | None = None, disk: int | None = None) -> None:
        self._share = 2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # shared by the processes on one machine
        self.memory = psutil.virtual_memory().available // self._share if memory is None else memory
        self.disk = disk
        self.memory_used = 0
        self.disk_used = 0
        self.left_out = 0
        """Number of prefixes that `fill` could not cache."""
        self._kept: dict[str, Tensor] = {}  # key -> (layers * 2, heads, tokens, head width), on the CPU

    def fill(
        self,
        llm: nn.Module,
        prefixes: Iterable[Sequence[int]],
        advance: Callable[[int], None],
        folder: Path | None = None,
    ) -> None:
        """Read prefixes, in batches that depend only on the set of prefixes.

        Rounding depends on the rest of a batch. Since prefixes are read before the first step and in a fixed order, a
        resumed training gets exactly the keys and values of the interrupted one.

        Args:
            llm: the frozen LLM.
            prefixes: token ids.
            advance: called with the number of prefixes that have just been read.
            folder: folder for files when main memory is full; existing files in it are reused. None: no files.
        """
        rows = {tuple(prefix) for prefix in prefixes if prefix}
        files = _Files(folder, llm_digest(llm), self.disk, self._share) if folder is not None else None
        if files is not None:
            self._kept |= files.found()
        room = True
        for number, batch in enumerate(like_lengths(rows, READ_TOKENS)):
            room = room and self._keep(llm, batch, number, files)
            advance(len(batch))
        self.disk_used = files.used if files is not None else 0
        self.left_out = sum(_key(torch.tensor(row)) not in self._kept for row in rows)

    def _keep(self, llm: nn.Module, batch: list[tuple[int, ...]], number: int, files: "_Files | None") -> bool:
        """Read and cache those of a batch of prefixes that are missing; return false if one cannot be cached."""
        keys = [_key(torch.tensor(ids)) for ids in batch]
        missing = [row for row, key in enumerate(keys) if key not in self._kept]
        if not missing:
            return True
        device = input_device(llm)
        cache = read_prefix(llm, **{name: value.to(device) for name, value in left_padded(batch, 0).items()})
        stacked = _stack(cache, len(batch[-1]))
        if stacked is None:
            return False
        overflow: dict[str, Tensor] = {}
        for row in missing:
            tokens = stacked[:, row, :, -len(batch[row]) :]  # (layers * 2, heads, tokens, head width)
            own = tokens.clone(memory_format=torch.contiguous_format)  # a view would keep the whole batch
            fits = self.memory_used + own.nbytes <= self.memory
            self.memory_used += own.nbytes if fits else 0
            (self._kept if fits else overflow)[keys[row]] = own
        if not overflow:
            return True
        written = files.write(number, overflow) if files is not None else {}
        self._kept |= written
        return bool(written)

    def read(self, llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        """Like `prefix.read_prefix`, from the cache; the LLM reads only rows that are not cached."""
        attended = attention_mask.bool().cpu()
        lengths = attended.sum(1).tolist()
        kept = [self._kept.get(_key(ids[mask])) for ids, mask in zip(input_ids.cpu(), attended, strict=True)]
        new = [row for row, length in enumerate(lengths) if length and kept[row] is None]
        if all(tokens is None for tokens in kept):
            return read_prefix(llm, input_ids, attention_mask, position_ids)
        if new:
            fresh = read_prefix(llm, input_ids[new], attention_mask[new], position_ids[new])
            stacked = _stack(fresh, input_ids.shape[1])
            if stacked is None:
                return read_prefix(llm, input_ids, attention_mask, position_ids)
            for place, row in enumerate(new):
                kept[row] = stacked[:, place, :, -lengths[row] :]
        return _gather(kept, input_ids.shape[1], input_ids.device)


class _Files:
    """The part of a store on disk: one safetensors file per batch, memory-mapped for reading."""

    def __init__(self, folder: Path, llm: str, budget: int | None, share: int) -> None:
        self.folder, self.llm, self.used = folder, llm, 0
        folder.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # counted as used below
        self.budget = (shutil.disk_usage(folder).free + there) // share if budget is None else budget

    def found(self) -> dict[str, Tensor]:
        """Return the tensors that an interrupted training has left; remove files that are damaged or of another LLM."""
        kept: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            tensors = self._open(path)
            if tensors is None:
                path.unlink()
            else:
                kept |= tensors
                self.used += path.stat().st_size
        return kept

    def write(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write tensors to a file and return them memory-mapped; return an empty dictionary if they do not fit."""
        data = save(tensors, {"llm": self.llm})
        path = self.folder / f"{number:06d}.safetensors"
        if self.used + len(data) > self.budget:
            return {}
        try:
            write_bytes(path, data)
        except OSError as error:
            log.warning(
                f"Cannot write prompt prefixes to {path}: {error.strerror or error}. No more files are written."
            )
            return {}
        self.used += len(data)
        return self._open(path) or {}

    def _open(self, path: Path) -> dict[str, Tensor] | None:
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("llm") == self.llm:
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, OSError):
            pass
        return None


def _key(ids: Tensor) -> str:
    """Return the key of a prefix: the digest of its token ids, (tokens,) int64, on the CPU."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def _stack(cache: Any, width: int) -> Tensor | None:
    """Return a cache as (layers * 2, batch, heads, width, head width) on the CPU; None if not uniform and full."""
    sides = [side.cpu() for pair in full_sides(cache, width) or () for side in pair]
    return torch.stack(sides) if sides and all(side.shape == sides[0].shape for side in sides) else None


def _gather(kept: Sequence[Tensor | None], width: int, device: torch.device) -> DynamicCache:
    """Join prefixes (layers * 2, heads, tokens, head width) to one left-padded cache of `width` columns.

    Each is copied once, directly into place; padding is zero, and masked.
    """
    like = next(tokens for tokens in kept if tokens is not None)
    sides, heads, _, head = like.shape
    batch = torch.empty(sides, len(kept), heads, width, head, dtype=like.dtype, device=device)
    for row, tokens in enumerate(kept):
        start = width - (0 if tokens is None else tokens.shape[2])
        batch[:, row, :, :start] = 0
        if tokens is not None:
            batch[:, row, :, start:] = tokens
    return as_cache((batch[side], batch[side + 1]) for side in range(0, sides, 2))
