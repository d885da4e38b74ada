"""Atomic files and folder swaps, with real failures: a full disk, text that cannot be encoded, a killed process."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from atv.files import read_json, recover_folder, replace_folder, require_writable, sha256, write_json, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, with its text."""
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


@contextmanager
def disk_with_room_for(size: int):
    """No file may grow beyond `size` bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


@settings(max_examples=40, deadline=None)
@given(JSON)
def test_what_is_written_as_json_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "deep" / "er" / "value.json"
    write_json(path, value)
    assert read_json(path, "a value") == value
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize("content", [None, "[" * 100_000])
def test_a_folder_or_json_nested_without_end_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_text(content)
    with refused("a.json is not valid JSON", "expected a value"):
        read_json(path, "a value")


def test_json_is_written_for_people_too(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Zoë", "layers": [0, 1]})
    assert (tmp_path / "a.json").read_bytes() == '{\n "name": "Zoë",\n "layers": [\n  0,\n  1\n ]\n}\n'.encode()


def test_a_disk_that_fills_up_in_the_middle_leaves_the_former_file_and_no_part(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"former": True})
    with disk_with_room_for(1000), pytest.raises(OSError, match="File too large"):
        write_json(path, list(range(100_000)))
    assert tree(tmp_path) == {"a.json": '{\n "former": true\n}\n'}


@pytest.mark.parametrize(
    ("value", "error"),
    [({"new": object()}, TypeError), ({"new": "x" * 100_000 + "\ud800"}, UnicodeEncodeError)],
)
def test_a_value_that_cannot_be_written_leaves_the_former_file_and_no_part(tmp_path, value, error):
    path = tmp_path / "a.json"
    write_json(path, {"former": True})
    with pytest.raises(error):
        write_json(path, value)
    assert tree(tmp_path) == {"a.json": '{\n "former": true\n}\n'}


def test_a_file_that_cannot_take_its_place_leaves_no_part(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("No file",)),
        (b"{'single': 1}", ("is not valid JSON", "line 1 column 2")),
        (b'{"cut": [1, 2', ("is not valid JSON", "line 1")),
        (b"", ("is not valid JSON",)),
        (b'{"name": "\xff"}', ("is not valid JSON", "utf-8", "0xff")),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named_with_what_was_expected(tmp_path, content, parts):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with refused(path, "expected the settings of a kettle.", *parts):
        read_json(path, "the settings of a kettle")


def test_the_digest_is_the_published_one_of_the_test_vector(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def make_folder(path: Path, text: str, *names: str) -> None:
    with replace_folder(path) as part:
        for name in names:
            write_text(part / name, text)


def test_a_folder_takes_the_place_of_the_former_one_as_a_whole(tmp_path):
    path = tmp_path / "new" / "adapter"
    make_folder(path, "first", "a", "only-first")
    make_folder(path, "second", "a", "sub/b")
    assert tree(tmp_path) == {"new/adapter/a": "second", "new/adapter/sub/b": "second"}


@pytest.mark.parametrize("former", [True, False])
def test_an_exception_while_a_folder_is_filled_leaves_things_as_they_were(tmp_path, former):
    path = tmp_path / "adapter"
    if former:
        make_folder(path, "first", "a")

    def fail():
        with replace_folder(path) as part:
            write_text(part / "a", "half")
            raise RuntimeError("the disk broke")

    with pytest.raises(RuntimeError, match="the disk broke"):
        fail()
    assert tree(tmp_path) == ({"adapter/a": "first"} if former else {})
    assert list(tmp_path.iterdir()) == ([path] if former else [])


KILLED = """
import os, signal, sys
from pathlib import Path
from atv.files import replace_folder

renames_left, rename = int(sys.argv[2]), os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def rename_and_perhaps_die(*names):
    global renames_left
    rename(*names)
    renames_left -= 1
    if renames_left == 0:
        die()

os.replace = rename_and_perhaps_die
with replace_folder(Path(sys.argv[1])) as part:
    (part / "a").write_text("second")
    if renames_left == 0:
        die()
    (part / "b").write_text("second")
"""


def kill_after_renames(path: Path, renames: int) -> None:
    """Replace `path` in another process, which dies after that many renames."""
    done = subprocess.run([sys.executable, "-c", KILLED, path, str(renames)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def adapter(tmp_path) -> Path:
    make_folder(tmp_path / "adapter", "first", "a", "only-first")
    return tmp_path / "adapter"


FIRST = {"a": "first", "only-first": "first"}
SECOND = {"a": "second", "b": "second"}


def test_a_kill_while_the_folder_is_filled_leaves_the_former_folder(adapter):
    kill_after_renames(adapter, 0)
    assert tree(adapter) == FIRST


def test_a_kill_between_the_two_renames_leaves_the_former_folder(adapter):
    kill_after_renames(adapter, 1)
    assert not adapter.exists()
    recover_folder(adapter)
    assert tree(adapter) == FIRST


def test_a_kill_after_both_renames_leaves_the_new_folder(adapter):
    kill_after_renames(adapter, 2)
    recover_folder(adapter)
    assert tree(adapter) == SECOND


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_can_be_replaced_after_any_kill(adapter, renames):
    kill_after_renames(adapter, renames)
    make_folder(adapter, "third", "c")
    assert tree(adapter) == {"c": "third"}
    assert not (adapter.parent / ".adapter.former").exists()


def test_a_failed_fill_after_a_kill_between_the_renames_still_leaves_the_former_folder(adapter):
    os.rename(adapter, adapter.parent / ".adapter.former")
    with pytest.raises(KeyError), replace_folder(adapter):
        json.loads("{}")["missing"]
    assert tree(adapter) == FIRST


def test_recovery_of_what_was_never_there_or_is_whole_changes_nothing(adapter):
    recover_folder(adapter.parent / "other")
    recover_folder(adapter)
    assert list(adapter.parent.iterdir()) == [adapter]
    assert tree(adapter) == FIRST


def test_a_folder_is_flushed_through_handles_that_can_write(tmp_path, monkeypatch):
    """Windows refuses to flush a handle that was opened for reading."""
    fcntl = pytest.importorskip("fcntl")
    flushed, fsync = [], os.fsync

    def as_on_windows(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed.append(handle)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", as_on_windows)
    with replace_folder(tmp_path / "adapter") as part:
        (part / "sub").mkdir()
        (part / "sub" / "weights").write_bytes(b"whole")
    assert (tmp_path / "adapter" / "sub" / "weights").read_bytes() == b"whole"
    assert len(flushed) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_a_folder_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        with replace_folder(tmp_path / "adapter") as part:
            (part / "sub").mkdir()
            (part / "sub" / "private").touch(0o600)
            (part / "open").touch()
            (part / "open").chmod(0o666)
    finally:
        os.umask(former)
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").rglob("*") if file.is_file()}
    assert found == {"private": mode, "open": mode}


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for place in ("file", "file/below", "file/below/it", "dangling", "dangling/below"):
        with refused("is a file", "expected a folder"):
            require_writable(tmp_path / place)
    for place in ("new", "new/below", "."):
        require_writable(tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]  # nothing was made
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # as on a read-only disk
    (tmp_path / "new").mkdir()
    require_writable(tmp_path / "new/below")
    with refused(f"Nothing can be written to {tmp_path}."):
        require_writable(tmp_path / "other")
