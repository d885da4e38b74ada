"""Task vectors of queries that come again: kept while they fit, and made again after a weight has changed."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 16
"""Elements of each tensor that are compared at every call."""


class Lock:
    """A lock that may be taken again by the thread that has it; a copy of its owner gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return Lock, ()


class AdapterHash:
    """The sha256 of a module's weights and of what else decides its vectors, computed again only after a change.

    The weights are hashed at the first use and after a change: on one core 0.06 s for a generator of 22 million
    parameters and 0.3 s for one of 124 million. Whether there was a change is told at every use, in about 1 ms, from
    three signs of each tensor: which storage it has, torch's counter of writes to it, and the values of a few of its
    elements. The counter alone would not do: torch's fused Adam and writes through `.data` do not move it. What no sign
    shows is a write through `.data` to single elements that are not among the few; after one, clear the cache.
    """

    def __init__(self) -> None:
        self._known: tuple[tuple[object, ...], str] | None = None  # one value, so that no thread sees half of it

    @torch.no_grad()
    def of(self, module: nn.Module, about: str) -> str:
        """The hash of the weights that `module` has now, and of `about`."""
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
    """Task vectors by adapter and query; those not asked for longest make room for new ones. Threads may share it.

    Args:
        limit: most bytes to keep; 0 turns the cache off. The vectors of one query take 4 bytes x layers x hidden.
    """

    def __init__(self, limit: int = 64 * 2**20) -> None:
        self.limit = limit
        self.used = 0
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()  # (layers, hidden) each
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of queries whose vectors are kept."""
        return len(self._kept)

    def get(self, adapter: str, queries: Sequence[str], make: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """The vectors of queries, kept or made: (queries, layers, hidden), a tensor of the caller's own.

        Args:
            adapter: hash of what makes the vectors.
            queries: texts; one that comes several times is made once.
            make: called once, with the queries that are not kept, unless there are none.
        """
        found = {}
        with self._lock:
            for query in queries:
                if (adapter, query) in self._kept:
                    self._kept.move_to_end((adapter, query))
                    found[query] = self._kept[adapter, query]
        missing = [query for query in dict.fromkeys(queries) if query not in found]
        if missing:  # made without the lock: two threads may make the same vectors, and neither waits
            for query, vectors in zip(missing, make(missing), strict=True):
                found[query] = vectors
                self._keep((adapter, query), vectors)
        return torch.stack([found[query] for query in queries])

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._kept.clear()
            self.used = 0

    def _keep(self, key: tuple[str, str], vectors: Tensor) -> None:
        with self._lock:
            if vectors.nbytes <= self.limit and key not in self._kept:
                self._kept[key] = vectors.clone()  # alone: a row of a batch would keep the whole batch in memory
                self.used += vectors.nbytes
            while self.used > self.limit:
                self.used -= self._kept.popitem(last=False)[1].nbytes
