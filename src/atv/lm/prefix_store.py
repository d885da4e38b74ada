"""Keys and values of the training prompts' prefixes, computed once and cached for all epochs.

They do not depend on the vectors (`prefix`), so later epochs cost the LLM only the edited tokens and the answer.
Beginnings that prompts share are read and cached once (`prefix_tree`). All are cached in the LLM's dtype, without loss:
in main memory up to its budget, then in memory-mapped safetensors files. What fits in neither is read again each time.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import DynamicCache

from atv.data.collate import left_padded, pad
from atv.files import write_bytes
from atv.lm.hooks import input_device
from atv.lm.identity import llm_digest
from atv.lm.prefix import as_cache, counts_positions, full_sides, read_prefix
from atv.lm.prefix_tree import Ids, batches, pieces_of, tree
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
        self.tokens_read = 0
        """Number of tokens that `fill` has let the LLM read, without padding."""
        self._seconds: dict[str, float] = {}  # key of a piece -> its share of the time that reading its batch took
        self._kept: dict[str, Tensor] = {}  # key of a piece -> (layers * 2, heads, own tokens, head width), on the CPU
        self._pieces: dict[str, list[str]] = {}  # key of a prefix -> keys of its pieces, if all of them are cached

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
        shares = bool(rows) and counts_positions(llm, 2 * max(map(len, rows)))  # those before a piece are padded
        starts = tree(rows) if shares else dict.fromkeys(rows, 0)
        room = True
        for number, batch in enumerate(batches(starts, READ_TOKENS)):
            room = room and self._keep(llm, [pieces_of(ids, starts) for ids in batch], number, files)
            advance(sum(ids in rows for ids in batch))
        self.disk_used = files.used if files is not None else 0
        for row in rows:
            keys = _keys(pieces_of(row, starts))
            if all(key in self._kept for key in keys):
                self._pieces[_key(row)] = keys
        self.left_out = sum(_key(row) not in self._pieces for row in rows)

    def seconds_of(self, prefixes: Iterable[Sequence[int]]) -> float:
        """Return the seconds that `fill` took for the cached ones of some prefixes, whenever that was."""
        pieces = {key for prefix in prefixes for key in self._pieces.get(_key(tuple(prefix)), ())}
        return sum(self._seconds.get(key, 0.0) for key in pieces)

    def _keep(self, llm: nn.Module, batch: list[list[Ids]], number: int, files: "_Files | None") -> bool:
        """Read and cache those of a batch of pieces that are missing; return false if one cannot be cached.

        Args:
            llm: the frozen LLM.
            batch: the pieces that lead to each piece, and it itself, as the tokens up to their ends.
            number: of the batch.
            files: where pieces are written for which memory has no room.
        """
        keys = [_keys(pieces) for pieces in batch]
        missing = [row for row, of_row in enumerate(keys) if of_row[-1] not in self._kept]
        if not missing:
            return True
        if any(key not in self._kept for of_row in keys for key in of_row[:-1]):
            return False
        began = time.perf_counter()
        stacked = self._read_pieces(llm, batch, [of_row[:-1] for of_row in keys])
        if stacked is None:
            return False
        overflow: dict[str, Tensor] = {}
        read = dict[str, int]()
        for row in missing:
            new = len(batch[row][-1]) - sum(self._kept[key].shape[2] for key in keys[row][:-1])
            read[keys[row][-1]] = new
            tokens = stacked[:, row, :, :new] if keys[row][:-1] else stacked[:, row, :, -new:]
            own = tokens.clone(memory_format=torch.contiguous_format)  # a view would keep the whole batch
            fits = self.memory_used + own.nbytes <= self.memory
            self.memory_used += own.nbytes if fits else 0
            (self._kept if fits else overflow)[keys[row][-1]] = own
        written = files.write(number, overflow) if files is not None and overflow else {}
        self._kept |= written
        self.tokens_read += sum(read.values())
        each = (time.perf_counter() - began) / sum(read.values())
        self._seconds |= {key: each * tokens for key, tokens in read.items()}
        return bool(written) or not overflow

    def _read_pieces(self, llm: nn.Module, batch: list[list[Ids]], before: list[list[str]]) -> Tensor | None:
        """Let the LLM read a batch of pieces after those before them; return their keys and values.

        Returns:
            (layers * 2, batch, heads, tokens, head width), padded on the right, or on the left if nothing is before
            them; None if the LLM's cache is not uniform.
        """
        device = input_device(llm)
        if not any(before):
            inputs = left_padded([pieces[-1] for pieces in batch], 0)
            cache = read_prefix(llm, **{name: value.to(device) for name, value in inputs.items()})
            return _stack(cache, inputs["input_ids"].shape[1])
        known = [[self._kept[key] for key in keys] for keys in before]
        starts = [sum(tokens.shape[2] for tokens in pieces) for pieces in known]
        width = max(starts)
        own, mask = pad([pieces[-1][start:] for pieces, start in zip(batch, starts, strict=True)], 0, "right")
        seen = torch.arange(width) >= width - torch.tensor(starts)[:, None]  # (batch, width), padded on the left
        places = torch.tensor(starts)[:, None] + torch.arange(own.shape[1])
        cache = read_prefix(
            llm,
            own.to(device),
            torch.cat([seen.to(mask), mask], dim=1).to(device),
            places.to(device),
            _gather(known, width, device),
        )
        return _stack(cache, width + own.shape[1], width)

    def read(self, llm: nn.Module, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
        """Like `prefix.read_prefix`, from the cache; the LLM reads only rows that are not cached."""
        attended = attention_mask.bool().cpu()
        lengths = attended.sum(1).tolist()
        known = [self._pieces.get(_key(ids[mask]), []) for ids, mask in zip(input_ids.cpu(), attended, strict=True)]
        kept = [[self._kept[key] for key in keys] for keys in known]
        new = [row for row, length in enumerate(lengths) if length and not kept[row]]
        if not any(kept):
            return read_prefix(llm, input_ids, attention_mask, position_ids)
        if new:
            fresh = read_prefix(llm, input_ids[new], attention_mask[new], position_ids[new])
            stacked = _stack(fresh, input_ids.shape[1])
            if stacked is None:
                return read_prefix(llm, input_ids, attention_mask, position_ids)
            for place, row in enumerate(new):
                kept[row] = [stacked[:, place, :, -lengths[row] :]]
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


def _key(ids: Ids | Tensor, start: int = 0) -> str:
    """Return the key of a piece, the tokens from `start` on of token ids (tokens,) int64, or of a whole prefix."""
    digest = hashlib.sha256(torch.as_tensor(ids).numpy().tobytes()).hexdigest()
    return f"{digest}-{start}" if start else digest


def _keys(pieces: Sequence[Ids]) -> list[str]:
    """Return the keys of the pieces of a prefix, each given as the tokens up to its end."""
    starts = [0, *map(len, pieces[:-1])]
    return [_key(ids, start) for ids, start in zip(pieces, starts, strict=True)]


def _stack(cache: Any, width: int, start: int = 0) -> Tensor | None:
    """Return a cache from column `start` on as (layers * 2, batch, heads, columns, head width) on the CPU.

    None if it is not uniform, or does not have all `width` columns.
    """
    sides = [side[:, :, start:].cpu() for pair in full_sides(cache, width) or () for side in pair]
    return torch.stack(sides) if sides and all(side.shape == sides[0].shape for side in sides) else None


def _gather(kept: Sequence[Sequence[Tensor]], width: int, device: torch.device) -> DynamicCache:
    """Join pieces of prefixes, (layers * 2, heads, tokens, head width), to one left-padded cache of `width` columns.

    Each is copied once, directly into place; padding is zero, and masked.
    """
    like = next(pieces[0] for pieces in kept if pieces)
    sides, heads, _, head = like.shape
    batch = torch.empty(sides, len(kept), heads, width, head, dtype=like.dtype, device=device)
    for row, pieces in enumerate(kept):
        start = width - sum(tokens.shape[2] for tokens in pieces)
        batch[:, row, :, :start] = 0
        for tokens in pieces:
            end = start + tokens.shape[2]
            batch[:, row, :, start:end] = tokens
            start = end
    return as_cache((batch[side], batch[side + 1]) for side in range(0, sides, 2))
