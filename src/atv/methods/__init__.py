"""Methods: one file each, behind one contract. New method = one file and one line here."""

from atv.methods.atv import ATV
from atv.methods.base import Method
from atv.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {"zero-shot": ZeroShot, "atv": ATV}

__all__ = ["METHODS", "Method"]
