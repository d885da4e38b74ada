"""Tasks: data, templates and judging. A task knows no model."""

from atv.tasks.audit import findings, long_prompts, refuse_shared_inputs, shared_beginnings
from atv.tasks.base import ANSWER_PREFIXES, TRAIN_PREFIX, UNSEEN, Example, Task, Variant, composed
from atv.tasks.builtin import BUILTIN, builtin_task
from atv.tasks.folder import available_tasks, load_task, load_tasks
from atv.tasks.paper import PAPER, PaperTask, paper_templates

__all__ = [
    "ANSWER_PREFIXES",
    "BUILTIN",
    "PAPER",
    "TRAIN_PREFIX",
    "UNSEEN",
    "Example",
    "PaperTask",
    "Task",
    "Variant",
    "available_tasks",
    "builtin_task",
    "composed",
    "findings",
    "load_task",
    "load_tasks",
    "long_prompts",
    "paper_templates",
    "refuse_shared_inputs",
    "shared_beginnings",
]
