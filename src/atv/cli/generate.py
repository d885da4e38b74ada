"""`atv generate`, and the prompts of queries that a user types."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds

from atv import artifact
from atv.cli.loading import frozen_llm
from atv.cli.options import Generate, Inspect
from atv.cli.output import print_lines
from atv.data import TRAIN_PREFIX, composed
from atv.data.collate import pad_id
from atv.errors import ATVError, unknown
from atv.model import ATVModel
from atv.progress import log


def load_adapter(given: Generate | Inspect) -> tuple[ATVModel, str]:
    """The adapter on its LLM, and the template of the queries; a mistake in these is told before the LLM is loaded."""
    for query in given.query:
        if not query.strip():
            raise ATVError("A query is empty; expected some text.")
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder, ATVModel.method if isinstance(given, Inspect) else None)
    template = prompt_template(saved, given.task, given.template)
    llm, tokenizer = frozen_llm(given.llm or saved.base_llm["name"], given.loading).load()
    return ATVModel.from_pretrained(folder, llm, tokenizer=tokenizer), template


def prompt_template(saved: artifact.Saved, task: str | None, template: str | None) -> str:
    """What surrounds a query for the LLM: as given, a trained task's first template, or the bare query."""
    trained: dict[str, list[str]] = saved.training.get("tasks", {})
    if template is not None:
        if "{input}" not in template:
            raise ATVError(f"The template {template!r} has no {{input}}; put {{input}} where the query goes.")
        return template
    if task is not None:
        task = composed(task)
        if task not in trained:
            raise unknown("task", task, trained, "These are the tasks that the adapter was trained on.")
        return trained[task][0]
    if len(trained) == 1:
        return next(iter(trained.values()))[0]
    log.info(f"No --task or --template: the LLM reads the bare query. Trained tasks: {', '.join(trained) or 'none'}.")
    return "{input}"


def prompts_of(queries: Sequence[str], template: str) -> list[str]:
    """What the LLM reads of queries, in a template with {input}."""
    return [f"{template.replace('{input}', query)}\n{TRAIN_PREFIX}" for query in queries]


def read_by_generator(atv: ATVModel, queries: Sequence[str], prompts: Sequence[str]) -> Sequence[str]:
    """What the generator reads: the prompts, or the queries alone, as the adapter's configuration says."""
    return prompts if atv.config.reads == "prompt" else queries


def unsteered(atv: ATVModel, prompts: Sequence[str], **options: Any) -> list[str]:
    """Answers of the frozen LLM alone."""
    inputs = atv.encode_prompts(list(prompts))
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    plain = llm.generate(**inputs, **options, pad_token_id=pad_id(atv.tokenizer))
    return atv.tokenizer.batch_decode(plain[:, width:], skip_special_tokens=True)  # type: ignore[no-any-return]


def answer(given: Generate) -> None:
    """Print the answer to each query; with --compare that of the frozen LLM alone beside it."""
    atv, template = load_adapter(given)
    how: dict[str, Any] = {"max_new_tokens": given.max_new_tokens, "do_sample": given.temperature > 0}
    if given.temperature > 0:
        how["temperature"] = given.temperature
    prompts = prompts_of(given.query, template)
    set_seed(given.seed)
    read = read_by_generator(atv, given.query, prompts)
    steered = [answer.strip() for answer in atv.generate(prompts, read, **how)]
    if not given.compare:
        print_lines(steered)
        return
    plain, gates = unsteered(atv, prompts, **how), atv.gate(read).tolist()
    for query, without, with_vectors, gate in zip(given.query, plain, steered, gates, strict=True):
        lines = [f"query:     {query}", f"unsteered: {without.strip()!r}", f"steered:   {with_vectors!r}"]
        print_lines([*lines, gate_line(gate), ""])


def gate_line(gate: float) -> str:
    """The gate's value, with what it means."""
    return f"gate:      {gate:.2f} (1: with the query's own part, 0: the common vector alone)"
