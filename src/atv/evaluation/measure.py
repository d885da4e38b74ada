"""Training and measuring one method on tasks, in folders that can be resumed."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed  # transformers' own imports peft, which takes seconds
from torch import nn

from atv import artifact
from atv.data import Task, check_chat_template
from atv.errors import ATVError, unknown
from atv.evaluation.metrics import recorded_name
from atv.evaluation.records import RUN_FILE, RunWriter
from atv.evaluation.run import evaluate, metrics_of
from atv.files import read_json
from atv.lm.hooks import input_device
from atv.lm.load import load_llm, load_tokenizer, parse_dtype
from atv.lm.prefix_store import PrefixStore
from atv.methods import METHODS
from atv.methods.settings import Settings
from atv.training.record import RECORD_FILE


@dataclass(frozen=True)
class Frozen:
    """Which LLM, how it is loaded, and its description in records."""

    llm: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def load(self) -> tuple[nn.Module, Any]:
        """The LLM and its tokenizer, cached."""
        return _load(self)

    def described(self) -> dict[str, Any]:
        """The settings that affect its answers."""
        dtype = str(parse_dtype(self.dtype, self.device)).removeprefix("torch.")
        return {"llm": self.llm, "revision": self.revision, "dtype": dtype, "quantization": self.quantization}


@lru_cache(maxsize=1)  # memory may hold only one LLM
def _load(frozen: Frozen) -> tuple[nn.Module, Any]:
    how = asdict(frozen)
    name = how.pop("llm")
    tokenizer = load_tokenizer(name, frozen.revision, trust_remote_code=frozen.trust_remote_code)
    return load_llm(name, **how), tokenizer


def measure(
    name: str,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    *,
    metrics: Sequence[str] | None = None,
    label: str = "",
    adapter: Path | None = None,
    shots: int | None = None,
    seed: int = 42,
    variants: str = "trained",
    batch_size: int = 16,
    force: bool = False,
) -> bool:
    """Evaluate a method on the test rows of tasks; false if `out` holds this run already, finished.

    Args:
        name: name of the method.
        frozen: the LLM, which is not loaded if there is nothing to do.
        tasks: evaluated on their test splits; demonstrations come from their training splits.
        out: the folder of the run.
        metrics: names as for `load_metric`. None: each task's default.
        label: name of its table rows; by default the method's name.
        adapter: the adapter's folder, for a method that needs one.
        shots: number of demonstrations. None: the method's default, if it has any.
        seed: seed of all random choices.
        variants: as for `Task.renderers`.
        batch_size: prompts per call of the LLM.
        force: start over.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method_class = METHODS[name]
    trained = method_class.trained_as()
    if trained is not None:
        method_class.wanted_adapter(adapter)
    elif adapter is not None:
        raise ATVError(f"The method {name} has no adapter; found --adapter {adapter}: leave it out.")
    shots = method_class.wanted_shots(shots)
    folder = artifact.locate(adapter) if adapter is not None else None
    saved = None if folder is None else artifact.read(folder, trained)  # refuses another method's adapter before a run
    judged = metrics_of(method_class, tasks, metrics)  # refuses metrics that cannot be computed, before loading
    settings = {
        "method": name,
        **frozen.described(),
        "seed": seed,
        "adapter": artifact.identity(folder) if folder else None,
        "tasks": {task.name: f"{len(task.test)} rows, {task.digest('test')}" for task in tasks},
        "asking": {task.name: task.asking() for task in tasks},
        "variants": variants,
        "metrics": {task: [recorded_name(metric) for metric in some] for task, some in judged.items()},
    }
    if label not in ("", name):
        settings["label"] = label
    if shots:
        settings |= {"shots": shots, "demonstrations from": {task.name: task.digest("train") for task in tasks}}
    run = RunWriter(out, settings, force)
    if run.finished:
        return False
    llm, tokenizer = frozen.load()
    if saved is not None:
        check_chat_template(saved.training, tokenizer)
    set_seed(seed)
    method = method_class.load(llm, tokenizer, folder, shots=shots or None, seed=seed)
    run.describe(method=method.describe(), device=str(input_device(llm)))
    evaluate(method, tasks, metrics, run, variants=variants, batch_size=batch_size)
    return True


def learn(
    name: str,
    frozen: Frozen,
    tasks: Sequence[Task],
    out: Path,
    settings: Settings,
    store: PrefixStore,
    force: bool = False,
) -> bool:
    """Train a method on tasks; false if `out` holds this training already, finished.

    Args:
        name: name of a trained method.
        frozen: the LLM, which is not loaded if there is nothing to do.
        tasks: trained on together.
        out: the folder of the training.
        settings: of the method and its training.
        store: cached prompt prefixes, which several trainings may share.
        force: start over.
    """
    record = out / RECORD_FILE
    if record.exists() and not force and read_json(record, "the record of a training")["finished"]:
        return False
    llm, tokenizer = frozen.load()
    METHODS[name].fit(llm, tokenizer, tasks, out, *settings, force=force, store=store)
    return True


def remove_results(out: Path, folders: str) -> None:
    """Remove the trainings and runs of a command that starts over, before it records its new settings.

    If it is killed and resumed, a finished one with the former settings would otherwise be taken for a new one.

    Args:
        out: the command's folder, with `trained` and `runs` in it.
        folders: pattern of the folders in these two; those without a record of their own are kept.
    """
    for record in [*out.glob(f"trained/{folders}/{RECORD_FILE}"), *out.glob(f"runs/{folders}/{RUN_FILE}")]:
        gone = record.parent.with_name(f".{record.parent.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)  # left by a kill
        os.replace(record.parent, gone)  # first: a folder that is half removed could be neither resumed nor removed
        shutil.rmtree(gone, ignore_errors=True)
