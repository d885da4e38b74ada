"""Saved adapters of any method: folders that are written atomically and verified when they are read.

`atv_config.json` contains the method, its configuration, the LLM, how it was trained and the digest of every other
file. Weights are safetensors, never pickle. The folder is written under a temporary name and renamed into place.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from atv.config import is_whole
from atv.errors import ATVError
from atv.files import local, occupied, read_json, recover_folder, replace_folder, sha256, write_json
from atv.lm.identity import describe_llm, different_weights

FORMAT = 8
CONFIG_FILE = "atv_config.json"
CARD_FILE = "README.md"
"""The model card: the only file that users may edit."""
UNSAFE = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py")
"""Endings of files that are unpickled or executed when they are loaded; an adapter has none of them."""
LARGEST = 2**25
"""Bytes of a configuration. Parsed JSON takes many times its size in memory, and the file may be a stranger's."""
LIBRARIES = ("adaptive-task-vectors", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Saved:
    """The contents of `atv_config.json`."""

    method: str
    config: dict[str, Any]
    base_llm: dict[str, Any]
    training: dict[str, Any]
    weights: frozenset[str]
    """The weight files, relative to the folder."""
    about: dict[str, Any]
    """Further entries, written by the method."""


def save(
    path: Path,
    method: str,
    llm: dict[str, Any],
    config: dict[str, Any],
    training: dict[str, Any],
    write: Callable[[Path], None],
    about: dict[str, Any] | None = None,
) -> None:
    """Write an adapter atomically: a kill at any moment leaves either the old folder or the new one.

    Files that the user added to an old adapter are kept, and so is an edited model card; also those of a retired one.

    Args:
        path: folder to write.
        method: its name in the registry.
        llm: from `describe_llm`.
        config: configuration of the method.
        training: summary of the training.
        write: writes the weights (safetensors) and any other files into the folder that it is given.
        about: further entries for `atv_config.json`.
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
        _require_small(part / CONFIG_FILE)
        _keep_users_files(path if path.exists() else _retired(path), part)
    shutil.rmtree(_retired(path), ignore_errors=True)


def _retired(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


def retire(path: Path) -> None:
    """Put an adapter out of use, in one step, before another one is made in its place."""
    recover_folder(path)
    if (path / CONFIG_FILE).exists():
        shutil.rmtree(_retired(path), ignore_errors=True)
        os.replace(path, _retired(path))


def restore(path: Path) -> None:
    """Undo `retire`, unless an adapter has been made since."""
    if not path.exists():
        with suppress(FileNotFoundError):  # nothing was retired, or another process has restored it
            os.replace(_retired(path), path)


def _files(folder: Path) -> list[str]:
    found = (file for file in folder.rglob("*") if file.is_file() or file.is_symlink())
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _keep_users_files(former: Path, part: Path) -> None:
    """Copy the user's own files, except into subfolders of the new adapter, which may be loaded as a whole."""
    if not (former / CONFIG_FILE).is_file():
        return
    try:
        digests = dict(read_json(former / CONFIG_FILE, "an adapter's configuration")["sha256"])
    except (ATVError, KeyError, TypeError, ValueError):
        digests = {}  # damaged: files with the name of a new one are replaced, the rest are kept
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
    """Return an adapter's local folder: the path itself, its subfolder `adapter`, or a download from the hub."""
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
        files = _safe_names(folder, _read_config(folder)["sha256"])
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, *files]))
    except ATVError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ATVError(f"No adapter at {name}: not a local folder, and the download failed ({reason}).") from error


def identity(folder: Path) -> str:
    """Return a digest of an adapter, which any change to the adapter changes."""
    return sha256(folder / CONFIG_FILE)[:16]


def _read_config(folder: Path) -> dict[str, Any]:
    _require_small(folder / CONFIG_FILE)
    written = read_json(folder / CONFIG_FILE, "an adapter's configuration")
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise ATVError(
            f"{folder / CONFIG_FILE} has format {found}; this version reads format {FORMAT}. Train the adapter "
            "again, or use the version that made it."
        )
    return written


def _require_small(file: Path) -> None:
    if file.is_file() and (size := file.stat().st_size) > LARGEST:
        raise ATVError(f"{file} has {size:,} bytes; expected at most {LARGEST:,} for an adapter's configuration.")


