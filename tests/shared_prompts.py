"""Prompts that begin alike, and the logits of the shared read and of the plain one."""

from contextlib import nullcontext

from atv.lm.prefix import call_llm

INSTRUCTION = "Is this opinion positive or negative? Answer positive or negative. "
PROMPTS = [
    INSTRUCTION + text for text in ("the kettle leaks", "the harbour was quiet and the lid sticks\nA:", "six A:")
]


def encoded(atv):
    return [atv.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def logits(llm, shared, ids, once=True):
    inputs, past = shared.inputs(ids, 0)
    own = {name: tensor[:, shared.length :] for name, tensor in inputs.items() if name != "attention_mask"}
    own["attention_mask"] = inputs["attention_mask"]
    with shared.attention() if once else nullcontext():
        return call_llm(llm, keep=1, **own, past_key_values=past, use_cache=past is not None).logits
