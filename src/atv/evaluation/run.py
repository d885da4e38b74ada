"""The one loop: method x task x variant to predictions."""

import time
from collections.abc import Iterator, Sequence, Set
from functools import partial
from itertools import cycle
from typing import Any

import torch

from atv.data import Task, Variant, findings, refuse_shared_inputs
from atv.data.collate import pad_id
from atv.errors import ATVError
from atv.evaluation.records import Prediction, RunWriter, row_key
from atv.lm.hooks import input_device
from atv.lm.load import context_length
from atv.lm.prefix import SharedPrefix, call_llm
from atv.lm.scoring import answer_ids, likeliest, option_ids, reader, task_options
from atv.methods.base import Choice, Method
from atv.processes import rank, world_size
from atv.progress import Bar, bar, log, warn_once


def evaluate(
    method: Method,
    tasks: Sequence[Task],
    run: RunWriter,
    *,
    variants: str = "all",
    batch_size: int = 16,
) -> None:
    """Ask every test example of every task in every variant, and write one row for each.

    A prediction is right when the most likely next token over the whole vocabulary is the first token of " " + answer
    (section 3 of the paper; of a method that answers by itself, when its answer begins with that token), which is not
    defined where first tokens do not tell a task's options apart; beside it stands the likeliest of the options, judged
    by their tokens up to where they differ (`atv.lm.scoring`).

    Where a launcher has started several processes, all of them call this, and each asks every n-th batch of those
    that one process would ask.

    What the audit of the tasks finds is said first, a line each, once in a process.

    Args:
        method: what answers.
        tasks: their test splits are asked.
        run: where rows go; the rows that it has already are not asked again.
        variants: templates and answer prefixes, as `Task.variants` takes it.
        batch_size: prompts per call of the LLM.

    Raises:
        ATVError: a task's training inputs are test inputs of another, or two of its options are the same tokens, and
            nothing is asked; or a prompt is longer than the LLM's context, and nothing of that task and variant is
            asked.
    """
    if batch_size < 1:
        raise ATVError(f"batch_size is {batch_size}; expected a whole number from 1.")
    refuse_shared_inputs(tasks)
    for task in tasks:
        for finding in findings(task, partial(option_ids, method.tokenizer, task), task.variants(variants)):
            warn_once(finding)
    done = {row_key(row) for row in run.rows}
    work = [(task, variant) for task in tasks for variant in task.variants(variants)]
    order = [(task.name, *variant, index) for task, variant in work for index in range(len(task.test))]
    mine = cycle([process == rank() for process in range(world_size())])
    with bar(f"{method.name}", len(order)) as progress:
        progress.advance(len(done))
        for task, variant in work:
            progress.describe(f"{method.name}: {task.name}")
            asked = {i for i in range(len(task.test)) if (task.name, *variant, i) in done}
            _ask(method, task, variant, asked, run, batch_size, progress, mine)
    run.gather(order)
    seconds = sum(row["seconds"] for row in run.rows)
    run.finish(seconds=round(seconds, 3))
    _tell_of_dropped(method, run)


def _tell_of_dropped(method: Method, run: RunWriter) -> None:
    """Note, once for a run, that prompts had fewer demonstrations than asked for."""
    counts = [row.get("demonstrations", 0) for row in run.rows]
    fewer = [count for count in counts if count < method.shots]
    if fewer:
        log.warning(
            f"{method.name}: {len(fewer)} of {len(counts)} prompts had fewer than {method.shots} demonstrations "
            f"(down to {min(fewer)}): the LLM's context has no room for more, or the task no more training rows."
        )


