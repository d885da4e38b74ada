"""`atv generate`, and an adapter with the prompts of the user's queries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed  # transformers' own imports peft, which takes seconds

from atv import artifact
from atv.cli.loading import frozen_llm
from atv.cli.options import Generate, Inspect
from atv.cli.output import print_lines
from atv.data import Example, Prompt, Renderer, query_renderer
from atv.data.collate import pad_id
from atv.errors import ATVError
from atv.lm.ends import decoded, end_ids
from atv.model import ATVModel
from atv.progress import log


def read_adapter(given: Generate | Inspect) -> tuple[Path, artifact.Saved, Renderer]:
    """The adapter's folder and contents, and the renderer of the queries; mistakes are reported here."""
    for query in given.query:
        if not query.strip():
            raise ATVError("A query is empty; expected some text.")
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder, ATVModel.method if isinstance(given, Inspect) else None)
    return folder, saved, query_renderer(saved.training, saved.config.get("reads", "query"), given.task, given.template)


def onto_llm(given: Generate | Inspect, folder: Path, saved: artifact.Saved) -> ATVModel:
    """The adapter on its LLM, which is loaded."""
    llm, tokenizer = frozen_llm(given.llm or saved.base_llm["name"], given.loading).load()
    return ATVModel.from_pretrained(folder, llm, tokenizer=tokenizer)


def unsteered(atv: ATVModel, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """Answers of the frozen LLM alone."""
    inputs = atv.encode_prompts(prompts)
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    ends = end_ids(llm, atv.tokenizer)
    plain = llm.generate(**inputs, **options, pad_token_id=pad_id(atv.tokenizer), eos_token_id=ends)
    return [decoded(atv.tokenizer, ids, skip_special_tokens=True) for ids in plain[:, width:].tolist()]


def room(atv: ATVModel, prompts: Sequence[Prompt], wanted: int) -> int:
    """The most tokens of an answer: those that are wanted, or fewer that the LLM's context leaves the longest prompt.

    Raises:
        ATVError: it leaves none.
    """
    context, longest = atv.context, max(len(prompt.ids) for prompt in prompts)
    if context is None or longest + wanted <= context:
        return wanted
    if longest >= context:
        raise ATVError(
            f"The longest prompt has {longest} tokens and the LLM's context is {context}, which leaves none for an "
            "answer. Shorten the query."
        )
    log.warning(
        f"Answers end after {context - longest} tokens instead of {wanted}: the longest prompt has {longest}, and the "
        f"LLM's context is {context}"
    )
    return context - longest


def answer(given: Generate) -> None:
    """Print the answer to each query; with --compare also that of the frozen LLM alone."""
    folder, saved, render = read_adapter(given)
    atv = onto_llm(given, folder, saved)
    prompts = [render.prompt(atv.tokenizer, Example(query, "")) for query in given.query]
    most = room(atv, prompts, given.max_new_tokens)
    how: dict[str, Any] = {"max_new_tokens": most, "do_sample": given.temperature > 0}
    if given.temperature > 0:
        how["temperature"] = given.temperature
    set_seed(given.seed)
    steered = [answer.strip() for answer in atv.generate(prompts, **how)]
    if not given.compare:
        print_lines(steered)
        return
    plain, gates = unsteered(atv, prompts, **how), atv.gate([p.query for p in prompts]).tolist()
    for query, without, with_vectors, gate in zip(given.query, plain, steered, gates, strict=True):
        lines = [f"query:     {query}", f"unsteered: {without.strip()!r}", f"steered:   {with_vectors!r}"]
        print_lines([*lines, f"gate:      {gate:.2f} (1: with the query's own part, 0: without it)", ""])
