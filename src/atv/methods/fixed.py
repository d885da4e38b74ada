"""Fixed: one learned vector per layer, the same for every query. The control that shows what `adaptive` is worth."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from atv.config import ATVConfig
from atv.errors import ATVError
from atv.generator import CONSTANT
from atv.methods.atv import ATV
from atv.model import ATVModel, Expansion


@dataclass
class FixedConfig(ATVConfig):
    """An ATV's configuration without a query: layers, positions and scale count.

    A fixed vector moves by scale * learning rate in a step, whatever the two are by themselves; a generator's wide
    state makes an ATV's vector move much farther. So the paper's scale, 0.001, would leave it where it starts.
    """

    generator: str = CONSTANT
    """Reads nothing."""
    train_generator: bool = False
    """It has no weights."""
    scale: float = 1.0
    """lambda, the strength of the injection."""

    def __post_init__(self) -> None:
        """Refuse what would make it another method."""
        super().__post_init__()
        if (self.generator, self.train_generator, self.expansion_rank) != (CONSTANT, False, None):
            raise ATVError(
                f"A fixed vector has no generator to choose or train and no rank; found generator {self.generator!r}, "
                f"train_generator {self.train_generator}, expansion_rank {self.expansion_rank}: leave them out."
            )


class FixedModel(ATVModel):
    """An ATV whose generator says the same of every query, so that its expansion is the vectors themselves.

    They start at zero, as the plain LLM. An expansion starts at random so that its outputs differ by query, and how
    far is set by the width of the state: for a state of width 1, far. It has no bias either: that would be the same
    weight again, and each step of Adam twice as long.
    """

    method = "fixed"

    def __init__(self, llm: nn.Module, config: ATVConfig | None = None, **options: Any) -> None:
        super().__init__(llm, config or FixedConfig(), **options)

    def new_expansion(self) -> Expansion:
        """Zeros."""
        expansion = super().new_expansion()
        layers, hidden = expansion.shape
        expansion.map = nn.Linear(1, layers * hidden, bias=False)
        nn.init.zeros_(expansion.map.weight)
        return expansion


class Fixed(ATV):
    """A trained fixed vector."""

    name = "fixed"
    config_class = FixedConfig
    model_class = FixedModel
    train_defaults: ClassVar[dict[str, Any] | None] = {"learning_rate": 3e-3}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"learning_rate": (3e-3, 1e-3, 1e-2), "scale": (1.0, 0.5, 2.0)}
