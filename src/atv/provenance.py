"""Versions, commit and machine, which are recorded with every result."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from atv.processes import world_size


def provenance() -> dict[str, Any]:
    """Return versions, commit and machine, to be recorded with a result."""
    versions = {}
    known = (
        "adaptive-task-vectors",
        "torch",
        "transformers",
        "accelerate",
        "bm25s",
        "peft",
        "safetensors",
        "scikit-learn",
    )
    for package in known:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        here = Path(__file__).parent
        options: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "check": True, "timeout": 5}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "versions": versions,
        "commit": commit,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "processes": world_size(),
    }
