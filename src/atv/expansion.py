"""The expansion maps a generator's state to one vector per layer: the calibrated default, and the paper's form."""

from typing import cast

import torch
from torch import Tensor, nn

from atv.config import ATVConfig
from atv.gate import Gate


class PaperExpansion(nn.Module):
    """One linear map of the generator's state, reshaped to one vector per layer (section 1 of the paper).

    Args:
        state_size: width of the generator's hidden state.
        layers: number of steered layers.
        hidden_size: width of the LLM's residual stream.
        rank: None: the paper's full map; otherwise a product of two maps through `rank` dimensions.
    """

    def __init__(self, state_size: int, layers: int, hidden_size: int, rank: int | None = None) -> None:
        super().__init__()
        self.shape = (layers, hidden_size)
        self.map = _linear(state_size, layers * hidden_size, rank, bias=True)

    def forward(self, state: Tensor) -> Tensor:
        """Map (batch, state) to (batch, layers, hidden)."""
        return cast(Tensor, self.map(state).unflatten(-1, self.shape))


class Expansion(nn.Module):
    """Maps the generator's state to one vector per layer, `r_l * (b_l + a * W_l z)`.

    b and W start at zero, so an untrained ATV is the plain LLM. Before `calibrate`, z is the unmodified state and r_l
    is 1.

    Args:
        state_size: width of the generator's hidden state; 0: there is no W, and all queries get the same vectors.
        layers: number of steered layers.
        hidden_size: width of the LLM's residual stream.
        rank: None: a full map W; otherwise a product of two maps through `rank` dimensions.
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
    """Dropout on z in training mode."""

    def calibrate(self, states: Tensor, sizes: Tensor) -> None:
        """Set r and the standardisation of z from training rows.

        Args:
            states: (queries, state), of the training queries.
            sizes: (layers,), root mean square of the residual stream's entries at the prompts' last token.
        """
        self.sizes.copy_(sizes)
        if self.map is None:
            return
        deviation = states.std(0, correction=0)
        least = 0.1 * deviation.mean()  # dimensions that hardly vary here may vary for other queries
        self.mean.copy_(states.mean(0))
        self.deviation.copy_(deviation.clamp(min=least) if least > 0 else torch.ones_like(deviation))

    def rates(self, rate: float) -> list[tuple[nn.Parameter, float]]:
        """Return the learning rates of b and W, where `rate` is that of b.

        Adam moves each weight by about its rate per step, so W z moves by the rate times the sum of |z|, which grows
        with the width of the state. W's rate is divided by that width: with any generator, the query's own part moves
        about three times as far per step as the common vector. It differs from query to query, so changes that are
        wrong for most queries cancel out.
        """
        own = [] if self.map is None else list(self.map.parameters())
        return [(self.common, rate), *((weight, 3 * rate / weight.shape[1]) for weight in own)]

    def standardised(self, state: Tensor) -> Tensor:
        """Return z for `state`; both are (batch, state)."""
        return (state - self.mean) / self.deviation

    def forward(self, state: Tensor, share: Tensor | None = None) -> Tensor:
        """Map (batch, state) to (batch, layers, hidden); `share`, (batch,), is a, by default 1."""
        vectors = self.common.expand(len(state), -1, -1)
        if self.map is not None:
            z = nn.functional.dropout(self.standardised(state), self.dropout, self.training)
            own = self.map(z).unflatten(-1, self.shape)
            vectors = vectors + (own if share is None else share[:, None, None] * own)
        return self.sizes[:, None] * vectors


def new_expansion(config: ATVConfig, state_size: int, vectors: int, hidden_size: int) -> Expansion | PaperExpansion:
    """Return an untrained expansion of the configured kind."""
    kind = PaperExpansion if config.parametrisation == "paper" else Expansion
    return kind(state_size, vectors, hidden_size, config.expansion_rank)


def _linear(inputs: int, outputs: int, rank: int | None, bias: bool) -> nn.Module:
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
