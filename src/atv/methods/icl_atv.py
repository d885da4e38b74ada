"""ICL and ATV together: demonstrations in the prompt, and vectors made from the query inside the LLM."""

from typing import Any, ClassVar

from atv.methods.atv import ATVMethod
from atv.methods.icl import ICL


class ICLWithATV(ICL, ATVMethod):
    """ICL's prompts, read by an LLM that an ATV steers. The generator reads only the query, no demonstrations.

    The adapter is an ATV's, trained without demonstrations; the generator `self` reads them with the prompt anyway. The
    prompt before the edited tokens is independent of the vectors, so with positions `last` and `last:K` the
    demonstrations are still read once for all queries.
    """

    name = "icl+atv"
    config_class = None  # it is not trained itself
    search: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def trained_as(cls) -> str:
        """It uses the adapter of `atv`."""
        return ATVMethod.name

    def describe(self) -> dict[str, Any]:
        """The descriptions of both methods."""
        return ATVMethod.describe(self) | ICL.describe(self)
