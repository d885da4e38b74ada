"""Saved adapters of any method: a folder that is whole or not there, known to be unaltered and of which LLM it is.

`atv_config.json` says the method, its configuration, the LLM, how it was trained and the digest of every other file;
weights are safetensors, never pickle. Written beside its place and renamed into it.
"""

import base64
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atv.errors import ATVError
from atv.files import local, occupied, read_json, recover_folder, replace_folder, sha256, write_json
from atv.hooks import base_llm, decoder_layers, quantization, text_config

FORMAT = 4
CONFIG_FILE = "atv_config.json"
CARD_FILE = "README.md"
"""The model card: the one file that its user may edit."""
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
    about: dict[str, Any]
    """What the method has said beside."""


# ---- which LLM it is ----

SAMPLES = 8
"""Values that are kept of each tensor."""
ROWS = 16
"""Embeddings that values are kept of."""


def describe_llm(llm: nn.Module, layer_path: str | None = None) -> dict[str, Any]:
    """What identifies an LLM: name, revision, shape, quantisation and a fingerprint."""
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
    """A few values of an LLM's embeddings, of its other weights and of its active PEFT adapters, rounded to bfloat16.

    Returns:
        `rows`: how many embeddings there are;
        `embeddings`: of some of them, spread over the vocabulary;
        `head`: of the same rows of the language-model head; empty if it is tied to the embeddings, or quantised;
        `weights`: by name, those of all layers together. Of a quantised LLM only tensors with one dimension, such as
            those of norms: quantisation leaves them alone, while it changes matrices;
        `adapters`: empty if there is none.
    """
    base = base_llm(llm)
    embeddings: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[operator]
    with align_module_device(embeddings):  # brings them back if they are offloaded
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
    """A few values of every weight, rounded to bfloat16, by its name without the numbers of layers.

    Args:
        module: in any dtype, on any devices, offloaded in part or not.
        apart: modules whose weights are left out.
        matrices: false takes only tensors with at most one dimension.
        vocabulary: tensors with as many rows are left out too: they grow with the embeddings.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for place, part in module.named_modules():
        if part in apart:
            continue
        with align_module_device(part):
            for name, p in part.named_parameters(recurse=False):
                plain = p.is_floating_point() and p.element_size() > 1  # neither packed bits nor float8
                if plain and (matrices or p.dim() <= 1) and p.shape[:1] != (vocabulary,):
                    where = re.sub(r"\.(base_layer|original_module)\b", "", f"{place}.{name}")  # as without PEFT
                    found[re.sub(r"\.\d+\b", ".*", where)].append(_values(p))
    return {name: _packed(torch.cat(values)) for name, values in found.items()}


def _adapters(llm: nn.Module) -> tuple[list[nn.Module], list[Tensor]]:
    """What PEFT has put into an LLM, and values of what is active of it."""
    parts: list[nn.Module] = []
    values: list[Tensor] = []
    for module in cast(Any, llm).modules():
        names = getattr(module, "adapter_layer_names", ())  # of PEFT's layers alone
        kinds = [part for name in names if isinstance(part := getattr(module, name, None), nn.Module)]
        parts += kinds
        if kinds and not module.disable_adapters:
            active = module.active_adapters
            values += [
                _values(p) for kind in kinds for key, p in kind.named_parameters() if key.split(".")[0] in active
            ]
            scaling = getattr(module, "scaling", {})
            values += [torch.tensor([scaling[name]], dtype=torch.bfloat16) for name in active if name in scaling]
    prompts = getattr(llm, "prompt_encoder", None)  # of prefix- and prompt-tuning
    if isinstance(prompts, nn.Module):
        active = cast(Any, llm).active_adapters
        values += [_values(p) for key, p in prompts.named_parameters() if key.split(".")[0] in active]
    return parts, values


def _head_values(llm: nn.Module, rows: int) -> Tensor | None:
    """Of the language-model head, if it has a plain weight that is not the embeddings'."""
    base = base_llm(llm)
    head: nn.Module | None = base.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1
    tied = weight is base.get_input_embeddings().weight  # type: ignore[operator]
    return _row_values(head, rows) if plain and not tied and head is not None else None


def _row_values(module: nn.Module, count: int) -> Tensor:
    """Values of rows spread over the first `count` of a module's weight, (rows, values) bfloat16; of those it has."""
    with align_module_device(module):
        weight = cast(Tensor, module.weight).detach()
        rows = _spread(count, ROWS)
        columns = _spread(weight.shape[1], SAMPLES)
        rows = rows[rows < len(weight)]
        return weight[rows.to(weight.device)][:, columns.to(weight.device)].float().cpu().to(torch.bfloat16)


def _spread(length: int, count: int) -> Tensor:
    return torch.linspace(0, length - 1, count, dtype=torch.float64).long()


def _values(tensor: Tensor) -> Tensor:
    """Values spread over a tensor, on the CPU, bfloat16."""
    flat = tensor.detach().reshape(-1)
    return flat[_spread(len(flat), SAMPLES).to(flat.device)].float().cpu().to(torch.bfloat16)


def _packed(values: Tensor) -> str:
    return base64.b64encode(values.flatten().view(torch.int16).numpy().astype("<i2").tobytes()).decode()


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<i2").astype(np.int16)).view(torch.bfloat16).float()


def alike(one: str, other: str) -> bool:
    """Whether samples of weights are equal, but for one step of bfloat16, or of float16 near 0: rounding to a dtype."""
    a, b = _unpacked(one), _unpacked(other)
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=2**-7, atol=2**-23, equal_nan=True).all())


