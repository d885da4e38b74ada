"""Fixed: one learned vector per layer, the same for every query. The control that shows what `adaptive` is worth."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from atv.config import ATVConfig
from atv.errors import ATVError
from atv.generator import CONSTANT
from atv.methods.atv import ATVMethod
from atv.model import ATVModel


@dataclass
class FixedConfig(ATVConfig):
    """An ATV's configuration without a query: layers, positions and scale count."""

    UNLISTED: ClassVar[tuple[str, ...]] = (
        *("generator", "generator_revision", "generator_layer", "train_generator", "pooling", "reads"),
        *("query_template", "expansion_rank", "parametrisation", "gate"),
    )
    """What says nothing of a vector without a query: no options of the command line."""

    generator: str = CONSTANT
    """Reads nothing."""
    train_generator: bool = False
    """It has no weights."""
    gate: float = 0.0
    """The vector is the same everywhere."""

    def __post_init__(self) -> None:
        """Refuse what would make it another method."""
        super().__post_init__()
        expected = FixedConfig.__dataclass_fields__
        for name in ("generator", "train_generator", "gate", "expansion_rank", "parametrisation", "reads"):
            if getattr(self, name) != expected[name].default:
                raise ATVError(
                    f"{name} is {getattr(self, name)!r}; a fixed vector has nothing of a query's own: leave {name} out."
                )


class FixedModel(ATVModel):
    """An ATV whose generator says nothing, so that the common vector is all that it has."""

    method = "fixed"

    def __init__(self, llm: nn.Module, config: ATVConfig | None = None, **options: Any) -> None:
        super().__init__(llm, config or FixedConfig(), **options)


class Fixed(ATVMethod):
    """A trained fixed vector."""

    name = "fixed"
    config_class = FixedConfig
    model_class = FixedModel
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"learning_rate": (0.1, 0.03, 0.3)}
