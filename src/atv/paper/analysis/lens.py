"""The logit lens on the residual stream, layer by layer, without and with steering."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atv.lm.hooks import capture_outputs, decoder_layers
from atv.lm.lens import Readout, top_tokens
from atv.lm.prefix import call_llm
from atv.model import ATVModel


@torch.no_grad()
def layer_by_layer(
    atv: ATVModel, readout: Readout, query: str, inputs: Mapping[str, Tensor]
) -> dict[str, list[list[list[Any]]]]:
    """The likeliest next tokens after each decoder layer, at the last prompt token, without and with steering.

    Args:
        atv: the adapter on its LLM.
        readout: the LLM's readout.
        query: the text for the generator.
        inputs: the prompt's inputs, one row: `input_ids`, `attention_mask`, `position_ids`.

    Returns:
        For `unsteered` and `steered`, a list for every layer (even layers without a vector): [token, probability], see
        `top_tokens`.
    """
    layers = decoder_layers(atv.llm, atv.config.layer_path)
    found = {}
    for name, steer in (("unsteered", nullcontext), ("steered", partial(atv.steer, [query]))):
        with steer(), capture_outputs(layers) as captured:
            call_llm(atv.llm, keep=1, **inputs, use_cache=False)
        logits = torch.cat([readout(captured[index][:1, -1]) for index in range(len(layers))])  # (layers, vocabulary)
        found[name] = top_tokens(logits, atv.tokenizer, logits.softmax(-1))
    return found
