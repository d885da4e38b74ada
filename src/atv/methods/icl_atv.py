"""ICL and ATV together: demonstrations in the prompt, and vectors made from the query inside the LLM."""

from typing import Any, ClassVar

from atv.methods.atv import ATVMethod
from atv.methods.icl import ICL


class ICLWithATV(ICL, ATVMethod):
    """The prompts of ICL, read by an LLM that an ATV steers. The generator reads the query, no demonstration.

    The adapter is an ATV's, trained without demonstrations; the generator `self` reads them with the prompt anyway.
    What stands before the edited tokens depends on no vector: with positions `last` and `last:K` the demonstrations are
    still read once for all queries.
    """

    name = "icl+atv"
    config_class = None  # nothing is trained for it
    search: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def trained_as(cls) -> str:
        """It takes an ATV's adapter."""
        return ATVMethod.name

    def describe(self) -> dict[str, Any]:
        """What both of them say."""
        return ATVMethod.describe(self) | ICL.describe(self)
