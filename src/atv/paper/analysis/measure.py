"""The whole analysis of one adapter, as a record of JSON values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atv.data import Example, Prompt, Task
from atv.errors import ATVError
from atv.lm.hooks import base_llm, decoder_layers
from atv.lm.lens import Readout, top_tokens
from atv.methods.elicit import Elicit
from atv.model import ATVModel
from atv.paper.analysis.geometry import LEAST, map_of, nearest, require_sklearn, variation
from atv.paper.analysis.lens import layer_by_layer
from atv.paper.analysis.norms import beside_residual, scaled_vectors
from atv.paper.analysis.swapped import KINDS, exchanged
from atv.progress import Bar, bar, log
from atv.words import words

NEIGHBOURS = 90
"""Maximum number of training rows per task that can be neighbours: as many as the paper trains on."""
NAMED = 3
"""Number of nearest training queries recorded for each query."""
LONGEST = 200
"""Maximum number of characters of a recorded text."""


def analyse(
    atv: ATVModel,
    tasks: Sequence[Task],
    *,
    elicit: Elicit | None = None,
    rows: int = 20,
    query: str | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Analyse an adapter's vectors on test queries of tasks.

    Args:
        atv: the adapter on its LLM.
        tasks: their test queries are analysed; their training queries are the neighbours.
        elicit: a library on the same LLM, whose entries are shown for comparison.
        rows: number of test rows per task, the first ones of the split, which must not be sorted by answer.
        query: the query to show layer by layer, in the first task's first template. None: its first test row.
        seed: seed of t-SNE and of the training rows drawn if a task has more than `NEIGHBOURS`.

    Returns:
        A record of JSON values; `report.analysis_tables` makes tables of it.

    Raises:
        ATVError: too few queries, scikit-learn is missing, or `elicit` does not match.
    """
    if query is not None and not query.strip():
        raise ATVError("The query is empty; expected some text.")
    require_sklearn()
    drawn = [task.drawn(NEIGHBOURS, 1, seed).first_test_rows(rows) for task in tasks]
    asked = [(task, example) for task in drawn for example in task.test]
    if len(asked) < LEAST:
        raise ATVError(
            f"Found {len(asked)} test queries in {', '.join(task.name for task in tasks) or 'no task'}; expected at "
            f"least {LEAST}. Take more rows, or name more tasks."
        )
    entries = None if elicit is None else _entries(elicit, atv, tasks)
    one = Example(query, "") if query is not None else asked[0][1]
    neighbours = [(task, example) for task in drawn for example in task.train]
    prompts = [_prompt(atv, task, example) for task, example in asked]
    texts = [prompt.query for prompt in prompts]
    with bar("analysis", (2 + len(KINDS)) * len(asked) + len(neighbours) + 2) as progress:
        progress.describe("analysis: vectors")
        vectors = _gathered(
            atv, [*texts, _prompt(atv, tasks[0], one).query], progress
        )  # (queries + 1, layers, hidden), the last one's: `one`
        progress.describe("analysis: training queries")
        cosines = _cosines(atv, vectors, [_prompt(atv, *row).query for row in neighbours], progress)
        progress.describe("analysis: residual stream")
        beside = beside_residual(atv, prompts, vectors[:-1], progress)
        progress.describe("analysis: other vectors")
        own = vectors[:-1]
        answers = exchanged(atv, asked, prompts, own, progress)
        gates = [value for start in range(0, len(texts), 32) for value in atv.gate(texts[start : start + 32]).tolist()]
        progress.describe("analysis: map and tokens")
        places = map_of([part.flatten(1) for part in ([own, entries[1]] if entries else [own])], seed)
        record = {
            "llm": base_llm(atv.llm).name_or_path,
            "config": atv.config.to_dict(),
            "layers": atv.config.layer_indices(len(decoder_layers(atv.llm, atv.config.layer_path))),
            "tasks": {task.name: _about(task, atv) for task in drawn},
            "norms": {"vector": _spread(own.norm(dim=-1))} | {name: _spread(part) for name, part in beside.items()},
            "variation": variation(own.flatten(1), [task.name for task, _ in asked]),
            "queries": _queries(asked, neighbours, cosines[:-1], places, answers, gates),
            "explained": places["explained"],
            "elicit": None,
            **_lens(atv, drawn, asked, vectors, one),
        }
        record["query"] |= {"nearest": _nearest(cosines[-1:], neighbours)[0]}
        if elicit is not None and entries is not None:
            names, states = entries
            record["norms"]["elicit"] = _spread(states.norm(dim=-1))
            record["elicit"] = {
                "scale": elicit.config.scale,
                "cosine": float(torch.cosine_similarity(own.mean(0).flatten(), states.mean(0).flatten(), dim=0)),
                "entries": _placed(names, places, len(asked)),
            }
        progress.advance()
    return record


def _prompt(atv: ATVModel, task: Task, example: Example) -> Prompt:
    """An example in the task's first template."""
    return task.training_renderers(atv.reads)[0].prompt(atv.tokenizer, example)


def _about(task: Task, atv: ATVModel) -> dict[str, Any]:
    """A task's description, and whether the adapter was trained on it."""
    trained = task.name in atv.training_summary.get("tasks", {})
    return {"category": task.category, "trained": trained, "test": len(task.test), "train": len(task.train)}


def _gathered(atv: ATVModel, queries: Sequence[str], progress: Bar) -> Tensor:
    parts = list(scaled_vectors(atv, queries, progress))
    order = torch.tensor([index for places, _ in parts for index in places])
    return torch.cat([part for _, part in parts])[order.argsort()]


