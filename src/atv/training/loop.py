"""Training with transformers' Trainer, a wiring test before the first step, and an adapter saved at the end."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from atv.config import TrainConfig
from atv.data import Task, unread_queries
from atv.data.collate import EncodedRow
from atv.data.render import TooLong
from atv.doctor import require_wiring
from atv.errors import ATVError
from atv.files import local
from atv.generator import Generator
from atv.lm.adapter_model import AdapterModel
from atv.lm.attention import grouped
from atv.lm.hooks import input_device
from atv.lm.prefix_store import PrefixStore
from atv.lm.quiet import quiet_libraries
from atv.lm.scoring import note_shared, training_options
from atv.model import ATVModel
from atv.processes import barrier, is_main, local_rank, rank, world_size
from atv.progress import bar, log, log_once
from atv.provenance import provenance
from atv.training.batches import Rows, balanced_weights, note_imbalance, training_rows
from atv.training.calibration import answer_facts
from atv.training.record import LOGS, TrainResult, begin, clear, former_record, training_settings
from atv.training.saving import after_non_finite, finish, last_complete
from atv.training.trainer import (
    ATVTrainer,
    NonFiniteLoss,
    Progress,
    ValidationScore,
    make_trainer,
    require_tracker,
)

with quiet_libraries():
    from transformers import TrainerCallback, TrainerState, set_seed
    from transformers.trainer import TRAINER_STATE_NAME

LONG_ANSWERS = 8
"""From this mean number of answer tokens on, steering the prompt alone is noted."""
ENOUGH_TO_CHOOSE = 100
"""With fewer validation rows than this, differences between epochs are mostly chance."""


def train(
    model: AdapterModel,
    tasks: Sequence[Task],
    out: str | Path,
    config: TrainConfig | None = None,
    force: bool = False,
    store: PrefixStore | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metric: ValidationScore | None = None,
) -> TrainResult:
    """Train an ATV or another method on the training splits of tasks and keep the epoch with the best validation score.

    Writes `out/adapter` (the adapter), `out/train.json` (settings and history) and, while it runs, `out/checkpoints`
    and, if main memory is too small, `out/prefixes`. Called again with the same arguments after an interruption, it
    resumes from the last complete epoch and ends with the same weights, bit for bit on a CPU if the store caches every
    prompt. Called again after the end, it is a no-op. If a launcher has started several processes, all of them call
    it and share each batch.

    In the end `model` has the weights of `out/adapter`, read back from there, and is in eval mode.

    Args:
        model: created under `set_seed(config.seed)` for a reproducible result.
        tasks: tasks that are trained on together, shuffled.
        out: folder of this training.
        config: by default `TrainConfig()`.
        force: start over, even if `out` contains a training.
        store: an empty store for the prompts' keys and values; by default one with the default budgets.
        callbacks: transformers' callbacks, called after those of this training. They see `eval_loss`, `eval_accuracy`
            and `eval_choice`, whose maximum selects the epoch. They are no part of what a resumed training must share.
        metric: selects the epoch instead of `config.best_epoch`: a function of the model, in eval mode, whose maximum
            is the best epoch (ties: the lowest validation loss), such as `ValidationMetric(tasks, "rouge_l")`. Its
            `name` is recorded, its values are in the history as `eval_metric`. For one process.

    Raises:
        ATVError: `out` contains another training; several processes are given a metric; the package of
            `config.report_to` is missing; all rows of a task are too long; a batch cannot be split among the processes;
            the wiring self-test failed; a part of the model differs from what the configuration builds, so that it
            cannot be saved; or the training or validation loss became NaN or infinite: then `out/adapter` contains the
            best epoch before that, if there was one.
    """
    began = time.perf_counter()
    config, out = config or TrainConfig(), local(out)
    model.settle(tasks)
    _require_possible(model, config, metric)
    device = input_device(model.llm)
    settings = training_settings(model.llm, tasks, model.describe(), config.learned_with())
    if metric is not None:
        settings["metric"] = getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__))
    record = former_record(out, settings, force)
    if record is not None and record["finished"]:
        log.info(f"{out} holds this training already, finished; nothing to do (--force starts over).")
        model.load_weights(out / "adapter")
        model.eval()
        return TrainResult(out / "adapter", record)
    data = {task.name: dict(task.prepared) for task in tasks}
    rows = Rows(_encoded(model, tasks, "train", data, config.class_weights == "balanced"), config.templates_per_row)
    epochs = config.epochs_of(len(rows), model.read_per_task * len(tasks))
    note_shared(model.tokenizer, tasks)
    _note_unread(model, tasks)
    if config.class_weights == "none":
        for task in tasks:
            note_imbalance(task)
    valid = Rows(_encoded(model, tasks, "valid", data), config.templates_per_row)
    if len(valid) < ENOUGH_TO_CHOOSE:
        error = 50 / math.sqrt(len(valid))
        log.warning(
            f"{len(valid)} validation rows: accuracy on them has a standard error of about {error:.0f} points, "
            "too much to tell most epochs apart. Use more of them for a better choice."
        )
    _require_as_many_prompts(rows)
    _note_unsteered_answers(model, rows.rows)
    _require_gradient(model, rows[0])
    barrier()  # nothing is written before every process has passed all checks
    if record is None:
        record = {"finished": False, "settings": settings, "data": data} | provenance()
        if is_main():
            clear(out)
            shutil.rmtree(out / LOGS, ignore_errors=True)
            begin(out, record)
    barrier()  # other processes write nothing before old files have been removed
    set_seed(config.seed)
    store = store or PrefixStore()
    # A store that is shared may have read them for another training: each training counts its own prompts.
    began -= _fill(store, model, [*rows.of_epochs(epochs), *valid.of_epochs(1)], out / "prefixes" / str(rank()))
    checkpoints = out / "checkpoints"
    steps = epochs * math.ceil(len(rows) / config.batch_size)
    # Torch's fused attention has a slow backward pass on a CPU: LoRA's whole step takes 1.4 times as long with it. If
    # prefixes are stored, reading them again must give what was stored, so only the steered part uses the other one.
    attention = grouped() if device.type == "cpu" and model.dependent_tokens is None else nullcontext()
    both = [*rows.rows, *valid.rows]
    with model.in_training(config, store.read, both), bar("train", steps) as progress, attention:
        model.calibrate(rows.rows)
        said = Progress(model, rows, progress, epochs, config, began)
        trainer = make_trainer(model, rows, valid, config, epochs, checkpoints, [said, *callbacks], metric)
        broken = _run(trainer, said, checkpoints)
        if trainer.state.best_model_checkpoint is not None:
            model.eval()
            model.set_gate(rows.rows, valid.rows)
            found = answer_facts(model, tasks, rows.rows, valid.rows)
    if broken is not None:
        message = after_non_finite(trainer, model, record, out, str(broken))
        shutil.rmtree(out / "prefixes" / str(rank()), ignore_errors=True)
        barrier()  # a process that fails first must not end the one that writes
        raise ATVError(message)
    finish(trainer, model, record, out, found, said.seconds)
    return TrainResult(out / "adapter", record)


def _require_possible(model: AdapterModel, config: TrainConfig, metric: ValidationScore | None) -> None:
    """Raise ATVError if the model cannot be trained so, by what can be checked without reading a row."""
    config.rows_per_call(world_size())
    if metric is not None and world_size() > 1:
        raise ATVError(f"metric selects the epoch in one process only; found {world_size()} of them. Leave it out.")
    model.require_savable()
    device = input_device(model.llm)
    if device.type == "cuda" and (device.index or 0) != local_rank():
        raise ATVError(
            f"The LLM is on {device}; training expects this process's GPU, cuda:{local_rank()}. Select the GPU with "
            "CUDA_VISIBLE_DEVICES instead."
        )
    require_tracker(config.report_to)


def _run(trainer: ATVTrainer, said: Progress, checkpoints: Path) -> NonFiniteLoss | None:
    """Train, resuming from the last complete checkpoint if any; the model then has its best epoch, if any.

    Returns:
        What stopped it; None if all losses were finite.
    """
    last = last_complete(checkpoints)
    if last is not None:
        log.info(f"Resuming from {last}")
        state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        if said.worse_epochs(state.log_history):  # it had stopped, which the Trainer forgets: no epoch is left
            trainer.args.num_train_epochs = round(state.epoch)
    if rank() > 0:
        torch.manual_seed(trainer.train_config.seed + rank())  # different dropout in each process
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except NonFiniteLoss as broken:
        if trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        return broken
    except Exception as error:
        tracker = trainer.train_config.report_to
        if type(error).__module__.partition(".")[0] != tracker:
            raise
        raise ATVError(
            f"The tracker {tracker} failed: {error} Training resumes without --report-to {tracker}."
        ) from error
    return None


def _require_as_many_prompts(rows: Rows) -> None:
    """Raise ATVError if a step would read more prompts of one task's rows than of another's: a batch has one shape."""
    templates = {row.task: len(row.pairs) for row in rows.rows}
    least, most = min(templates.values()), rows.templates_per_row
    if most is not None and len({min(most, count) for count in templates.values()}) > 1:
        said = ", ".join(f"{task}: {count}" for task, count in templates.items())
        raise ATVError(
            f"templates_per_row is {most}, and tasks that are trained together have fewer templates ({said}); expected "
            f"as many prompts for every row of a step. Set templates_per_row to {least}, or give every task {most}."
        )


def _require_gradient(model: AdapterModel, row: EncodedRow) -> None:
    """Raise ATVError if training would change nothing, which a new library version can cause silently."""
    if isinstance(model, ATVModel):
        log.info("Wiring self-test")
        return require_wiring(model)
    batch = {name: value.to(input_device(model.llm)) for name, value in model.collator()([row]).items()}
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(**batch).loss, learned, allow_unused=True) if learned else ()
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise ATVError("No gradient reaches the trained parameters: the method does not work with this LLM.")
    return None


def _encoded(
    model: AdapterModel, tasks: Sequence[Task], split: str, data: dict[str, dict[str, Any]], balanced: bool = False
) -> list[EncodedRow]:
    """A split's rows, and what became of too long ones in `data`; `balanced`: with weights by their answers' counts."""
    weights = {task.name: balanced_weights([row.output for row in getattr(task, split)]) for task in tasks}
    judged = {task.name: training_options(model.tokenizer, task).judged for task in tasks if task.chooses}
    rows = [row for task in tasks for row in training_rows(task, split, model.reads)]
    taught = {task.name: task.taught for task in tasks}
    encoded, skipped, cut = list[EncodedRow](), Counter[str](), Counter[str]()
    with bar(f"tokenise {split}", len(rows)) if len(rows) >= 2000 else nullcontext() as progress:
        for row in rows:
            answer = row.example.output
            try:
                made = model.encode_row(row)
            except TooLong:
                skipped[row.task] += 1
                continue
            cut[row.task] += made.cut
            right = judged[row.task][answer] if row.task in judged else len(made.pairs[0][1])
            made = replace(made, judged=right, weight=weights[row.task][answer] if balanced else 1.0)
            lesson = taught[row.task].get(row.example)
            if lesson is not None and balanced:
                raise ATVError("class_weights is 'balanced', and a teacher's answers have no classes; expected none.")
            if lesson is not None:
                made = replace(made, pairs=[(prompt, lesson.ids) for prompt, _ in made.pairs], taught=lesson)
            encoded.append(made)
            if progress is not None:
                progress.advance()
    for name, record in data.items():
        found = {"cut": cut[name], "left_out": skipped[name]}
        record |= {split: {what: count for what, count in found.items() if count}}
    _note_long(split, skipped.total(), cut.total(), len(rows))
    for task in tasks:  # each one's rows are needed: to learn it, to choose the epoch and to set its gate
        if skipped[task.name] == len(getattr(task, split)):
            raise ATVError(
                f"All {skipped[task.name]} {split} rows are too long for the LLM's context in the task {task.name}; "
                "shorten their answers, or leave the task out."
            )
    return encoded


def _note_long(split: str, skipped: int, cut: int, rows: int) -> None:
    """Log how many rows do not fit the LLM's context."""
    if cut:
        log.warning(f"{split}: the queries of {cut} of {rows} rows are cut at their end to fit the LLM's context.")
    if skipped:
        log.warning(f"{split}: {skipped} of {rows} rows are left out: their answers do not fit the LLM's context.")


