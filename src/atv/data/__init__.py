"""Tasks: data, templates and judging. A task knows no model."""

from atv.data.asked import (
    as_trained,
    asking_of,
    check_chat_template,
    check_test_rows,
    query_renderer,
    table_of,
    trained_task,
)
from atv.data.audit import findings, long_prompts, refuse_shared_inputs, shared_beginnings, unread_queries
from atv.data.builtin import BUILTIN, builtin_task
from atv.data.chat import Chat
from atv.data.folder import available_tasks, load_task
from atv.data.load import load_tasks
from atv.data.render import Example, Prompt, Renderer, Template, Turn
from atv.data.rendering import Rendering
from atv.data.table import load_table
from atv.data.task import ANSWER_PREFIXES, UNSEEN, Task, Variant, composed

__all__ = [
    "ANSWER_PREFIXES",
    "BUILTIN",
    "UNSEEN",
    "Chat",
    "Example",
    "Prompt",
    "Renderer",
    "Rendering",
    "Task",
    "Template",
    "Turn",
    "Variant",
    "as_trained",
    "asking_of",
    "available_tasks",
    "builtin_task",
    "check_chat_template",
    "check_test_rows",
    "composed",
    "findings",
    "load_table",
    "load_task",
    "load_tasks",
    "long_prompts",
    "query_renderer",
    "refuse_shared_inputs",
    "shared_beginnings",
    "table_of",
    "trained_task",
    "unread_queries",
]
