"""The LLM's answers if a query gets other vectors than its own: the effect of adaptivity, not only its size."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from atv.data import Example, Prompt, Task
from atv.evaluation.metrics import FirstToken, NextToken
from atv.lm.continuation import Continuation
from atv.lm.prefix import call_llm
from atv.lm.scoring import training_options
from atv.model import ATVModel
from atv.paper.analysis.norms import batches
from atv.progress import Bar

OWN, TASK_MEAN, MEAN, SAME_TASK, OTHER_TASK, NONE = (
    "its own",
    "the mean of its task",
    "the mean of all queries",
    "of another query of its task",
    "of a query of another task",
    "none",
)
KINDS = (OWN, TASK_MEAN, MEAN, SAME_TASK, OTHER_TASK, NONE)
"""Kinds of vectors with which a query is answered."""


def others(vectors: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The vectors with which each query is answered, for each kind except none.

    "Another query of its task" is the next one, wrapping around at the end. The query of another task has the same
    index in the next task, modulo that task's number of queries. A kind for which there is no such query is left out.

    Args:
        vectors: (queries, layers, hidden), each query's own vectors.
        tasks: the name of each query's task.

    Returns:
        By kind, vectors (queries, layers, hidden).
    """
    places: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        places.setdefault(task, []).append(place)
    names = list(places)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    of_task, same, other = torch.empty_like(vectors), [0] * len(tasks), [0] * len(tasks)
    for task, own in places.items():
        of_task[own] = vectors[own].mean(0)
        there = places[following[task]]
        for number, place in enumerate(own):
            same[place] = own[(number + 1) % len(own)]
            other[place] = there[number % len(there)]
    found = {OWN: vectors, TASK_MEAN: of_task, MEAN: vectors.mean(0).expand_as(vectors)}
    if all(len(own) > 1 for own in places.values()):
        found[SAME_TASK] = vectors[same]
    if len(places) > 1:
        found[OTHER_TASK] = vectors[other]
    return found


@torch.no_grad()
def exchanged(
    atv: ATVModel, asked: Sequence[tuple[Task, Example]], prompts: Sequence[Prompt], vectors: Tensor, progress: Bar
) -> list[dict[str, dict[str, float | None]]]:
    """Answer each query with its own vectors, with others, and with none.

    Args:
        atv: the adapter on its LLM.
        asked: the queries.
        prompts: the LLM's prompts, one per query.
        vectors: (queries, layers, hidden), as added, on any device.
        progress: advances by one per answer.

    Returns:
        For each query and kind, the scores of the metric `first_token`, and whether the answer differs from that with
        the query's own vectors (`other`): the token over the vocabulary or, if options begin alike, the option.
    """
    options = [training_options(atv.tokenizer, task) for task, _ in asked]
    found: list[dict[str, dict[str, float | None]]] = [{} for _ in asked]
    judge = FirstToken()
    first: dict[int, int | str] = {}  # the answers with the queries' own vectors, which come first
    kinds: dict[str, Any] = others(vectors, [task.name for task, _ in asked]) | {NONE: None}
    for kind, made in kinds.items():
        for batch in batches([prompt.ids for prompt in prompts]):
            inputs = atv.encode_prompts([prompts[index] for index in batch])
            queries = [prompts[index].query for index in batch]
            steer = nullcontext() if made is None else atv.steer(queries, vectors=made[batch], scale=1.0)
            own = [options[index] for index in batch]
            on = not all(each.told_apart for each in own)
            with steer:
                output = call_llm(atv.llm, keep=1, **inputs, use_cache=on)
                behind = Continuation(atv.llm, inputs, output)
                best, tokens = behind.likeliest(own), behind.logits.argmax(-1).tolist()
            for place, index in enumerate(batch):
                said = NextToken(tokens[place], atv.tokenizer.decode([tokens[place]]), best[place], own[place])
                says = said.token if own[place].told_apart else said.option
                other = {"other": float(says != first.setdefault(index, says))}
                found[index][kind] = {**judge(asked[index][1], said), **other}
            progress.advance(len(batch))
    progress.advance((len(KINDS) - len(kinds)) * len(asked))
    return found
