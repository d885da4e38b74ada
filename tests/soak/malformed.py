"""Give the command line what is wrong, over 500 times: files, adapters, TOML, options, columns.

    PYTHONPATH=tests python tests/soak/malformed.py --seed 0

Not part of the gate. Wrong input must end with exit code 2 and one line that begins with `atv:`. Counted are
tracebacks, other endings, and input that is certainly wrong and was accepted without a word. What a random change
makes of a file may still be valid; such a case only counts if it ends in a traceback. Adapters are changed as a
stranger would change them: with digests that fit. The LLM is a tiny one with random weights.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from documents import COMMANDS
from safetensors.torch import load_file, save_file

from atv.cli import main as command_line

LIMIT = 60
"""Seconds after which a case counts as accepted: it has begun its work."""
STRANGE = (None, True, -1, 10**13, 0.5, "", "x", "../../outside", [], [[]], {}, {"a": 1}, "\ud7ff\u0000")


HUGE = "9" * 23
"""As a maximum number of rows it is right."""
TAKES_MANY = ("generate", "inspect", "report")
"""Commands that take several arguments."""
ROWS = [{"input": f"the harbour is {'quiet' if n % 2 else 'loud'} {n}", "output": str(n % 2)} for n in range(12)]


class TooLong(BaseException):
    """A case is still at work."""


class Case(NamedTuple):
    """Arguments of the command line, and whether they are certainly wrong."""

    name: str
    arguments: list[Any]
    wrong: bool = True


class Found(NamedTuple):
    """How a case ended."""

    code: int | None
    """None: with an exception."""
    said: str


def run(arguments: list[Any]) -> Found:
    """Run a command in this process."""
    before, said = sys.argv, io.StringIO()
    sys.argv = ["atv", *map(str, arguments)]

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            command_line()
    except SystemExit as end:
        return Found(end.code if isinstance(end.code, int) else 0, said.getvalue())
    except TooLong:
        return Found(0, f"still at work after {LIMIT} s")
    except BaseException:
        return Found(None, traceback.format_exc())
    finally:
        signal.alarm(0)
        sys.argv = before
    return Found(0, said.getvalue())


def verdict(case: Case, found: Found) -> str:
    """Return what was wrong with an ending, or `right`."""
    last = (found.said.strip().splitlines() or [""])[-1]
    if found.code is None or "Traceback" in found.said:
        return "traceback"
    if found.code == 0:
        return "accepted" if case.wrong else "right"
    return "right" if found.code == 2 and last.startswith("atv: ") else f"ended with {found.code}"


# ---- what is changed ----


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every node of a JSON tree but its root."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from nodes(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at `path`; `...` removes it."""
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return tree


