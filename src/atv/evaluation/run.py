"""The evaluation loop: method x task x variant to rows."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import cycle
from typing import Any

import torch

from atv.data import Prompt, Renderer, Task, Variant, findings, refuse_shared_inputs
from atv.data.collate import pad_id
from atv.data.render import TooLong, fitting
from atv.errors import ATVError
from atv.evaluation.metrics import GENERATED, ExactMatch, Metric, Need, default_metric, load_metric, reads_whole
from atv.evaluation.records import Row, RunWriter, row_key
from atv.evaluation.requests import Requests, first_line
from atv.lm.continuation import Continuation
from atv.lm.hooks import input_device
from atv.lm.load import context_length
from atv.lm.prefix import SharedPrefix, call_llm
from atv.lm.scoring import option_ids
from atv.lm.spans import Tracked
from atv.methods.base import Choice, Method
from atv.processes import rank, world_size
from atv.progress import Bar, bar, log, log_once
from atv.steer import steer

Metrics = Sequence[str | Metric | Callable[..., Any]]
"""Metrics as for `load_metric`."""
Append = Callable[[list[Row]], None]


def metrics_of(
    method: Method | type[Method], tasks: Iterable[Task], metrics: Metrics | None = None
) -> dict[str, list[Metric]]:
    """The metrics of each task, by the task's name.

    Args:
        method: the method to evaluate.
        tasks: the tasks.
        metrics: metrics for all tasks. None: each task's default (`default_metric`), or `exact_match` for a method
            without option scores.

    Raises:
        ATVError: a metric is unknown or given twice, or the method does not provide what it needs.
    """
    if metrics is not None and not metrics:
        raise ATVError("No metric is named; expected at least one, or None for the tasks' defaults.")
    named = None if metrics is None else [load_metric(metric) for metric in metrics]
    if named is not None and len({metric.name for metric in named}) < len(named):
        raise ATVError(f"A metric is named twice: {', '.join(metric.name for metric in named)}. Leave one out.")
    for metric in named or ():
        if metric.needs not in method.serves:
            raise ATVError(
                f"The metric {metric.name} needs {metric.needs}, which the method {method.name} does not give; it "
                f"gives {', '.join(sorted(method.serves))}. Choose another metric for it."
            )
    return {task.name: _default(method, task) if named is None else named for task in tasks}


def _default(method: Method | type[Method], task: Task) -> list[Metric]:
    metric = load_metric(default_metric(task))
    return [metric if metric.needs in method.serves else ExactMatch()]


def evaluate(
    method: Method,
    tasks: Sequence[Task],
    metrics: Metrics | None = None,
    out: RunWriter | None = None,
    *,
    variants: str = "trained",
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Evaluate every test example of every task in every variant and score the answers.

    The LLM reads each prompt once, whatever the metrics need.

    With several processes (started by a launcher), all of them call this, and each of n processes handles every n-th
    batch.

    First the findings of the tasks' audit are logged, one line each, once per process.

    Args:
        method: the method to evaluate.
        tasks: evaluated on their test splits.
        metrics: names, functions or `Metric`s, as for `load_metric`. None: each task's default.
        out: receives the rows; rows that it already has are not computed again. None: rows are only returned.
        variants: templates and answer prefixes, as for `Task.renderers`.
        batch_size: prompts per call of the LLM.

    Returns:
        The rows in the order of tasks, variants and examples, each a `Row` as a dictionary.

    Raises:
        ATVError: Before evaluation starts: a metric cannot be computed for this method; a task's training inputs are
            test inputs of another; or two of a task's options have the same tokens and a metric compares options.
            Before a task and variant is evaluated: what stands around a query does not fit the LLM's context. (A query
            that does not fit is cut at its end, and logged.)
    """
    if batch_size < 1:
        raise ATVError(f"batch_size is {batch_size}; expected a whole number from 1.")
    if out is None and world_size() > 1:
        raise ATVError("Several processes share their rows through a run's folder; expected out, a RunWriter.")
    judged = metrics_of(method, tasks, metrics)
    refuse_shared_inputs(tasks)
    renderers = {task.name: task.renderers(variants, method.reads) for task in tasks}
    for task in tasks:
        needs = {metric.needs for metric in judged[task.name]}
        encode = partial(option_ids, method.tokenizer, task)
        if "loglikelihood" in needs:
            for render in renderers[task.name].values():
                encode(render)  # refuses options with the same tokens before evaluation starts
        for finding in findings(task, encode if "next_token" in needs else None, renderers[task.name]):
            log_once(finding)
    rows: list[dict[str, Any]] = [] if out is None else out.rows
    append = out.append if out is not None else lambda some: rows.extend(map(asdict, some))
    done = {row_key(row) for row in rows}
    work = [(task, variant, render) for task in tasks for variant, render in renderers[task.name].items()]
    order = [(task.name, *variant, index) for task, variant, _ in work for index in range(len(task.test))]
    mine = cycle([process == rank() for process in range(world_size())])
    with bar(f"{method.name}", len(order)) as progress:
        progress.advance(len(done))
        for task, variant, render in work:
            progress.describe(f"{method.name}: {task.name}")
            asked = {i for i in range(len(task.test)) if (task.name, *variant, i) in done}
            _ask(method, task, variant, render, judged[task.name], asked, append, batch_size, progress, mine)
    if out is not None:
        out.gather(order)
        rows = out.rows
        out.finish(seconds=round(sum(row["seconds"] for row in rows), 3))
    place = {key: index for index, key in enumerate(order)}
    rows = sorted(rows, key=lambda row: place.get(row_key(row), len(place)))
    _tell_of_dropped(method, rows)
    return rows


