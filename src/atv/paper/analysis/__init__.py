"""Analysis of a trained ATV's vectors: their size, adaptivity, neighbours, and the tokens that they promote."""

from atv.paper.analysis.geometry import cosine_means, map_of, nearest, require_sklearn, variation
from atv.paper.analysis.lens import layer_by_layer
from atv.paper.analysis.measure import analyse
from atv.paper.analysis.norms import beside_residual, scaled_vectors

__all__ = [
    "analyse",
    "beside_residual",
    "cosine_means",
    "layer_by_layer",
    "map_of",
    "nearest",
    "require_sklearn",
    "scaled_vectors",
    "variation",
]