def _cosines(atv: ATVModel, vectors: Tensor, others: Sequence[str], progress: Bar) -> Tensor:
    """Cosines of vectors with those of other queries, which are not stored: (queries, others)."""
    unit = torch.nn.functional.normalize(vectors.flatten(1).double(), dim=1)  # vectors may agree to four digits
    found = torch.empty(len(unit), len(others), dtype=unit.dtype)
    for places, part in scaled_vectors(atv, others, progress):
        found[:, places] = unit @ torch.nn.functional.normalize(part.flatten(1).double(), dim=1).T
    return found


def _entries(elicit: Elicit, atv: ATVModel, tasks: Sequence[Task]) -> tuple[list[str], Tensor]:
    """The library's entries of these tasks, as added to the LLM: task names and (entries, layers, hidden)."""
    if base_llm(elicit.llm) is not base_llm(atv.llm):
        raise ATVError(
            f"The ELICIT library is on {base_llm(elicit.llm).name_or_path} and the adapter on "
            f"{base_llm(atv.llm).name_or_path}, two models in memory; load both onto the same one."
        )
    wanted = {task.name for task in tasks}
    names = elicit.entry_tasks()
    kept = [place for place, name in enumerate(names) if name in wanted]
    if not kept:
        raise ATVError(
            f"The ELICIT library holds entries of {', '.join(dict.fromkeys(names))}; none of the tasks "
            f"{', '.join(sorted(wanted))} is among them. Name one of them, or leave the library out."
        )
    states = elicit.states.float().cpu()
    layers = atv.config.layer_indices(states.shape[1])
    return [names[place] for place in kept], elicit.config.scale * states[kept][:, layers]


def _spread(values: Tensor) -> dict[str, list[Any]]:
    """Mean and sample standard deviation over queries at each layer; the latter is None for one query."""
    std: list[Any] = values.std(0).tolist() if len(values) > 1 else [None] * values.shape[1]
    return {"mean": values.mean(0).tolist(), "std": std}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _nearest(cosines: Tensor, neighbours: Sequence[tuple[Task, Example]]) -> list[list[dict[str, Any]]]:
    """For each query, the training queries with the nearest vectors."""
    found = []
    for line in nearest(cosines, NAMED):
        named = [(*neighbours[place], cosine) for place, cosine in line]
        found.append(
            [
                {"task": task.name, "query": _short(example.input), "answer": example.output, "cosine": cosine}
                for task, example, cosine in named
            ]
        )
    return found


def _queries(
    asked: Sequence[tuple[Task, Example]],
    neighbours: Sequence[tuple[Task, Example]],
    cosines: Tensor,
    places: dict[str, Any],
    answers: Sequence[dict[str, dict[str, float | None]]],
    gates: Sequence[float],
) -> list[dict[str, Any]]:
    """One row per test query: its place on the map, its neighbours, and the answers with different vectors."""
    found = []
    for number, near in enumerate(_nearest(cosines, neighbours)):
        task, example = asked[number]
        own = [place for place, (other, _) in enumerate(neighbours) if other is task]
        first = max(own, key=lambda place: float(cosines[number, place]))
        shared = {place: shared_words(example.input, neighbours[place][1].input) for place in own}
        found.append(
            {
                "task": task.name,
                "query": _short(example.input),
                "answer": example.output,
                **_place(places, number),
                "nearest": near,
                "same_task_by_chance": len(own) / len(neighbours),
                "same_answer": neighbours[first][1].output == example.output,
                "same_answer_by_chance": sum(neighbours[p][1].output == example.output for p in own) / len(own),
                "shared_words": shared[first],
                "shared_words_by_chance": sum(shared.values()) / len(own),
                "vectors": answers[number],
                "gate": gates[number],
            }
        )
    return found


def shared_words(one: str, other: str) -> float:
    """Number of words in both texts, as a share of those in either."""
    these, others = set(words(one)), set(words(other))
    return len(these & others) / len(these | others) if these | others else 0.0


def _placed(names: Sequence[str], places: dict[str, Any], start: int) -> list[dict[str, Any]]:
    return [{"task": name, **_place(places, start + number)} for number, name in enumerate(names)]


def _place(places: dict[str, Any], number: int) -> dict[str, Any]:
    return {name: places[name][number] for name in ("pca", "tsne")}


def _lens(
    atv: ATVModel, tasks: Sequence[Task], asked: Sequence[tuple[Task, Example]], vectors: Tensor, one: Example
) -> dict[str, Any]:
    """Tokens promoted by each task's mean vector and by one query's vector, and that query layer by layer.

    If the lens cannot be read, `lens` and the query's `layers` are None, and `no_lens` gives the reason.
    """
    prompt = _prompt(atv, tasks[0], one)
    inputs = atv.encode_prompts([prompt])
    query: dict[str, Any] = {"task": tasks[0].name, "query": one.input, "layers": None}
    query["prompt"] = atv.tokenizer.decode(prompt.ids, skip_special_tokens=True)
    try:
        readout = Readout(atv.llm, inputs, atv.config.layer_path)
    except ATVError as error:
        log.warning(str(error))
        return {"lens": None, "no_lens": str(error), "query": query}
    means = {task.name: vectors[:-1][torch.tensor([other is task for other, _ in asked])].mean(0) for task in tasks}
    named = {"of": readout.described(atv.llm)}
    lens = {name: top_tokens(readout.promoted(mean), atv.tokenizer) for name, mean in means.items()}
    query |= {
        "lens": top_tokens(readout.promoted(vectors[-1]), atv.tokenizer),
        "layers": layer_by_layer(atv, readout, prompt.query, inputs),
    }
    return {"lens": named | {"tasks": lens}, "no_lens": None, "query": query}
