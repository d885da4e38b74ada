"""The artifact: what `save_pretrained` writes, and every check that `from_pretrained` makes.

A folder with `atv_config.json`, `expansion.safetensors`, `README.md` and, if the generator was trained, a Hugging
Face folder `generator/`. Never pickle. Written beside its place and renamed into it.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from atv.config import ATVConfig
from atv.errors import ATVError
from atv.files import occupied, read_json, recover_folder, replace_folder, sha256, write_json
from atv.generator import Generator
from atv.hooks import base_llm, decoder_layers, quantization, text_config

if TYPE_CHECKING:
    from atv.model import ATVModel

FORMAT = 1
CONFIG_FILE = "atv_config.json"
EXPANSION_FILE = "expansion.safetensors"
GENERATOR_FOLDER = "generator"
LIBRARIES = ("adaptive-task-vectors", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Saved:
    """What `atv_config.json` says."""

    config: ATVConfig
    base_llm: dict[str, Any]
    training: dict[str, Any]


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


def save(model: "ATVModel", path: Path) -> None:
    """Write the adapter; a kill at any moment leaves the former folder or the new one."""
    if occupied(path) and not (path / CONFIG_FILE).exists():
        raise ATVError(f"{path} exists and is not an adapter; choose a new folder, so that nothing there is lost.")
    llm = describe_llm(model.llm, model.config.layer_path)
    with replace_folder(path) as part:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.expansion.state_dict().items()}
        save_file(tensors, part / EXPANSION_FILE, metadata={"format": "pt"})
        if model.config.train_generator:
            model.generator.save(part / GENERATOR_FOLDER)
        files = sorted(file for file in part.rglob("*.safetensors"))
        write_json(
            part / CONFIG_FILE,
            {
                "format": FORMAT,
                "config": model.config.to_dict(),
                "base_llm": llm,
                "generator": {"name": model.generator.name_or_path, "revision": model.generator.revision},
                "sha256": {file.relative_to(part).as_posix(): sha256(file) for file in files},
                "versions": {library: version(library) for library in LIBRARIES},
                "training": model.training_summary,
            },
        )
        (part / "README.md").write_text(model_card(model, llm), encoding="utf-8")


def locate(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter: as named, the `adapter` folder of a training, or downloaded from the hub."""
    path = Path(path_or_hub_id)
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


def read(folder: Path) -> Saved:
    """Read `atv_config.json` and compare every weight file with the digest that stands in it."""
    written = read_json(folder / CONFIG_FILE, "an adapter's configuration")
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise ATVError(f"{folder / CONFIG_FILE} has format {found}; this version reads format {FORMAT}.")
    try:
        config, digests = ATVConfig.from_dict(written["config"]), dict(written["sha256"])
        base, training = dict(written["base_llm"]), dict(written["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise ATVError(f"{folder / CONFIG_FILE} is damaged: {error}. Restore it or train again.") from error
    expected = {EXPANSION_FILE} | ({f"{GENERATOR_FOLDER}/model.safetensors"} if config.train_generator else set())
    if set(digests) != expected:
        raise ATVError(f"{folder / CONFIG_FILE} lists the weight files {sorted(digests)}; expected {sorted(expected)}.")
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file() or sha256(file) != digest:
            state = "altered or truncated" if file.is_file() else "missing"
            raise ATVError(f"{file} is {state}: it is not the file that was saved. Restore it or train again.")
    return Saved(config, base, training)


def check_llm(saved: Saved, llm: nn.Module, folder: Path) -> None:
    """Refuse an LLM that is not the one that the adapter was trained for."""
    found, made = describe_llm(llm, saved.config.layer_path), saved.base_llm
    same = ("model_type", "num_layers", "hidden_size", "vocab_size", "fingerprint")
    differing = [f"{name} {made.get(name)} against {found[name]}" for name in same if made.get(name) != found[name]]
    if differing:
        raise ATVError(
            f"The adapter {folder} was made for {made.get('name')} and the LLM given is {found['name']}; they differ "
            f"in {', '.join(differing)}. Load it onto {made.get('name')}, or train an adapter for {found['name']}."
        )


def load_generator(saved: Saved, folder: Path) -> Generator:
    """The generator of an adapter: its own trained one, or the frozen one that its configuration names."""
    source = str(folder / GENERATOR_FOLDER) if saved.config.train_generator else None
    return Generator.load(saved.config, source)


def load_expansion(model: "ATVModel", folder: Path) -> None:
    """Load the expansion's weights; shapes must fit exactly."""
    try:
        model.expansion.load_state_dict(load_file(folder / EXPANSION_FILE))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"{folder / EXPANSION_FILE} does not fit: {reason}") from error


def push(model: "ATVModel", repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Upload an adapter to the hub as one commit; returns its address."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(model, Path(folder) / "adapter")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder) / "adapter", commit_message="Upload an Adaptive Task Vector"
        )
    return str(commit)


def model_card(model: "ATVModel", llm: dict[str, Any]) -> str:
    """The card that goes with an adapter: what it is, what it was trained on, how to use it."""
    name = str(llm["name"])
    about = ["---", "library_name: adaptive-task-vectors", "tags: [adaptive-task-vectors, steering]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        about.append(f"base_model: {name}")
    return "\n".join([*about, "---", _CARD.format(
        name=name,
        layers=llm["num_layers"],
        hidden=llm["hidden_size"],
        generator=model.generator.name_or_path,
        config=model.config,
        tasks=", ".join(model.training_summary.get("tasks", {})) or "not recorded",
    )])  # fmt: skip


_CARD = """
# Adaptive Task Vector for {name}

A generator ({generator}) reads the query; a linear expansion turns its state into one vector per layer; the vectors
are added inside the frozen LLM (arXiv 2506.03426). No weight of the LLM is changed.

| | |
|---|---|
| base LLM | {name}, {layers} layers of width {hidden} |
| positions | {config.positions} |
| layers | {config.layers} |
| scale | {config.scale} |
| trained on | {tasks} |

```python
from atv import ATVModel

atv = ATVModel.from_pretrained("{name}", "PATH_OR_ID_OF_THIS_ADAPTER")
print(atv.generate(["a prompt"], queries=["the query in it"], max_new_tokens=8))
```

What it is good for is what it was measured on; it inherits the LLM's licence, faults and limits.
"""
