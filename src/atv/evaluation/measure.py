"""One method measured on tasks, as a run that can be resumed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds
from torch import nn

from atv import artifact
from atv.data import Task
from atv.errors import ATVError, unknown
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate, metrics_of
from atv.lm.hooks import input_device
from atv.lm.load import load_llm, load_tokenizer, parse_dtype
from atv.methods import METHODS


@dataclass(frozen=True)
class Frozen:
    """Which LLM, and how it is loaded; what a record says of it."""

    llm: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def load(self) -> tuple[nn.Module, Any]:
        """The LLM and its tokenizer; asked for again, the same ones."""
        return _load(self)

    def described(self) -> dict[str, Any]:
        """What decides its answers."""
        dtype = str(parse_dtype(self.dtype, self.device)).removeprefix("torch.")
        return {"llm": self.llm, "revision": self.revision, "dtype": dtype, "quantization": self.quantization}


@lru_cache(maxsize=1)  # of several LLMs the memory may hold one
def _load(frozen: Frozen) -> tuple[nn.Module, Any]:
    how = asdict(frozen)
    name = how.pop("llm")
    return load_llm(name, **how), load_tokenizer(name, frozen.revision)


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
    variants: str = "all",
    batch_size: int = 16,
    force: bool = False,
) -> bool:
    """Ask a method the test rows of tasks; false if `out` holds this run already, finished.

    Args:
        name: of the method.
        frozen: the LLM; not loaded if there is nothing to do.
        tasks: their test splits are asked; demonstrations come from their training splits.
        out: folder of the run.
        metrics: as `load_metric` takes their names; None: each task's default.
        label: what its lines in tables are called; by default the method's name.
        adapter: for a method that needs one.
        shots: demonstrations; None: the method's own number, and none for a method that has none.
        seed: of what is drawn.
        variants: as `Task.renderers` takes it.
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
    if folder is not None:
        artifact.read(folder, trained)  # refuses another method's before there is a run
    judged = metrics_of(method_class, tasks, metrics)  # refuses what cannot be computed before anything is loaded
    settings = {
        "method": name,
        **frozen.described(),
        "seed": seed,
        "adapter": artifact.identity(folder) if folder else None,
        "tasks": {task.name: f"{len(task.test)} rows, {task.digest('test')}" for task in tasks},
        "asking": {task.name: task.asking() for task in tasks},
        "variants": variants,
        "metrics": {task: [metric.name for metric in some] for task, some in judged.items()},
    }
    if label not in ("", name):
        settings["label"] = label
    if shots:
        settings |= {"shots": shots, "demonstrations from": {task.name: task.digest("train") for task in tasks}}
    run = RunWriter(out, settings, force)
    if run.finished:
        return False
    llm, tokenizer = frozen.load()
    set_seed(seed)
    method = method_class.load(llm, tokenizer, folder, shots=shots or None, seed=seed)
    run.describe(method=method.describe(), device=str(input_device(llm)))
    evaluate(method, tasks, metrics, run, variants=variants, batch_size=batch_size)
    return True
