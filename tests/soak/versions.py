"""The core tests with other versions of Python and of the dependencies: `make test-versions`.

    python tests/soak/versions.py --pair 3.11:lowest --pair 3.13:5.23.0

Not part of the gate. A pair is a version of Python and one of transformers, or `lowest` for the lowest version of
every dependency that pyproject.toml allows, which uv finds. All else has the versions of constraints.txt. torch is
always that of constraints.txt: older ones come without CUDA from PyTorch's own index only, so its lower bound is not
tested. Each pair gets an environment of its own under .venv-versions. Prints a table of what passed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv-versions"
PAIRS = ("3.11:lowest", "3.11:5.24.0", "3.13:5.23.0")
FOLLOW = ("transformers", "tokenizers", "huggingface_hub", "safetensors")
"""Packages whose versions follow from that of transformers."""
EXTRAS = ("analysis", "data", "embedded", "quantized", "report", "rouge", "serve")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "openai")
NOT_CORE = ("benchmarks", "docs", "embedded", "page")
"""Tests of tools (of the site, of a browser, of ruff), and of what the embedded models and benchmarks say."""


def main() -> int:
    """Test each pair, print the table, and return 1 if a test failed."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--pair", action="append", default=[], help="PYTHON:TRANSFORMERS or PYTHON:lowest; repeatable")
    asked.add_argument("--workers", default="2", help="processes that run tests")
    chosen = asked.parse_args()
    PLACE.mkdir(exist_ok=True)
    lines, failed = [], 0
    for pair in chosen.pair or PAIRS:
        python, transformers = pair.split(":")
        began = time.monotonic()
        found, passed = test(python, transformers, chosen.workers)
        failed += not passed
        lines.append(f"| {python} | {transformers} | {found} | {(time.monotonic() - began) / 60:.0f} |")
        print(lines[-1], flush=True)
    heads = ["| Python | transformers | tests | minutes, installation included |", "|---|---|---|---:|"]
    print("\n".join(["", *heads, *lines]))
    return int(failed > 0)


def test(python: str, transformers: str, workers: str) -> tuple[str, bool]:
    """Install one pair and run the tests; return what pytest says at its end, and whether all passed."""
    folder = PLACE / f"{python}-{transformers}"
    own, log = folder / "bin" / "python", folder.with_suffix(".log")
    if not own.exists() and not ran(f"python{python}", "-m", "venv", folder):
        return f"not tested: no python{python} on this machine", False
    if not install(own, folder.with_suffix(".txt"), transformers):
        return "not tested: the installation failed", False
    ignored = [word for name in NOT_CORE for word in ("--ignore", f"tests/test_{name}.py")]
    with log.open("w") as file:
        tests = [own, "-m", "pytest", "-n", workers, "--dist", "worksteal", *ignored]
        code = subprocess.run(tests, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    return log.read_text().strip().splitlines()[-1].partition(" in ")[0].strip("= "), code == 0


def install(python: Path, constraints: Path, transformers: str) -> bool:
    """Install the package with one version of transformers, or the lowest of everything."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pinned if line.startswith("torch=="))
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    package, about = f"{ROOT}[{','.join(EXTRAS)}]", []
    if transformers == "lowest":
        only = constraints.with_suffix(".torch.txt")
        only.write_text(torch + "\n")
        extras = [word for extra in EXTRAS for word in ("--extra", extra)]
        find = ["uv", "pip", "compile", "--quiet", "--no-header", "--resolution", "lowest-direct", "--python", python]
        if not ran(*pip, next(line for line in pinned if line.startswith("uv=="))):
            return False
        if not ran(python, "-m", *find, "-c", only, *extras, ROOT / "pyproject.toml", "-o", constraints):
            return False
    else:
        constraints.write_text("\n".join(line for line in pinned if not line.startswith(FOLLOW)) + "\n")
        about = [f"transformers=={transformers}"]
    return (
        ran(*pip, torch)
        and ran(*pip, "-c", constraints, *about, "-e", package, *TOOLS)
        and ran(*pip, "--no-deps", "-r", ROOT / "requirements-embedded.txt")
    )


def ran(*words: Any) -> bool:
    """Run a command; return whether it ended well."""
    try:
        return subprocess.run(list(map(str, words)), check=False).returncode == 0
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(main())