def files(folder: Path, draw: random.Random) -> Iterator[Case]:
    """Tables of rows that are damaged or not what they seem."""
    rows = ROWS

    def case(name: str, suffix: str, data: bytes, wrong: bool = True) -> Case:
        file = folder / f"{len(list(folder.iterdir()))}{suffix}"
        file.write_bytes(data)
        return Case(f"{suffix} {name}", ["tasks", "--data", file], wrong)

    def lines(found: list[Any]) -> bytes:
        return "\n".join(map(json.dumps, found)).encode()

    def table(found: list[list[str]], delimiter: str = ",") -> bytes:
        return "\n".join(delimiter.join(row) for row in found).encode()

    written = {".jsonl": lines(rows), ".json": json.dumps(rows).encode()}
    cells = [["input", "output"], *([row["input"], row["output"]] for row in rows)]
    written |= {".csv": table(cells), ".tsv": table(cells, "\t")}
    for suffix, data in written.items():
        yield case("empty", suffix, b"")
        yield case("blank", suffix, b"\n \n\n")
        yield case("random bytes", suffix, draw.randbytes(500))
        yield case("UTF-16", suffix, data.decode().encode("utf-16"))
        yield case("a gzip's beginning", suffix, b"\x1f\x8b\x08\x00" + data)
        yield case(
            "header only", suffix, b"input,output\n" if "sv" in suffix else b"[]" if suffix == ".json" else b"{}"
        )
        for _ in range(6):
            at = draw.randrange(len(data))
            yield case(f"byte {at} is not UTF-8", suffix, data[:at] + b"\xff" + data[at + 1 :])
            yield case(f"cut off at {at}", suffix, data[:at], suffix == ".json")
            yield case(f"NUL at {at}", suffix, data[:at] + b"\0" + data[at:], suffix.startswith(".json"))
    for key in ("input", "output"):
        for value in (None, [], {}, ["a", None], {"a": "b"}, "", " "):
            strange = [*rows[:5], rows[5] | {key: value}, *rows[6:]]
            empty = value is None or not str(value).strip()  # dropped and counted, as documented
            yield case(f"{key} of a row is {value!r}", ".jsonl", lines(strange), not empty)
            yield case(f"{key} of a row is {value!r}", ".json", json.dumps(strange).encode(), not empty)
        without = [dict(row) for row in rows]
        del without[draw.randrange(12)][key]
        yield case(f"{key} of a row is missing", ".jsonl", lines(without), False)
        yield case(f"no {key}", ".csv", table([[row[key == "input"]] for row in cells]))
    for row in (None, 1, "text", [], [rows[0]]):
        yield case(f"a row is {row!r}", ".jsonl", lines([*rows[:3], row, *rows[3:]]))
    yield case("a row too long", ".csv", table([*cells, ["a", "0", "b"]]))
    yield case("a row too short", ".csv", table([*cells, ["a"]]), False)
    yield case(
        "the same column twice", ".csv", table([["input", "output", "output"], *([*row, "1"] for row in cells[1:])])
    )
    yield case("a quote that does not end", ".csv", table([*cells, ['"a', "0"]]))
    yield case("nested deeply", ".json", b"[" * 100_000)
    yield case("nested deeply", ".jsonl", b'{"input":' * 100_000)
    yield case("unknown ending", ".xlsx", b"PK\x03\x04")
    yield case("not Parquet", ".parquet", b"PAR1" + draw.randbytes(200))
    yield case("a pickle", ".pkl", b"\x80\x04N.")


def names(folder: Path) -> Iterator[Case]:
    """Names of data, columns, templates and options of a chat that are none."""
    good = folder / "good.jsonl"
    good.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in (
        "",
        "nothing.csv",
        "/dev/null",
        "/proc/self/mem",
        "hub:",
        "hub:../..",
        "x" * 5000,
        "a\nb",
        str(folder),
    ):
        yield Case(f"data {name[:20]!r}", ["tasks", "--data", name])
    for option in ("--input", "--output"):
        for column in ("nothing", "", "Input ", "input,output", "\0"):
            yield Case(f"{option} {column!r}", ["tasks", "--data", good, option, column])
    for template in ("", "without a place", "{inputs}", "{input", "{}", "{input.__class__}", "{input!r}", "{0}"):
        yield Case(f"--template {template!r}", ["tasks", "--data", good, "--template", template])
    for given in ("", "x", "[]", "1", "{", '{"a": NaN}', "null"):
        arguments = ["tasks", "--data", good, "--format", "chat", "--chat-template-kwargs", given]
        yield Case(f"--chat-template-kwargs {given!r}", arguments, given != '{"a": NaN}')


