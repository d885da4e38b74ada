"""Geometry of vectors: how much depends on the query, nearest neighbours, and a map."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from atv.errors import ATVError

LEAST = 4
"""Minimum number of points for a map."""
_PERPLEXITY = 30.0
_COMPONENTS = 50
"""Number of principal components for t-SNE, the usual number: less noise, almost the same distances."""


def variation(vectors: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """How much of the vectors is common to all queries, to the task, and specific to the query.

    Args:
        vectors: (queries, numbers).
        tasks: the task of each query.

    Returns:
        `common`: norm of the mean vector as a share of the mean norm. `within`: share of the variance (squared
        distances to the mean vector) that is left around the tasks' means; None if all vectors are the same.
        `within_by_chance`: that share's expectation if tasks did not matter. `cosine_within`, `cosine_between`: means
        over pairs of queries, see `cosine_means`. `tasks`: for each its queries, mean norm, root mean square distance
        to its mean, and mean cosines; None where there is no pair.
    """
    vectors = vectors.double()
    norms = vectors.norm(dim=1)
    mean = vectors.mean(0)
    total = (vectors - mean).square().sum()
    names = list(dict.fromkeys(tasks))
    left = torch.zeros((), dtype=torch.float64)
    own: dict[str, dict[str, Any]] = {}
    for name in names:
        mine = torch.tensor([task == name for task in tasks])
        around = (vectors[mine] - vectors[mine].mean(0)).square().sum()
        left += around
        own[name] = {
            "queries": int(mine.sum()),
            "norm": float(norms[mine].mean()),
            "distance": float((around / mine.sum()).sqrt()),
        }
    cosines = cosine_means(vectors, tasks)
    for name in names:
        own[name] |= {"cosine_within": cosines[name][0], "cosine_between": cosines[name][1]}
    within, between = cosines[""]
    return {
        "common": float(mean.norm() / norms.mean()) if norms.any() else None,
        "within": float(left / total) if total > 0 else None,
        "within_by_chance": (len(tasks) - len(names)) / (len(tasks) - 1) if len(tasks) > 1 else None,
        "cosine_within": within,
        "cosine_between": between,
        "tasks": own,
    }


def cosine_means(vectors: Tensor, tasks: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """Mean cosine of two different queries of one task, and of two queries of different tasks.

    Args:
        vectors: (queries, numbers).
        tasks: the task of each query.

    Returns:
        By task name, the means over pairs with at least one of its queries; under the empty name, over all pairs. None
        if there is no such pair.
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    cosines = unit @ unit.T
    numbers = torch.tensor([list(dict.fromkeys(tasks)).index(task) for task in tasks])
    same = numbers[:, None] == numbers
    pairs = ~torch.eye(len(tasks), dtype=torch.bool)

    def mean(chosen: Tensor) -> float | None:
        return float(cosines[chosen].mean()) if chosen.any() else None

    found = {"": (mean(same & pairs), mean(~same))}
    for number, name in enumerate(dict.fromkeys(tasks)):
        mine = (numbers == number)[:, None]
        found[name] = mean(mine & same & pairs), mean(mine & ~same)
    return found


def nearest(cosines: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """For each row of cosines (queries, others), the `count` largest as (index, cosine); ties in order of index."""
    kept = []
    for row in cosines:
        places = row.argsort(descending=True, stable=True)[:count].tolist()
        kept.append([(place, float(row[place])) for place in places])
    return kept


def require_sklearn() -> None:
    """Raise ATVError, naming the extra, if scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise ATVError(
            "The map of vectors needs the package scikit-learn, which is not installed. Install it with: "
            "pip install 'adaptive-task-vectors[analysis]'"
        )


def map_of(kinds: Sequence[Tensor], seed: int) -> dict[str, Any]:
    """Map vectors of one or several kinds to points in one plane.

    Each kind is centred and scaled to a mean square of 1: otherwise kinds that are far apart and unequally spread would
    each shrink to a point.

    Args:
        kinds: (points, numbers) each; together at least `LEAST` points.
        seed: seed of t-SNE.

    Returns:
        `pca` and `tsne`, [x, y] for each point of all kinds; `explained`, the two PCA axes' shares of the variance.
    """
    require_sklearn()
    from sklearn.decomposition import PCA  # here, since the import takes seconds
    from sklearn.manifold import TSNE

    points = torch.cat([_like_sized(kind.double()) for kind in kinds]).numpy()
    if not points.any():  # a generator with the same output for all queries: one point
        same = [[0.0, 0.0] for _ in points]
        return {"pca": same, "tsne": same, "explained": [0.0, 0.0]}
    pca = PCA(n_components=min(_COMPONENTS, len(points) - 1, points.shape[1]), svd_solver="full")
    components = pca.fit_transform(points)
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(components)
    return {
        "pca": components[:, :2].tolist(),
        "tsne": tsne.astype(float).tolist(),
        "explained": pca.explained_variance_ratio_[:2].tolist(),
    }


def _like_sized(vectors: Tensor) -> Tensor:
    around = vectors - vectors.mean(0)
    size = around.square().sum(1).mean().sqrt()
    # Below this, the rest is rounding of the mean.
    return around / size if size > 1e-12 * vectors.norm(dim=1).mean() else torch.zeros_like(around)
