"""A cache of task vectors by query, which are recomputed after a weight has changed."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 16
"""Elements of each tensor that are compared on every call."""


class Lock:
    """A reentrant lock; a copy of its owner gets a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Lock, ()


class AdapterHash:
    """The sha256 of a module's weights and of everything else that determines its vectors, recomputed after a change.

    The weights are hashed on first use and after a change: on one core 0.06 s for a generator of 22 million parameters
    and 0.3 s for one of 124 million. Each use checks for a change, in about 1 ms, by three signs of each tensor: its
    storage, torch's write counter, and the values of a few elements. The counter alone is not enough: torch's fused
    Adam and writes through `.data` do not increment it. A write through `.data` to elements outside the sample goes
    unnoticed; clear the cache after one.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[object, ...], str] | None = None  # one tuple, so that threads see it whole

    @torch.no_grad()
    def of(self, module: nn.Module, about: str) -> str:
        """Return the hash of the current weights of `module` and of `about`."""
        signs = (about, *_signs(module))
        known = self._known
        if known is None or known[0] != signs:
            known = self._known = signs, _hash(module, about)
        return known[1]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _signs(module: nn.Module) -> Iterator[object]:
    samples = []
    for _, tensor in _tensors(module):
        version = 0 if tensor.is_inference() else tensor._version  # torch counts no writes to inference tensors
        yield id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.shape
        samples.append(tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)])
    yield torch.cat(samples).view(torch.uint8).cpu().numpy().tobytes()


def _hash(module: nn.Module, about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in _tensors(module):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class VectorCache:
    """A thread-safe LRU cache of task vectors by adapter and query.

    Args:
        limit: maximum bytes to keep; 0 turns the cache off. One query's vectors take 4 bytes x layers x hidden.
    """

    def __init__(self, limit: int = 64 * 2**20) -> None:
        self.limit = limit
        self.used = 0
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()  # (layers, hidden) each
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of cached queries."""
        return len(self._kept)

    def get(self, adapter: str, queries: Sequence[str], make: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """Return the vectors of queries, cached or newly made, as a new tensor (queries, layers, hidden).

        Args:
            adapter: hash of what makes the vectors.
            queries: texts; vectors of a repeated one are made once.
            make: called once with the queries that are not cached, if there are any.
        """
        found = {}
        with self._lock:
            for query in queries:
                if (adapter, query) in self._kept:
                    self._kept.move_to_end((adapter, query))
                    found[query] = self._kept[adapter, query]
        missing = [query for query in dict.fromkeys(queries) if query not in found]
        if missing:  # without the lock: two threads may make the same vectors, but neither waits
            for query, vectors in zip(missing, make(missing), strict=True):
                found[query] = vectors
                self._keep((adapter, query), vectors)
        return torch.stack([found[query] for query in queries])

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._kept.clear()
            self.used = 0

    def _keep(self, key: tuple[str, str], vectors: Tensor) -> None:
        with self._lock:
            if vectors.nbytes <= self.limit and key not in self._kept:
                self._kept[key] = vectors.clone()  # a view of a row would keep the whole batch in memory
                self.used += vectors.nbytes
            while self.used > self.limit:
                self.used -= self._kept.popitem(last=False)[1].nbytes