def task_files(world: Path, folder: Path, draw: random.Random) -> Iterator[Case]:
    """Folders of TASK.json files with one node that is another."""
    good = json.loads((world / "data" / "one.json").read_text())
    good = {name: rows[:8] if isinstance(rows, list) else rows for name, rows in good.items()}
    templates = json.loads((world / "data" / "templates.json").read_text())
    for number in range(60):
        tree, there = good, copy.deepcopy(templates)
        if number % 4 == 3:
            path, value = draw.choice(list(nodes(templates))), draw.choice((*STRANGE, ...))
            there = changed(templates, path, value)
        else:
            path, value = draw.choice(list(nodes(good))), draw.choice((*STRANGE, ...))
            tree = changed(good, path, value)
        place = folder / str(number)
        place.mkdir()
        (place / "one.json").write_text(json.dumps(tree))
        (place / "templates.json").write_text(json.dumps(there))
        shown = "removed" if value is ... else repr(value)
        yield Case(f"{'/'.join(map(str, path))} is {shown}", ["tasks", "--data", place], False)


def options(world: Path, folder: Path) -> Iterator[Case]:
    """Values that an option cannot have; the same in TOML where the command reads it."""
    data, llm, adapter = world / "data", world / "llm", world / "first" / "adapter"
    shared = ["--llm", llm, "--dtype", "float32"]
    begin: dict[str, list[Any]] = {
        "train": ["train", *shared, "--data", data, "--generator", "self", "--epochs", "1"],
        "eval": ["eval", *shared, "--data", data, "--method", "zero-shot"],
        "compare": ["compare", *shared, "--data", data / "one.json", "--method", "zero-shot", "--method", "bm25"],
        "generate": ["generate", "the harbour", "--adapter", adapter, "--dtype", "float32"],
        "predict": ["predict", world / "rows.csv", "--adapter", adapter, "--task", "one"],
        "serve": ["serve", *shared, "--adapter", f"a={adapter}"],
        "inspect": ["inspect", "the harbour", "--adapter", adapter, "--data", data],
        "doctor": ["doctor", *shared],
        "tasks": ["tasks", "--data", data],
        "report": ["report", world / "reproduced"],
        "paper reproduce": ["paper", "reproduce", *shared, "--data", data, "--profile", "smoke"],
        "paper sweep": ["paper", "sweep", *shared, "--data", data, "--trials", "1"],
        "paper analysis": ["paper", "analysis", "--adapter", adapter, "--data", data],
    }
    outputs = {"train", "eval", "compare", "paper reproduce", "paper sweep", "paper analysis", "predict"}
    for command, arguments in begin.items():
        out = [] if command not in outputs else ["--out", folder / f"out{'.csv' * (command == 'predict')}"]
        yield Case(f"{command} --no-such-option", [*arguments, *out, "--no-such-option"])
        yield Case(
            f"{command}, an argument too many", [*arguments, *out, "one", "two", "three"], command not in TAKES_MANY
        )
        for parameter in COMMANDS[command].params:
            if parameter.param_type_name != "option" or parameter.is_flag or parameter.name in ("help", "out"):
                continue
            for value in wrong_values(parameter):
                words = [*arguments, *out, f"{parameter.opts[0]}={value}"]
                may = value == HUGE or (parameter.name, value) == ("config", "/dev/null")  # an empty file
                yield Case(f"{command} {parameter.opts[0]} {value[:20]!r}", words, not may)
    numeric = {"epochs": "x", "lr": [1], "seed": 1.5, "batch-size": 0, "scale": "nan", "unknown": 1, "method": 3}
    tables = [f"[train]\n{name} = {json.dumps(value)}\n" for name, value in numeric.items()]
    tables += [f"[atv]\n{name} = {json.dumps(value)}\n" for name, value in numeric.items() if name != "method"]
    tables += [
        f"[lora]\nrank = {value}\n" for value in ("0", "-1", '"x"', "nan", "inf", "true", "[8]", "{a = 1}", "1e9")
    ]
    tables += [
        "[trian]\n",
        "train = 1\n",
        "[train\n",
        "[train]\nepochs = 1\nepochs = 2\n",
        "\0",
        "[[train]]\n",
        "[all]\nx=1\n",
    ]
    tables += [
        f"[train]\n{name} = {value}\n"
        for name in ("epochs", "lr", "scale")
        for value in ("nan", "true", "''", "[]", "{}")
    ]
    for number, text in enumerate(tables):
        file = folder / f"{number}.toml"
        file.write_text(text)
        method = ["--method", "lora"] if "[lora]" in text else []
        arguments = ["train", *shared, "--data", data, "--config", file, *method, "--out", folder / "out"]
        yield Case(f"TOML {text!r}", arguments)


