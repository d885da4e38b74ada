"""ATV compared with PEFT's LoRA and prefix-tuning: seconds per epoch, and peak memory above the LLM's weights.

All use the same LLM, rows and batch size. Each side's memory is measured in its own process.
"""

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn

from atv.data.collate import IGNORED, EncodedRow, pad
from atv.progress import bar
from benchmarks.common import Figure, Options, Record, in_turn, options_of, parser, ratio, times
from benchmarks.reference import update
from benchmarks.step import RATE, own_optimizer, train_step
from benchmarks.subjects import fill, make_atv, pairs_of, rows_of, small_llm, small_name

BATCH = 8
ROWS = 64
"""Rows per epoch and in the store."""
STORED, UNSTORED, LORA, PREFIX = "ATV", "ATV without store", "LoRA", "prefix-tuning"
KINDS = (STORED, UNSTORED, LORA, PREFIX)


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measure time in this process and memory in one process per side."""
    parse = parser("benchmarks.peft_methods", __doc__)
    parse.add_argument("--memory-of", choices=KINDS, help="measure only this side's memory and print it as JSON")
    given = parse.parse_args(argv)
    options = options_of(given, "benchmarks.peft_methods", argv)
    if given.memory_of:
        sys.stdout.write(json.dumps(_memory(options, given.memory_of)) + "\n")
        return None
    tokens = _tokens(options)
    record = Record(
        "peft_methods",
        "ATV beside LoRA and prefix-tuning",
        options,
        llm=small_name(options),
        generator="MiniLM",
        **{"prompt tokens": tokens, "prompts per row": 3, "rows per step": BATCH, "rows per epoch": ROWS},
    )
    time = _time(record, options)
    memory = _memories(record, options)
    record.plot("time", "", f"seconds per epoch of {ROWS} rows", {"": time}, kind="bars")
    if memory:
        record.plot("memory", "", "peak MB above the LLM's weights", {"": memory}, kind="bars")
    return record.finish()


def _tokens(options: Options) -> int:
    return 24 if options.tiny else 50


def _time(record: Record, options: Options) -> dict[Any, Figure]:
    """Seconds per epoch: seconds per step times the number of (equal) steps."""
    llm, tokenizer = small_llm(options)
    peft = {kind: peft_model(copy.deepcopy(llm), kind) for kind in (LORA, PREFIX)}
    atv = make_atv(options, llm, tokenizer)
    rows = rows_of(atv, BATCH, _tokens(options))
    fill(atv, rows)
    sides: dict[str, Callable[[], object]] = {
        "fill": partial(fill, atv, rows),
        STORED: partial(train_step, atv, rows, own_optimizer(atv)),
        **{kind: partial(peft_step, model, peft_optimizer(model), rows) for kind, model in peft.items()},
    }
    seconds = in_turn("ATV, LoRA, prefix-tuning", sides, options)
    record.keep("step: ", seconds)
    epoch = {kind: times(ROWS / BATCH, values) for kind, values in seconds.items()}
    first = [fill + steps for fill, steps in zip(epoch.pop("fill"), epoch[STORED], strict=True)]
    shown = {f"{STORED}, first epoch": first, f"{STORED}, later epochs": epoch.pop(STORED), **epoch}
    for kind, values in shown.items():
        record.measure(f"{kind}: an epoch of {ROWS} rows", "s", Figure.of(values))
    for kind in (LORA, PREFIX):
        for which in list(shown)[:2]:
            record.measure(f"time: {which} / {kind}", "x", ratio(shown[which], shown[kind]), ("at most", 1))
    return {kind: Figure.of(values) for kind, values in shown.items()}


def _memories(record: Record, options: Options) -> dict[Any, Figure]:
    """Peak MB above the LLM's weights, of each side."""
    found: dict[str, dict[str, float]] = {}
    with bar("memory", len(KINDS)) as progress:
        for kind in KINDS:
            progress.describe(f"memory: {kind}")
            found[kind] = _memory(options, kind) if options.tiny else _in_process(options, kind)
            progress.advance()
    if not all(memory.get("peak", 0) > 0 for memory in found.values()):  # not reported by the kernel, or tiny models
        return {}
    peak = {kind: memory["peak"] for kind, memory in found.items()}
    for kind in KINDS:
        record.measure(f"{kind}: peak memory above the LLM's weights", "MB", peak[kind])
    own = found[UNSTORED]["own weights"]
    record.measure(f"{UNSTORED}, its own weights left out", "MB", peak[UNSTORED] - own)
    for kind in (LORA, PREFIX):
        for which in (STORED, UNSTORED):
            record.measure(f"memory: {which} / {kind}", "x", peak[which] / peak[kind], ("at most", 0.5))
    return {kind: Figure(value, value, value) for kind, value in peak.items()}


def _in_process(options: Options, kind: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.peft_methods", "--device", options.device, "--memory-of", kind]
    command += ["--threads", str(options.threads)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory(options: Options, kind: str) -> dict[str, float]:
    """Peak MB of two steps above the memory with the LLM loaded; the store contains the prompts of an epoch.

    Empty if the kernel does not record the peak: on a CPU, only Linux does.
    """
    llm, tokenizer = small_llm(options)
    pairs = pairs_of(tokenizer, ROWS, _tokens(options))
    with torch.no_grad():  # weights are in memory only after they have been read once
        cast(Any, llm)(input_ids=torch.ones(1, 4, dtype=torch.long, device=options.device))
    gc.collect()
    before = _begin(options)
    if before is None:
        return {}
    own = 0
    if kind in (LORA, PREFIX):
        model = peft_model(llm, kind)
        rows = [EncodedRow([], prompts) for _, prompts in pairs]
        step: Callable[[list[EncodedRow]], None] = partial(peft_step, model, peft_optimizer(model))
    else:
        atv = make_atv(options, llm, tokenizer)
        rows = rows_of(atv, ROWS, _tokens(options))
        own = sum(parameter.nbytes for parameter in atv.parameters())
        if kind == STORED:
            fill(atv, rows)
        optimizer = own_optimizer(atv)
        step = partial(train_step, atv, optimizer=optimizer)
    for start in (0, BATCH):
        step(rows[start : start + BATCH])
    return {"peak": (_peak(options) - before) / 1e6, "own weights": own / 1e6}


def _begin(options: Options) -> int | None:
    """Reset the peak; returns the bytes in use now."""
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident set
    except OSError:
        return None
    return int(psutil.Process().memory_info().rss)


def _peak(options: Options) -> int:
    """Peak bytes since `_begin`."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def peft_model(llm: nn.Module, kind: str) -> nn.Module:
    """PEFT's LoRA (the paper's settings) or prefix-tuning around the LLM, in training mode."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    lora: dict[str, Any] = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}
    config = (
        LoraConfig(task_type="CAUSAL_LM", **lora)
        if kind == LORA
        else PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    )
    return cast(nn.Module, get_peft_model(cast(Any, llm), config).train())


def peft_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The paper's Adam on PEFT's trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=RATE, weight_decay=1e-5, fused=True)


def peft_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[EncodedRow]) -> None:
    """The usual step: whole prompts and answers, loss from `labels`."""
    device = next(model.parameters()).device
    pairs = [pair for row in rows for pair in row.pairs]
    tokens, mask = pad([prompt + answer for prompt, answer in pairs], 0, "right")
    labels, _ = pad([[IGNORED] * len(prompt) + answer for prompt, answer in pairs], IGNORED, "right")
    output = model(input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device))
    update(output.loss, optimizer)


if __name__ == "__main__":
    main()
