"""An ATV's saved adapter, beside what `artifact` keeps of every method's.

`expansion.safetensors`, a model card and, unless its name tells which generator it is, a Hugging Face folder
`generator/`.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from atv import artifact
from atv.config import SELF, ATVConfig
from atv.data.collate import pad, pad_id
from atv.errors import ATVError
from atv.generator import CONSTANT, Constant, Generator, Itself
from atv.lm import identity
from atv.lm.hooks import decoder_layers
from atv.lm.load import ENCODER_FILE, new_model, reading_part

if TYPE_CHECKING:
    from atv.model import ATVModel

EXPANSION_FILE = "expansion.safetensors"
GENERATOR_FOLDER = "generator"
GENERATOR_FILE = f"{GENERATOR_FOLDER}/{ENCODER_FILE}"


def require_savable(model: "ATVModel") -> None:
    """Raise ATVError if what an adapter of `model` is read back as would be something else.

    It is read back as the modules that the configuration names, so that one's own in their place would be lost.
    """
    config, generator = model.config, model.generator
    kinds = {CONSTANT: Constant, SELF: Itself}
    kind = kinds.get(config.generator, Generator)
    if type(generator) is not kind:
        raise _unsavable(f"the generator is a {type(generator).__name__}; expected a {kind.__name__}")
    for name in ("pooling", "query_template"):
        found, expected = getattr(generator, name), getattr(config, name)
        if kind is Generator and found != expected:
            raise _unsavable(f"the generator's {name} is {found!r}; the configuration says {expected!r}")
    with torch.device("meta"):
        parts: list[tuple[str, nn.Module, nn.Module]] = [("expansion", model.expansion, model.new_expansion())]
        if kind is Generator:
            whole = new_model(generator.model_config)
            parts.append(("generator's encoder", generator.encoder, reading_part(whole)))
    for name, found, expected in parts:
        if (differs := _structure(found) ^ _structure(expected)) != set():
            where, type_or_shape = min(differs)
            raise _unsavable(f"the {name} is not a plain {type(expected).__name__} ({where or name}: {type_or_shape})")
    layers = decoder_layers(model.llm, config.layer_path)
    if list(map(id, model.layers)) != [id(layers[index]) for index in config.layer_indices(len(layers))]:
        raise _unsavable("layers are not the LLM's decoder layers that the configuration names")


def _unsavable(what: str) -> ATVError:
    return ATVError(
        f"An adapter of this model would be read back as another: {what}. Leave the parts as the configuration makes "
        "them, or keep the model's state_dict() yourself and train it in a loop of your own."
    )


def _structure(module: nn.Module) -> set[tuple[str, str]]:
    """Every part with its type, every parameter with its shape; how many rows a gate knows is not of its making."""
    types = {(name, f"{type(part).__module__}.{type(part).__qualname__}") for name, part in module.named_modules()}
    return types | {(name, str(tuple(p.shape))) for name, p in module.named_parameters()}


def save(model: "ATVModel", path: Path) -> None:
    """Write the adapter; a kill at any moment leaves the former folder or the new one.

    The generator is part of it unless it is frozen and can be loaded by its name. What was written is read back before
    it takes its place.

    Raises:
        ATVError: what would be read back is not the model.
    """
    require_savable(model)
    llm = identity.describe_llm(model.llm, model.config.layer_path)
    named = (model.config.generator, model.config.generator_revision)
    kept = type(model.generator) is Generator and (model.config.train_generator or model.generator.loaded_by != named)

    def write(part: Path) -> None:
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.expansion.state_dict().items()}
        save_file(tensors, part / EXPANSION_FILE, metadata={"format": "pt"})
        if kept:
            model.generator.save(part / GENERATOR_FOLDER)
        (part / artifact.CARD_FILE).write_text(model_card(model, llm), encoding="utf-8")
        _require_read_back(model, part, kept)

    generator: dict[str, Any] = {"name": model.generator.name_or_path, "revision": model.generator.revision}
    if type(model.generator) is Generator and not kept:
        generator["weights"] = identity.sample_weights(model.generator.encoder)
    config, training = model.config.to_dict(), model.training_summary
    artifact.save(path, model.method, llm, config, training, write, {"generator": generator})


PROBES = ("The kettle leaks and the lid sticks.", "Harbour: 17 boats?")
"""Queries whose vectors are compared."""


@torch.no_grad()
def _require_read_back(model: "ATVModel", folder: Path, kept: bool) -> None:
    """Raise ATVError unless generator and expansion, read from a folder, make the vectors that those in memory make."""
    own, config, weight = model.generator, model.config, next(model.expansion.parameters())
    with torch.random.fork_rng(devices=[]):
        expansion = model.new_expansion().to(weight)
    load_expansion(expansion, folder)
    was_training = model.training
    model.eval()
    try:
        if type(own) is Generator:
            read = Generator.load_saved(config, folder / GENERATOR_FOLDER) if kept else Generator.load(config)
            states = [_states(each) for each in (own, read.to(next(own.encoder.parameters())).eval())]
        else:  # there is no generator to read back
            states = [torch.linspace(-1, 1, 2 * own.hidden_size).view(2, own.hidden_size).to(weight)] * 2
        made, again = model.expansion(states[0]), expansion(states[1])
    finally:
        model.train(was_training)
    if not made.isfinite().all():
        raise ATVError(
            "The vectors that this model makes are not finite: its training diverged, and there is nothing to save. "
            "Lower the learning rate or the scale, or clip the gradient."
        )
    # States too: in an untrained expansion all of them make the same vectors.
    if not all(_alike(*pair) for pair in ((made, again), states)):
        other = "" if kept else f", or {own.name_or_path} is another generator"
        raise _unsavable(f"its vectors would be other ones (a hook on a part changes what it returns{other})")


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * one.abs().mean().nan_to_num().item())


def _states(generator: Generator) -> torch.Tensor:
    ids, mask = pad(generator.encode(PROBES), pad_id(generator.tokenizer), "right")
    states: torch.Tensor = generator(ids.to(generator.device), mask.to(generator.device))
    return states


def read_config(saved: artifact.Saved, folder: Path) -> ATVConfig:
    """The configuration of an ATV's adapter, whose weight files must be the ones that it names."""
    try:
        config = ATVConfig.from_dict(saved.config)
    except (TypeError, ValueError) as error:
        raise ATVError(f"{folder / artifact.CONFIG_FILE} is damaged: {error}. Restore it or train again.") from error
    expected = {EXPANSION_FILE, GENERATOR_FILE} if config.train_generator else {EXPANSION_FILE}
    if saved.weights not in (expected, {EXPANSION_FILE, GENERATOR_FILE}):
        raise ATVError(
            f"{folder / artifact.CONFIG_FILE} lists the weight files {sorted(saved.weights)}; expected "
            f"{sorted(expected)}."
        )
    return config


