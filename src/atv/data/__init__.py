"""Tasks: data, templates and judging. A task knows no model."""

from atv.data.audit import findings, long_prompts, refuse_shared_inputs, shared_beginnings
from atv.data.builtin import BUILTIN, builtin_task
from atv.data.folder import available_tasks, load_task
from atv.data.load import load_tasks
from atv.data.render import Example, Prompt, Renderer, Template
from atv.data.table import load_table
from atv.data.task import ANSWER_PREFIXES, UNSEEN, Task, Variant, composed

__all__ = [
    "ANSWER_PREFIXES",
    "BUILTIN",
    "UNSEEN",
    "Example",
    "Prompt",
    "Renderer",
    "Task",
    "Template",
    "Variant",
    "available_tasks",
    "builtin_task",
    "composed",
    "findings",
    "load_table",
    "load_task",
    "load_tasks",
    "long_prompts",
    "refuse_shared_inputs",
    "shared_beginnings",
]
