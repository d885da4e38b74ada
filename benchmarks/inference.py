"""Steered inference compared with the plain LLM and with 16 demonstrations in the prompt, all costs included.

On --device cuda the LLM has Llama 3 8B's shape with random weights, and the generator GPT-2's.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atv.config import SELF
from atv.data.collate import edit_mask, left_padded, pad_id
from atv.lm.prefix import call_llm, steered_logits
from atv.lm.spans import Known
from atv.model import ATVModel
from atv.steer import steer
from benchmarks.common import Figure, Record, in_turn, parse_options, ratio, times
from benchmarks.subjects import large_llm, make_atv, rows_of, small_llm, small_name, tasks

STEERED, PLAIN, MANY, OWN = "steered", "zero-shot", "16 demonstrations", "generator and expansion alone"
ITSELF = "steered, generator self"
APART = "steered, prefix beside generator"
DEMONSTRATIONS, NEW_TOKENS = 16, 16


def main(argv: Sequence[str] | None = None) -> Path:
    """Time batches of 1 and 16 (on a GPU of 1, 8 and 64): the first answer token, and 16 new tokens."""
    options = parse_options("benchmarks.inference", __doc__, argv)
    on_gpu = options.device == "cuda"
    tokens = 24 if options.tiny else 110
    llm, tokenizer = large_llm(options) if on_gpu else small_llm(options)
    atv = make_atv(options, llm, tokenizer, "gpt2" if on_gpu else "minilm").eval()
    itself = make_atv(options, llm, tokenizer, SELF).eval()
    named = (
        ("Llama 3 8B's shape, random weights, bfloat16", "GPT-2-sized") if on_gpu else (small_name(options), "MiniLM")
    )
    record = Record(
        "inference",
        "Steered inference",
        options,
        llm="tiny" if options.tiny else named[0],
        generator=named[1],
        **{"prompt tokens": tokens, "tokens with 16 demonstrations": tokens + DEMONSTRATIONS * (tokens + 2)},
    )
    plots: dict[str, dict[str, dict[Any, Figure]]] = {}
    for batch in (1, 8, 64) if on_gpu else (1, 16):
        queries = [example.input for task in tasks() for example in task.test][:batch]
        rows = rows_of(atv, (DEMONSTRATIONS + 1) * batch, tokens, templates=1)
        prompts = [row.pairs[0][0] for row in rows[:batch]]
        reads = {PLAIN: partial(first_token, atv, prompts), STEERED: partial(first_token, atv, prompts, queries)}
        reads[ITSELF] = partial(first_token, itself, prompts, queries)
        reads[APART] = partial(first_token_apart, atv, prompts, queries)
        if batch == 1 or (on_gpu and batch == 8) or options.tiny:  # larger batches take too long
            shown = [_with_demonstrations(rows, index, batch) for index in range(batch)]
            reads[MANY] = partial(first_token, atv, shown)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        writes = {PLAIN: partial(_write, atv, texts), STEERED: partial(_write, atv, texts, queries)}
        writes[ITSELF] = partial(_write, itself, texts, queries)
        for what, sides in (("first token", reads), (f"{NEW_TOKENS} tokens", writes)):
            both: dict[str, Callable[[], object]] = {**sides, OWN: partial(atv.task_vectors, queries)}
            seconds = in_turn(f"inference, {what}, batch {batch}", both, options)
            title = f"{what}, batch {batch}"
            record.keep(f"{title}: ", seconds)
            for side in both:
                figure = Figure.of(times(1000 / batch, seconds[side]))
                record.measure(f"{title}: {side}", "ms/query", figure)
                if side != OWN:
                    plots.setdefault(what, {}).setdefault(side, {})[f"batch {batch}"] = figure
            limit = ("at most", 1.08) if on_gpu else None
            record.measure(f"{title}: {STEERED} / {PLAIN}", "x", ratio(seconds[STEERED], seconds[PLAIN]), limit)
            record.measure(f"{title}: {ITSELF} / {PLAIN}", "x", ratio(seconds[ITSELF], seconds[PLAIN]))
            share = ratio(times(100, seconds[OWN]), seconds[STEERED])
            record.measure(f"{title}: generator's share", "%", share)
            if MANY in sides:
                record.measure(
                    f"{title}: {MANY} / {STEERED}",
                    "x",
                    ratio(seconds[MANY], seconds[STEERED]),
                    ("at least", 8 if on_gpu else 6),
                )
    for what, series in plots.items():
        record.plot(what, "", "milliseconds per query", series, kind="bars")
    return record.finish()


@torch.no_grad()
def first_token(atv: ATVModel, prompts: Sequence[Sequence[int]], queries: Sequence[str] | None = None) -> Tensor:
    """Each prompt's likeliest next token, in one call as in `evaluate`; steered if queries are given."""
    inputs = left_padded(prompts, pad_id(atv.tokenizer))
    on_device = {name: tensor.to(atv.generator.device) for name, tensor in inputs.items()}
    read = partial(call_llm, atv.llm, keep=1, use_cache=False, **on_device)
    if queries is None:
        logits = read().logits
    else:
        with atv.steer(queries):
            logits = read().logits
    return logits[:, -1].float().cpu().argmax(-1)  # type: ignore[no-any-return]


@torch.no_grad()
def first_token_apart(atv: ATVModel, prompts: Sequence[Sequence[int]], queries: Sequence[str]) -> Tensor:
    """Like `first_token`, but in two calls: the prompt's prefix while the generator runs, then its last token, steered.

    On a GPU the generator has its own stream; on a CPU the two run one after the other.
    """
    device = atv.generator.device
    inputs = {name: tensor.to(device) for name, tensor in left_padded(prompts, pad_id(atv.tokenizer)).items()}
    side = torch.cuda.Stream() if device.type == "cuda" else None
    with torch.cuda.stream(side) if side is not None else nullcontext():
        vectors = atv.task_vectors(queries)

    def steered(mask: Tensor) -> AbstractContextManager[None]:
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
            vectors.record_stream(torch.cuda.current_stream())
        return steer(atv.llm, atv.edit(vectors), Known(mask))

    edited = edit_mask(inputs["attention_mask"], atv.positions)
    ids, mask, places = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    return steered_logits(atv.llm, steered, ids, mask, places, edited, keep=1)[:, -1].float().cpu().argmax(-1)


def _write(atv: ATVModel, prompts: Sequence[str], queries: Sequence[str] | None = None) -> list[str]:
    """Generate texts of exactly NEW_TOKENS tokens; steered if queries are given."""
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if queries is not None:
        return atv.generate(prompts, queries, batch_size=len(prompts), **how)
    inputs = atv.encode_prompts(prompts)
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    with torch.no_grad():
        ids = llm.generate(**inputs, pad_token_id=pad_id(atv.tokenizer), **how)
    return atv.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)  # type: ignore[no-any-return]


def _with_demonstrations(rows: Sequence[Any], index: int, batch: int) -> list[int]:
    """A prompt after 16 other prompts with their answers, separated by one token."""
    first = batch + index * DEMONSTRATIONS
    shown = [[*row.pairs[0][0], row.pairs[0][1][0], row.pairs[0][0][0]] for row in rows[first : first + DEMONSTRATIONS]]
    return [token for demonstration in shown for token in demonstration] + list(rows[index].pairs[0][0])


if __name__ == "__main__":
    main()
