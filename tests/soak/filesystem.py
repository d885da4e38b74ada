"""The commands on a full or read-only disk, in a folder that vanishes, and with a clock that jumps.

    PYTHONPATH=tests python tests/soak/filesystem.py

Not part of the gate. Needs Linux and root, to mount file systems in memory; the clock needs libfaketime and is left out
without it. Every command must end with one line that begins with `atv:` and exit code 2, or with its result; then the
fault is taken away and the same command, run again, must end with what it writes without any fault.
"""

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kills import COMMAND, make_world, run

SIZES = (8, 64, 256, 1024, 4096)
"""KiB of disks that are too small, at different moments."""
FAKETIME = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
DAYS = (0, 400, -400, 0)
"""By how much the clock is off, one after the other."""


class Job(NamedTuple):
    """A command and what it writes."""

    arguments: Callable[[Path], list[Any]]
    result: Callable[[Path], Any]
    expected: Any
    seconds: float
    """Without a fault."""


def main() -> int:
    """Try every fault with every command, print what was wrong, and return 1 if anything was."""
    asked = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    asked.add_argument("--only", choices=("train", "predict", "reproduce"))
    chosen = asked.parse_args()
    wrong = tried = 0
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        for command, (arguments, result) in make_world(world).items():
            if chosen.only not in (None, command):
                continue
            whole = world / f"{command}-whole"
            seconds = run(arguments(whole))
            job = Job(arguments, result, result(whole), seconds)
            for fault in (full, read_only, vanishing, *([clock] if FAKETIME else [])):
                for case, problem in fault(world, job):
                    tried += 1
                    wrong += problem is not None
                    print(f"{command}, {case}: {problem or 'right'}", flush=True)
    print(f"{tried} cases, {wrong} wrong" + ("" if FAKETIME else "; no libfaketime: the clock was not tried"))
    return int(wrong > 0)


# ---- faults: each yields a case and what was wrong with it ----


def full(world: Path, job: Job) -> Iterator[tuple[str, str | None]]:
    """The disk has too little room."""
    for size in SIZES:
        with mounted(world / "disk", f"size={size}k") as disk:
            code, said = ended(start(job.arguments(disk / "out")))
            problem = refused(code, said, "No space left") or incomplete(code, job, disk / "out")
            mount(disk, "remount,size=1g")
            yield f"a disk of {size} KiB (ended with {code}: {said[-160:]})", problem or again(job, disk / "out")


def read_only(world: Path, job: Job) -> Iterator[tuple[str, str | None]]:
    """The disk is read-only from the start, or from some moment on."""
    for share in (0.0, 0.5, 0.7, 0.9):
        with mounted(world / "disk", "size=1g") as disk:
            stopped = share == 0 and mount(disk, "remount,ro")
            process = start(job.arguments(disk / "out"))
            stopped = stopped or (not over(process, share * job.seconds) and mount(disk, "remount,ro"))
            code, said = ended(process)
            reasons = ("Read-only file system", "Nothing can be written to")
            problem = refused(code, said, *reasons) if stopped else None
            problem = problem or incomplete(code, job, disk / "out")
            mount(disk, "remount,rw")
            when = f"read-only after {share:.0%}" if stopped else f"no fault: not made read-only after {share:.0%}"
            yield f"{when} (ended with {code}: {said[-160:]})", problem or again(job, disk / "out")


def vanishing(world: Path, job: Job) -> Iterator[tuple[str, str | None]]:
    """The folder of the results is removed while the command runs."""
    for share in (0.5, 0.7, 0.9):
        folder = world / "vanishing"
        folder.mkdir()
        process = start(job.arguments(folder / "out"))
        if not over(process, share * job.seconds):
            for entry in folder.iterdir():
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        code, said = ended(process)
        problem = None if code == 0 else refused(code, said, "")
        yield f"removed after {share:.0%} (ended with {code}: {said[-160:]})", problem or again(job, folder / "out")
        shutil.rmtree(folder)


def clock(world: Path, job: Job) -> Iterator[tuple[str, str | None]]:
    """The clock jumps by more than a year, forwards and back, while the command runs and between two runs."""
    folder, offset = world / "clock", world / "offset"
    folder.mkdir()
    offset.write_text("+0d")
    about = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1"}
    about |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    process = start(job.arguments(folder / "out"), about)
    for number, days in enumerate(DAYS[1:], 1):
        if not over(process, job.seconds / len(DAYS)):
            offset.write_text(f"{days:+d}d")
        elif number == 1:
            break
    code, said = ended(process)
    problem = None if code == 0 else f"ended with {code}: {said[-300:]}"
    yield "a clock that jumps in the middle", problem or again(job, folder / "out")
    shutil.rmtree(folder)
    folder.mkdir()
    offset.write_text("+400d")
    process = start(job.arguments(folder / "out"), about)
    if not over(process, 0.7 * job.seconds):
        os.killpg(process.pid, signal.SIGKILL)
    ended(process)
    yield "killed at a date 400 days from now, run again today", again(job, folder / "out")
    shutil.rmtree(folder)


# ---- helpers ----


def start(arguments: list[Any], environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a command as the leader of a process group."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | (environment or {}),
    )


def over(process: "subprocess.Popen[str]", seconds: float) -> bool:
    """Wait; return whether the command has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    return process.poll() is not None


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Wait for a command's end; return its exit code and what it said."""
    _, said = process.communicate()
    return process.returncode, said.strip()


def refused(code: int, said: str, *reasons: str) -> str | None:
    """Return what is wrong with an ending that must be one line with one of some reasons."""
    last = (said.splitlines() or [""])[-1]
    if code == 0:
        return None  # there was room enough
    if (
        code != 2
        or "Traceback" in said
        or not last.startswith("atv: ")
        or not any(reason in last for reason in reasons)
    ):
        return f"ended with {code} and {said[-1500:]}"
    return None


def incomplete(code: int, job: Job, out: Path) -> str | None:
    """Return what is wrong with the result of a command that says that it ended well."""
    if code:
        return None
    try:
        return None if alike(job.result(out), job.expected) else "ended with 0 and another result"
    except OSError as error:
        return f"ended with 0 and no result ({error})"


def again(job: Job, out: Path) -> str | None:
    """Run a command once more; return what is wrong with its ending or its result."""
    code, said = ended(start(job.arguments(out)))
    if code:
        return f"did not go on: {code}, {said[-600:]}"
    return None if alike(job.result(out), job.expected) else "another result"


def alike(found: Any, expected: Any) -> bool:
    """Whether results are equal; numbers in a table up to rounding, since rows share batches with other rows."""
    if not isinstance(found, bytes):
        return bool(found == expected)
    tables = [list(csv.reader(io.StringIO(data.decode()))) for data in (found, expected)]
    cells = [[cell for row in table for cell in row] for table in tables]
    return [*map(len, tables[0])] == [*map(len, tables[1])] and all(
        one == other or _near(one, other) for one, other in zip(*cells, strict=True)
    )


def _near(one: str, other: str) -> bool:
    try:
        return abs(float(one) - float(other)) < 1e-5
    except ValueError:  # words
        return False


def mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory, or change how it is mounted; return whether that was possible.

    Linux does not make a file system read-only in which a file is open for writing.
    """
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, check=False, stderr=subprocess.DEVNULL).returncode == 0


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at a folder."""
    folder.mkdir(exist_ok=True)
    if not mount(folder, options):
        sys.exit(f"No file system could be mounted at {folder}: are you root?")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


if __name__ == "__main__":
    sys.exit(main())
