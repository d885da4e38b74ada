"""Look inside an ATV for one query: how near training is, what the vectors change in the answer, and at which layers.

Everything is a value of `Inspection`, which `dataclasses.asdict` turns into JSON values.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atv.data import Example, Prompt, Task, query_renderer, trained_task
from atv.data.collate import EncodedRow
from atv.data.conversation import example_of, turns_of
from atv.data.render import fitting
from atv.errors import ATVError
from atv.evaluation.metrics import Need
from atv.evaluation.requests import MOST_TOKENS, Requests
from atv.evaluation.run import read_batch
from atv.expansion import Expansion
from atv.gate import MOST, NEAREST
from atv.lm.hooks import capture_outputs, decoder_layers, input_device
from atv.lm.lens import Readout, top_tokens
from atv.lm.prefix import SharedPrefix, call_llm
from atv.lm.scoring import Options, encoded_options
from atv.lm.spans import Known
from atv.methods.atv import ATVMethod
from atv.methods.base import Method
from atv.methods.zero_shot import ZeroShot
from atv.model import ATVModel
from atv.progress import bar
from atv.steer import EDITS, Edit, steer
from atv.vectors import ATV

LEAST_TOKENS = 16
"""An answer is generated up to at least this number of tokens, to show what the LLM says if it does not stop."""
NO_CHANGE = 1e-3
"""Answers whose scores the vectors change by less than this, in nats, are changed alike."""
TOGETHER = 16
"""Number of training queries that the generator reads together."""


@dataclass(frozen=True)
class Neighbour:
    """A training query near a query."""

    query: str
    answer: str
    task: str
    cosine: float
    """Between the generator's states of both."""


@dataclass(frozen=True)
class Distance:
    """How far a query is from the training queries, as the gate measures it (`atv.gate.Gate`)."""

    nearness: float
    """Mean cosine to the three nearest training queries of the query's task."""
    typical: float
    """Median nearness of that task's training queries, each to the others."""
    opened: float
    """From this nearness on the distance does not close the gate."""
    closed: float
    """Up to this nearness it closes the gate."""
    share: float
    """Factor of the gate by distance, from 0 to 1."""
    strength: float
    """Factor of the gate that suited the validation rows of the query's task best, from 0 to 1."""


@dataclass(frozen=True)
class Said:
    """An answer of the LLM."""

    text: str
    """What it writes, decoded greedily."""
    answer: str
    """The likeliest option as a whole; without options, the text."""
    probabilities: dict[str, float] | None
    """Probability of each option, as in `atv.predict`: of the steered LLM with the calibrated temperature of the
    training, of the plain LLM without one."""


@dataclass(frozen=True)
class LayerLens:
    """What the LLM would answer if it ended after a decoder layer: the logit lens at the end of the prompt."""

    layer: int
    """Its index, from 0."""
    norm: float | None
    """Norm of what is added at this layer; None: nothing is."""
    stream: float
    """Norm of the plain LLM's residual stream after this layer, at the last prompt token."""
    alone: str | None
    """The answer whose identifying token the vector alone raises most, read through norm and head."""
    plain: dict[str, float]
    """Probability of each answer among those compared, without vectors; judged by the tokens that tell them apart."""
    steered: dict[str, float]
    """The same with the vectors."""
    raised: str | None
    """The answer whose score all vectors up to this layer raise most; None: they change all alike."""
    plain_tokens: list[list[Any]]
    """Likeliest next tokens without vectors: [token, probability]."""
    steered_tokens: list[list[Any]]
    """The same with the vectors."""
    alone_tokens: list[list[Any]]
    """Tokens whose logits the vector alone raises most: [token, raise]; empty if there is no vector."""


