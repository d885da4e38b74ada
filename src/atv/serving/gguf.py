"""Is the LLM in a GGUF file the one in a Hugging Face folder? Compared before anything is served."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from atv.errors import ATVError
from atv.lm.hooks import base_llm, decoder_layers, text_config

ROWS = 16
"""Embeddings that are compared."""
QUANTISED = 0.2
"""Largest relative difference of embeddings. Four bits make about 0.1; those of another LLM differ by 1 or more."""
ROUNDED = 2.0**-7
"""Largest relative difference of the weights of norms, which GGUF files have in float32: twice that of bfloat16."""


def check_gguf(file: Path, outline: nn.Module) -> None:
    """Compare a GGUF file with an LLM: shape, all weights of norms, and some embeddings.

    Norms are not quantised, and every training changes them, so that a base model and its chat model differ in them.

    Args:
        file: the GGUF file; of a split one the first.
        outline: the LLM that adapters are for, from `load_outline`.

    Raises:
        ATVError: the file cannot be read, or contains another LLM.
    """
    found = _Gguf(file)
    base = base_llm(outline)
    name = base.name_or_path
    layers, width = len(decoder_layers(outline)), int(text_config(outline).hidden_size)
    if (found.layers, found.width) != (layers, width):
        raise ATVError(
            f"{file} has {found.layers} layers of width {found.width}; {name!r}, which the adapters are for, has "
            f"{layers} of width {width}. Give the GGUF file of that LLM."
        )
    names = found.names()
    compared = (_settings(text_config(outline), found), _norms(base, found, names), _embeddings(base, found))
    different = [place for place in compared if place is not None]
    if different:
        raise ATVError(
            f"{file} contains another LLM than {name!r}, which the adapters are for: {different[0]} differs. Vectors "
            "of one LLM mean nothing in another, not even in another training of it."
        )


class _Gguf:
    """What is read of a GGUF file."""

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ATVError(
                "GGUF files are read with the package gguf, which is not installed. Install it with: pip install gguf"
            ) from error
        if not file.is_file():
            raise ATVError(f"The GGUF file {file} does not exist.")
        self.file = file
        try:
            reader = GGUFReader(file)
            self.kind = str(reader.fields["general.architecture"].contents())
            self.layers, self.width = (
                int(reader.fields[f"{self.kind}.{name}"].contents()) for name in ("block_count", "embedding_length")
            )
            self.settings = {
                name: float(reader.fields[key].contents())
                for name in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
                if (key := f"{self.kind}.{name}") in reader.fields
            }
            self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:  # whatever a damaged file makes the reader do
            reason = " ".join(str(error).split())[:200]
            raise ATVError(f"{file} cannot be read as an LLM in GGUF: {type(error).__name__}: {reason}") from error

    def names(self) -> Any:
        """Return the map of names from Hugging Face's to those of the file."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        for number, kind in MODEL_ARCH_NAMES.items():
            if kind == self.kind:
                return get_tensor_name_map(number, self.layers)
        raise ATVError(
            f"The installed package gguf does not know the architecture {self.kind} of {self.file}, which therefore "
            "cannot be compared with the LLM. Update it: pip install --upgrade gguf"
        )

    def values(self, name: str, rows: Tensor | None = None) -> Tensor:
        """Return a tensor of the file, or some of its rows, in float32."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        data = tensor.data if rows is None else tensor.data[rows.numpy()]
        return torch.from_numpy(np.array(dequantize(data, tensor.tensor_type), dtype=np.float32))


def _settings(config: Any, found: _Gguf) -> str | None:
    """Return a setting that differs, of those that have one meaning in all LLMs; None: all are equal."""
    rope = getattr(config, "rope_parameters", None) or {}
    own: dict[str, Any] = {
        "rope.freq_base": (rope.get("full_attention") or rope).get("rope_theta"),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
    }
    for name, value in found.settings.items():
        if own[name] is not None and abs(value - own[name]) > ROUNDED * own[name]:
            return name
    return None


def _norms(base: nn.Module, found: _Gguf, names: Any) -> str | None:
    """Return a weight of norms that differs; None: all are equal."""
    for place, module in base.named_modules():
        for part, _ in module.named_parameters(recurse=False):
            name = names.get_name(f"{place}.{part}", try_suffixes=(".weight", ".bias"))
            if name not in found.tensors or "norm" not in name:
                continue
            with align_module_device(module):
                own = cast(Tensor, getattr(module, part)).detach().float().cpu()
            theirs = found.values(name)
            # llama.cpp adds the 1 to the weights of Gemma's norms that transformers adds in use
            same = [own.shape == theirs.shape and _close(own, theirs - shift) for shift in (0.0, 1.0)]
            if not any(same):
                return str(name)
    return None


def _close(own: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(own, theirs, rtol=ROUNDED, atol=1e-6)


def _embeddings(base: Any, found: _Gguf) -> str | None:
    """Return the name of the embeddings if they differ."""
    name = "token_embd.weight"
    if name not in found.tensors:
        raise ATVError(f"{found.file} has no embeddings of tokens. Give the first file of a split LLM.")
    embeddings: nn.Module = base.get_input_embeddings()
    with align_module_device(embeddings):
        weight = cast(Tensor, embeddings.weight).detach()
        count = min(len(weight), len(found.tensors[name].data))
        rows = torch.linspace(0, count - 1, ROWS, dtype=torch.float64).long()
        own = weight[rows.to(weight.device)].float().cpu()
    differ = (own - found.values(name, rows)).norm() > QUANTISED * own.norm()
    return name if bool(differ) else None
