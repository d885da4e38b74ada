"""Atomic file and folder writes, and JSON and TOML readers with actionable errors."""

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from atv.errors import ATVError


def local(path: str | Path) -> Path:
    """Return a path given by a user, with `~` expanded to the home folder."""
    return Path(os.path.expanduser(path))


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file, with or without a byte order mark; the error says what was `expected`."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ATVError(f"No file {path}; expected {expected}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ATVError(f"{path} is not valid JSON ({error}); expected {expected}.") from None


def read_toml(path: Path, expected: str) -> dict[str, Any]:
    """Parse a TOML file, with or without a byte order mark; the error says what was `expected`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ATVError(f"No file {path}; expected {expected}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ATVError(f"{path} is not a TOML file ({error}); expected {expected}.") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically: a kill leaves either the old file or the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically: a kill leaves either the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically: a kill leaves either the old file or the new one."""
    with replace_file(path) as part:
        part.write_bytes(data)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write; at the end it replaces `path`, unless there was an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        yield part
        with part.open("r+b") as file:  # Windows cannot flush a read-only handle
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def occupied(folder: Path) -> bool:
    """Whether something is there that new output would hide or mix with; half-written (hidden) files do not count."""
    return folder.is_file() or (folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()))


def require_writable(folder: Path) -> None:
    """Raise ATVError if a folder, which need not exist yet, is a file or cannot be written to."""
    folder = local(folder).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ATVError(f"{there} is a file; expected a folder. Name another one for what is to be written.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ATVError(f"Nothing can be written to {there}. Name another folder than {folder}, or change permissions.")


def same_settings(former: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    """Raise ATVError that names the differences if `folder` was made with settings other than `settings`."""
    settings = json.loads(json.dumps(settings))  # as read back from a file
    there, now = _leaves(former), _leaves(settings)
    differing = [key for key in sorted(there.keys() | now.keys()) if there.get(key) != now.get(key)]
    if differing:
        shown = "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing)
        raise ATVError(f"{folder} was made with other settings ({shown[:400]}). Use another --out, or --force.")


def _leaves(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested settings to keys such as `train.seed`, so that a message names exactly what differs."""
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        leaves |= _leaves(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return leaves


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def follow_umask(folder: Path) -> None:
    """Give the files in a folder the mode of the process's umask, since some libraries write them as 0600.

    Executable files, such as a user's script, stay executable.
    """
    mode = folder.stat().st_mode & 0o666  # the folder was made with the same umask; reading the umask would set it
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode | file.stat().st_mode & 0o111)


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}.former")


def recover_folder(path: Path) -> None:
    """Restore the old folder if a kill came between the two renames of `replace_folder`."""
    if not path.exists() and _former(path).exists():
        os.replace(_former(path), path)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end it replaces `path`.

    There is no portable way to swap two folders in one step, so the old folder is renamed away first. If a kill comes
    in between, `recover_folder`, which every reader calls, restores it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        yield part
        follow_umask(part)
        for file in part.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("r+b") as opened:  # Windows cannot flush a read-only handle
                    os.fsync(opened.fileno())
        shutil.rmtree(_former(path), ignore_errors=True)
        if path.exists():
            os.replace(path, _former(path))
        os.replace(part, path)
        shutil.rmtree(_former(path), ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