@dataclass(frozen=True)
class Inspection:
    """What an ATV does for one query."""

    query: str
    cut: bool
    """Whether the LLM reads it cut at its end, to fit its context."""
    task: str
    """The training task as which it is asked; empty: none."""
    gate: float
    """Share of the query's own part that is kept."""
    distance: Distance | None
    """None: the adapter has no gate."""
    nearest: list[Neighbour] | None
    """The nearest training queries, the nearest first. None: no training queries were given."""
    compared: int
    """Number of training queries that were compared."""
    training: int
    """Number of training queries that there are."""
    plain: Said
    """Without vectors."""
    steered: Said
    """With the vectors."""
    compared_answers: list[str]
    """The answers in `layers`: the task's options, or the plain and the steered text if they differ; else none."""
    promoted: str | None
    """The compared answer whose score the vectors raise most, at the last layer."""
    promoted_from: int | None
    """The layer from which on this is so."""
    leader: str | None
    """The likeliest compared answer with the vectors at the last layer, judged by the tokens that tell them apart."""
    leads_from: int | None
    """The layer from which on it is the likeliest."""
    layers: list[LayerLens]
    """One for each decoder layer; empty if the lens is not available."""
    lens: str
    """The modules that the lens reads with, or why it is not available."""


class TrainingQueries:
    """Training queries as an ATV's generator sees them, to find those nearest to a query.

    Args:
        atv: the model.
        tasks: its training tasks, asked as in training (`atv.data.as_trained`). Of more than 4,096 training rows that
            many are drawn at random.
        call: calls a function that uses the model, for some rows at a time, and returns its result; to share the model
            with others. By default it is called at once.

    Raises:
        ATVError: there is no task.
    """

    def __init__(
        self, atv: ATVModel, tasks: Sequence[Task], call: Callable[[Callable[[], Any]], Any] | None = None
    ) -> None:
        rows = [(task, example) for task in tasks for example in task.train]
        if not rows:
            raise ATVError("There is no training task; expected at least one.")
        self.total = len(rows)
        """Number of training rows that there are."""
        self.rows = rows if len(rows) <= MOST else random.Random(0).sample(rows, MOST)
        """The compared rows: task and example."""
        room = atv.context
        atv.eval()
        renderers = {task.name: task.training_renderers(atv.reads)[0] for task in tasks}
        call = call or (lambda function: function())

        def encoded(rows: Sequence[tuple[Task, Example]]) -> list[list[int]]:
            return [
                read_by_generator(atv, fitting(renderers[task.name], atv.tokenizer, example, room))
                for task, example in rows
            ]

        @torch.no_grad()
        def states_of(batch: Sequence[int]) -> Tensor:
            return atv.atv.states([read[index] for index in batch])

        read: list[list[int]] = []
        for start in range(0, len(self.rows), TOGETHER):
            read += call(partial(encoded, self.rows[start : start + TOGETHER]))
        order = sorted(range(len(read)), key=lambda index: len(read[index]))  # less padding
        states: dict[int, Tensor] = {}
        with bar("read training queries", len(order)) as progress:
            for start in range(0, len(order), TOGETHER):
                batch = order[start : start + TOGETHER]
                states |= zip(batch, call(partial(states_of, batch)), strict=True)
                progress.advance(len(batch))
        self.states = nn.functional.normalize(torch.stack([states[index] for index in range(len(read))]), dim=-1)
        """(rows, state), of norm 1."""

    def nearest(self, state: Tensor, count: int = NEAREST) -> list[Neighbour]:
        """Return the nearest training queries of a state (state,), as the generator returns it; the nearest first."""
        cosines = self.states @ nn.functional.normalize(state, dim=-1)  # (rows,)
        found = cosines.topk(min(count, len(cosines)))
        return [
            Neighbour(example.input, example.output, task.name, cosine)
            for cosine, (task, example) in zip(
                found.values.tolist(), (self.rows[index] for index in found.indices.tolist()), strict=True
            )
        ]


