"""ELICIT's library: states of prompts with demonstrations, and the layer at which each state helps most."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from atv.config import Positions
from atv.data import Example, Prompt, Renderer, Task
from atv.data.collate import IGNORED, Collator, EncodedRow, left_padded, like_lengths, pad_id
from atv.data.render import TooLong, fitting
from atv.errors import ATVError
from atv.lm.adapter_model import answer_loss
from atv.lm.hooks import capture_outputs, decoder_layers, input_device, read_up_to
from atv.lm.load import context_length
from atv.lm.prefix import ReadPrefix, as_cache, call_llm, full_sides, read_prefix, steered_logits
from atv.lm.scoring import answers_right, training_options
from atv.lm.spans import Known
from atv.methods.demonstrations import fitted
from atv.progress import log_once
from atv.steer import AddVectors, steer

AT_ONCE = 100
"""Most prompts per call in the search for the best layer."""
SPLIT_NAMES = {"train": "training", "valid": "validation", "test": "test"}
LAST = Positions.parse("last")
READ_TOKENS = 1024
"""Tokens per call that collects states; all layers' states of all tokens are in memory until it ends."""


class Exemplars(NamedTuple):
    """One task's part of the library."""

    states: Tensor
    """(exemplars, layers, hidden): each decoder layer's output at a prompt's last token."""
    layers: Tensor
    """(exemplars,) int64: the layer at which adding the state gets the most validation rows right."""
    rows: Tensor
    """(exemplars,) int64: the training row in each prompt's query."""


def exemplar_prompts(
    llm: nn.Module, tokenizer: Any, task: Task, count: int, shots: int, seed: int
) -> list[tuple[int, Prompt]]:
    """Prompts for `count` training rows, each after `shots` other rows as demonstrations, with the rows' indices.

    Rows repeat only if there are fewer than `count`; templates alternate. There are fewer demonstrations if they exceed
    the LLM's context or the task has too few rows, and none before a query that is cut as by `plain_prompts`.
    """
    draw = random.Random(f"{seed} {task.name}")
    rows = draw.sample(range(len(task.train)), len(task.train))
    rows = [rows[number % len(rows)] for number in range(count)]
    plain = plain_prompts(llm, tokenizer, task, "train", [task.train[row] for row in rows])
    prompts, renderers, room = [], task.training_renderers(), context_length(llm)
    for number, asked in enumerate(rows):
        others = [row for index, row in enumerate(task.train) if index != asked]
        shown = draw.sample(others, min(shots, len(others)))
        prompt = fitted(tokenizer, task, shown, task.train[asked], renderers[number % len(renderers)], room)
        prompts.append((asked, prompt if prompt.demonstrations else plain[number]))
    return prompts


def plain_prompts(
    llm: nn.Module,
    tokenizer: Any,
    task: Task,
    split: str,
    rows: Sequence[Example],
    renderers: Sequence[Renderer] | None = None,
    read_after: int = 0,
) -> list[Prompt]:
    """Prompts of rows. A query that does not fit the LLM's context is cut at its end, and how many is logged.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        task: the task.
        split: of the rows: train, valid or test.
        rows: the rows.
        renderers: they alternate. None: those of training.
        read_after: most tokens that are read after a prompt.

    Raises:
        ATVError: what stands around a query does not fit either.
    """
    limit, renderers, prompts, cut = context_length(llm), renderers or task.training_renderers(), [], set()
    for number, row in enumerate(rows):
        render = renderers[number % len(renderers)]
        prompt = render.prompt(tokenizer, row)
        if limit is not None and len(prompt.ids) > limit - read_after:
            cut.add(row)
            try:
                prompt = fitting(render, tokenizer, row, limit - read_after)
            except TooLong as error:
                raise ATVError(f"Task {task.name}, a {SPLIT_NAMES[split]} row: {error}") from None
        prompts.append(prompt._replace(task=task.name))
    if cut:
        log_once(
            f"{task.name}: the queries of {len(cut)} of {len({*rows})} {SPLIT_NAMES[split]} rows are cut at their end "
            f"to fit the LLM's context of {limit} tokens."
        )
    return prompts


@torch.no_grad()
def last_states(llm: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], layer: int | None = None) -> Tensor:
    """Outputs of decoder layers at the last token of encoded prompts: (prompts, layers, hidden), on the CPU.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        prompts: token ids, none empty. Prompts of similar length are batched.
        layer: index of the only layer wanted, after which the forward pass stops: (prompts, 1, hidden). None: all.
    """
    layers = decoder_layers(llm)
    read: dict[tuple[int, ...], Tensor] = {}
    for batch in like_lengths({tuple(ids) for ids in prompts}, READ_TOKENS):
        inputs = {name: t.to(input_device(llm)) for name, t in left_padded(batch, pad_id(tokenizer)).items()}
        if layer is None:
            with capture_outputs(layers) as captured:
                call_llm(llm, keep=1, **inputs, use_cache=False)
            found = torch.stack([captured[index][:, -1].cpu() for index in range(len(layers))], dim=1)
        else:
            found = read_up_to(llm, layers[layer], **inputs, use_cache=False)[:, -1:].cpu()
        read |= zip(batch, found, strict=True)  # found: (batch, layers, hidden)
    return torch.stack([read[tuple(ids)] for ids in prompts])


