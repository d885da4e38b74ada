"""The expansion maps a generator's state to one vector per layer: the calibrated default, and the paper's form."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from atv.config import ATVConfig
from atv.errors import ATVError
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
    """Maps the generator's state to one vector per layer, `r_l * (b_l + a * (c_l + s * W_l z))`.

    c is the part that the queries of one training task share, and z is the state standardised within that task. A query
    belongs to the task whose mean state its own state is most similar to. With a single task there is no c.

    b, c and W start at zero, so an untrained ATV is the plain LLM. Before `calibrate`, z is the unmodified state and
    r_l is 1.

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
        self.register_parameter("task_parts", None)
        self.map = _linear(state_size, layers * hidden_size, rank, bias=False) if state_size else None
        if self.map is not None:
            nn.init.zeros_(list(self.map.parameters())[-1])
        self.gate = Gate(state_size)
        self.register_buffer("sizes", torch.ones(layers))
        self.register_buffer("means", torch.zeros(1, state_size))
        self.register_buffer("deviation", torch.ones(state_size))
        self.register_buffer("centres", torch.zeros(1, state_size))

    task_parts: nn.Parameter | None
    """(tasks, layers, hidden), c; None: there is a single task."""
    sizes: Tensor
    means: Tensor
    """(tasks, state), before training."""
    deviation: Tensor
    """(state,), within tasks, before training."""
    centres: Tensor
    """(tasks, state), mean states of norm 1."""
    dropout = 0.0
    """Dropout on z in training mode."""

    def set_tasks(self, count: int) -> None:
        """Have parts for `count` tasks, which start at zero, and a gate that knows none of them."""
        state_size = self.means.shape[1]
        self.means, self.centres = self.means.new_zeros(count, state_size), self.centres.new_zeros(count, state_size)
        parts = None if count == 1 else nn.Parameter(self.common.new_zeros(count, *self.shape).detach())
        self.task_parts = parts
        self.gate = Gate(state_size).to(self.common)

    def calibrate(self, states: Sequence[Tensor], sizes: Tensor) -> None:
        """Set r and the standardisation of z from training rows, with a gate that knows none of them yet.

        Args:
            states: for each task (queries, state), of its training queries.
            sizes: (layers,), root mean square of the residual stream's entries at the prompts' last token.
        """
        self.sizes.copy_(sizes)
        if self.map is None:
            return
        if len(states) != len(self.means):
            self.set_tasks(len(states))
        self.gate = Gate(self.means.shape[1]).to(self.common)  # a former training's would affect validation
        self.means.copy_(torch.stack([of_task.mean(0) for of_task in states]))
        within = torch.cat([of_task - mean for of_task, mean in zip(states, self.means, strict=True)])
        deviation = within.pow(2).mean(0).sqrt()
        least = 0.1 * deviation.mean()  # dimensions that hardly vary here may vary for other queries
        self.deviation.copy_(deviation.clamp(min=least) if least > 0 else torch.ones_like(deviation))
        self.locate(states)

    def locate(self, states: Sequence[Tensor]) -> None:
        """Set the states that a task is recognised by.

        Args:
            states: as for `calibrate`; a generator that was trained returns others than before.
        """
        self.centres.copy_(nn.functional.normalize(torch.stack([of_task.mean(0) for of_task in states]), dim=-1))

    def nearest_tasks(self, state: Tensor) -> Tensor:
        """Return the numbers of the tasks whose centres are most similar to states (batch, state): (batch,) int64."""
        return (nn.functional.normalize(state, dim=-1) @ self.centres.T).argmax(1)

    def rates(self, rate: float) -> list[tuple[nn.Parameter, float]]:
        """Return the learning rates of b, c and W, where `rate` is that of b and c.

        Adam moves each weight by about its rate per step, so W z moves by the rate times the sum of |z|, which grows
        with the width of the state. W's rate is divided by that width: with any generator, the query's own part moves
        about three times as far per step as the common vector. It differs from query to query, so changes that are
        wrong for most queries cancel out.
        """
        shared = [self.common] if self.task_parts is None else [self.common, self.task_parts]
        own = [] if self.map is None else list(self.map.parameters())
        return [*((part, rate) for part in shared), *((weight, 3 * rate / weight.shape[1]) for weight in own)]

    def standardised(self, state: Tensor, tasks: Tensor) -> Tensor:
        """Return z for states (batch, state) of queries of these tasks (batch,): (batch, state)."""
        return (state - self.means[tasks]) / self.deviation

    def forward(
        self,
        state: Tensor,
        tasks: Tensor | None = None,
        openness: Tensor | None = None,
        strength: Tensor | None = None,
    ) -> Tensor:
        """Map states to vectors.

        Args:
            state: (batch, state).
            tasks: numbers of the queries' tasks, (batch,) int64; by default the nearest ones.
            openness: a, (batch,), by default 1.
            strength: s, (batch,), by default 1.

        Returns:
            (batch, layers, hidden).
        """
        vectors = self.common.expand(len(state), -1, -1)
        if self.map is not None:
            tasks = self.nearest_tasks(state) if tasks is None else tasks
            z = nn.functional.dropout(self.standardised(state, tasks), self.dropout, self.training)
            own = self.map(z).unflatten(-1, self.shape)
            own = own if strength is None else strength[:, None, None] * own
            own = own if self.task_parts is None else self.task_parts[tasks] + own
            vectors = vectors + (own if openness is None else openness[:, None, None] * own)
        return self.sizes[:, None] * vectors

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Have as many tasks as were saved before loading."""
        saved = state_dict.get(f"{prefix}means")
        if saved is not None and saved.dim() == 2 and len(saved) != len(self.means):
            self.set_tasks(len(saved))
        super()._load_from_state_dict(state_dict, prefix, *others)
        if len(self.gate.references) and len(self.gate.limits) != len(self.means):
            errors: list[str] = others[-1]
            errors.append(f"the gate has limits of {len(self.gate.limits)} tasks; expected {len(self.means)}.")


def new_expansion(config: ATVConfig, state_size: int, vectors: int, hidden_size: int) -> Expansion | PaperExpansion:
    """Return an untrained expansion of the configured kind."""
    kind = PaperExpansion if config.parametrisation == "paper" else Expansion
    return kind(state_size, vectors, hidden_size, config.expansion_rank)


def _linear(inputs: int, outputs: int, rank: int | None, bias: bool) -> nn.Module:
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    if rank > min(inputs, outputs):
        raise ATVError(
            f"expansion_rank is {rank}; expected at most {min(inputs, outputs)}, the rank of the full map from a state "
            f"of {inputs} numbers to vectors of {outputs}. Leave it out for the full map."
        )
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
