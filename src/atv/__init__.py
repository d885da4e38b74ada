"""Adaptive Task Vectors: adapt a frozen large language model to each query (arXiv 2506.03426).

The names below are the public interface. They are imported on first use, so that ``import atv`` and
``atv --help`` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "ATVConfig": "atv.config",
    "ATVError": "atv.errors",
    "ATVModel": "atv.model",
    "Example": "atv.data",
    "Task": "atv.data",
    "TrainConfig": "atv.config",
    "TrainingQueries": "atv.evaluation.inspect",
    "ValidationMetric": "atv.evaluation.validation",
    "check_wiring": "atv.doctor",
    "evaluate": "atv.evaluation.run",
    "inspect_query": "atv.evaluation.inspect",
    "load_llm": "atv.lm.load",
    "load_runs": "atv.evaluation.records",
    "load_tasks": "atv.data",
    "predict": "atv.evaluation.predict",
    "train": "atv.training.loop",
    "unsteered": "atv.lm.calls",
}

__all__ = [
    "ATVConfig",
    "ATVError",
    "ATVModel",
    "Example",
    "Task",
    "TrainConfig",
    "TrainingQueries",
    "ValidationMetric",
    "check_wiring",
    "evaluate",
    "inspect_query",
    "load_llm",
    "load_runs",
    "load_tasks",
    "predict",
    "train",
    "unsteered",
]

if TYPE_CHECKING:
    from atv.config import ATVConfig, TrainConfig
    from atv.data import Example, Task, load_tasks
    from atv.doctor import check_wiring
    from atv.errors import ATVError
    from atv.evaluation.inspect import TrainingQueries, inspect_query
    from atv.evaluation.predict import predict
    from atv.evaluation.records import load_runs
    from atv.evaluation.run import evaluate
    from atv.evaluation.validation import ValidationMetric
    from atv.lm.calls import unsteered
    from atv.lm.load import load_llm
    from atv.model import ATVModel
    from atv.training.loop import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'atv' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
