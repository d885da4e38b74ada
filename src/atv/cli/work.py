"""The work behind the subcommands; imported when one of them runs, since it loads torch."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds

from atv import artifact
from atv.cli.output import output, print_lines
from atv.config import EMBEDDED_LLM, ATVConfig
from atv.data import TRAIN_PREFIX, UNSEEN, Task, composed, findings, load_tasks, long_prompts, refuse_shared_inputs
from atv.data.collate import encode_prompt, pad_id
from atv.doctor import check_wiring, model_summary
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen, measure
from atv.lm.load import load_context_length, load_tokenizer, quiet_transformers
from atv.lm.prefix_store import PrefixStore
from atv.lm.scoring import option_ids
from atv.methods import METHODS
from atv.methods.settings import method_settings
from atv.model import ATVModel
from atv.processes import world_size
from atv.progress import log

quiet_transformers()


def frozen(options: Mapping[str, Any], llm: str | None = None) -> Frozen:
    """The LLM that the options of a command name."""
    how = ("dtype", "device", "quantization", "revision", "trust_remote_code")
    return Frozen(llm or options["llm"], **{key: options[key] for key in how})


def named_tasks(options: Mapping[str, Any]) -> list[Task]:
    """The tasks that the options of a command name."""
    return load_tasks(options["task"], options["data"], options["template"])


def train_adapter(options: Mapping[str, Any], given: Mapping[str, Any], store: PrefixStore | None = None) -> Path:
    """`atv train`: everything that can be checked without a model is checked before one is loaded.

    Args:
        options: of the command.
        given: what was said of the method and its training.
        store: of prompts that were read already; by default a new one, as large as the options say.
    """
    name: str = options["method"]
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    settings = method_settings(name, [{name: given}], options["seed"])
    settings.train.rows_per_call(world_size())
    tasks = named_tasks(options)
    if not options["task"]:
        left_out = [task.name for task in tasks if task.category == UNSEEN]
        tasks = [task for task in tasks if task.category != UNSEEN]
        if left_out:
            log.info(f"Not trained on, since their category is {UNSEEN}: {', '.join(left_out)} (--task names tasks)")
        if not tasks:
            raise ATVError(f"All tasks are of the category {UNSEEN}, which is not trained on; name them with --task.")
    tasks = [task.drawn(options["train_rows"], options["valid_rows"], options["seed"]) for task in tasks]
    llm, tokenizer = frozen(options).load()
    rows = sum(len(task.train) for task in tasks)
    log.info(f"{name}: {rows} training rows of {', '.join(task.name for task in tasks)}")
    store = store or PrefixStore(_bytes(options, "prefix_memory"), _bytes(options, "prefix_disk"))
    adapter = METHODS[name].fit(llm, tokenizer, tasks, options["out"], *settings, force=options["force"], store=store)
    data = f" --data {options['data']}" if options["data"] else ""
    print_lines([f"Adapter: {adapter}", f"Next: atv eval --adapter {adapter} --task {tasks[0].name}{data}"])
    return adapter


def _bytes(options: Mapping[str, Any], name: str) -> int | None:
    """An option in GiB as bytes."""
    gib = options[name]
    if gib is not None and not 0 <= gib < float("inf"):
        raise ATVError(f"--{name.replace('_', '-')} is {gib}; expected a number of GiB from 0.")
    return None if gib is None else int(gib * 2**30)


def evaluate_method(options: Mapping[str, Any]) -> Path:
    """`atv eval`: one run; a finished one is shown, an interrupted one is resumed."""
    adapter = options["adapter"]
    saved = artifact.read(artifact.locate(adapter)) if adapter else None
    name = options["method"] or (saved.method if saved else "zero-shot")
    out = Path(options["out"] or Path("runs") / name)
    rows, seed = (options["train_rows"], options["test_rows"]), options["seed"]
    tasks = [task.drawn(rows[0], None, seed, test=rows[1]) for task in named_tasks(options)]
    for task in tasks:
        task.variants(options["variants"])  # refused before the LLM is loaded
    llm = frozen(options, options["llm"] or (saved.base_llm["name"] if saved else EMBEDDED_LLM))
    how = {key: options[key] for key in ("adapter", "shots", "seed", "variants", "batch_size", "force")}
    if measure(name, llm, tasks, out, **how):
        print_lines([f"Run: {out}", f"Next: atv report {out}"])
    else:
        print_lines([f"{out} holds this run already, finished. Show it with: atv report {out}"])
    return out


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


def unsteered(atv: ATVModel, prompts: Sequence[str], **options: Any) -> list[str]:
    """Answers of the frozen LLM alone."""
    inputs = atv.encode_prompts(list(prompts))
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    plain = llm.generate(**inputs, **options, pad_token_id=pad_id(atv.tokenizer))
    return atv.tokenizer.batch_decode(plain[:, width:], skip_special_tokens=True)  # type: ignore[no-any-return]


def answer(options: Mapping[str, Any]) -> None:
    """`atv generate`."""
    queries: list[str] = options["query"]
    for query in queries:
        if not query.strip():
            raise ATVError("A query is empty; expected some text.")
    folder = artifact.locate(options["adapter"])
    saved = artifact.read(folder)
    template = prompt_template(saved, options["task"], options["template"])
    llm, tokenizer = frozen(options, options["llm"] or saved.base_llm["name"]).load()
    atv = ATVModel.from_pretrained(folder, llm, tokenizer=tokenizer)
    how: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"], "do_sample": options["temperature"] > 0}
    if options["temperature"] > 0:
        how["temperature"] = options["temperature"]
    prompts = prompts_of(queries, template)
    set_seed(options["seed"])
    read = prompts if atv.config.reads == "prompt" else queries
    steered = [answer.strip() for answer in atv.generate(prompts, read, **how)]
    if not options["compare"]:
        print_lines(steered)
        return
    for query, without, given, gate in zip(
        queries, unsteered(atv, prompts, **how), steered, atv.gate(read).tolist(), strict=True
    ):
        lines = [f"query:     {query}", f"unsteered: {without.strip()!r}", f"steered:   {given!r}"]
        print_lines([*lines, f"gate:      {gate:.2f} (1: with the query's own part, 0: the common vector alone)", ""])


def examine(options: Mapping[str, Any]) -> bool:
    """`atv doctor`: print every check; true if all passed."""
    config = ATVConfig(
        generator=options["generator"],
        pooling=options["pooling"],
        layers=options["layers"],
        layer_path=options["layer_path"],
        positions=options["positions"],
    )
    llm, tokenizer = frozen(options).load()
    set_seed(0)
    atv = ATVModel(llm, config, tokenizer=tokenizer)
    print_lines([model_summary(atv)])
    checks = check_wiring(atv)
    for check in checks:
        mark = "[green]ok    [/green]" if check.passed else "[red]FAILED[/red]"
        output.print(f"{mark} {check.name}  [dim]({check.found})[/dim]", highlight=False, soft_wrap=True)
    failed = [check.name for check in checks if not check.passed]
    print_lines([f"{len(failed)} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks passed."])
    return not failed


def list_tasks(options: Mapping[str, Any]) -> None:
    """`atv tasks`."""
    from rich.table import Table

    if options["llm"] is not None and not options["audit"]:
        raise ATVError("--llm is what --audit looks at; expected both. Add --audit, or leave --llm out.")
    tasks = named_tasks(options)
    grid = Table()
    for column in ("task", "category", "train", "valid", "test", "majority", "options"):
        grid.add_column(column, justify="left" if column in ("task", "category", "options") else "right")
    for task in tasks:
        shown = ", ".join(task.options[:6]) + (" ..." if len(task.options) > 6 else "")
        sizes = (str(len(task.train)), str(len(task.valid)), str(len(task.test)))
        grid.add_row(task.name, task.category, *sizes, f"{100 * task.majority():.1f}%", shown)
    output.print(grid)
    if options["audit"]:
        _audit(tasks, options["llm"])


def _audit(tasks: list[Task], llm: str | None) -> None:
    """`atv tasks --audit`: refuse what evaluation refuses, print what it finds; an LLM's weights are not loaded."""
    refuse_shared_inputs(tasks)
    tokenizer = None if llm is None else load_tokenizer(llm)
    limit = None if llm is None else load_context_length(llm)
    for task in tasks:
        print_lines(findings(task, None if tokenizer is None else partial(option_ids, tokenizer, task)))
        if limit is not None:
            print_lines(long_prompts(task, lambda prompt: len(encode_prompt(tokenizer, prompt)), limit))
