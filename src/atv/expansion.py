"""The expansion: a generator's state to one vector per layer, as it is by default and as in the paper."""

from typing import cast

import torch
from torch import Tensor, nn

from atv.config import ATVConfig
from atv.gate import Gate


class PaperExpansion(nn.Module):
    """The generator's state to one vector per layer: one linear map, reshaped (section 1 of the paper).

    Args:
        state_size: width of the generator's hidden state.
        layers: number of steered layers.
        hidden_size: width of the LLM's residual stream.
        rank: None for the paper's full map; else the product of two maps through `rank` dimensions.
    """

    def __init__(self, state_size: int, layers: int, hidden_size: int, rank: int | None = None) -> None:
        super().__init__()
        self.shape = (layers, hidden_size)
        self.map = _linear(state_size, layers * hidden_size, rank, bias=True)

    def forward(self, state: Tensor) -> Tensor:
        """(batch, state) to (batch, layers, hidden)."""
        return cast(Tensor, self.map(state).unflatten(-1, self.shape))


class Expansion(nn.Module):
    """The generator's state to one vector per layer, `r_l * (b_l + a * W_l z)`.

    b and W start at zero, so that an untrained ATV is the plain LLM. Until `calibrate` z is the state as it is and r_l
    is 1.

    Args:
        state_size: width of the generator's hidden state; 0: there is no W, and all queries have the same vectors.
        layers: number of steered layers.
        hidden_size: width of the LLM's residual stream.
        rank: None for a full map W; else the product of two maps through `rank` dimensions.
    """

    def __init__(self, state_size: int, layers: int, hidden_size: int, rank: int | None = None) -> None:
        super().__init__()
        self.shape = (layers, hidden_size)
        self.common = nn.Parameter(torch.zeros(layers, hidden_size))
        self.map = _linear(state_size, layers * hidden_size, rank, bias=False) if state_size else None
        if self.map is not None:
            nn.init.zeros_(list(self.map.parameters())[-1])
        self.gate = Gate(state_size)
        self.register_buffer("sizes", torch.ones(layers))
        self.register_buffer("mean", torch.zeros(state_size))
        self.register_buffer("deviation", torch.ones(state_size))

    sizes: Tensor
    mean: Tensor
    deviation: Tensor
    dropout = 0.0
    """Of z, in training mode."""

    def calibrate(self, states: Tensor, sizes: Tensor) -> None:
        """Take what z and r are from training rows.

        Args:
            states: (queries, state), of training queries.
            sizes: (layers,), root mean square of the residual stream's entries at the prompts' last token.
        """
        self.sizes.copy_(sizes)
        if self.map is None:
            return
        deviation = states.std(0, correction=0)
        least = 0.1 * deviation.mean()  # what hardly varies among these queries may among others
        self.mean.copy_(states.mean(0))
        self.deviation.copy_(deviation.clamp(min=least) if least > 0 else torch.ones_like(deviation))

    def rates(self, rate: float) -> list[tuple[nn.Parameter, float]]:
        """Learning rates of b and W, where `rate` is that of b.

        Adam moves every weight by about its rate in a step, so that W z moves by the rate times the sum of |z|, which
        grows with the width of the state. W's is divided by that: whatever the generator, the query's own part of a
        vector moves about ten times as far in a step as the common vector. It differs from query to query, and what is
        wrong for most of them cancels out.
        """
        own = [] if self.map is None else list(self.map.parameters())
        return [(self.common, rate), *((weight, 10 * rate / weight.shape[1]) for weight in own)]

    def standardised(self, state: Tensor) -> Tensor:
        """z, of the shape of `state`: (batch, state)."""
        return (state - self.mean) / self.deviation

    def forward(self, state: Tensor, share: Tensor | None = None) -> Tensor:
        """(batch, state) to (batch, layers, hidden); `share`, (batch,), is a, and 1 by default."""
        vectors = self.common.expand(len(state), -1, -1)
        if self.map is not None:
            z = nn.functional.dropout(self.standardised(state), self.dropout, self.training)
            own = self.map(z).unflatten(-1, self.shape)
            vectors = vectors + (own if share is None else share[:, None, None] * own)
        return self.sizes[:, None] * vectors


def new_expansion(config: ATVConfig, state_size: int, vectors: int, hidden_size: int) -> Expansion | PaperExpansion:
    """An untrained expansion, as the configuration says."""
    kind = PaperExpansion if config.parametrisation == "paper" else Expansion
    return kind(state_size, vectors, hidden_size, config.expansion_rank)


def _linear(inputs: int, outputs: int, rank: int | None, bias: bool) -> nn.Module:
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
