"""All measurements on a GPU, in one command of a few minutes; nothing is downloaded.

First a two-layer LLM on the CPU and on the GPU: loss, gradients and steered logits must be equal up to rounding. Then
`benchmarks.inference` and `benchmarks.gpu_training`.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from atv.model import ATVModel
from benchmarks import gpu_training, inference
from benchmarks.common import Options, Record, options_of, parser
from benchmarks.step import loss_of
from benchmarks.subjects import LLAMA_3_8B, TINY, make_atv, memory_tokenizer, pairs_of, rows_of

ROWS = 8
EQUAL = 1e-4
"""Largest difference, relative to the largest value, of two float32 results that differ only in rounding."""


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Compare, then measure; returns the records."""
    parse = parser("benchmarks.gpu_day", __doc__)
    given = parse.parse_args(argv)
    if given.device == "cpu" and not given.tiny:
        parse.error(
            "an LLM of 8 billion weights is measured on a GPU: add --device cuda, or --tiny for a try on the CPU"
        )
    options = options_of(given, "benchmarks.gpu_day", argv)
    words = ["--device", options.device, "--threads", str(options.threads), "--rounds", str(options.rounds)]
    words += ["--out", str(options.out), *(["--tiny"] if options.tiny else [])]
    steps: list[Callable[[], Path]] = [
        partial(_equality, options),
        partial(inference.main, words),
        partial(gpu_training.main, words),
    ]
    files = []
    for step in steps:
        files.append(step())
        gc.collect()  # an LLM with hooks has reference cycles: its memory would count for the next benchmark
        torch.cuda.empty_cache()
    return files


def _equality(options: Options) -> Path:
    """The record of the differences between the CPU and the device."""
    shape = TINY | {"intermediate_size": 48} if options.tiny else LLAMA_3_8B | {"vocab_size": 1000}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 4096}
    record = Record(
        "gpu_equality",
        "The same on the CPU and on the device",
        options,
        llm=f"Llama, 2 layers of width {shape['hidden_size']}, random weights, float32",
        generator="GPT-2-sized",
        rows=ROWS,
    )
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.float32).eval()
    here = make_atv(options, llm, memory_tokenizer(), "gpt2").eval()
    there = make_atv(options, copy.deepcopy(llm).to(options.device), memory_tokenizer(), "gpt2").eval()
    there.atv.load_state_dict(here.atv.state_dict())
    on_device = _results(options, there)
    for name, ours in _results(options, here).items():
        other = on_device[name]
        difference = ((ours - other).abs().max() / ours.abs().max()).item()
        record.measure(f"{name}: largest difference / largest value", "", difference, ("at most", EQUAL))
    return record.finish()


def _results(options: Options, atv: ATVModel) -> dict[str, Tensor]:
    """Loss, gradient of the expansion, and steered logits of the next token, on the CPU."""
    loss = loss_of(atv, rows_of(atv, ROWS, 24 if options.tiny else 110))
    gradients = torch.autograd.grad(loss, list(atv.expansion.parameters()))
    found = pairs_of(atv.tokenizer, ROWS, 24)
    inputs = atv.encode_prompts([atv.tokenizer.decode(pairs[0][0]) for _, pairs in found])
    llm: Any = atv.llm
    with torch.no_grad(), atv.steer([query for query, _ in found]):
        logits = llm(**inputs).logits[:, -1]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return {name: value.detach().cpu() for name, value in (("loss", loss), ("gradient", flat), ("logits", logits))}


if __name__ == "__main__":
    main()