def _safe_names(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names of an adapter's files; ATVError if one leaves the folder or could run code when it is loaded.

    A file may be a link that leaves the folder, as in the cache of the hub: its digest says what is in it.
    """
    for name in names:
        if "\0" in name:
            raise ATVError(f"{folder / CONFIG_FILE} names the file {name!r}, which cannot be one.")
        if any(path.anchor or ".." in path.parts for path in (PurePosixPath(name), PureWindowsPath(name))):
            raise ATVError(f"{folder / CONFIG_FILE} names the file {name}, which is not inside the folder.")
        if name.lower().endswith(UNSAFE):
            raise ATVError(f"{folder / CONFIG_FILE} names the file {name}, which could run code; expected safetensors.")
    return list(names)


def read(folder: Path, method: str | None = None) -> Saved:
    """Read `atv_config.json` and verify the digest of every file except the model card.

    Args:
        folder: from `locate`.
        method: the expected method; None: any.
    """
    written = _read_config(folder)
    try:
        digests, config = dict(written.pop("sha256")), dict(written.pop("config"))
        base, training = dict(written.pop("base_llm")), dict(written.pop("training"))
        name = base["name"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder, repr(error)) from error
    tasks = training.get("tasks", {})
    for key, value, kind in (
        ("base_llm.name", name, str),
        ("training.tasks", tasks, dict),
        *(_asking_parts(tasks) if isinstance(tasks, dict) else ()),
        ("generator", written.get("generator", {}), dict),
        ("encoder", written.get("encoder", {}), dict),
    ):
        if not isinstance(value, kind):
            raise damaged(folder, f"{key} is {value!r}; expected a {kind.__name__}")
    made_by = str(written.get("method"))
    if method is not None and made_by != method:
        raise ATVError(f"{folder} is an adapter of the method {made_by}; expected one of the method {method}.")
    _safe_names(folder, digests)
    for name, digest in digests.items():
        file = folder / name
        if name != CARD_FILE and (not file.is_file() or sha256(file) != digest):
            state = "altered or truncated" if file.is_file() else "missing"
            raise ATVError(f"{file} is {state}: it is not the file that was saved. Restore it or train again.")
    weights = frozenset(name for name in digests if name.endswith(".safetensors"))
    for name in sorted(weights):
        _require_finite(folder / name)
    return Saved(made_by, config, base, training, weights, written)


def _asking_parts(tasks: Mapping[str, Any]) -> Iterator[tuple[str, Any, type]]:
    """Yield the parts of the records of training tasks (`Task.asking`): name, value and expected type."""
    for task, asked in tasks.items():
        where = f"training.tasks.{task}"
        yield where, asked, dict
        if isinstance(asked, dict):  # otherwise refused already
            yield f"{where}.renderer", asked.get("renderer"), dict
            for key in ("templates", "answer_prefixes"):
                found = asked.get(key) or None  # an empty list is none
                yield f"{where}.{key}", found, list
                for text in found if isinstance(found, list) else ():
                    if text is not None or key == "templates":
                        yield f"a part of {where}.{key}", text, str


def _require_finite(file: Path) -> None:
    """Raise ATVError if a weight is NaN or infinite: every answer would be wrong without a word."""
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ATVError(f"{file}: {name} has values that are NaN or infinite. Train the adapter again.")
    except (SafetensorError, OSError) as error:
        raise ATVError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error


def read_for(path_or_hub_id: str | Path, method: str, llm: nn.Module) -> tuple[Path, Saved]:
    """Return an adapter's folder and contents; ATVError unless it is of this method and for this LLM."""
    folder = locate(path_or_hub_id)
    saved = read(folder, method)
    check_llm(saved, llm, folder)
    return folder, saved


def damaged(folder: Path, what: str) -> ATVError:
    """Return the error about what is wrong in an adapter's configuration."""
    return ATVError(f"{folder / CONFIG_FILE} is damaged: {what}. Restore it or train again.")


def layer_of(saved: Saved, folder: Path, layers: int) -> int:
    """Return the layer that training chose; ATVError if it is not one of an LLM with this many layers."""
    layer: Any = saved.training.get("layer")
    if not is_whole(layer, 0) or layer >= layers:
        raise damaged(folder, f"training.layer is {layer!r}; expected a whole number from 0 to {layers - 1}")
    return int(layer)


def answers_of(saved: Saved, folder: Path) -> dict[str, list[str]]:
    """Return the answers of each task of a classifier; ATVError if they are none."""
    found: Any = saved.about.get("answers")
    lists = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(some, list) and some and all(isinstance(text, str) for text in some) for some in lists):
        raise damaged(folder, f"answers is {found!r}; expected a list of texts for each task")
    return dict(found)


def load_tensors(file: Path, like: Mapping[str, Sequence[int] | Tensor]) -> dict[str, Tensor]:
    """Load a weight file, whose names and shapes must match.

    Args:
        file: the file.
        like: for each name a tensor of the shape, or the shape; -1: any size.
    """
    try:
        given = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ATVError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
    shapes = {name: tuple(each.shape if isinstance(each, Tensor) else each) for name, each in like.items()}
    differing = given.keys() ^ shapes.keys()
    for name in given.keys() & shapes.keys():
        found = given[name].shape
        if len(found) != len(shapes[name]) or any(
            size not in (-1, own) for size, own in zip(shapes[name], found, strict=True)
        ):
            differing.add(name)
    if differing:
        raise ATVError(f"{file} does not fit: other names or shapes ({', '.join(sorted(differing))[:300]}).")
    return given


def check_llm(saved: Saved, llm: nn.Module, folder: Path) -> None:
    """Raise ATVError unless `llm` is the LLM that the adapter was trained for, in any dtype or quantisation.

    Embeddings may have been appended or cut off at the end: only those that both LLMs have are compared.
    """
    found, made = describe_llm(llm, saved.config.get("layer_path")), saved.base_llm
    same = ("model_type", "num_layers", "hidden_size")
    differing = [f"{name} {made.get(name)} against {found[name]}" for name in same if made.get(name) != found[name]]
    try:
        differing = differing or different_weights(made, found, llm)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(folder, repr(error)) from error
    if differing:
        names = [about.get("name") or "an LLM without a name" for about in (made, found)]
        raise ATVError(
            f"The adapter {folder} was made for {names[0]} and the LLM given is {names[1]}; they differ in "
            f"{', '.join(differing)}. Load it onto {names[0]}, or train an adapter for {names[1]}."
        )
