"""The work behind the subcommands; imported when one of them runs, since it loads torch."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed  # that of transformers imports peft, which takes seconds
from torch import nn

from atv import artifact
from atv.batching import encode_prompt, pad_id
from atv.cli.options import EMBEDDED_LLM, parse_layers
from atv.cli.show import output, print_lines
from atv.config import ATVConfig, TrainConfig
from atv.doctor import check_wiring, model_summary
from atv.errors import ATVError, unknown
from atv.evaluation import evaluate, first_answer_token
from atv.generator import Generator
from atv.hooks import input_device
from atv.methods import METHODS
from atv.model import ATVModel
from atv.models import load_context_length, load_llm, load_tokenizer, quiet_transformers
from atv.processes import world_size
from atv.progress import note
from atv.records import RunWriter
from atv.store import PrefixStore
from atv.tasks import (
    TRAIN_PREFIX,
    UNSEEN,
    Task,
    Variant,
    findings,
    load_tasks,
    long_prompts,
    refuse_shared_inputs,
)

quiet_transformers()


def _load_llm(options: Mapping[str, Any], name: str) -> tuple[nn.Module, Any]:
    """The LLM and its tokenizer; asked for again in one process, the same ones."""
    how = ("dtype", "device", "quantization", "revision", "trust_remote_code")
    return _loaded(name, **{key: options[key] for key in how})


@cache
def _loaded(name: str, **how: Any) -> tuple[nn.Module, Any]:
    return load_llm(name, **how), load_tokenizer(name, how["revision"])


def load_embedded() -> tuple[nn.Module, Any]:
    """The embedded LLM and its tokenizer, as every command loads them by default."""
    defaults = {"dtype": "bfloat16", "device": None, "quantization": None, "revision": None, "trust_remote_code": False}
    return _load_llm(defaults, EMBEDDED_LLM)


def _tasks(options: Mapping[str, Any]) -> list[Task]:
    return load_tasks(options["task"], options["data"], options["template"])


def train_adapter(options: Mapping[str, Any]) -> Path:
    """`atv train`: everything that can be checked without a model is checked before one is loaded."""
    from atv.training import train  # the Trainer brings peft and bitsandbytes along: seconds that other commands save

    config = ATVConfig(
        generator=options["generator"],
        pooling=options["pooling"],
        train_generator=not options["freeze_generator"],
        query_template=options["query_template"],
        expansion_rank=options["expansion_rank"],
        layers=parse_layers(options["layers"]),
        positions=options["positions"],
        scale=options["scale"],
    )
    settings = TrainConfig(
        epochs=options["epochs"],
        batch_size=options["batch_size"],
        gradient_accumulation_steps=options["gradient_accumulation_steps"],
        learning_rate=options["lr"],
        generator_learning_rate=options["generator_lr"],
        weight_decay=options["weight_decay"],
        max_grad_norm=options["max_grad_norm"],
        bf16=options["bf16"],
        templates_per_row=options["templates_per_row"],
        seed=options["seed"],
    )
    settings.rows_per_call(world_size())
    tasks = _tasks(options)
    if not options["task"]:
        left_out = [task.name for task in tasks if task.category == UNSEEN]
        tasks = [task for task in tasks if task.category != UNSEEN]
        if left_out:
            note(f"Not trained on, since their category is {UNSEEN}: {', '.join(left_out)} (--task names tasks)")
        if not tasks:
            raise ATVError(f"All tasks are of the category {UNSEEN}, which is not trained on; name them with --task.")
    tasks = [task.limited(train=options["train_rows"], valid=options["valid_rows"]) for task in tasks]
    llm, tokenizer = _load_llm(options, options["llm"])
    set_seed(options["seed"])
    atv = ATVModel(llm, config, tokenizer=tokenizer)
    rows = sum(len(task.train) for task in tasks)
    note(f"{model_summary(atv)}; {rows} training rows of {', '.join(task.name for task in tasks)}")
    store = PrefixStore(_bytes(options, "prefix_memory"), _bytes(options, "prefix_disk"))
    result = train(atv, tasks, options["out"], settings, options["force"], store)
    seconds = result.record.get("seconds")
    print_lines(
        [
            f"Adapter: {result.adapter}" + (f" (trained in {seconds:.0f} s)" if seconds else ""),
            f"Next: atv eval --adapter {result.adapter} --task {tasks[0].name}"
            + (f" --data {options['data']}" if options["data"] else ""),
        ]
    )
    return result.adapter


def _bytes(options: Mapping[str, Any], name: str) -> int | None:
    """An option in GiB as bytes."""
    gib = options[name]
    if gib is not None and not 0 <= gib < float("inf"):
        raise ATVError(f"--{name.replace('_', '-')} is {gib}; expected a number of GiB from 0.")
    return None if gib is None else int(gib * 2**30)


def _variants(name: str) -> list[Variant] | None:
    if name not in ("all", "first"):
        raise unknown("variants", name, ("all", "first"))
    return None if name == "all" else [Variant(0, TRAIN_PREFIX)]


def evaluate_method(options: Mapping[str, Any]) -> Path:
    """`atv eval`: one run; a finished one is shown, an interrupted one goes on."""
    name = options["method"] or ("atv" if options["adapter"] else "zero-shot")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    if name == "atv" and options["adapter"] is None:
        raise ATVError("The method atv needs an adapter; give --adapter DIR, the folder that atv train wrote.")
    shots = METHODS[name].wanted_shots(options["shots"])
    tasks = [task.limited(test=options["test_rows"]) for task in _tasks(options)]
    variants = _variants(options["variants"])
    folder = artifact.locate(options["adapter"]) if options["adapter"] else None
    saved = artifact.read(folder) if folder else None
    llm_name = options["llm"] or (saved.base_llm["name"] if saved else EMBEDDED_LLM)
    settings = {
        "method": name,
        "llm": llm_name,
        "revision": options["revision"],
        "dtype": options["dtype"],
        "quantization": options["quantization"],
        "seed": options["seed"],
        "adapter": artifact.identity(folder) if folder else None,
        "tasks": {task.name: f"{len(task.test)} rows, {task.digest('test')}" for task in tasks},
        "templates": {task.name: list(task.templates) for task in tasks},
        "variants": options["variants"],
    }
    if shots:
        settings |= {"shots": shots, "demonstrations from": {task.name: task.digest("train") for task in tasks}}
    out = options["out"] or Path("runs") / name
    run = RunWriter(out, settings, options["force"])
    if run.finished:
        print_lines([f"{out} holds this run already, finished. Show it with: atv report {out}"])
        return Path(out)
    llm, tokenizer = _load_llm(options, llm_name)
    set_seed(options["seed"])
    method = METHODS[name].load(llm, tokenizer, folder, shots=options["shots"], seed=options["seed"])
    run.describe(method=method.describe(), device=str(input_device(llm)))
    evaluate(method, tasks, run, variants=variants, batch_size=options["batch_size"])
    print_lines([f"Run: {out}", f"Next: atv report {out}"])
    return Path(out)


def prompt_template(saved: artifact.Saved, task: str | None, template: str | None) -> str:
    """What surrounds a query for the LLM: as given, a trained task's first template, or the bare query."""
    trained: dict[str, list[str]] = saved.training.get("tasks", {})
    if template is not None:
        if "{input}" not in template:
            raise ATVError(f"The template {template!r} has no {{input}}; put {{input}} where the query goes.")
        return template
    if task is not None:
        if task not in trained:
            raise unknown("task", task, trained, "These are the tasks that the adapter was trained on.")
        return trained[task][0]
    if len(trained) == 1:
        return next(iter(trained.values()))[0]
    note(f"No --task or --template: the LLM reads the bare query. Trained tasks: {', '.join(trained) or 'none'}.")
    return "{input}"