@torch.no_grad()
def inspect_query(
    atv: ATVModel,
    query: str | Sequence[Mapping[str, Any]],
    *,
    task: str | None = None,
    template: str | None = None,
    known: TrainingQueries | None = None,
) -> Inspection:
    """Look inside an ATV for one query.

    Args:
        atv: a trained model.
        query: a text, or a conversation that ends with the user: {"role": ..., "content": ...} for each turn.
        task: name of the training task. None: the only one; if there are several, the query alone is asked.
        template: used instead of the task's first one.
        known: the training queries to compare with. None: the nearest are left out.

    Raises:
        ATVError: the query is empty, the task is unknown, the model is of another method (`fixed`), or its edit takes
            several vectors per layer.
    """
    _refuse_others(atv)
    method, training = ATVMethod(atv), atv.training_summary
    render = query_renderer(training, atv.reads, task, template)
    name, asked = trained_task(training, task)
    if isinstance(query, str) and not query.strip():
        raise ATVError("A query is empty; expected some text.")
    example = (
        Example(query, "") if isinstance(query, str) else example_of("A query", turns_of("A query", "turn", query))
    )
    texts: Sequence[str] | None = asked.get("options")
    options = None if texts is None else encoded_options(atv.tokenizer, render, tuple(texts))
    longest = MOST_TOKENS // 2 if options is None else max(map(len, options.ids))
    limit = max(LEAST_TOKENS, 2 * int(asked.get("answer_tokens") or longest))
    needs: set[Need] = {"generate"} if options is None else {"generate", "loglikelihood"}
    requests = Requests(atv.llm, atv.tokenizer, render, needs, options=options, limit=limit, lines=True)
    room = atv.context
    prompt = fitting(render, atv.tokenizer, example, None if room is None else room - requests.read_after)
    cut = len(prompt.ids) < len(render.prompt(atv.tokenizer, example).ids)
    plain = _said(ZeroShot(atv.llm, atv.tokenizer), requests, prompt, 1.0)
    steered = _said(method, requests, prompt, float(asked.get("temperature") or 1.0))
    if options is None and plain.text and steered.text:
        both = tuple(dict.fromkeys((plain.text, steered.text)))
        options = encoded_options(atv.tokenizer, render, both) if len(both) > 1 else None
    state = atv.atv.states([read_by_generator(atv, prompt)])  # (1, state)
    gate, near = distance(atv.atv, state)
    layers, lens = lenses(atv, prompt, atv.atv.expand(state), options)
    raised, leading = [each.raised for each in layers], [_first(each.steered) for each in layers]
    return Inspection(
        query=example.input,
        cut=cut,
        task=name,
        gate=gate,
        distance=near,
        nearest=None if known is None else known.nearest(state[0]),
        compared=0 if known is None else len(known.rows),
        training=0 if known is None else known.total,
        plain=plain,
        steered=steered,
        compared_answers=[] if options is None else options.texts,
        promoted=raised[-1] if raised else None,
        promoted_from=_since(raised),
        leader=leading[-1] if leading else None,
        leads_from=_since(leading),
        layers=layers,
        lens=lens,
    )


def _refuse_others(atv: ATVModel) -> None:
    if type(atv).method != ATVModel.method:
        raise ATVError(
            f"The model is of the method {type(atv).method}, whose vectors are the same for all queries; expected one "
            f"of the method {ATVModel.method}."
        )
    _require_one_vector(atv)


def _require_one_vector(atv: ATVModel) -> None:
    if EDITS[atv.config.edit].vectors_per_site != 1:
        raise ATVError(
            f"The edit {atv.config.edit!r} takes {EDITS[atv.config.edit].vectors_per_site} vectors per layer; expected "
            "an edit that takes one, whose size and tokens can be shown."
        )


# ---- the query and its neighbours ----


def read_by_generator(atv: ATVModel | ATV, prompt: Prompt) -> list[int]:
    """Return what the generator reads of a prompt, as its token ids: the generator `self` reads the prompt itself."""
    return prompt.ids if atv.own else atv.generator.encode([prompt.query])[0]


