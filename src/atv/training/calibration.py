"""The temperature of a task's options: how confident a trained model is, measured on validation rows."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from atv.data import Task
from atv.data.collate import EncodedRow
from atv.data.splits import stratified
from atv.lm.adapter_model import AdapterModel
from atv.lm.hooks import input_device
from atv.lm.scoring import training_options

ROWS = 200
"""Most validation rows of a task that are read, each once per option."""
PAIRS = 64
"""Prompts with an option that are read at once."""
BOUNDS = 0.05, 20.0
"""Least and highest temperature."""


@torch.no_grad()
def option_scores(model: AdapterModel, task: Task, rows: Sequence[EncodedRow]) -> Tensor:
    """Return the log-probability of each option as a whole after each row's first prompt, (rows, options), float64."""
    ids = [list(option) for option in training_options(model.tokenizer, task).ids]
    lengths = torch.tensor([len(option) for option in ids], dtype=torch.float64)
    collate, device, scores = model.collator(), input_device(model.llm), []
    at_once = max(1, PAIRS // len(ids))
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        some = [replace(row, pairs=[(row.pairs[0][0], option) for option in ids]) for row in batch]
        losses: Tensor = model(**{name: tensor.to(device) for name, tensor in collate(some).items()}).losses
        scores.append(-losses.double().cpu().view(len(some), -1) * lengths)
    return torch.cat(scores)


def best_temperature(scores: Tensor, right: Tensor) -> float:
    """Return the temperature T at which softmax(scores / T) fits the answers best, by cross-entropy.

    Each option counts as if it were right once more in all rows together, as in Platt's scaling: otherwise rows that
    are all answered right would make the temperature as low as it can be.

    Args:
        scores: log-probabilities of options, (rows, options), float64.
        right: number of each row's answer, (rows,), int64.
    """
    rows, options = scores.shape
    smoothing = options / (rows + options)

    def loss(log_temperature: float) -> float:
        wide = scores / torch.tensor(log_temperature).exp()
        return float(torch.nn.functional.cross_entropy(wide, right, label_smoothing=smoothing))

    low, high = (float(torch.tensor(bound).log()) for bound in BOUNDS)
    return float(torch.tensor(minimize_scalar(loss, bounds=(low, high), method="bounded").x).exp())


def temperature_of(model: AdapterModel, task: Task, rows: Sequence[EncodedRow]) -> float | None:
    """Return the temperature of a task's options; None if it has none, or no row leaves room for each of them.

    Args:
        model: after its training, in eval mode.
        task: the task.
        rows: its encoded validation rows; of those whose prompt leaves room for each option, at most `ROWS` are used,
            with each answer in its share, drawn by the task's name alone.
    """
    if not (task.chooses and model.writes and rows):
        return None
    options = training_options(model.tokenizer, task)
    if options.continued:  # the loss of an answer does not say whether it ends there
        return None
    limit, longest = model.context, max(map(len, options.ids))
    if limit is not None:  # a query that was cut leaves room for its own answer alone
        rows = [row for row in rows if len(row.pairs[0][0]) + longest <= limit]
    rows = [rows[index] for index in stratified([row.answer for row in rows], ROWS, task.name)]
    if not rows:
        return None
    right = torch.tensor([options.texts.index(row.answer) for row in rows])
    return best_temperature(option_scores(model, task, rows), right)


def answer_facts(
    model: AdapterModel, tasks: Sequence[Task], rows: Sequence[EncodedRow], valid: Sequence[EncodedRow]
) -> dict[str, dict[str, Any]]:
    """Return what an adapter records about the answers of each task: most tokens in training, and the temperature.

    Args:
        model: after its training, in eval mode.
        tasks: the training tasks.
        rows: encoded training rows of all tasks.
        valid: encoded validation rows.
    """
    return {
        task.name: {
            "answer_tokens": max(
                (len(ids) for row in rows if row.task == task.name for _, ids in row.pairs), default=0
            ),
            "temperature": temperature_of(model, task, [row for row in valid if row.task == task.name]),
        }
        for task in tasks
    }