def load_generator(saved: artifact.Saved, config: ATVConfig, folder: Path) -> Generator | None:
    """The generator that is part of an adapter; None if it is the one that its configuration names."""
    return Generator.load_saved(config, folder / GENERATOR_FOLDER) if GENERATOR_FILE in saved.weights else None


def require_named_generator(saved: artifact.Saved, generator: Generator, folder: Path) -> None:
    """Raise ATVError if the generator that an adapter only names has other weights than when the adapter was made."""
    made = saved.about.get("generator", {}).get("weights")
    if not made:
        return
    found = identity.sample_weights(generator.encoder)
    if made.keys() != found.keys() or not all(identity.alike(made[name], found[name]) for name in made):
        raise ATVError(
            f"The adapter {folder} was made with a frozen generator named {generator.name_or_path}, and what has that "
            "name now has other weights. Restore that model, or train the adapter again."
        )


def load_expansion(expansion: nn.Module, folder: Path) -> None:
    """Load the expansion's weights; shapes must fit exactly."""
    try:
        expansion.load_state_dict(load_file(folder / EXPANSION_FILE))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ATVError(f"{folder / EXPANSION_FILE} does not fit: {reason}") from error


def load_weights(model: "ATVModel", folder: Path) -> None:
    """Put an adapter's weights into a model that was made alike."""
    saved = artifact.read(folder, model.method)
    artifact.check_llm(saved, model.llm, folder)
    read = load_generator(saved, read_config(saved, folder), folder)
    if read is None:
        require_named_generator(saved, model.generator, folder)
    else:
        try:
            model.generator.encoder.load_state_dict(read.encoder.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ATVError(f"{folder / GENERATOR_FILE} does not fit: {reason}") from error
    load_expansion(model.expansion, folder)
    model.training_summary = saved.training


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
    name = identity.public_name(str(llm["name"]))
    about = ["---", "library_name: adaptive-task-vectors", "tags: [adaptive-task-vectors, steering]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        about.append(f"base_model: {name}")
    return "\n".join([*about, "---", _CARD.format(
        name=name,
        layers=llm["num_layers"],
        hidden=llm["hidden_size"],
        generator=identity.public_name(model.generator.describe()),
        reads=model.config.reads,
        queries="" if model.config.reads == "prompt" else ', queries=["the query in it"]',
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
