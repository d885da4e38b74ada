"""Saving and loading an ATV's adapter: the files that are specific to an ATV (`artifact` handles the rest).

They are `expansion.safetensors`, a model card and, unless the generator can be loaded by its name, a Hugging Face
folder `generator/`.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from atv import artifact
from atv.config import ATVConfig
from atv.data.collate import pad, pad_id
from atv.errors import ATVError
from atv.expansion import Expansion, PaperExpansion, new_expansion
from atv.generator import GENERATORS, Generator, load_generator
from atv.lm import identity
from atv.lm.load import new_model, reading_part

EXPANSION_FILE = "expansion.safetensors"
GENERATOR_FOLDER = "generator"


def require_savable(config: ATVConfig, generator: Generator, expansion: Expansion | PaperExpansion) -> None:
    """Raise ATVError if an adapter of these parts would load as something else.

    Loading builds the modules that the configuration names, so custom modules in their place would be lost.
    """
    kind = GENERATORS.get(config.generator, Generator)
    if type(generator) is not kind:
        raise unsavable(
            f"the generator is a {type(generator).__name__}; expected a {kind.__name__} (register a custom class "
            "in atv.generator.GENERATORS)"
        )
    for name in ("pooling", "query_template"):
        found, expected = getattr(generator, name), getattr(config, name)
        if kind is Generator and found != expected:
            raise unsavable(f"the generator's {name} is {found!r}; the configuration says {expected!r}")
    with torch.device("meta"):
        built = new_expansion(config, generator.hidden_size, *_shape(expansion))
        if isinstance(built, Expansion) and isinstance(expansion, Expansion):
            built.set_tasks(len(expansion.means))
        parts: list[tuple[str, nn.Module, nn.Module]] = [("expansion", expansion, built)]
        if kind is Generator:
            whole = new_model(generator.model_config)
            parts.append(("generator's encoder", generator.encoder, reading_part(whole)))
    for name, found, expected in parts:
        if (differs := _structure(found) ^ _structure(expected)) != set():
            where, type_or_shape = min(differs)
            raise unsavable(f"the {name} is not a plain {type(expected).__name__} ({where or name}: {type_or_shape})")


def _shape(expansion: nn.Module) -> tuple[int, int]:
    """Return vectors per query and their width; raise ATVError if the expansion is not one of `atv.expansion`."""
    shape = getattr(expansion, "shape", None)
    if shape is None:
        raise unsavable(f"the expansion is a {type(expansion).__name__}; expected one of atv.expansion")
    return shape  # type: ignore[no-any-return]


def unsavable(what: str) -> ATVError:
    """Return the error for a part that differs from what the configuration builds."""
    return ATVError(
        f"An adapter of this model would load as a different model: {what}. Leave the parts as the configuration "
        "builds them, or save the model's state_dict() and train it in your own loop."
    )


def _structure(module: nn.Module) -> set[tuple[str, str]]:
    """Return every part with its type and every parameter with its shape; buffers, such as a gate's rows, may vary."""
    types = {(name, f"{type(part).__module__}.{type(part).__qualname__}") for name, part in module.named_modules()}
    return types | {(name, str(tuple(p.shape))) for name, p in module.named_parameters()}


def save(
    path: Path,
    method: str,
    llm: dict[str, Any],
    config: ATVConfig,
    generator: Generator,
    expansion: Expansion | PaperExpansion,
    training: dict[str, Any],
) -> None:
    """Write an adapter atomically: a kill at any moment leaves either the old folder or the new one.

    Args:
        path: folder to write.
        method: its name in the registry.
        llm: from `describe_llm`.
        config: configuration of the ATV.
        generator: in eval mode; written unless it is frozen and can be loaded by its name.
        expansion: in eval mode.
        training: summary of the training.

    Raises:
        ATVError: the written adapter would load as something else.
    """
    named = (config.generator, config.generator_revision)
    kept = generator.savable and bool(config.train_generator or generator.loaded_by != named)

    def write(part: Path) -> None:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in expansion.state_dict().items()}
        save_file(tensors, part / EXPANSION_FILE, metadata={"format": "pt"})
        if kept:
            generator.save(part / GENERATOR_FOLDER)
        (part / artifact.CARD_FILE).write_text(model_card(llm, config, generator, training), encoding="utf-8")
        _require_read_back(config, generator, expansion, part, kept)

    about: dict[str, Any] = {"name": generator.name_or_path, "revision": generator.revision}
    if generator.savable and not kept:
        about["weights"] = identity.sample_weights(generator.encoder)
    artifact.save(
        path, method, llm, config.to_dict(), training, write, {"generator": about, "vectors": list(_shape(expansion))}
    )


