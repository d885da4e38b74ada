"""Saved adapters of any method: a folder that is whole or not there, known to be unaltered and of which LLM it is.

`atv_config.json` says the method, its configuration, the LLM, how it was trained and the digest of every weight file;
weights are safetensors, never pickle. Written beside its place and renamed into it.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import nn

from atv.errors import ATVError
from atv.files import local, occupied, read_json, recover_folder, replace_folder, sha256, write_json
from atv.hooks import base_llm, decoder_layers, quantization, text_config

FORMAT = 1
CONFIG_FILE = "atv_config.json"
LIBRARIES = ("adaptive-task-vectors", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Saved:
    """What `atv_config.json` says."""

    method: str
    config: dict[str, Any]
    base_llm: dict[str, Any]
    training: dict[str, Any]
    weights: frozenset[str]
    """The weight files, relative to the folder."""


def describe_llm(llm: nn.Module, layer_path: str | None = None) -> dict[str, Any]:
    """What identifies an LLM: name, revision, shape, and a fingerprint of some of its embeddings; and its quantisation.

    The embeddings are never quantised: an adapter fits every quantisation of its LLM.
    """
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


def fingerprint(llm: nn.Module) -> str:
    """Digest of a few input embeddings, rounded to bfloat16 so that it is the same in every dtype one may load."""
    embeddings: nn.Module = base_llm(llm).get_input_embeddings()  # type: ignore[operator]
    with align_module_device(embeddings):  # brings them back if they are offloaded
        weight = cast(torch.Tensor, embeddings.weight)
        rows = torch.linspace(0, len(weight) - 1, 16).long().to(weight.device)
        sample = weight.detach()[rows, :64].float().cpu().to(torch.bfloat16)
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def save(
    path: Path,
    method: str,
    llm: dict[str, Any],
    config: dict[str, Any],
    training: dict[str, Any],
    write: Callable[[Path], None],
    about: dict[str, Any] | None = None,
) -> None:
    """Write an adapter; a kill at any moment leaves the former folder or the new one.

    Args:
        path: of the folder.
        method: its name in the registry.
        llm: from `describe_llm`.
        config: of the method.
        training: summary of how it was trained.
        write: writes the weights, as safetensors, and what else belongs there into the folder that it is given.
        about: more to be kept in `atv_config.json`.
    """
    path = local(path)
    if occupied(path) and not (path / CONFIG_FILE).exists():
        raise ATVError(f"{path} exists and is not an adapter; choose a new folder, so that nothing there is lost.")
    with replace_folder(path) as part:
        write(part)
        files = sorted(file for file in part.rglob("*.safetensors"))
        written = {"format": FORMAT, "method": method, "config": config, "base_llm": llm, **(about or {})}
        written["sha256"] = {file.relative_to(part).as_posix(): sha256(file) for file in files}
        written["versions"] = {library: version(library) for library in LIBRARIES}
        write_json(part / CONFIG_FILE, written | {"training": training})


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: as named, the `adapter` folder of a training, or downloaded from the hub."""
    path = local(path_or_hub_id)
    for folder in (path, path / "adapter"):
        recover_folder(folder)
        if (folder / CONFIG_FILE).exists():
            return folder
    name = str(path_or_hub_id)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ATVError(f"No adapter at {name}: {path / CONFIG_FILE} is missing. Make one with: atv train --out {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"])
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ATVError(f"No adapter at {name}: not a local folder, and the hub did not give it ({reason}).") from error


def identity(folder: Path) -> str:
    """A digest that is the same for the same adapter and differs after any change to it."""
    return sha256(folder / CONFIG_FILE)[:16]


def read(folder: Path, method: str | None = None) -> Saved:
    """Read `atv_config.json` and compare every weight file with the digest that stands in it.

    Args:
        folder: from `locate`.
        method: whose adapter it must be; None: any.
    """
    written = read_json(folder / CONFIG_FILE, "an adapter's configuration")
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise ATVError(f"{folder / CONFIG_FILE} has format {found}; this version reads format {FORMAT}.")
    try:
        digests, config = dict(written["sha256"]), dict(written["config"])
        base, training = dict(written["base_llm"]), dict(written["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise ATVError(f"{folder / CONFIG_FILE} is damaged: {error}. Restore it or train again.") from error
    made_by = str(written.get("method", "atv"))  # adapters were of this one method before there were others
    if method is not None and made_by != method:
        raise ATVError(f"{folder} is an adapter of the method {made_by}; expected one of the method {method}.")
    for name, digest in digests.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ATVError(f"{folder / CONFIG_FILE} names the weight file {name}, which is not inside the folder.")
        if not file.is_file() or sha256(file) != digest:
            state = "altered or truncated" if file.is_file() else "missing"
            raise ATVError(f"{file} is {state}: it is not the file that was saved. Restore it or train again.")
    return Saved(made_by, config, base, training, frozenset(digests))


def check_llm(saved: Saved, llm: nn.Module, folder: Path) -> None:
    """Refuse an LLM that is not the one that the adapter was trained for."""
    found, made = describe_llm(llm, saved.config.get("layer_path")), saved.base_llm
    same = ("model_type", "num_layers", "hidden_size", "vocab_size", "fingerprint")
    differing = [f"{name} {made.get(name)} against {found[name]}" for name in same if made.get(name) != found[name]]
    if differing:
        raise ATVError(
            f"The adapter {folder} was made for {made.get('name')} and the LLM given is {found['name']}; they differ "
            f"in {', '.join(differing)}. Load it onto {made.get('name')}, or train an adapter for {found['name']}."
        )