@torch.no_grad()
def distance(atv: ATV, state: Tensor) -> tuple[float, Distance | None]:
    """Return the gate of a state (1, state) and its distance from the training queries; None without a gate."""
    if not isinstance(atv.expansion, Expansion) or not atv.config.gate or not len(atv.expansion.gate.references):
        return 1.0, None
    gate, task = atv.expansion.gate, atv.expansion.nearest_tasks(state)
    closed, opened = gate.limits[task].squeeze(0).tolist()
    nearness, share, strength = (
        gate.nearness(state, task).item(),
        gate.openness(state, task).item(),
        gate.strength(task).item(),
    )
    return share * strength, Distance(nearness, 2 * opened - closed, opened, closed, share, strength)


# ---- the answers ----


def _said(method: Method, requests: Requests, prompt: Prompt, temperature: float) -> Said:
    """What the LLM answers with a method."""
    shared = SharedPrefix(method.llm, [prompt.ids], method.edited_tokens)
    (found,) = read_batch(method, requests, shared, [prompt])
    text, scores = found["generate"].strip(), found.get("loglikelihood")
    if scores is None:
        return Said(text, text, None)
    chances = (torch.tensor(scores.values, dtype=torch.float64) / temperature).softmax(0).tolist()
    probabilities = dict(sorted(zip(scores.options, chances, strict=True), key=lambda pair: -pair[1]))
    return Said(text, next(iter(probabilities)), probabilities)


# ---- the lens ----


@torch.no_grad()
def lenses(
    atv: ATVModel, prompt: Prompt, vectors: Tensor, options: Options | None = None, scale: float | None = None
) -> tuple[list[LayerLens], str]:
    """Return the lens after each decoder layer, and the modules that it reads with or why there are none.

    Args:
        atv: the model.
        prompt: what the LLM reads.
        vectors: the query's, (1, layers, hidden).
        options: the answers to compare; None: only tokens are shown.
        scale: strength of the vectors; None: the model's.

    Raises:
        ATVError: the model's edit takes several vectors per layer.
    """
    _require_one_vector(atv)
    strength = atv.config.scale if scale is None else scale
    try:
        readout = Readout(atv.llm, atv.encode_prompts([prompt]), atv.config.layer_path)
    except ATVError as error:
        return [], str(error)
    edit = atv.edit(None if atv.own else vectors, scale)
    without, with_it = (_Stream(atv, prompt, options, each) for each in (None, edit))
    added = dict(zip(atv.config.layer_indices(len(without.ends)), (strength * vectors[0]).cpu().float(), strict=True))
    texts = [] if options is None else options.texts
    # All layers in one call of the head, which is the largest module of a small LLM.
    plain, steered = (
        readout(torch.stack([end.cpu() for end in each.ends])) for each in (without, with_it)
    )  # (layers, vocabulary)
    promoted = readout.promoted(torch.stack(list(added.values())))  # (steered layers, vocabulary)
    alone = dict(zip(added, zip(promoted, top_tokens(promoted, atv.tokenizer), strict=True), strict=True))
    plain_tokens, steered_tokens = _tokens(atv, plain), _tokens(atv, steered)
    layers = []
    for layer in range(len(without.ends)):
        before, after = (each.scores(readout, layer) for each in (without, with_it))  # (answers,)
        raises, raised_tokens = alone.get(layer, (None, []))
        layers.append(
            LayerLens(
                layer=layer,
                norm=added[layer].norm().item() if layer in added else None,
                stream=without.ends[layer].float().norm().item(),
                alone=None if raises is None or options is None else _most(texts, raises[_identifying(options)]),
                plain=_among(texts, before),
                steered=_among(texts, after),
                raised=_most(texts, after - before),
                plain_tokens=plain_tokens[layer],
                steered_tokens=steered_tokens[layer],
                alone_tokens=raised_tokens,
            )
        )
    return layers, readout.described(atv.llm)


