"""Identify an LLM by a fingerprint that is independent of dtype, quantisation, PEFT wrappers and added tokens."""

import base64
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Set
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from atv.lm.hooks import base_llm, decoder_layers, quantization, text_config

SAMPLES = 8
"""Values kept per tensor."""
ROWS = 16
"""Embeddings of which values are kept."""
QUANTISED = 256
"""Values per tensor of a quantised LLM that its digest covers."""


def describe_llm(llm: nn.Module, layer_path: str | None = None) -> dict[str, Any]:
    """Return what identifies an LLM: name, revision, shape, quantisation and a fingerprint."""
    config: Any = base_llm(llm).config
    return {
        "name": base_llm(llm).name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "model_type": config.model_type,
        "num_layers": len(decoder_layers(llm, layer_path)),
        "hidden_size": text_config(llm).hidden_size,
        "vocab_size": text_config(llm).vocab_size,
        "quantization": quantization(llm),
        "fingerprint": fingerprint(llm),
    }


def fingerprint(llm: nn.Module) -> dict[str, Any]:
    """Return a few values of an LLM's embeddings, other weights and active PEFT adapters, rounded to bfloat16.

    Returns:
        `rows`: number of embeddings;
        `embeddings`: values of some embeddings, spread over the vocabulary;
        `head`: values of the same rows of the language-model head; empty if it is tied to the embeddings, or quantised;
        `weights`: values by name, with all layers under one name. Of a quantised LLM only one-dimensional tensors, such
            as those of norms, which quantisation does not change;
        `adapters`: values of the active PEFT adapters; empty if there are none.
    """
    base = base_llm(llm)
    embeddings: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[operator]
    with align_module_device(embeddings):  # loads them if they are offloaded
        rows = len(cast(Tensor, embeddings.weight))
    parts, adapters = _adapters(llm)
    apart = {module for part in (embeddings, head, *parts) if part is not None for module in part.modules()}
    return {
        "rows": rows,
        "embeddings": _packed(_row_values(embeddings, rows)),
        "head": "" if (values := _head_values(llm, rows)) is None else _packed(values),
        "weights": sample_weights(base, apart, quantization(llm) is None, rows),
        "adapters": _packed(torch.cat(adapters)) if adapters else "",
    }


def sample_weights(
    module: nn.Module, apart: Set[nn.Module] = frozenset(), matrices: bool = True, vocabulary: int | None = None
) -> dict[str, str]:
    """Return a few values of every weight, rounded to bfloat16, by its name without layer numbers.

    Args:
        module: in any dtype, on any devices, partly offloaded or not.
        apart: modules whose weights are excluded.
        matrices: false includes only tensors with at most one dimension.
        vocabulary: tensors with this many rows are excluded too, since they grow with the embeddings.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for place, part in module.named_modules():
        if part in apart:
            continue
        with align_module_device(part):
            for name, p in part.named_parameters(recurse=False):
                plain = p.is_floating_point() and p.element_size() > 1  # neither packed bits nor float8
                if plain and (matrices or p.dim() <= 1) and p.shape[:1] != (vocabulary,):
                    where = re.sub(r"\.(base_layer|original_module)\b", "", f"{place}.{name}")  # the name without PEFT
                    found[re.sub(r"\.\d+\b", ".*", where)].append(_values(p))
    return {name: _packed(torch.cat(values)) for name, values in found.items()}


def _adapters(llm: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """Return the modules that PEFT has added to an LLM, and values of the active adapters."""
    parts: list[nn.Module] = []
    values: list[Tensor] = []
    for module in cast(Any, llm).modules():
        names = getattr(module, "adapter_layer_names", ())  # only PEFT's layers have it
        kinds = [part for name in names if isinstance(part := getattr(module, name, None), nn.Module)]
        parts += kinds
        if kinds and not module.disable_adapters:
            active = module.active_adapters
            values += [
                _values(p) for kind in kinds for key, p in kind.named_parameters() if key.split(".")[0] in active
            ]
            scaling = getattr(module, "scaling", {})
            values += [torch.tensor([scaling[name]], dtype=torch.bfloat16) for name in active if name in scaling]
    prompts = getattr(llm, "prompt_encoder", None)  # prefix tuning and prompt tuning
    if isinstance(prompts, nn.Module):
        active = cast(Any, llm).active_adapters
        values += [_values(p) for key, p in prompts.named_parameters() if key.split(".")[0] in active]
    return parts, values


def _head_values(llm: nn.Module, rows: int) -> Tensor | None:
    """Return values of the language-model head; None if its weight is quantised or tied to the embeddings."""
    base = base_llm(llm)
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
    tied = weight is base.get_input_embeddings().weight  # type: ignore[operator]
    return _row_values(head, rows) if plain and not tied and head is not None else None


def _row_values(module: nn.Module, count: int) -> Tensor:
    """Return values of existing rows, spread over the first `count` of a module's weight: (rows, values) bfloat16."""
    with align_module_device(module):
        weight = cast(Tensor, module.weight).detach()
        rows = _spread(count, ROWS)
        columns = _spread(weight.shape[1], SAMPLES)
        rows = rows[rows < len(weight)]
        return weight[rows.to(weight.device)][:, columns.to(weight.device)].float().cpu().to(torch.bfloat16)


