"""`atv generate`, and prompts for the user's queries."""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import set_seed  # transformers' own imports peft, which takes seconds

from atv import artifact
from atv.cli.loading import frozen_llm
from atv.cli.options import Generate, Inspect
from atv.cli.output import print_lines
from atv.data import ANSWER_PREFIXES, Example, Prompt, Template, composed
from atv.data.collate import pad_id
from atv.data.render import INPUT, query_template, renderer_name
from atv.errors import ATVError, unknown
from atv.model import ATVModel
from atv.progress import log


def load_adapter(given: Generate | Inspect) -> tuple[ATVModel, Template]:
    """The adapter on its LLM and the template of the queries; mistakes are reported before the LLM is loaded."""
    for query in given.query:
        if not query.strip():
            raise ATVError("A query is empty; expected some text.")
    folder = artifact.locate(given.adapter)
    saved = artifact.read(folder, ATVModel.method if isinstance(given, Inspect) else None)
    template = prompt_template(saved, given.task, given.template)
    llm, tokenizer = frozen_llm(given.llm or saved.base_llm["name"], given.loading).load()
    return ATVModel.from_pretrained(folder, llm, tokenizer=tokenizer), template


def prompt_template(saved: artifact.Saved, task: str | None, template: str | None) -> Template:
    """The template of a query: the given one, a trained task's first template, or the bare query.

    In each case with an answer prefix from the adapter's training: that of the task, or of the first task.
    """
    trained: dict[str, dict[str, Any]] = saved.training.get("tasks", {})
    if task is not None and composed(task) not in trained:
        raise unknown("task", composed(task), trained, "These are the tasks that the adapter was trained on.")
    if task is None and template is None and len(trained) != 1:
        names = ", ".join(trained) or "none"
        log.info(f"No --task or --template: the LLM reads the bare query. Trained tasks: {names}.")
        template = INPUT
    asked = next(iter(trained.values()), None) if task is None else trained[composed(task)]
    if asked is not None and asked["renderer"] != renderer_name(Template):
        raise ATVError(
            f"The adapter was trained on prompts rendered by {asked['renderer']}, but this command supports only "
            "templates. Use ATVModel.generate with prompts of that renderer."
        )
    if template is None:
        template = asked["templates"][0] if asked else INPUT
    prefix = asked["answer_prefixes"][0] if asked else ANSWER_PREFIXES[0]
    return Template(template, prefix, query_template(saved.config.get("reads", "query"), template, prefix))


def prompts_of(queries: Sequence[str], template: Template, tokenizer: Any) -> list[Prompt]:
    """The prompts of queries, for the LLM and the generator."""
    return [template.prompt(tokenizer, Example(query, "")) for query in queries]


def unsteered(atv: ATVModel, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """Answers of the frozen LLM alone."""
    inputs = atv.encode_prompts(prompts)
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    plain = llm.generate(**inputs, **options, pad_token_id=pad_id(atv.tokenizer))
    return atv.tokenizer.batch_decode(plain[:, width:], skip_special_tokens=True)  # type: ignore[no-any-return]


def answer(given: Generate) -> None:
    """Print the answer to each query; with --compare also that of the frozen LLM alone."""
    atv, template = load_adapter(given)
    how: dict[str, Any] = {"max_new_tokens": given.max_new_tokens, "do_sample": given.temperature > 0}
    if given.temperature > 0:
        how["temperature"] = given.temperature
    prompts = prompts_of(given.query, template, atv.tokenizer)
    set_seed(given.seed)
    steered = [answer.strip() for answer in atv.generate(prompts, **how)]
    if not given.compare:
        print_lines(steered)
        return
    plain, gates = unsteered(atv, prompts, **how), atv.gate([p.query for p in prompts]).tolist()
    for query, without, with_vectors, gate in zip(given.query, plain, steered, gates, strict=True):
        lines = [f"query:     {query}", f"unsteered: {without.strip()!r}", f"steered:   {with_vectors!r}"]
        print_lines([*lines, gate_line(gate), ""])


def gate_line(gate: float) -> str:
    """The gate's value, with what it means."""
    return f"gate:      {gate:.2f} (1: with the query's own part, 0: the common vector alone)"
