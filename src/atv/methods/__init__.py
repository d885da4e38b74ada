"""Methods: one file each, with a common interface. A new method is one file and one line in `METHODS`."""

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atv.methods.base import Choice, Method


class Registry(MutableMapping[str, "type[Method]"]):
    """Method classes by name. Each is imported on first access, so listing the names does not import torch.

    Args:
        places: where the class of each name is, as `module:Class`.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._classes: dict[str, str | type[Method]] = dict(places)

    def __getitem__(self, name: str) -> "type[Method]":
        found = self._classes[name]
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self._classes[name] = getattr(import_module(module), attribute)
        return found

    def __setitem__(self, name: str, method: "type[Method]") -> None:
        self._classes[name] = method

    def __delitem__(self, name: str) -> None:
        del self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._classes  # the inherited one would import the class

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


METHODS = Registry(
    {
        "zero-shot": "atv.methods.zero_shot:ZeroShot",
        "icl": "atv.methods.icl:ICL",
        "bm25": "atv.methods.bm25:BM25",
        "elicit": "atv.methods.elicit:Elicit",
        "i2cl": "atv.methods.i2cl:I2CL",
        "linear": "atv.methods.linear:Linear",
        "lora": "atv.methods.lora:LoRA",
        "prefix": "atv.methods.prefix_tuning:PrefixTuning",
        "full": "atv.methods.full:Full",
        "probe": "atv.methods.probe:Probe",
        "encoder": "atv.methods.encoder:Encoder",
        "learned-tv": "atv.methods.learned_tv:LearnedTV",
        "fixed": "atv.methods.fixed:Fixed",
        "atv": "atv.methods.atv:ATVMethod",
        "icl+atv": "atv.methods.icl_atv:ICLWithATV",
    }
)
"""In the order used by help texts and table rows."""
TRAINED = tuple(name for name in METHODS if name not in ("zero-shot", "icl", "bm25", "icl+atv"))
"""Those that `atv train` trains. The others learn nothing themselves."""

__all__ = ["METHODS", "TRAINED", "Choice", "Method", "Registry"]


def __getattr__(name: str) -> Any:
    """The interface, imported on first use because it imports torch."""
    if name not in __all__:
        raise AttributeError(f"module 'atv.methods' has no attribute {name!r}")
    return getattr(import_module("atv.methods.base"), name)
