"""One training step of the library, whole or with each of its parts timed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atv.config import TrainConfig
from atv.data.collate import EncodedRow
from atv.model import ATVModel
from atv.training.trainer import make_optimizer
from benchmarks.common import clock
from benchmarks.reference import update

RATE = 1e-5
"""Learning rate, small enough that all rounds compute nearly the same."""
PARTS = (
    "generator forward",
    "expansion forward",
    "prefix gather",
    "LLM forward and loss",
    "LLM backward",
    "expansion backward",
    "generator backward",
    "optimiser",
)


def own_optimizer(atv: ATVModel) -> torch.optim.Optimizer:
    """The optimiser of the library's training."""
    return make_optimizer(atv, TrainConfig(learning_rate=RATE))


def loss_of(atv: ATVModel, rows: Sequence[EncodedRow]) -> Tensor:
    """The library's loss of one batch, from encoded rows."""
    batch = {name: tensor.to(atv.generator.device) for name, tensor in atv.collator()(rows).items()}
    loss: Tensor = atv(**batch).loss
    loss.item()  # training reads it before it continues
    return loss


def train_step(atv: ATVModel, rows: Sequence[EncodedRow], optimizer: torch.optim.Optimizer) -> None:
    """Encoded rows to updated weights."""
    update(loss_of(atv, rows), optimizer)


def floor_step(atv: ATVModel, rows: Sequence[EncodedRow], optimizer: torch.optim.Optimizer) -> None:
    """The minimum for training this generator: its forward and backward pass, and the optimiser.

    The optimiser also updates the expansion (with a gradient of zero), whose forward and backward pass are left out.
    """
    batch = atv.collator()(rows)
    device = atv.generator.device
    for parameter in atv.expansion.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    states = atv.generator(batch["query_input_ids"].to(device), batch["query_attention_mask"].to(device))
    (states * torch.linspace(-1, 1, states.shape[1], device=device)).sum().backward()
    optimizer.step()
    for parameter in atv.generator.parameters():
        parameter.grad = None


@contextmanager
def _clocks(atv: ATVModel, device: str, spent: dict[str, float], arrived: dict[str, float]) -> Iterator[None]:
    """Clocks on generator, expansion and `read_prefix`, and on the gradients of the two modules' outputs."""
    began: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            began[name] = clock(device)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            spent[f"{name} forward"] = clock(device) - began[name]
            output.register_hook(lambda _: arrived.__setitem__(name, clock(device)))

        return hook

    read = atv.read_prefix

    def timed_read(*args: Any, **kwargs: Any) -> Any:
        start = clock(device)
        try:
            return read(*args, **kwargs)
        finally:
            spent["prefix gather"] = clock(device) - start

    handles = []
    for name in ("generator", "expansion"):
        module = getattr(atv, name)
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    atv.read_prefix = timed_read
    try:
        yield
    finally:
        atv.read_prefix = read
        for handle in handles:
            handle.remove()


def timed_step(
    atv: ATVModel, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: str
) -> dict[str, float]:
    """Seconds of each of PARTS, and of the `whole` step, with the loss from `loss_of`.

    Only uses what every version of the library has: the modules `generator` and `expansion`, and `read_prefix`. The
    rest of the forward pass counts as the LLM's.
    """
    spent = dict.fromkeys(PARTS, 0.0)
    arrived: dict[str, float] = {}
    with _clocks(atv, device, spent, arrived):
        began = clock(device)
        loss = loss_of()
        forward = clock(device)
        loss.backward()
        backward = clock(device)
    optimizer.step()
    optimizer.zero_grad()
    end = clock(device)
    known = sum(spent[name] for name in ("generator forward", "expansion forward", "prefix gather"))
    spent["LLM forward and loss"] = forward - began - known
    spent["LLM backward"] = arrived["expansion"] - forward
    spent["expansion backward"] = arrived["generator"] - arrived["expansion"]
    spent["generator backward"] = backward - arrived["generator"]
    spent["optimiser"] = end - backward
    return spent | {"whole": end - began}


def llm_share(parts: dict[str, float]) -> float:
    """Seconds of a step that are not the generator's, the expansion's or the optimiser's."""
    return parts["prefix gather"] + parts["LLM forward and loss"] + parts["LLM backward"]
