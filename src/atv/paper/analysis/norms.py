"""How large the vectors are beside what they are added to."""

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
"""Texts that a model reads together."""


def batches(texts: Sequence[Sized]) -> Iterator[list[int]]:
    """Places of texts, or token ids, that are read together: of like lengths, for little padding."""
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(texts), AT_ONCE):
        yield by_length[start : start + AT_ONCE]


def scaled_vectors(atv: ATVModel, queries: Sequence[str], progress: Bar) -> Iterator[tuple[list[int], Tensor]]:
    """What is added for each query, scale * v: places in `queries`, and (batch, layers, hidden) on the CPU."""
    for batch in batches(queries):
        vectors = atv.config.scale * atv.task_vectors([queries[index] for index in batch])
        progress.advance(len(batch))
        yield batch, vectors.cpu()


@torch.no_grad()
def beside_residual(atv: ATVModel, prompts: Sequence[Prompt], vectors: Tensor, progress: Bar) -> dict[str, Tensor]:
    """The unsteered residual stream at the tokens that would be edited, and the vectors beside it.

    Args:
        atv: the adapter on its LLM.
        prompts: what the LLM reads, one for each query.
        vectors: (queries, layers, hidden), as they are added.
        progress: advances by one for each prompt.

    Returns:
        For each query and steered layer, means over its edited prompt tokens, (queries, layers) each: `residual`, the
        norm of what the layer gives out; `ratio`, the vector's norm as a share of that; `cosine` of the two.
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