def _note_unsteered_answers(model: AdapterModel, rows: Sequence[EncodedRow]) -> None:
    """Log a warning if answers are long and only the prompt is steered, whose effect fades along the answer."""
    tokens = fmean(len(row.pairs[0][1]) for row in rows)
    if isinstance(model, ATVModel) and not model.positions.answer and tokens >= LONG_ANSWERS:
        log.warning(
            f"Answers have {tokens:.0f} tokens on average, and positions = {model.config.positions!r} steers only the "
            "prompt. Long answers are learned better with --positions answer."
        )


def _note_unread(model: AdapterModel, tasks: Sequence[Task]) -> None:
    """Log once what a model's generator, if it has one of its own, cannot read of the queries."""
    generator = getattr(model, "generator", None)
    if isinstance(generator, Generator) and generator.tokenizer not in (None, model.tokenizer):
        for task in tasks:
            for line in unread_queries(task, generator.tokenizer, ("train", "valid")):
                log_once(line)


def _fill(store: PrefixStore, model: AdapterModel, rows: Sequence[EncodedRow], folder: Path) -> float:
    """Fill the store with every prompt up to its first edited token.

    Returns:
        The seconds that reading took before, for those prompts that the store had already.
    """
    if model.dependent_tokens is None:
        return 0.0
    prefixes = {tuple(prompt[: -model.dependent_tokens]) for row in rows for prompt, _ in row.pairs} - {()}
    before, saved = store.tokens_read, store.seconds_of(prefixes)
    with bar("read prompts", len(prefixes)) as progress:
        store.fill(model.llm, prefixes, progress.advance, folder)
    read, tokens = store.tokens_read - before, sum(map(len, prefixes))
    log.info(f"Read {read:,} tokens for prompts that have {tokens:,}: beginnings that they share are read once")
    kept = f"Kept {store.memory_used / 2**20:.0f} MiB of prompt prefixes in memory"
    kept += f" and {store.disk_used / 2**20:.0f} MiB in {folder}" if store.disk_used else ""
    log.info(kept + (f"; {store.left_out} of {len(prefixes)} are read again each time" if store.left_out else ""))
    return saved