def public_name(name: str) -> str:
    """A model's name as a model card says it: of a local folder its last part, since the rest is nobody's business."""
    local = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or Path(name).exists()
    return PureWindowsPath(name).name if local else name


def llm_digest(llm: nn.Module) -> str:
    """One word for an LLM's fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint(llm), sort_keys=True).encode()).hexdigest()[:16]


# ---- the folder ----


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

    Files that its user has put beside a former adapter stay, and so does a model card that he has edited.

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
        written = {"format": FORMAT, "method": method, "config": config, "base_llm": llm, **(about or {})}
        written["sha256"] = {name: sha256(part / name) for name in _files(part)}
        written["versions"] = {library: version(library) for library in LIBRARIES}
        write_json(part / CONFIG_FILE, written | {"training": training})
        _keep_users_files(path, part)


def _files(folder: Path) -> list[str]:
    found = (file for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _keep_users_files(former: Path, part: Path) -> None:
    """Copy what no adapter has written: but into no folder of the new one, which may be read as a whole."""
    if not (former / CONFIG_FILE).is_file():
        return
    try:
        digests = dict(read_json(former / CONFIG_FILE, "an adapter's configuration")["sha256"])
    except (ATVError, KeyError, TypeError, ValueError):
        digests = {}  # it is damaged: what has the name of a new file is replaced, the rest stays
    own = {file.name for file in part.iterdir() if file.is_dir()}
    for name in _files(former):
        if name in digests:
            users = name == CARD_FILE and digests[name] != sha256(former / name)
        else:
            users = name.split("/")[0] not in own and not (part / name).exists()
        if users:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(former / name, part / name, follow_symlinks=False)


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
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE]))
        files = list(_read_config(folder)["sha256"])  # these alone, and of what is a pickle nothing
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, *files]))
    except ATVError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ATVError(f"No adapter at {name}: not a local folder, and the hub did not give it ({reason}).") from error


def identity(folder: Path) -> str:
    """A digest that is the same for the same adapter and differs after any change to it."""
    return sha256(folder / CONFIG_FILE)[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    written = read_json(folder / CONFIG_FILE, "an adapter's configuration")
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise ATVError(
            f"{folder / CONFIG_FILE} has format {found}; this version reads format {FORMAT}. Train the adapter "
            "again, or use the version that made it."
        )
    return written


def read(folder: Path, method: str | None = None) -> Saved:
    """Read `atv_config.json` and compare every file but the model card with the digest that stands in it.

    Args:
        folder: from `locate`.
        method: whose adapter it must be; None: any.
    """
    written = _read_config(folder)
    try:
        digests, config = dict(written.pop("sha256")), dict(written.pop("config"))
        base, training = dict(written.pop("base_llm")), dict(written.pop("training"))
        name = base["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise ATVError(f"{folder / CONFIG_FILE} is damaged: {error!r}. Restore it or train again.") from error
    for key, value, kind in (
        ("base_llm.name", name, str),
        ("training.tasks", training.get("tasks", {}), dict),
        ("generator", written.get("generator", {}), dict),
    ):
        if not isinstance(value, kind):
            raise ATVError(
                f"{folder / CONFIG_FILE} is damaged: {key} is {value!r}; expected a {kind.__name__}. Restore it or "
                "train again."
            )
    made_by = str(written.get("method"))
    if method is not None and made_by != method:
        raise ATVError(f"{folder} is an adapter of the method {made_by}; expected one of the method {method}.")
    for name, digest in digests.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ATVError(f"{folder / CONFIG_FILE} names the file {name}, which is not inside the folder.")
        if name != CARD_FILE and (not file.is_file() or sha256(file) != digest):
            state = "altered or truncated" if file.is_file() else "missing"
            raise ATVError(f"{file} is {state}: it is not the file that was saved. Restore it or train again.")
    weights = frozenset(name for name in digests if name.endswith(".safetensors"))
    return Saved(made_by, config, base, training, weights, written)


def load_tensors(file: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weight file, which must have the names and shapes of `like`."""
    try:
        given = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ATVError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    expected, found = ({name: tuple(t.shape) for name, t in which.items()} for which in (like, given))
    differing = sorted({name for name, _ in expected.items() ^ found.items()})
    if differing:
        raise ATVError(f"{file} does not fit: other names or shapes ({', '.join(differing)[:300]}).")
    return given


def check_llm(saved: Saved, llm: nn.Module, folder: Path) -> None:
    """Refuse an LLM that is not the one that the adapter was trained for, in whatever dtype or quantisation.

    Embeddings may have been added or cut off at the end: those that both have are compared.
    """
    found, made = describe_llm(llm, saved.config.get("layer_path")), saved.base_llm
    same = ("model_type", "num_layers", "hidden_size")
    differing = [f"{name} {made.get(name)} against {found[name]}" for name in same if made.get(name) != found[name]]
    try:
        differing = differing or _different_weights(made, found, llm)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ATVError(f"{folder / CONFIG_FILE} is damaged: {error!r}. Restore it or train again.") from error
    if differing:
        names = [about.get("name") or "an LLM without a name" for about in (made, found)]
        raise ATVError(
            f"The adapter {folder} was made for {names[0]} and the LLM given is {names[1]}; they differ in "
            f"{', '.join(differing)}. Load it onto {names[0]}, or train an adapter for {names[1]}."
        )


def _different_weights(made: dict[str, Any], found: dict[str, Any], llm: nn.Module) -> list[str]:
    """In what the fingerprint of an LLM differs from the one that an adapter was made for, in words."""
    one, other = made["fingerprint"], found["fingerprint"]
    # Of matrices nothing is known where one of the two is quantised.
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
