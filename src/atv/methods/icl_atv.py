"""ICL and ATV together: demonstrations in the prompt, and vectors made from the query inside the LLM."""

from typing import Any

from atv.methods.atv import ATV
from atv.methods.icl import ICL


class ICLWithATV(ICL, ATV):
    """The prompts of ICL, read by an LLM that an ATV steers. The generator reads the query, no demonstration.

    The adapter is an ATV's, trained without demonstrations. What stands before its edited tokens depends on no vector:
    with positions `last` and `last:K` the demonstrations are still read once for all queries.
    """

    name = "icl+atv"
    config_class = None  # nothing of its own is trained

    def describe(self) -> dict[str, Any]:
        """What both of them say."""
        return ATV.describe(self) | ICL.describe(self)
