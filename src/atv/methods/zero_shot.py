"""Zero-shot: the template and the query, nothing else."""

from atv.methods.base import Method


class ZeroShot(Method):
    """The frozen LLM, unchanged."""

    name = "zero-shot"
    edited_tokens = 0