def answers(atv: ATVModel, queries: list[str], template: str, **options: Any) -> tuple[list[str], list[str]]:
    """Answers to queries without and with steering."""
    prompts = [f"{template.replace('{input}', query)}\n{TRAIN_PREFIX}" for query in queries]
    set_seed(options.pop("seed", 42))
    steered = atv.generate(prompts, queries, **options)
    inputs = atv.encode_prompts(prompts)
    width = inputs.pop("position_ids").shape[1]
    llm: Any = atv.llm
    plain = llm.generate(**inputs, **options, pad_token_id=pad_id(atv.tokenizer))
    return atv.tokenizer.batch_decode(plain[:, width:], skip_special_tokens=True), steered


def answer(options: Mapping[str, Any]) -> None:
    """`atv generate`."""
    queries: list[str] = options["query"]
    for query in queries:
        if not query.strip():
            raise ATVError("A query is empty; expected some text.")
    folder = artifact.locate(options["adapter"])
    saved = artifact.read(folder)
    template = prompt_template(saved, options["task"], options["template"])
    llm, tokenizer = _load_llm(options, options["llm"] or saved.base_llm["name"])
    atv = ATVModel.from_pretrained(llm, folder, tokenizer=tokenizer)
    how: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"], "do_sample": options["temperature"] > 0}
    if options["temperature"] > 0:
        how["temperature"] = options["temperature"]
    plain, steered = answers(atv, queries, template, seed=options["seed"], **how)
    for query, without, given in zip(queries, plain, steered, strict=True):
        if options["compare"]:
            print_lines([f"query:     {query}", f"unsteered: {without.strip()!r}", f"steered:   {given.strip()!r}", ""])
        else:
            print_lines([given.strip()])


def examine(options: Mapping[str, Any]) -> bool:
    """`atv doctor`: print every check; true if all passed."""
    config = ATVConfig(
        generator=options["generator"],
        pooling=options["pooling"],
        layers=parse_layers(options["layers"]),
        layer_path=options["layer_path"],
        positions=options["positions"],
    )
    llm, tokenizer = _load_llm(options, options["llm"])
    set_seed(0)
    atv = ATVModel(llm, config, tokenizer=tokenizer, generator=Generator.load(config))
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
    tasks = _tasks(options)
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
    first_token = None if tokenizer is None else partial(first_answer_token, tokenizer)
    for task in tasks:
        print_lines(findings(task, first_token))
        if limit is not None:
            print_lines(long_prompts(task, lambda prompt: len(encode_prompt(tokenizer, prompt)), limit))