@torch.no_grad()
def _ask(
    method: Method,
    task: Task,
    variant: Variant,
    asked: Set[int],
    run: RunWriter,
    batch_size: int,
    progress: Bar,
    mine: Iterator[bool],
) -> None:
    """Ask in batches the examples that are not in `asked`, if `mine` says that it is this process's turn.

    What is read together does not depend on what has been asked: a run that was interrupted ends with the same rows.
    """
    if len(asked) == len(task.test):
        return
    began = time.perf_counter()
    chosen = method.choose(task, task.test, variant)
    if chosen is not None:
        seconds = (time.perf_counter() - began) / len(chosen)
        _take(method, task, variant, chosen, seconds, asked, run, batch_size, progress, mine)
        return
    began = time.perf_counter()
    prompts = method.prompts(task, task.test, variant)
    encoded = [prompt.ids for prompt in prompts]
    seconds_before = time.perf_counter() - began
    options = task_options(method.tokenizer, task, variant)
    limit = context_length(method.llm)
    for index, ids in enumerate(encoded):
        if limit is not None and len(ids) + options.longest > limit:
            more = f", {options.longest} of an option are read after it," if options.longest else ""
            raise ATVError(
                f"Task {task.name}: test row {index} makes a prompt of {len(ids)} tokens{more} and the LLM's context "
                f"is {limit}; shorten or drop the row."
            )
    device = input_device(method.llm)
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # equal lengths: little padding
    began = time.perf_counter()
    shared = SharedPrefix(method.llm, encoded, method.edited)
    shared_seconds = (seconds_before + time.perf_counter() - began) / len(encoded)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        progress.advance(sum(index not in asked for index in batch))
        if not next(mine) or asked >= set(batch):
            continue
        began = time.perf_counter()
        inputs, past = shared.inputs([encoded[index] for index in batch], pad_id(method.tokenizer))
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with method.steer(task, [task.test[index] for index in batch]), shared.attention():
            output = call_llm(
                method.llm,
                keep=1,
                input_ids=inputs["input_ids"][:, shared.length :],
                attention_mask=inputs["attention_mask"],
                position_ids=inputs["position_ids"][:, shared.length :],
                past_key_values=past,
                use_cache=past is not None or not options.told_apart,
            )
            logits = output.logits[:, -1].float().cpu()  # (batch, vocabulary)
            best = likeliest([options] * len(batch), logits, reader(method.llm, inputs, output))
        seconds = (time.perf_counter() - began) / len(batch) + shared_seconds
        tokens = logits.argmax(-1).tolist()
        rows = []
        for place, index in enumerate(batch):
            if index in asked:
                continue
            example = task.test[index]
            first = options.ids[options.texts.index(example.output)][0]
            rows.append(
                Prediction(
                    **_place(task, variant, index),
                    prediction=method.tokenizer.decode([tokens[place]]),
                    correct=tokens[place] == first if options.told_apart else None,
                    prediction_among_options=best[place],
                    correct_among_options=best[place] == example.output,
                    prompt_tokens=len(encoded[index]),
                    seconds=seconds,
                    demonstrations=prompts[index].demonstrations,
                )
            )
        run.append(rows)


def _place(task: Task, variant: Variant, index: int) -> dict[str, Any]:
    """What a row says of the example that was asked."""
    return {
        "task": task.name,
        "category": task.category,
        "split": "test",
        "template": variant.template,
        "answer_prefix": variant.answer_prefix,
        "example": index,
        "target": task.test[index].output,
    }


def _take(
    method: Method,
    task: Task,
    variant: Variant,
    chosen: Sequence[Choice],
    seconds: float,
    asked: Set[int],
    run: RunWriter,
    batch_size: int,
    progress: Bar,
    mine: Iterator[bool],
) -> None:
    """The rows of a method that has answered by itself: judged by first tokens too, as the LLM's answers are."""
    options = task_options(method.tokenizer, task, variant)
    for start in range(0, len(chosen), batch_size):
        batch = [index for index in range(start, min(start + batch_size, len(chosen))) if index not in asked]
        progress.advance(len(batch))
        if not next(mine):
            continue
        rows = []
        for index in batch:
            choice, target = chosen[index], task.test[index].output
            first = [answer_ids(method.tokenizer, text, variant)[0] for text in (choice.answer, target)]
            rows.append(
                Prediction(
                    **_place(task, variant, index),
                    prediction=choice.answer,
                    correct=first[0] == first[1] if options.told_apart else None,
                    prediction_among_options=choice.among_options,
                    correct_among_options=choice.among_options == target,
                    prompt_tokens=choice.prompt_tokens,
                    seconds=seconds,
                )
            )
        run.append(rows)