def judged_rows(llm: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Example]) -> list[EncodedRow]:
    """Validation rows with one prompt each (`plain_prompts`) and the tokens by which its answer is judged."""
    options, renderers = training_options(tokenizer, task), task.training_renderers()
    tokens = [options.judged[row.output] for row in rows]
    prompts = plain_prompts(llm, tokenizer, task, "valid", rows, read_after=max(tokens) - 1)
    answers = (
        renderers[number % len(renderers)].answer(tokenizer, prompts[number], row.output)
        for number, row in enumerate(rows)
    )
    return [
        EncodedRow([0], [(prompt.ids, answer[:judged])], judged)
        for prompt, answer, judged in zip(prompts, answers, tokens, strict=True)
    ]


@torch.no_grad()
def layer_scores(
    llm: nn.Module,
    tokenizer: Any,
    task: Task,
    states: Tensor,
    scale: float,
    rows: Sequence[Example],
    at: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """How well validation rows are answered with a state added at one layer, for each state and layer.

    An answer is judged by its tokens up to where it differs from the task's other options, usually the first.
    Everything before the last token of a plain prompt is independent of the state and is read once for all states.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        task: the task, whose templates alternate.
        states: (exemplars, layers, hidden), added to every row; or one per row, (exemplars, rows, layers, hidden).
        scale: strength of the addition.
        rows: validation rows of the task.
        at: indices of the decoder layers at which `states` are added. None: all, in order.

    Returns:
        Accuracy over the whole vocabulary and mean log-probability of the right tokens, both (exemplars, layers)
        float32 on the CPU.
    """
    layers = decoder_layers(llm)
    chosen = layers if at is None else [layers[index] for index in at]
    asked, parts = judged_rows(llm, tokenizer, task, rows), []
    for start in range(0, len(asked), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        made = states if states.dim() == 3 else states[:, some]
        parts.append(_row_scores(llm, tokenizer, asked[some], made, scale, chosen))
    right, likely = (torch.cat(of, dim=-1).mean(-1) for of in zip(*parts, strict=True))
    return right, likely


def _row_scores(
    llm: nn.Module,
    tokenizer: Any,
    asked: Sequence[EncodedRow],
    states: Tensor,
    scale: float,
    layers: Sequence[nn.Module],
) -> tuple[Tensor, Tensor]:
    """What `layer_scores` averages over rows, both (exemplars, layers, rows); the rows are read in one call."""
    inputs = Collator(LAST, pad_id(tokenizer), 0)(asked)  # each (rows, seq)
    targets, judged = inputs.pop("labels"), torch.tensor([row.judged for row in asked])  # (rows, answer), (rows,)
    steered = ("input_ids", "attention_mask", "position_ids", "edit_mask")
    inputs = {name: inputs[name].to(input_device(llm)) for name in steered}
    read = _read_once(llm, inputs, targets.shape[1])

    def scores(layer: nn.Module, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (some, rows) for vectors (some, 1, hidden) or (some, rows, 1, hidden)."""
        made = vectors.flatten(0, -3)
        logits = steered_logits(
            llm,
            lambda where: steer(llm, AddVectors([layer], made, scale, LAST), Known(where)),
            **{name: tensor.repeat(len(vectors), 1) for name, tensor in inputs.items()},
            keep=targets.shape[1],
            read=read,
        )  # (some * rows, answer, vocabulary)
        found = answer_loss(logits.float().cpu(), targets.repeat(len(vectors), 1))
        assert found.right is not None
        assert found.losses is not None
        right = answers_right(found.right, judged.repeat(len(vectors)))  # (some * rows,)
        likely = -found.losses * (targets != IGNORED).sum(1).repeat(len(vectors))
        return right.view(len(vectors), -1).float(), likely.view(len(vectors), -1)

    right, likely = torch.empty(2, len(states), len(layers), len(asked)).unbind()
    at_once = max(1, AT_ONCE // len(asked))
    for start in range(0, len(states), at_once):
        some = slice(start, start + at_once)
        for index, layer in enumerate(layers):
            right[some, index], likely[some, index] = scores(layer, states[some, ..., index : index + 1, :])
    return right, likely


def _read_once(llm: nn.Module, inputs: dict[str, Tensor], keep: int) -> ReadPrefix:
    """A function that returns cached keys and values of all but the last `keep` columns, for any number of copies."""
    before = [inputs[name][:, :-keep] for name in ("input_ids", "attention_mask", "position_ids")]
    rows, width = before[0].shape
    sides = full_sides(read_prefix(llm, *before), width) if width else None

    def read(llm: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor) -> Any:
        if sides is None:  # a sliding window or recurrent state: read again each time
            return read_prefix(llm, ids, mask, positions)
        copies = (len(ids) // rows, 1, 1, 1)
        return as_cache((keys.repeat(copies), values.repeat(copies)) for keys, values in sides)

    return read


def best_layers(right: Tensor, likely: Tensor) -> Tensor:
    """The layer with the most right answers for each exemplar, ties broken by log-probability: (exemplars,)."""
    likely = likely.nan_to_num(nan=float("-inf"))  # too large a scale overflows to NaN
    return torch.tensor(
        [
            max(range(right.shape[1]), key=lambda layer: (right[row, layer].item(), likely[row, layer].item()))
            for row in range(len(right))
        ]
    )