def _tell_of_dropped(method: Method, rows: Sequence[Mapping[str, Any]]) -> None:
    """Log, once per run, that prompts had fewer demonstrations than requested."""
    counts = [row["demonstrations"] for row in rows]
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
    render: Renderer,
    metrics: Sequence[Metric],
    asked: Set[int],
    append: Append,
    batch_size: int,
    progress: Bar,
    mine: Iterator[bool],
) -> None:
    """Evaluate in batches the examples not in `asked`, if `mine` says that it is this process's turn.

    Batches do not depend on which examples are done, so a resumed run ends with the same rows.
    """
    if len(asked) == len(task.test):
        return
    requests = Requests.of_task(method.llm, method.tokenizer, task, render, metrics)
    began = time.perf_counter()
    chosen = method.choose(task, task.test, render)
    if chosen is not None:
        seconds = (time.perf_counter() - began) / len(chosen)
        for start in range(0, len(chosen), batch_size):
            batch = [index for index in range(start, min(start + batch_size, len(chosen))) if index not in asked]
            progress.advance(len(batch))
            if next(mine):
                append([_row_of(requests, metrics, task, variant, index, chosen[index], seconds) for index in batch])
        return
    began = time.perf_counter()
    method.read_after = requests.read_after
    prompts = _fitting(method, task, render, method.prompts(task, task.test, render))
    encoded = [prompt.ids for prompt in prompts]
    seconds_before = time.perf_counter() - began
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # less padding
    began = time.perf_counter()
    shared = SharedPrefix(method.llm, encoded, method.edited_tokens)
    shared_seconds = (seconds_before + time.perf_counter() - began) / len(encoded)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        progress.advance(sum(index not in asked for index in batch))
        if not next(mine) or asked >= set(batch):
            continue
        began = time.perf_counter()
        found = read_batch(method, requests, shared, [prompts[index] for index in batch])
        seconds = (time.perf_counter() - began) / len(batch) + shared_seconds
        append(
            [
                _row(
                    metrics,
                    task,
                    variant,
                    index,
                    outputs,
                    prompt_tokens=len(encoded[index]),
                    seconds=seconds,
                    demonstrations=prompts[index].demonstrations,
                )
                for index, outputs in zip(batch, found, strict=True)
                if index not in asked
            ]
        )


def read_batch(
    method: Method, requests: Requests, shared: SharedPrefix, prompts: Sequence[Prompt]
) -> list[dict[Need, Any]]:
    """Let the LLM read a batch of prompts, with the method's edits, and return what the requests need of each.

    Args:
        method: the method.
        requests: what is asked.
        shared: made of all prompts, these among them.
        prompts: the batch.
    """
    with reading(method, shared, prompts, requests.continues) as behind:
        return requests.outputs(behind)


