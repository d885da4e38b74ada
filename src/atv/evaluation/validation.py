"""A metric on validation rows, by which a training selects its epoch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from atv.data import Task
from atv.errors import ATVError, unknown
from atv.evaluation.metrics import Metric, load_metric
from atv.evaluation.run import evaluate
from atv.lm.adapter_model import AdapterModel
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.methods.peft_model import PEFTMethod


class ValidationMetric:
    """The mean score of a model's answers on validation rows, as the argument `metric` of `train`.

    Each row is asked once, in the first template. A metric of generated answers generates all of them after every
    epoch, which may take longer than the epoch itself.

    Args:
        tasks: those that are trained on, or with fewer validation rows (`Task.drawn`).
        metric: a name, a function or a `Metric`, as for `load_metric`.
        score: which of the metric's scores. None: its only one, or the first.
        batch_size: prompts per call of the LLM.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        metric: str | Metric | Callable[..., Any],
        score: str | None = None,
        batch_size: int = 16,
    ) -> None:
        self.tasks = [replace(task, valid=task.test, test=task.valid) for task in tasks]
        self.metric, self.score, self.batch_size = load_metric(metric), score, batch_size

    @property
    def name(self) -> str:
        """The name in records."""
        return self.metric.name if self.score is None else f"{self.metric.name}:{self.score}"

    def __call__(self, model: AdapterModel) -> float:
        """Return the mean over tasks of the mean score over the rows where it is defined.

        Raises:
            ATVError: the model's method does not answer with the LLM, the score is unknown or defined for no row.
        """
        found = METHODS.get(getattr(model, "method", ""))
        if found is None or not issubclass(found, ATVMethod | PEFTMethod):
            raise ATVError(f"{type(model).__name__} does not answer with the LLM; expected an ATV or a PEFT adapter.")
        rows = evaluate(found(model), self.tasks, [self.metric], variants="first", batch_size=self.batch_size)  # type: ignore[arg-type]
        return sum(self._mean(rows, task) for task in self.tasks) / len(self.tasks)

    def _mean(self, rows: Sequence[dict[str, Any]], task: Task) -> float:
        scores = [row["scores"] for row in rows if row["task"] == task.name]
        name = self.score or next(iter(scores[0]))
        if name not in scores[0]:
            raise unknown(f"score of the metric {self.metric.name}:", name, scores[0])
        defined = [each[name] for each in scores if each[name] is not None]
        if not defined:
            raise ATVError(f"{task.name}: {name} is defined for none of the {len(scores)} validation rows.")
        return float(sum(defined) / len(defined))
