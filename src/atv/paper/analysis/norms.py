"""Size of the vectors compared with what they are added to."""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor

from atv.data import Prompt
from atv.data.collate import edit_mask
from atv.lm.hooks import capture_outputs
from atv.lm.prefix import call_llm
from atv.model import ATVModel
from atv.progress import Bar

AT_ONCE = 8
"""Texts per batch."""


def batches(texts: Sequence[Sized]) -> Iterator[list[int]]:
    """Indices of the texts (or token ids) of each batch, with similar lengths to reduce padding."""
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(texts), AT_ONCE):
        yield by_length[start : start + AT_ONCE]


def scaled_vectors(atv: ATVModel, queries: Sequence[str], progress: Bar) -> Iterator[tuple[list[int], Tensor]]:
    """The vectors as added, scale * v: indices into `queries`, and (batch, layers, hidden) on the CPU."""
    for batch in batches(queries):
        vectors = atv.config.scale * atv.task_vectors([queries[index] for index in batch])
        progress.advance(len(batch))
        yield batch, vectors.cpu()


@torch.no_grad()
def beside_residual(atv: ATVModel, prompts: Sequence[Prompt], vectors: Tensor, progress: Bar) -> dict[str, Tensor]:
    """Compare the unsteered residual stream at the tokens that would be edited with the vectors.

    Args:
        atv: the adapter on its LLM.
        prompts: the LLM's prompts, one per query.
        vectors: (queries, layers, hidden), as added.
        progress: advances by one per prompt.

    Returns:
        For each query and steered layer, means over its edited prompt tokens, (queries, layers) each: `residual`, the
        norm of the layer's output; `ratio`, the vector's norm relative to it; `cosine` of the two.
    """
    found = {name: vectors.new_empty(vectors.shape[:2]) for name in ("residual", "ratio", "cosine")}
    for batch in batches([prompt.ids for prompt in prompts]):
        inputs = atv.encode_prompts([prompts[index] for index in batch])
        edited = edit_mask(inputs["attention_mask"], atv.positions)  # (batch, seq)
        with capture_outputs(atv.layers) as captured:
            call_llm(atv.llm, keep=1, **inputs, use_cache=False)
        for layer in range(len(atv.layers)):
            for place, index in enumerate(batch):
                hidden = captured[layer][place]
                states = hidden[edited[place].to(hidden.device)].to(vectors)  # (edited, hidden)
                vector = vectors[index, layer]
                norms = states.norm(dim=-1)
                found["residual"][index, layer] = norms.mean()
                found["ratio"][index, layer] = (vector.norm() / norms).mean()
                found["cosine"][index, layer] = torch.cosine_similarity(states, vector[None], dim=-1).mean()
        progress.advance(len(batch))
    return found