PROBES = ("The kettle leaks and the lid sticks.", "Harbour: 17 boats?")
"""Queries for which vectors are compared."""


@torch.no_grad()
def _require_read_back(
    config: ATVConfig, own: Generator, expansion: Expansion | PaperExpansion, folder: Path, kept: bool
) -> None:
    """Raise ATVError unless generator and expansion, read from `folder`, make the same vectors as those in memory."""
    weight = next(expansion.parameters())
    with torch.random.fork_rng(devices=[]):
        read_expansion = new_expansion(config, own.hidden_size, *_shape(expansion)).to(weight)
    load_expansion(read_expansion, folder)
    if own.savable:
        read = saved_generator(config, folder) if kept else load_generator(config)
        states = [_states(each) for each in (own, read.to(next(own.encoder.parameters())).eval())]
    else:  # no generator to read back
        states = [torch.linspace(-1, 1, 2 * own.hidden_size).view(2, own.hidden_size).to(weight)] * 2
    made, again = expansion(states[0]), read_expansion.eval()(states[1])
    if not made.isfinite().all():
        raise ATVError(
            "The vectors that this model makes are not finite: its training diverged, and there is nothing to save. "
            "Lower the learning rate or the scale, or clip the gradient."
        )
    # Compare states too: an untrained expansion makes the same vectors from any state.
    if not all(_alike(*pair) for pair in ((made, again), states)):
        other = "" if kept else f", or {own.name_or_path} is a different generator"
        raise unsavable(f"its vectors would differ (a hook changes what a part returns{other})")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * one.abs().mean().nan_to_num().item())


def _states(generator: Generator) -> torch.Tensor:
    ids, mask = pad(generator.encode(PROBES), pad_id(generator.tokenizer), "right")
    states: torch.Tensor = generator(ids.to(generator.device), mask.to(generator.device))
    return states


def read_config(saved: artifact.Saved, folder: Path) -> ATVConfig:
    """Return the configuration of an ATV's adapter; raise ATVError if its weight files do not match it."""
    try:
        config = ATVConfig.from_dict(saved.config)
    except (TypeError, ValueError) as error:
        raise artifact.damaged(folder, str(error)) from error
    others = saved.weights - {EXPANSION_FILE}
    own = {name for name in others if name.startswith(f"{GENERATOR_FOLDER}/")}
    if EXPANSION_FILE not in saved.weights or others != own or (config.train_generator and not own):
        raise ATVError(
            f"{folder / artifact.CONFIG_FILE} lists the weight files {sorted(saved.weights)}; expected "
            f"{EXPANSION_FILE}{' and those of the generator' if config.train_generator else ''}."
        )
    return config


def has_generator(saved: artifact.Saved) -> bool:
    """Whether the adapter contains the generator rather than only naming it."""
    return any(name.startswith(f"{GENERATOR_FOLDER}/") for name in saved.weights)


def saved_generator(config: ATVConfig, folder: Path) -> Generator:
    """Load the generator that an adapter contains."""
    return GENERATORS.get(config.generator, Generator).load_saved(config, folder / GENERATOR_FOLDER)


