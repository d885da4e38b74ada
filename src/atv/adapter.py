"""An ATV's saved adapter, beside what `artifact` keeps of every method's.

`expansion.safetensors`, a model card and, if the generator was trained, a Hugging Face folder `generator/`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atv import artifact
from atv.config import ATVConfig
from atv.errors import ATVError
from atv.generator import Generator

if TYPE_CHECKING:
    from atv.model import ATVModel

EXPANSION_FILE = "expansion.safetensors"
GENERATOR_FOLDER = "generator"


def save(model: "ATVModel", path: Path) -> None:
    """Write the adapter; a kill at any moment leaves the former folder or the new one."""
    llm = artifact.describe_llm(model.llm, model.config.layer_path)

    def write(part: Path) -> None:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.expansion.state_dict().items()}
        save_file(tensors, part / EXPANSION_FILE, metadata={"format": "pt"})
        if model.config.train_generator:
            model.generator.save(part / GENERATOR_FOLDER)
        (part / "README.md").write_text(model_card(model, llm), encoding="utf-8")

    generator = {"name": model.generator.name_or_path, "revision": model.generator.revision}
    config, training = model.config.to_dict(), model.training_summary
    artifact.save(path, model.method, llm, config, training, write, {"generator": generator})


def read_config(saved: artifact.Saved, folder: Path) -> ATVConfig:
    """The configuration of an ATV's adapter, whose weight files must be the ones that it names."""
    try:
        config = ATVConfig.from_dict(saved.config)
    except (TypeError, ValueError) as error:
        raise ATVError(f"{folder / artifact.CONFIG_FILE} is damaged: {error}. Restore it or train again.") from error
    expected = {EXPANSION_FILE} | ({f"{GENERATOR_FOLDER}/model.safetensors"} if config.train_generator else set())
    if saved.weights != expected:
        raise ATVError(
            f"{folder / artifact.CONFIG_FILE} lists the weight files {sorted(saved.weights)}; expected "
            f"{sorted(expected)}."
        )
    return config


def load_generator(config: ATVConfig, folder: Path) -> Generator | None:
    """The trained generator of an adapter; None if it is the frozen one that its configuration names."""
    return Generator.load(config, str(folder / GENERATOR_FOLDER)) if config.train_generator else None


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
        generator=model.generator.describe(),
        reads="prompt" if model.own else "query",
        queries="" if model.own else ', queries=["the query in it"]',
        config=model.config,
        tasks=", ".join(model.training_summary.get("tasks", {})) or "not recorded",
    )])  # fmt: skip


_CARD = """
# Adaptive Task Vector for {name}

A generator ({generator}) reads the {reads}; a linear expansion turns its state into one vector per layer; the vectors
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
print(atv.generate(["a prompt"]{queries}, max_new_tokens=8))
```

What it is good for is what it was measured on; it inherits the LLM's licence, faults and limits.
"""