def _spread(length: int, count: int) -> Tensor:
    return torch.linspace(0, length - 1, count, dtype=torch.float64).long()


def _values(tensor: Tensor) -> Tensor:
    """Return values spread over a tensor, in bfloat16 on the CPU."""
    flat = tensor.detach().reshape(-1)
    return flat[_spread(len(flat), SAMPLES).to(flat.device)].float().cpu().to(torch.bfloat16)


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.flatten().view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<i2").astype(np.int16)).view(torch.bfloat16).float()


def alike(one: str, other: str) -> bool:
    """Whether samples of weights are equal up to one step of bfloat16, or of float16 near 0 (rounding to a dtype)."""
    a, b = _unpacked(one), _unpacked(other)
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=2**-7, atol=2**-23, equal_nan=True).all())


def public_name(name: str) -> str:
    """Return a model's name for a model card: of a local folder only its last part, since the rest is private."""
    local = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or Path(name).exists()
    return PureWindowsPath(name).name if local else name


def llm_digest(llm: nn.Module) -> str:
    """Return a short digest of an LLM's fingerprint and, if it is quantised, of its quantised weights.

    These are not part of the fingerprint, which adapters compare: an LLM may be loaded in another quantisation.
    """
    digest = hashlib.sha256(json.dumps(fingerprint(llm), sort_keys=True).encode())
    if quantization(llm) is not None:
        for name, value in base_llm(llm).state_dict().items():
            if isinstance(value, Tensor) and value.numel() and not value.is_meta:
                flat = value.detach().reshape(-1)
                digest.update(name.encode())
                some = flat[_spread(len(flat), QUANTISED).to(flat.device)].cpu()
                digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def different_weights(made: dict[str, Any], found: dict[str, Any], llm: nn.Module) -> list[str]:
    """Describe how an LLM's fingerprint differs from that of the LLM that an adapter was made for."""
    one, other = made["fingerprint"], found["fingerprint"]
    # Matrices cannot be compared if one of the two is quantised.
    plain = made["quantization"] is None and found["quantization"] is None

    def same_rows(of: str, given: Tensor | None) -> bool:
        rows = _unpacked(of).view(-1, SAMPLES).to(torch.bfloat16)
        return given is None or not len(rows) or alike(_packed(rows[: len(given)]), _packed(given))

    embeddings: nn.Module = base_llm(llm).get_input_embeddings()  # type: ignore[operator]
    differing = [] if same_rows(one["embeddings"], _row_values(embeddings, one["rows"])) else ["embeddings"]
    weights, own = one["weights"], other["weights"]
    names = weights.keys() | own.keys() if plain else weights.keys() & own.keys()
    changed = sorted(
        name for name in names if name not in weights or name not in own or not alike(weights[name], own[name])
    )
    if changed:
        differing.append(f"weights ({changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''})")
    if plain and not same_rows(one["head"], _head_values(llm, one["rows"])):
        differing.append("language-model head")
    if not alike(one["adapters"], other["adapters"]):
        said = ["some" if side["adapters"] else "none" for side in (one, other)]
        differing.append(
            f"active PEFT adapters ({said[0]} against {said[1] if said != ['some', 'some'] else 'others'})"
        )
    return differing
