"""What a trained ATV's vectors are like: how large, how adaptive, near which others, and what tokens they promote."""

from atv.analysis.geometry import cosine_means, map_of, nearest, require_sklearn, variation
from atv.analysis.lens import Readout, layer_by_layer, top_tokens
from atv.analysis.measure import analyse
from atv.analysis.norms import beside_residual, scaled_vectors

__all__ = [
    "Readout",
    "analyse",
    "beside_residual",
    "cosine_means",
    "layer_by_layer",
    "map_of",
    "nearest",
    "require_sklearn",
    "scaled_vectors",
    "top_tokens",
    "variation",
]
