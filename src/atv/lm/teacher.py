"""The frozen LLM with a longer prompt as the teacher of a method that reads the query alone: prompt distillation.

The teacher reads a system prompt, or demonstrations, before each query and answers greedily. Its likeliest next tokens
at each step are kept with their probabilities; they are what a method is trained to reproduce without that prompt.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atv.data import Example, Task
from atv.data.collate import pad_id
from atv.data.render import INPUT
from atv.data.rendering import Rendering
from atv.data.table import Queries
from atv.data.taught import Taught
from atv.errors import ATVError
from atv.files import write_bytes
from atv.lm.continuation import Continuation
from atv.lm.ends import decoded, end_ids
from atv.lm.hooks import base_llm, input_device, quantization, text_config
from atv.lm.identity import llm_digest
from atv.lm.load import context_length
from atv.lm.prefix import SharedPrefix, call_llm
from atv.progress import bar, log

LIKELIEST = 64
"""Number of the teacher's next tokens that are kept at each step."""


@torch.no_grad()
def ask_teacher(
    llm: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int, batch_size: int = 16
) -> list[Taught]:
    """Let the LLM answer prompts greedily, and keep its likeliest tokens at each step.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's, which knows the tokens that end an answer.
        prompts: token ids. What they have in common at their beginning is read once.
        limit: most tokens of an answer.
        batch_size: prompts per call of the LLM.

    Raises:
        ATVError: a prompt leaves no room for an answer in the LLM's context.
    """
    room, longest = context_length(llm), max(map(len, prompts))
    if room is not None and longest + limit > room:
        raise ATVError(
            f"The teacher's longest prompt has {longest} tokens, its answer up to {limit}, and the LLM's context is "
            f"{room}. Shorten the system prompt, or use fewer demonstrations or answer tokens."
        )
    shared = SharedPrefix(llm, prompts, 0)
    ends = frozenset(end_ids(llm, tokenizer))
    kept = min(LIKELIEST, int(text_config(llm).vocab_size))
    found: dict[int, Taught] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with bar("ask the teacher", len(prompts)) as progress:
        for start in range(0, len(prompts), batch_size):
            batch = by_length[start : start + batch_size]
            steps: list[tuple[Tensor, Tensor]] = []

            def see(logits: Tensor, steps: list[tuple[Tensor, Tensor]] = steps) -> None:
                best = logits.float().softmax(-1).topk(kept)
                steps.append((best.indices, best.values))

            inputs, past = shared.inputs([prompts[index] for index in batch], pad_id(tokenizer))
            inputs = {name: tensor.to(input_device(llm)) for name, tensor in inputs.items()}
            with shared.attention():
                output = call_llm(
                    llm,
                    keep=1,
                    input_ids=inputs["input_ids"][:, shared.length :],
                    attention_mask=inputs["attention_mask"],
                    position_ids=inputs["position_ids"][:, shared.length :],
                    past_key_values=past,
                    use_cache=True,
                )
                answers = Continuation(llm, inputs, output).greedy(limit, lambda tokens: tokens[-1] in ends, see)
            for place, (index, ids) in enumerate(zip(batch, answers, strict=True)):
                own = [torch.stack([step[part][place] for step in steps[: len(ids)]]) for part in (0, 1)]
                found[index] = Taught(ids, *own)
            progress.advance(len(batch))
    return [found[index] for index in range(len(prompts))]


def taught_task(
    llm: nn.Module,
    tokenizer: Any,
    queries: Queries,
    student: Rendering,
    *,
    system: str | None = None,
    shots: Sequence[Example] = (),
    limit: int = 64,
    cache: Path | None = None,
) -> Task:
    """Return a task whose answers are a teacher's: the LLM's own with a system prompt or demonstrations.

    Queries that the teacher answers with nothing are left out, and logged.

    Args:
        llm: the frozen LLM, teacher and later student.
        tokenizer: the LLM's.
        queries: from `load_queries`.
        student: how prompts are written for the student.
        system: the teacher's system prompt.
        shots: demonstrations that the teacher reads before each query.
        limit: most tokens of an answer.
        cache: folder in which the answers are kept, so that the same teacher is asked once.

    Raises:
        ATVError: the teacher would read the same prompt as the student, or a prompt leaves no room for an answer.
    """
    teacher = student if system is None else replace(student, system=system)
    render, plain = teacher(INPUT, None, INPUT), student(INPUT, None, INPUT)
    every = [example for split in queries.splits.values() for example in split]
    prompts = [render.prompt(tokenizer, example, shots).ids for example in every]
    for example, prompt in zip(every, prompts, strict=True):
        if prompt == plain.prompt(tokenizer, example).ids:
            raise ATVError(
                f"The teacher would read what the student reads of the query {example.input[:60]!r}. Give it a system "
                "prompt or demonstrations; a conversation that begins with a system message keeps its own: remove it."
            )
    answers = _cached(llm, tokenizer, prompts, limit, cache)
    ends = frozenset(end_ids(llm, tokenizer))
    texts = [decoded(tokenizer, [token for token in answer.ids if token not in ends]).strip() for answer in answers]
    taught = {
        example._replace(output=text): answer
        for example, text, answer in zip(every, texts, answers, strict=True)
        if text
    }
    silent = len(every) - len(taught)
    if silent:
        log.warning(f"{queries.name}: the teacher answers {silent} of {len(every)} queries with nothing; left out.")
    by_input = {example.asked: example for example in taught}
    splits = {
        split: tuple(by_input[example.asked] for example in examples if example.asked in by_input)
        for split, examples in queries.splits.items()
    }
    tokens = sum(map(len, prompts)) / len(prompts)
    about = {"system": system, "shots": len(shots), "prompt_tokens": round(tokens, 1), "answer_tokens": limit}
    return Task(
        queries.name,
        (INPUT,),
        splits["train"],
        splits["valid"],
        splits["test"],
        answer_prefixes=(None,),
        renderer=student,
        taught=taught,
        prepared=queries.prepared | {"teacher": about},
    )


def _cached(
    llm: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int, folder: Path | None
) -> list[Taught]:
    """The teacher's answers, from a file in the folder if the same teacher was asked the same."""
    if folder is None:
        return ask_teacher(llm, tokenizer, prompts, limit)
    from safetensors.torch import load_file, save

    about = [
        llm_digest(llm),
        base_llm(llm).name_or_path,
        getattr(base_llm(llm).config, "_commit_hash", None),
        quantization(llm),
        str(next(llm.parameters()).dtype),
        limit,
        LIKELIEST,
        [*map(list, prompts)],
    ]
    file = folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.safetensors"
    if file.exists():
        log.info(f"The teacher's answers are in {file}")
        return _apart(load_file(file))
    answers = ask_teacher(llm, tokenizer, prompts, limit)
    write_bytes(
        file,
        save(
            {
                "lengths": torch.tensor([len(answer.ids) for answer in answers]),
                "ids": torch.tensor([token for answer in answers for token in answer.ids]),
                "likeliest": torch.cat([answer.likeliest for answer in answers]).int(),
                "probabilities": torch.cat([answer.probabilities for answer in answers]),
            }
        ),
    )
    return answers


def _apart(tensors: Mapping[str, Tensor]) -> list[Taught]:
    lengths = tensors["lengths"].tolist()
    parts = [tensors[name].split(lengths) for name in ("ids", "likeliest", "probabilities")]
    return [Taught(ids.tolist(), best.long(), shares) for ids, best, shares in zip(*parts, strict=True)]
