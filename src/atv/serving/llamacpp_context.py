"""A context of llama.cpp that adds vectors of its own to each sequence, at its edited tokens.

llama.cpp calls back for each tensor that it computes (`cb_eval`); at the output of each decoder layer, vectors are
added to the rows of the edited tokens. Its control vectors, the usual way, cannot do that: they skip the first layer,
and add the same to all rows.
"""

import ctypes
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor

from atv.config import Positions
from atv.errors import ATVError, Unavailable, unknown
from atv.serving.beginnings import MOST
from atv.serving.requests import Limits
from atv.serving.steers import Part, Steering, edited_rows

TESTED = "0.3.36"
"""The version of llama-cpp-python that was compared with transformers; its low-level interface changes."""
SEQUENCES = 256
"""Most sequences of a context; some are for beginnings that prompts share."""
TYPES = {"f32": 0, "f16": 1}
"""ggml's numbers of the types of cached keys and values."""


@dataclass(frozen=True)
class Options:
    """How llama.cpp runs."""

    n_threads: int = 0
    """Threads; 0: as many as torch uses."""
    n_ubatch: int = 512
    """Most tokens per call of the LLM."""
    n_gpu_layers: int = 0
    """Layers on a GPU, for a llama.cpp that was built for one. Not tested."""
    cache_type: str = "f16"
    """Type of cached keys and values: f16 or f32."""
    flash_attn: bool = False
    """Whether to use llama.cpp's flash attention."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Return options by name; raise ATVError for unknown names and wrong values."""
        for name, value in given.items():
            if name not in cls.__dataclass_fields__:
                raise unknown("llama.cpp option", name, cls.__dataclass_fields__)
            default = getattr(cls, name)
            if type(value) is not type(default):
                raise ATVError(f"The llama.cpp option {name} is {value!r}; expected a value such as {default!r}.")
        found = cls(**given)
        if found.cache_type not in TYPES:
            raise unknown("cache_type", found.cache_type, TYPES)
        if found.n_ubatch < 1 or found.n_threads < 0 or found.n_gpu_layers < 0:
            raise ATVError("n_ubatch must be at least 1, n_threads and n_gpu_layers at least 0.")
        return found


class Reading(NamedTuple):
    """Tokens of one sequence that are read next."""

    ids: Sequence[int]
    sequence: int
    done: int
    """Number of its tokens before them."""
    prompt: int
    """Tokens of its prompt."""
    steering: Steering | None = None
    wanted: bool = True
    """Whether the logits after the last token are wanted."""


