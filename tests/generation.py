"""What a steered LLM generates, and the same from whole passes without a cache, to compare with."""

import torch
from conftest import steer_known

PROMPTS = ["the kettle leaks and the lid sticks, yes or no?\nA:", "quiet\nA:", "x"]


QUERIES = ["the kettle leaks", "quiet", "one two three"]


NEW = 5


def recomputed(atv, prompt, query, steps=NEW, token_ids=None):
    """Greedy decoding by hand: the whole text read again at each step, alone, with its edit mask written out."""
    vectors = atv.task_vectors([query])
    ids = atv.encode_prompts([prompt])["input_ids"]
    length = ids.shape[1]
    for step in range(steps):
        mask = torch.zeros(1, length + step, dtype=torch.bool)
        count = atv.positions.prompt_tokens
        mask[:, 0 if count is None else max(0, length - count) : length] = True
        mask[:, length:] = atv.positions.answer
        with torch.no_grad(), steer_known(atv.llm, atv.layers, vectors, atv.config.scale, mask):
            logits = atv.llm(ids, use_cache=False).logits[0, -1]
        chosen = logits.argmax() if token_ids is None else token_ids[step]
        ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
    return ids[0, length:].tolist()


def generated(atv, prompts, queries, **options):
    """New token ids of the user's own call: ``with atv.steer(queries): llm.generate(...)``."""
    inputs = atv.encode_prompts(prompts)
    width = inputs.pop("position_ids").shape[1]
    with atv.steer(queries):
        out = atv.llm.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options)
    return out[:, width:].tolist()