def wrong_values(parameter: Any) -> list[str]:
    """Values that an option of this type cannot have."""
    kind = str(parameter.type_descriptor.annotation)
    if "int" in kind:
        return ["x", "1.5", "nan", "", "1e400", HUGE]
    if "float" in kind:
        return ["x", "nan", "", "0x10", "inf"]
    if (parameter.metavar or "").startswith("["):
        return ["nothing", ""]
    if parameter.name in ("adapter", "config", "elicit", "teacher_system", "gguf", "adapters_from", "data", "llm"):
        return ["", "/nowhere/at/all", "/dev/null", "x" * 5000, "no such hub/id"]
    if parameter.name in (
        "method",
        "task",
        "dtype",
        "device",
        "quantization",
        "positions",
        "layers",
        "engine",
        "profile",
    ):
        return ["nothing", "-1", "last:0", "99", ","]
    return []


def adapters(world: Path, folder: Path, draw: random.Random) -> Iterator[Case]:
    """Adapters of strangers: a node of the configuration or a file is another; digests fit."""
    source = world / "first" / "adapter"
    good = json.loads((source / "atv_config.json").read_text())
    weights = sorted(file.relative_to(source).as_posix() for file in source.rglob("*.safetensors"))

    def case(name: str, config: Any, wrong: bool, data: dict[str, bytes] | None = None) -> Case:
        place = folder / str(len(list(folder.iterdir())))
        shutil.copytree(source, place)
        for file, content in (data or {}).items():
            (place / file).write_bytes(content)
            config = changed(config, ("sha256", file), hashlib.sha256(content).hexdigest())
        (place / "atv_config.json").write_text(json.dumps(config))
        return Case(f"adapter: {name}", ["generate", "the harbour", "--adapter", place, "--dtype", "float32"], wrong)

    paths = [path for path in nodes(good) if "fingerprint" not in path[:-2] or draw.random() < 0.05]
    for path in draw.sample(paths, min(120, len(paths))):
        value = draw.choice((*STRANGE, ...))
        yield case(
            f"{'/'.join(map(str, path))} is {'removed' if value is ... else repr(value)}",
            changed(good, path, value),
            False,
        )
    for name in (
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../b",
        "..",
        "",
        "~/x",
        "C:\\x",
        "x\0y",
        "pickle.bin",
        "code.py",
    ):
        yield case(f"names the file {name!r}", changed(good, ("sha256", name), "0" * 64), True)
    for file in weights:
        data, tensors = (source / file).read_bytes(), load_file(source / file)
        (size,) = struct.unpack("<Q", data[:8])
        for name, content in (
            ("is empty", b""),
            ("has a header of 2^60 bytes", struct.pack("<Q", 2**60) + data[8:]),
            ("has a header of 2^64 - 1 bytes", struct.pack("<Q", 2**64 - 1) + data[8:]),
            ("has a header that is no JSON", data[:8] + b"x" * size + data[8 + size :]),
            ("has a header that is a list", struct.pack("<Q", 8) + b"[1,2,3] "),
            ("is cut off", data[: len(data) // 2]),
            ("has more at the end", data + b"\0" * 64),
            ("is a pickle", b"\x80\x04N."),
        ):
            yield case(f"{file} {name}", good, True, {file: content})
        first = next(iter(sorted(tensors)))
        for name, other in (
            ("without a tensor", {key: value for key, value in tensors.items() if key != first}),
            ("with one more tensor", tensors | {"more": torch.zeros(3)}),
            ("with another shape", tensors | {first: torch.zeros(3, 5, 7)}),
            *(
                (f"NaN in {key}", tensors | {key: torch.full_like(value, float("nan"))})
                for key, value in tensors.items()
                if value.is_floating_point() and value.numel()
            ),
            *(
                (f"infinity in {key}", tensors | {key: torch.full_like(value, float("inf"))})
                for key, value in tensors.items()
                if value.is_floating_point() and value.numel()
            ),
            *(
                (f"{key} as bytes", tensors | {key: value.to(torch.uint8)})
                for key, value in list(tensors.items())[:4]
                if value.is_floating_point()
            ),
        ):
            save_file(other, folder.parent / "other.safetensors")
            wrong = not name.endswith("as bytes")  # they are numbers
            yield case(f"{file} {name}", good, wrong, {file: (folder.parent / "other.safetensors").read_bytes()})


def huge(world: Path, folder: Path) -> tuple[str, float]:
    """Return the ending of an adapter whose configuration is a JSON of 1 GB, and the GiB that it took."""
    place = folder / "huge"
    shutil.copytree(world / "first" / "adapter", place)
    with (place / "atv_config.json").open("w") as file:
        file.write('{"format": 7, "config": [')
        for _ in range(1000):
            file.write("[0]," * 250_000)
        file.write("0]}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    words = [sys.executable, "-m", "atv", "generate", "q", "--adapter", str(place)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    shutil.rmtree(place)
    peak = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 2**20
    case = Case("adapter: a configuration of 1 GB", [])
    return verdict(case, Found(ended.returncode, ended.stderr)) + f" ({ended.stderr.strip()[:200]})", peak


def main() -> int:
    """Run all cases, print what was wrong and the counts, and return 1 if anything was."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--only", help="cases whose name holds this text")
    chosen = asked.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        make_world(world)
        counts, number = Counter[str](), 0
        for title, cases in (
            ("files", files(_new(world / "files"), draw)),
            ("names", names(_new(world / "names"))),
            ("task files", task_files(world, _new(world / "task files"), draw)),
            ("options and TOML", options(world, _new(world / "options"))),
            ("adapters", adapters(world, _new(world / "adapters"), draw)),
        ):
            here = Counter[str]()
            for case in cases:
                if chosen.only and chosen.only not in case.name:
                    continue
                number += 1
                found = run(case.arguments)
                how = verdict(case, found)
                here[how] += 1
                if how != "right":
                    print(f"{how.upper()}: {case.name}\n    {' '.join(found.said.split())[-400:]}", flush=True)
            print(f"{title}: {sum(here.values())} cases, {dict(here)}", flush=True)
            counts += here
        if not chosen.only:
            ending, peak = huge(world, world)
            print(f"configuration of 1 GB: {ending}, at most {peak:.1f} GiB of memory", flush=True)
            counts[ending.split(" ")[0]] += 1
        print(f"{number} cases: {dict(counts)}")
    return int(set(counts) != {"right"})


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_world(world: Path) -> None:
    """Write a tiny LLM, data, a trained adapter and a table."""
    torch.manual_seed(0)
    make_llm(dtype=torch.float32).save_pretrained(world / "llm")
    byte_level_tokenizer().save_pretrained(world / "llm")
    task = toy_task()
    rows = {split: [row._asdict() for row in getattr(task, split)] for split in ("train", "valid", "test")}
    _new(world / "data")
    for name in ("one", "two"):
        (world / "data" / f"{name}.json").write_text(json.dumps(rows))
    (world / "data" / "templates.json").write_text(json.dumps({name: list(task.templates) for name in ("one", "two")}))
    (world / "rows.csv").write_text("input\nthe harbour\n")
    train = ["train", "--llm", world / "llm", "--dtype", "float32", "--data", world / "data", "--epochs", "1"]
    # A generator that is saved with the adapter: a stranger's files can be wrong there, too.
    found = run([*train, "--generator", "random:1x32", "--out", world / "first"])
    if found.code:
        sys.exit(f"The adapter could not be trained: {found.said}")
    _new(world / "reproduced")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
