"""Tasks: data, templates and judging. A task knows no model."""

from atv.tasks.base import ANSWER_PREFIXES, TRAIN_PREFIX, Example, Task, Variant
from atv.tasks.builtin import BUILTIN, UNSEEN, builtin_task
from atv.tasks.folder import available_tasks, load_task, load_tasks

__all__ = [
    "ANSWER_PREFIXES",
    "BUILTIN",
    "TRAIN_PREFIX",
    "UNSEEN",
    "Example",
    "Task",
    "Variant",
    "available_tasks",
    "builtin_task",
    "load_task",
    "load_tasks",
]