@contextmanager
def reading(
    method: Method, shared: SharedPrefix, prompts: Sequence[Prompt], continues: bool = True
) -> Iterator[Continuation]:
    """Let the LLM read a batch of prompts, with the method's edits; inside the context it can be continued.

    Args:
        method: the method.
        shared: made of all prompts, these among them.
        prompts: the batch.
        continues: whether tokens may be read after the prompts, so that their keys and values are needed.
    """
    inputs, past = shared.inputs([prompt.ids for prompt in prompts], pad_id(method.tokenizer))
    inputs = {name: tensor.to(input_device(method.llm)) for name, tensor in inputs.items()}
    with steered(method, prompts), shared.attention():
        output = call_llm(
            method.llm,
            keep=1,
            input_ids=inputs["input_ids"][:, shared.length :],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"][:, shared.length :],
            past_key_values=past,
            use_cache=past is not None or continues,
        )
        yield Continuation(method.llm, inputs, output)


def steered(method: Method, prompts: Sequence[Prompt]) -> AbstractContextManager[None]:
    """A context in which the method's LLM reads these prompts, in this order, with the method's edits."""
    edit = method.edit(prompts)
    return nullcontext() if edit is None else steer(method.llm, edit, Tracked(len(prompts), edit.positions))


def _fitting(method: Method, task: Task, render: Renderer, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts; where one does not fit the LLM's context, its query is cut at its end, and how many is logged.

    Raises:
        ATVError: what stands around a query does not fit either.
    """
    room, fitted = method.room, list(prompts)
    if room is None:
        return prompts
    long = [index for index, prompt in enumerate(prompts) if len(prompt.ids) > room]
    for index in long:
        try:
            fitted[index] = fitting(render, method.tokenizer, task.test[index], room)._replace(task=task.name)
        except TooLong as error:
            raise ATVError(
                f"Task {task.name}, test row {index}: {error} {method.read_after} tokens are read after it."
            ) from None
    if long:
        log.warning(
            f"{task.name}: the queries of {len(long)} of {len(prompts)} test rows are cut at their end to fit the "
            f"LLM's context of {context_length(method.llm)} tokens, the first of them row {long[0]}."
        )
    return fitted


def _row_of(
    requests: Requests,
    metrics: Sequence[Metric],
    task: Task,
    variant: Variant,
    index: int,
    choice: Choice,
    seconds: float,
) -> Row:
    """The row of an answer that the method chose without the LLM."""
    outputs = requests.outputs_of(choice)
    return _row(metrics, task, variant, index, outputs, prompt_tokens=choice.prompt_tokens, seconds=seconds)


def _row(
    metrics: Sequence[Metric],
    task: Task,
    variant: Variant,
    index: int,
    outputs: Mapping[Need, Any],
    **costs: Any,
) -> Row:
    """The row of one example with the scores of all metrics."""
    example, scores = task.test[index], dict[str, float | None]()
    for metric in metrics:
        found = metric(example, _judged(metric, task, outputs[metric.needs]))
        if twice := scores.keys() & found.keys():
            raise ATVError(
                f"Two metrics give the score {min(twice)} ({', '.join(m.name for m in metrics)}); leave one out, or "
                "name it differently."
            )
        scores |= found
    texts: dict[str, str] = {}
    for need, output in outputs.items():
        texts |= {GENERATED: output.strip()} if need == "generate" else output.texts()
    likelihoods = outputs.get("loglikelihood")
    return Row(
        task=task.name,
        category=task.category,
        split="test",
        template=variant.template,
        answer_prefix=variant.answer_prefix,
        example=index,
        target=example.output,
        scores=scores,
        outputs=texts,
        probabilities=None if likelihoods is None else likelihoods.probabilities(),
        query=example.input if 0 in scores.values() else "",
        **costs,
    )


def _judged(metric: Metric, task: Task, output: Any) -> Any:
    """What a metric judges. Its score does not depend on the metrics beside it, for which more may be generated."""
    if metric.needs != "generate":
        return output
    return output.strip() if reads_whole(metric) or task.has_lines else first_line(output)
