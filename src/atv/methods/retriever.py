"""Embeddings of queries by a frozen encoder, and a linear classifier over them that predicts a query's task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atv.config import EMBEDDED_GENERATOR, SELF, ATVConfig, random_sizes
from atv.data.collate import pad, pad_id
from atv.errors import ATVError
from atv.generator import CONSTANT, Generator

AT_ONCE = 32
"""Queries per batch of the encoder."""


def load_encoder(name: str) -> Generator:
    """Load a frozen encoder of bare queries, with mean pooling, in eval mode."""
    config = ATVConfig(generator=name, pooling="mean", query_template="{query}", train_generator=False)
    return Generator.load(config).eval()


def check_encoder(name: object) -> None:
    """Raise ATVError for generator names that do not stand for an encoder."""
    if not isinstance(name, str) or name in (SELF, CONSTANT) or random_sizes(name) is not None:
        raise ATVError(
            f"The encoder of queries is {name!r}; expected the Hugging Face id or folder of a model that can read, or "
            f"{EMBEDDED_GENERATOR}."
        )


@torch.no_grad()
def read_queries(encoder: Generator, queries: Sequence[str]) -> Tensor:
    """The encoder's pooled states of queries, (queries, state) float32, on its device."""
    encoded = encoder.encode(queries)
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # less padding
    found = torch.empty(len(encoded), encoder.hidden_size, device=encoder.device)
    for start in range(0, len(encoded), AT_ONCE):
        batch = by_length[start : start + AT_ONCE]
        ids, mask = pad([encoded[index] for index in batch], pad_id(encoder.tokenizer), "right")
        found[batch] = encoder(ids.to(encoder.device), mask.to(encoder.device)).float()
    return found


def embed(encoder: Generator, queries: Sequence[str]) -> Tensor:
    """Embeddings of queries, normalised to length 1: (queries, embedding) float32, on the encoder's device."""
    return torch.nn.functional.normalize(read_queries(encoder, queries), dim=-1)


def fit_classifier(embeddings: Tensor, labels: Tensor, classes: int, penalty: float = 0.1) -> tuple[Tensor, Tensor]:
    """Softmax regression: the unique minimum of the summed cross-entropy + penalty / 2 * squared weights.

    Args:
        embeddings: (rows, embedding).
        labels: (rows,) int64.
        classes: number of classes.
        penalty: penalty of the weights; the bias has none. On validation queries of the paper's tasks, accuracy varied
            by at most two points for any value from 0.001 to 1.

    Returns:
        Weight (classes, embedding) and bias (classes,), float32, on the CPU.
    """
    inputs, labels = embeddings.double().cpu(), labels.cpu()
    basis = None
    if len(inputs) < inputs.shape[1]:  # the minimum is in the span of the rows: search only there
        basis = torch.linalg.svd(inputs, full_matrices=False).Vh  # (rows, embedding)
        inputs = inputs @ basis.T
    weight = torch.zeros(classes, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=1000, tolerance_grad=1e-6, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels, reduction="sum")
        total: Tensor = fit + penalty / 2 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    found = weight.detach() if basis is None else weight.detach() @ basis
    return found.float(), bias.detach().float()


class Retriever:
    """Picks a library entry for each query: the one with the nearest query among those of the likeliest task.

    Args:
        encoder: from `load_encoder`.
        weight: (tasks, embedding), the classifier's weights.
        bias: (tasks,), the classifier's biases.
        entries: (entries, embedding), embeddings of the entries' queries.
        tasks: (entries,), the task of each entry.
    """

    def __init__(self, encoder: Generator, weight: Tensor, bias: Tensor, entries: Tensor, tasks: Tensor) -> None:
        self.encoder = encoder
        self.weight, self.bias, self.entries, self.tasks = (
            t.to(encoder.device) for t in (weight, bias, entries, tasks)
        )

    def pick(self, queries: Sequence[str]) -> Tensor:
        """Indices of the entries, (queries,)."""
        embedded = embed(self.encoder, queries)  # (queries, embedding)
        task = (embedded @ self.weight.T + self.bias).argmax(-1)  # (queries,)
        near = embedded @ self.entries.T  # (queries, entries): cosines
        return near.masked_fill(self.tasks != task[:, None], float("-inf")).argmax(-1)
