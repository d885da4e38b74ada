"""Fixed: one learned vector per layer, the same for every query. The control for the effect of adaptivity."""

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
    """An ATV configuration without a query: layers, positions and scale matter."""

    UNLISTED: ClassVar[tuple[str, ...]] = (
        *("generator", "generator_revision", "generator_layer", "train_generator", "pooling", "reads"),
        *("query_template", "expansion_rank", "parametrisation", "gate"),
    )
    """Fields that do not apply to a vector without a query; they are not command-line options."""

    generator: str = CONSTANT
    """A constant: it reads nothing."""
    train_generator: bool = False
    """It has no weights."""
    gate: float = 0.0
    """The vector is the same everywhere."""

    def __post_init__(self) -> None:
        """Raise ATVError for values that would make it another method."""
        super().__post_init__()
        expected = FixedConfig.__dataclass_fields__
        for name in ("generator", "train_generator", "gate", "expansion_rank", "parametrisation", "reads"):
            if getattr(self, name) != expected[name].default:
                raise ATVError(
                    f"{name} is {getattr(self, name)!r}; a fixed vector does not depend on the query: leave {name} out."
                )


class FixedModel(ATVModel):
    """An ATV with a constant generator, so that only the common vector remains."""

    method = "fixed"

    def __init__(self, llm: nn.Module, config: ATVConfig | None = None, **options: Any) -> None:
        super().__init__(llm, config or FixedConfig(), **options)


class Fixed(ATVMethod):
    """A trained fixed vector per layer."""

    name = "fixed"
    config_class = FixedConfig
    model_class = FixedModel
    generator_options: ClassVar[frozenset[str]] = frozenset()
