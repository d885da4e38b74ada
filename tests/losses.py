"""The loss of a steered LLM from one pass over prompt and answer, to compare with."""

import torch
from conftest import steer_known
from rendering import row_of

from atv.lm.prefix import call_llm

ROWS = [
    row_of("the kettle leaks", ("the kettle leaks and the lid sticks\nA:", "is it so? the kettle\nA:"), "yes no"),
    row_of("a quiet harbour before the first boats came in", ("quiet\nA:", "x"), "three"),
]


POSITIONS = ["last", "last:3", "answer", "all"]


def batch_of(atv, rows=ROWS):
    return atv.collator()([atv.encode_row(row) for row in rows])


def full_pass_loss(atv, batch, vectors=None):
    """Prompt and answer in one plain pass with hooks on everything: the straightforward definition."""
    vectors = atv.atv(batch["query_input_ids"], batch["query_attention_mask"]) if vectors is None else vectors
    per_row = vectors.repeat_interleave(len(batch["input_ids"]) // len(vectors), 0)
    labels = batch["labels"]
    with steer_known(atv.llm, atv.layers, per_row, atv.config.scale, batch["edit_mask"]):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = call_llm(atv.llm, keep=labels.shape[1], use_cache=False, **inputs).logits
    losses = []
    for row in range(len(labels)):
        wanted = [i for i, label in enumerate(labels[row].tolist()) if label != -100]
        log_probs = logits[row].log_softmax(-1)
        losses.append(torch.stack([-log_probs[i, labels[row, i]] for i in wanted]).mean())
    return torch.stack(losses).mean()