class _Stream:
    """The residual stream after each decoder layer, at the end of the prompt and of the tokens that answers share.

    Args:
        atv: the model.
        prompt: what the LLM reads.
        options: the answers; None: only the prompt is read.
        edit: what steers the LLM; None: nothing does.
    """

    def __init__(self, atv: ATVModel, prompt: Prompt, options: Options | None, edit: Edit | None) -> None:
        self.options = options
        # What is read after the prompt for each answer, up to the token that tells it apart; nothing for most.
        self.read = [] if options is None else [ids[: options.judged[t] - 1] for t, ids in _pairs(options)]
        rows = list(dict.fromkeys(self.read)) or [()]
        self.row = {read: index for index, read in enumerate(rows)}
        encoded = EncodedRow([0], [(prompt.ids, [*read, 0]) for read in rows])  # the last token is not read
        batch = {name: value.to(input_device(atv.llm)) for name, value in atv.collator()([encoded]).items()}
        keep = batch["labels"].shape[1]
        ends = batch["labels"].new_full((len(rows),), -keep)
        with (
            nullcontext() if edit is None else steer(atv.llm, edit, Known(batch["edit_mask"], ends)),
            capture_outputs(decoder_layers(atv.llm, atv.config.layer_path)) as captured,
        ):
            names = ("input_ids", "attention_mask", "position_ids")
            call_llm(atv.llm, keep=keep, **{name: batch[name] for name in names}, use_cache=False)
        self.states = [captured[layer][:, -keep:] for layer in range(len(captured))]
        """For each layer (rows, columns, hidden); the first column is that of the last prompt token."""
        self.ends = [states[0, 0] for states in self.states]
        """For each layer (hidden,), at the last prompt token."""

    def scores(self, readout: Readout, layer: int) -> Tensor:
        """Return the log-probability after a layer of the tokens that tell each answer apart, (answers,)."""
        if self.options is None:
            return torch.empty(0)
        after = {  # for each distinct beginning (its tokens + 1, vocabulary)
            read: readout(self.states[layer][row, : len(read) + 1]).log_softmax(-1) for read, row in self.row.items()
        }
        found = []
        for number, (read, ids) in enumerate(zip(self.read, self.options.ids, strict=True)):
            score = sum(after[read][place, token].item() for place, token in enumerate(read))
            last = after[read][len(read)]
            if len(read) < len(ids):
                score += last[ids[len(read)]].item()
            else:  # others continue it: none of their next tokens follows
                last = last.clone()
                last[list(self.options.continued[number])] = -torch.inf
                score += last.logsumexp(-1).item()
            found.append(score)
        return torch.tensor(found, dtype=torch.float64)


def _pairs(options: Options) -> list[tuple[str, tuple[int, ...]]]:
    return list(zip(options.texts, options.ids, strict=True))


def _identifying(options: Options) -> list[int]:
    """The token that tells each answer apart; the last one of an answer that others continue."""
    return [ids[min(options.judged[text], len(ids)) - 1] for text, ids in _pairs(options)]


def _among(texts: Sequence[str], scores: Tensor) -> dict[str, float]:
    return dict(zip(texts, scores.softmax(0).tolist(), strict=True))


def _most(texts: Sequence[str], values: Tensor) -> str | None:
    """The text with the highest value; None if there is none, or all values are alike."""
    if len(texts) < 2 or (values.max() - values.min()).item() < NO_CHANGE:
        return None
    return texts[int(values.argmax())]


def _first(chances: Mapping[str, float]) -> str | None:
    return max(chances, key=chances.__getitem__, default=None)


def _since(values: Sequence[str | None]) -> int | None:
    """The index from which on all values are the last one; None if that is None."""
    if not values or values[-1] is None:
        return None
    others = [index for index, value in enumerate(values) if value != values[-1]]
    return others[-1] + 1 if others else 0


def _tokens(atv: ATVModel, logits: Tensor) -> list[list[list[Any]]]:
    return top_tokens(logits, atv.tokenizer, logits.softmax(-1))
