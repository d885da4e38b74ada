"""The one loop: method x task x variant to predictions."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle

import torch

from atv.batching import encode_pair, encode_prompt, left_padded, pad_id
from atv.errors import ATVError
from atv.hooks import input_device
from atv.methods.base import Method
from atv.models import context_length
from atv.prefix import call_llm
from atv.processes import rank, world_size
from atv.progress import Bar, bar
from atv.records import Prediction, RunWriter, row_key
from atv.tasks import Task, Variant


def evaluate(
    method: Method,
    tasks: Sequence[Task],
    run: RunWriter,
    *,
    variants: Sequence[Variant] | None = None,
    batch_size: int = 16,
) -> None:
    """Ask every test example of every task in every variant, and write one row for each.

    A prediction is right when the most likely next token over the whole vocabulary is the first token of " " + answer
    (section 3 of the paper); beside it stands the likeliest among the first tokens of the task's options.

    Where a launcher has started several processes, all of them call this, and each asks every n-th batch of those
    that one process would ask.

    Args:
        method: what answers.
        tasks: their test splits are asked.
        run: where rows go; the rows that it has already are not asked again.
        variants: templates and answer prefixes; None: all of a task's.
        batch_size: prompts per call of the LLM.

    Raises:
        ATVError: a prompt is longer than the LLM's context; nothing of that task and variant is asked then.
    """
    done = {row_key(row) for row in run.rows}
    work = [(task, variant) for task in tasks for variant in (variants or list(task.variants()))]
    order = [(task.name, *variant, index) for task, variant in work for index in range(len(task.test))]
    mine = cycle([process == rank() for process in range(world_size())])
    with bar(f"{method.name}", len(order)) as progress:
        progress.advance(len(done))
        for task, variant in work:
            progress.describe(f"{method.name}: {task.name}")
            left = [i for i in range(len(task.test)) if (task.name, *variant, i) not in done]
            _ask(method, task, variant, left, run, batch_size, progress, mine)
    run.gather(order)
    seconds = sum(row["seconds"] for row in run.rows)
    run.finish(seconds=round(seconds, 3))


def first_answer_token(method: Method, prompt: str, answer: str) -> int:
    """The token that the LLM should put after the prompt."""
    return encode_pair(method.tokenizer, prompt, answer)[1][0]


@torch.no_grad()
def _ask(
    method: Method,
    task: Task,
    variant: Variant,
    examples: Sequence[int],
    run: RunWriter,
    batch_size: int,
    progress: Bar,
    mine: Iterator[bool],
) -> None:
    """Ask `examples` in batches, those of them for which `mine` says that it is this process's turn."""
    prompts = {index: method.prompt(task, task.test[index], variant) for index in examples}
    encoded = {index: encode_prompt(method.tokenizer, prompt) for index, prompt in prompts.items()}
    limit = context_length(method.llm)
    for index, ids in encoded.items():
        if limit is not None and len(ids) > limit:
            raise ATVError(
                f"Task {task.name}: test row {index} makes a prompt of {len(ids)} tokens and the LLM's context is "
                f"{limit}; shorten or drop the row."
            )
    device = input_device(method.llm)
    by_length = sorted(examples, key=lambda index: len(encoded[index]))  # equal lengths together: little padding
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        progress.advance(len(batch))
        if not next(mine):
            continue
        began = time.perf_counter()
        inputs = left_padded([encoded[index] for index in batch], pad_id(method.tokenizer))
        with ExitStack() as stack:
            stack.enter_context(method.steer(task, [task.test[index] for index in batch]))
            output = call_llm(
                method.llm, keep=1, use_cache=False, **{name: value.to(device) for name, value in inputs.items()}
            )
        logits = output.logits[:, -1].float().cpu()  # (batch, vocabulary)
        seconds = (time.perf_counter() - began) / len(batch)
        likeliest = logits.argmax(-1).tolist()
        rows = []
        for place, index in enumerate(batch):
            example = task.test[index]
            options = {option: first_answer_token(method, prompts[index], option) for option in task.options}
            target = options[example.output]
            best = max(options, key=lambda option: logits[place, options[option]].item())
            rows.append(
                Prediction(
                    task=task.name,
                    category=task.category,
                    split="test",
                    template=variant.template,
                    answer_prefix=variant.answer_prefix,
                    example=index,
                    target=example.output,
                    prediction=method.tokenizer.decode([likeliest[place]]),
                    correct=likeliest[place] == target,
                    prediction_among_options=best,
                    correct_among_options=options[best] == target,
                    prompt_tokens=len(encoded[index]),
                    seconds=seconds,
                )
            )
        run.append(rows)