def vectors_shape(saved: artifact.Saved, folder: Path) -> tuple[int, int]:
    """Return the number of vectors per query and their width.

    Raises:
        ATVError: `vectors` is not that of the expansion's weights, which may not even fit in memory.
    """
    shape = saved.about.get("vectors")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise artifact.damaged(folder, f"vectors is {shape!r}; expected their number and width")
    with safe_open(folder / EXPANSION_FILE, "pt") as file:
        sizes = {math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if math.prod(shape) not in sizes:  # that of the common vector, or of the paper's bias
        raise artifact.damaged(folder, f"vectors is {shape!r}, and no weight in {EXPANSION_FILE} has this many values")
    return shape[0], shape[1]


def require_named_generator(
    saved: artifact.Saved, generator: Generator, folder: Path, called: str = "generator"
) -> None:
    """Raise ATVError if a generator that the adapter only names has changed since the adapter was made.

    Args:
        saved: from `artifact.read`. Older adapters do not say what weights it had.
        generator: the model that now has the name.
        folder: folder of the adapter.
        called: key under which the adapter describes it.
    """
    made = saved.about.get(called, {}).get("weights")
    if not made:
        return
    found = identity.sample_weights(generator.encoder)
    if made.keys() != found.keys() or not all(identity.alike(made[name], found[name]) for name in made):
        raise ATVError(
            f"The adapter {folder} was made with a frozen {called} named {generator.name_or_path}; the model of that "
            "name now has other weights. Restore that model, or train the adapter again."
        )


def load_expansion(expansion: nn.Module, folder: Path) -> None:
    """Load the expansion's weights; shapes must match exactly."""
    try:
        expansion.load_state_dict(load_file(folder / EXPANSION_FILE))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"{folder / EXPANSION_FILE} does not fit: {reason}") from error


def load_generator_weights(generator: Generator, saved: artifact.Saved, config: ATVConfig, folder: Path) -> None:
    """Load an adapter's generator weights into a generator with the same configuration."""
    if not has_generator(saved):
        require_named_generator(saved, generator, folder)
        return
    read = saved_generator(config, folder)
    try:
        generator.encoder.load_state_dict(read.encoder.state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"{folder / GENERATOR_FOLDER} does not fit: {reason}") from error


def push(save_to: Callable[[Path], None], repo_id: str, *, private: bool | None, token: str | None) -> str:
    """Upload what `save_to` writes to the hub as one commit and return the commit's URL."""
    from tempfile import TemporaryDirectory

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_to(Path(folder) / "adapter")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder) / "adapter", commit_message="Upload an Adaptive Task Vector"
        )
    return str(commit)


def model_card(llm: dict[str, Any], config: ATVConfig, generator: Generator, training: dict[str, Any]) -> str:
    """Return the adapter's model card: what it is, what it was trained on, how to use it."""
    name = identity.public_name(str(llm["name"]))
    tasks = training.get("tasks", {})
    about = [
        "library_name: adaptive-task-vectors",
        "pipeline_tag: text-generation",
        "tags: [adaptive-task-vectors, steering]",
    ]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        about += [f"base_model: {name}", "base_model_relation: adapter"]
    accuracy, loss = training.get("best_eval_accuracy"), training.get("best_eval_loss")
    if accuracy is not None:
        about.append("metrics: [accuracy]")
    measured = [f"loss {loss:.3f}"] if loss is not None else []
    measured += [f"accuracy {100 * accuracy:.1f}%"] if accuracy is not None else []
    return "\n".join(["---", *about, "---", _CARD.format(
        name=name,
        layers=llm["num_layers"],
        hidden=llm["hidden_size"],
        generator=identity.public_name(generator.describe()),
        reads=config.reads,
        queries="" if config.reads == "prompt" else ', queries=["the query in it"]',
        config=config,
        tasks=", ".join(tasks) or "not recorded",
        valid=", ".join(measured) or "not recorded",
        seed=training.get("train", {}).get("seed", "not recorded"),
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
| validation rows, by which the epoch was chosen | {valid} |
| seed | {seed} |

```python
from atv import ATVModel

atv = ATVModel.from_pretrained("PATH_OR_ID_OF_THIS_ADAPTER", "{name}")
print(atv.generate(["a prompt"]{queries}, max_new_tokens=8))
```

Validation rows chose the epoch, so these figures are too good; measure it on test rows: `atv eval --adapter DIR`.
Expect it to help only on tasks where that was measured. It inherits the LLM's licence, faults and limits; add
`license`, `language` and `datasets` above, which only you know.
"""