class Edits(NamedTuple):
    """What is added in one call of the LLM."""

    rows: Tensor
    """The edited rows of the call's flat batch, in ascending order."""
    owners: Tensor
    """Whose vectors each of them gets."""
    vectors: Tensor
    """(owners, layers, hidden)."""
    layers: frozenset[int]
    tokens: int
    """Number of rows."""
    outputs: Sequence[int]
    """Rows whose logits are wanted; in the last layer only these are left."""

    def at(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the edited rows of a layer's output, which has this many rows, and what is added to them.

        Raises:
            Unavailable: the output has rows of something else.
        """
        where, vectors = self.rows, self.vectors[self.owners, layer]
        if rows != self.tokens:
            if rows != len(self.outputs):
                raise Unavailable(f"Layer {layer} returned {rows} rows for {self.tokens} tokens.")
            place = {row: number for number, row in enumerate(self.outputs)}
            left = [index for index, row in enumerate(where.tolist()) if row in place]
            where, vectors = torch.tensor([place[int(where[index])] for index in left], dtype=torch.long), vectors[left]
        return where, vectors


def edits(parts: Sequence[tuple[Part, Steering | None]], layers: int, outputs: Sequence[int]) -> Edits | None:
    """Return what is added in a call; None: nothing.

    Args:
        parts: of the call's flat batch, and what is added to each.
        layers: number of the LLM's decoder layers.
        outputs: rows whose logits are wanted.
    """
    rows, owners, steered = list[int](), list[int](), set[int]()
    dense: list[Tensor] = []
    for part, steering in parts:
        if steering is not None and (where := edited_rows(part, steering.positions)):
            rows += list(where)
            owners += [len(dense)] * len(where)
            dense.append(steering.dense(layers))
            steered.update(steering.layers)
    if not rows:
        return None
    tokens = sum(part.new for part, _ in parts)
    return Edits(torch.tensor(rows), torch.tensor(owners), torch.stack(dense), frozenset(steered), tokens, outputs)


class LlamaCpp:
    """A context of llama.cpp, whose sequences share its cells of keys and values. For one thread at a time.

    Args:
        gguf: the LLM.
        limits: of the tokens and sequences that it has to hold.
        options: how it runs.

    Raises:
        ATVError: llama.cpp cannot load or steer the LLM.
    """

    def __init__(self, gguf: Path, limits: Limits, options: Options) -> None:
        self._cpp, self._ggml, self._said = libraries()
        self._edits: Edits | None = None
        self._applied: set[int] = set()
        self._error: Exception | None = None
        self._model = self._context = self._batch = None
        cpp: Any = self._cpp
        model = cpp.llama_model_default_params()
        model.n_gpu_layers = options.n_gpu_layers
        self._model = cpp.llama_model_load_from_file(str(gguf).encode(), model)
        if not self._model:
            raise ATVError(f"llama.cpp cannot load {gguf}: {self._reason()}")
        if cpp.llama_model_is_recurrent(self._model) or cpp.llama_model_is_hybrid(self._model):
            self.close()
            raise ATVError(f"{gguf} is a recurrent LLM, which cannot be steered with llama.cpp; use transformers.")
        self.layers = int(cpp.llama_model_n_layer(self._model))
        self.width = int(cpp.llama_model_n_embd(self._model))
        self.context = int(cpp.llama_model_n_ctx_train(self._model))
        self.vocabulary = int(cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self._model)))
        size = {"f16": 2, "f32": 4}[options.cache_type]
        shared = int(cpp.llama_model_n_head_kv(self._model))
        self.cell_bytes = self.layers * shared * (self._head_width("key") + self._head_width("value")) * size
        """Memory of the keys and values of one token."""
        self._names = {f"l_out-{layer}".encode(): layer for layer in range(self.layers)}
        self._ubatch = options.n_ubatch
        self._callback = cpp.ggml_backend_sched_eval_callback(self._computed)

        given = cpp.llama_context_default_params()
        # Beginnings are dropped after new ones were read, those of one batch at most.
        cells = limits.tokens + limits.kept // self.cell_bytes + limits.prefill
        given.n_ctx, given.n_batch, given.n_ubatch = cells, self._ubatch, self._ubatch
        given.n_seq_max = given.n_outputs_max = sequences(limits.rows)
        given.n_threads = given.n_threads_batch = options.n_threads or torch.get_num_threads()
        given.flash_attn_type = int(options.flash_attn)
        given.type_k = given.type_v = TYPES[options.cache_type]
        given.cb_eval = self._callback
        given.kv_unified = given.swa_full = True
        self._context = cpp.llama_init_from_model(self._model, given)
        if not self._context:
            reason = self._reason()
            self.close()
            raise ATVError(f"llama.cpp cannot make a context of {cells} tokens (--tokens makes it smaller): {reason}")
        self._memory = cpp.llama_get_memory(self._context)
        self._batch = cpp.llama_batch_init(self._ubatch, 0, 1)
        self._free = list(range(given.n_seq_max))
        try:
            self._probe()
        except ATVError:
            self.close()
            raise

    def _head_width(self, side: str) -> int:
        """Return the width of the keys or values of one head, which often is not the LLM's width by its heads."""
        found = self._metadata(f"{self._metadata('general.architecture')}.attention.{side}_length")
        return int(found) if found else self.width // int(self._cpp.llama_model_n_head(self._model))

    def _metadata(self, name: str) -> str:
        """Return a value of the file; empty: it has none of this name."""
        buffer = ctypes.create_string_buffer(256)
        self._cpp.llama_model_meta_val_str(self._model, name.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace")

    def _reason(self) -> str:
        return " ".join("".join(self._said).split())[-300:] or "it gave no reason."

    def _probe(self) -> None:
        """Read a token with an edit in every layer, so that an LLM without outputs of layers is refused at once."""
        zero = Steering(torch.zeros(self.layers, self.width), tuple(range(self.layers)), Positions(None, True))
        with self.sequence() as sequence:
            self.read([Reading([0], sequence, 0, 1, zero)])
            self.drop(sequence)

    # ---- sequences ----

    def take(self) -> int:
        """Return a new sequence."""
        return self._free.pop()

    @contextmanager
    def sequence(self) -> Iterator[int]:
        """Take a sequence, which is freed if the block raises."""
        taken = self.take()
        try:
            yield taken
        except BaseException:
            self.drop(taken)
            raise

    def copy(self, source: int, count: int) -> int:
        """Return a new sequence with the first `count` tokens of another; both use the same cells."""
        taken = self.take()
        self._cpp.llama_memory_seq_cp(self._memory, source, taken, 0, count)
        return taken

    def drop(self, sequence: int) -> None:
        """Free a sequence."""
        self._cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        self._free.append(sequence)

    # ---- reading ----

    def read(self, readings: Sequence[Reading]) -> Tensor:
        """Read tokens of several sequences, in as many calls as they take.

        Returns:
            (wanted, vocabulary) float32: the logits after each reading that wants them.

        Raises:
            Unavailable: llama.cpp failed. The sequences must not be read further.
        """
        found = []
        for call in _calls(readings, self._ubatch):
            found += self._call(call)
        return torch.stack(found) if found else torch.empty(0, self.vocabulary)

    def _call(self, readings: Sequence[Reading]) -> list[Tensor]:
        batch: Any = self._batch
        parts, outputs, row = [], list[int](), 0
        for reading in readings:
            parts.append((Part(row, len(reading.ids), reading.done, reading.prompt), reading.steering))
            for place, token in enumerate(reading.ids, reading.done):
                batch.token[row], batch.pos[row] = token, place
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, reading.sequence
                batch.logits[row] = 0
                row += 1
            if reading.wanted:
                batch.logits[row - 1] = 1
                outputs.append(row - 1)
        batch.n_tokens = row
        self._edits = edits(parts, self.layers, outputs)
        self._applied.clear()
        self._error = None
        try:
            code = self._cpp.llama_decode(self._context, batch)
            if self._error is not None:
                raise self._error
            if code != 0:
                raise Unavailable(f"llama.cpp failed (code {code}): {self._reason()}")
            if self._edits is not None and (left := sorted(self._edits.layers - self._applied)):
                raise Unavailable(
                    f"llama.cpp computed no output named l_out of the layers {left}; they were not steered."
                )
        finally:
            self._edits = None
        return [self._logits(output) for output in outputs]

    def _logits(self, row: int) -> Tensor:
        values = self._cpp.llama_get_logits_ith(self._context, row)
        buffer = ctypes.cast(values, ctypes.POINTER(ctypes.c_float * self.vocabulary)).contents
        return torch.frombuffer(buffer, dtype=torch.float32).clone()

    def _computed(self, tensor: int, ask: bool, _: Any) -> bool:
        """Called by llama.cpp: whether a tensor is wanted (`ask`), then with it. False ends the call of the LLM.

        An exception cannot pass through llama.cpp, so that it is kept.
        """
        try:
            layer = None if self._edits is None else self._names.get(self._ggml.ggml_get_name(tensor))
            if self._edits is None or layer not in self._edits.layers:
                return not ask
            if not ask:
                self._add(tensor, layer, self._edits)
            return True
        except Exception as error:
            self._error = error
            return False

    def _add(self, tensor: int, layer: int, now: Edits) -> None:
        """Add the vectors of a layer to its output."""
        values, row = self._ggml.ggml_nelements(tensor), 4 * self.width
        if self._ggml.ggml_nbytes(tensor) != 4 * values or values % self.width:
            raise Unavailable(f"The output of layer {layer} is not rows of {self.width} float32 numbers.")
        rows, vectors = now.at(layer, values // self.width)
        if len(rows):
            first, last = int(rows[0]), int(rows[-1])
            hidden = torch.empty(last + 1 - first, self.width)
            where = (hidden.data_ptr(), first * row, len(hidden) * row)
            self._ggml.ggml_backend_tensor_get(tensor, *where)
            hidden.index_add_(0, rows - first, vectors)
            self._ggml.ggml_backend_tensor_set(tensor, *where)
        self._applied.add(layer)

    def close(self) -> None:
        """Free its memory."""
        if self._batch is not None:
            self._cpp.llama_batch_free(self._batch)
        if self._context:
            self._cpp.llama_free(self._context)
        if self._model:
            self._cpp.llama_model_free(self._model)
        self._model = self._context = self._batch = None


def _calls(readings: Sequence[Reading], most: int) -> Iterator[list[Reading]]:
    """Split readings into calls of at most `most` tokens."""
    call: list[Reading] = []
    room = most
    for reading in readings:
        ids, done = reading.ids, reading.done
        while ids:
            now, ids = ids[:room], ids[room:]
            call.append(reading._replace(ids=now, done=done, wanted=reading.wanted and not ids))
            done, room = done + len(now), room - len(now)
            if not room:
                yield call
                call, room = [], most
    if call:
        yield call


def sequences(rows: int) -> int:
    """Return the number of sequences that are needed: rows, kept beginnings, and new beginnings of one batch."""
    return 2 * rows + MOST


@cache
def libraries() -> tuple[Any, Any, deque[str]]:
    """Return the low-level interface of llama.cpp, its library of tensors, and the last lines of its log.

    Raises:
        ATVError: llama-cpp-python is missing or not the tested version.
    """
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError as error:
        raise ATVError(
            f"The engine llamacpp needs the package llama-cpp-python {TESTED}, which is not installed. Installing it "
            "compiles llama.cpp, which takes minutes: pip install 'adaptive-task-vectors[llamacpp]'"
        ) from error
    if found != TESTED:
        raise ATVError(
            f"llama-cpp-python {found} is installed; version {TESTED} was tested, and its low-level interface changes. "
            f"Install it: pip install llama-cpp-python=={TESTED}"
        )
    import llama_cpp.llama_cpp as llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    ggml = load_shared_library("ggml-base", Path(cast(str, llama_cpp.__file__)).parent / "lib")
    size, number, text = ctypes.c_size_t, ctypes.c_int64, ctypes.c_char_p
    for name, arguments, result in (
        ("ggml_get_name", [ctypes.c_void_p], text),
        ("ggml_nelements", [ctypes.c_void_p], number),
        ("ggml_nbytes", [ctypes.c_void_p], size),
        ("ggml_backend_tensor_get", [ctypes.c_void_p, ctypes.c_void_p, size, size], None),
        ("ggml_backend_tensor_set", [ctypes.c_void_p, ctypes.c_void_p, size, size], None),
    ):
        function = getattr(ggml, name)
        function.argtypes, function.restype = arguments, result
    said: deque[str] = deque(maxlen=20)
    log_line = llama_cpp.llama_log_callback(lambda _, line, __: said.append(line.decode(errors="replace")))
    llama_cpp.llama_log_set(log_line, None)
    llama_cpp.atv_log = log_line  # it must live as long as the library
    llama_cpp.llama_backend_init()
    return llama_cpp, ggml, said
