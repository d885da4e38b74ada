"""Training: transformers' Trainer with the paper's optimiser, a wiring test before it and a whole adapter after it."""

import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from atv.batching import EncodedRow, Row
from atv.config import TrainConfig
from atv.doctor import require_wiring
from atv.errors import ATVError
from atv.files import occupied, read_json, same_settings, write_json
from atv.hooks import quantization
from atv.model import ATVModel
from atv.prefix import PrefixStore, read_prefix
from atv.progress import Bar, bar, note
from atv.records import provenance
from atv.tasks import TRAIN_PREFIX, Task, Variant

RECORD_FILE = "train.json"
COMPLETE = "complete"
"""Empty file in a checkpoint folder whose writing has ended."""


class Rows(Dataset[EncodedRow]):
    """Encoded training rows; with fewer templates per row than there are, each epoch takes the next ones in turn."""

    def __init__(self, rows: Sequence[EncodedRow], templates_per_row: int | None = None) -> None:
        self.rows = rows
        self.templates_per_row = templates_per_row
        self.epoch = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> EncodedRow:
        """The row with the prompts that are its turn in this epoch."""
        row = self.rows[index]
        count = len(row.pairs)
        if self.templates_per_row is None or self.templates_per_row >= count:
            return row
        first = index + self.epoch * self.templates_per_row
        return EncodedRow(row.query, [row.pairs[(first + step) % count] for step in range(self.templates_per_row)])


def training_rows(task: Task, split: str = "train") -> list[Row]:
    """A task's rows with every template and the one answer prefix of training."""
    variants = [Variant(template, TRAIN_PREFIX) for template in range(len(task.templates))]
    return [
        Row(example.input, tuple(task.prompt(example.input, variant) for variant in variants), example.output)
        for example in getattr(task, split)
    ]


class Batches(Sampler[int]):
    """A new shuffle each epoch, in which rows of about the same length stand together so that little is padded.

    Sixteen batches of shuffled rows at a time are put in order of length and their batches shuffled again: padding
    falls by about a third while a batch still mixes the tasks.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        self.lengths = [max(len(prompt) for prompt, _ in row.pairs) for row in rows.rows]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader, after a resume too: the order depends on seed and epoch alone."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Row numbers in this epoch's order; the batch that is not full comes last."""
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = rng.sample(range(len(self)), len(self))
        size, block = self.batch_size, 16 * self.batch_size
        batches = []
        for start in range(0, len(order), block):
            alike = sorted(order[start : start + block], key=lambda row: self.lengths[row])
            batches += [alike[first : first + size] for first in range(0, len(alike), size)]
        rng.shuffle(batches)
        batches.sort(key=lambda batch: len(batch) < size)
        return chain.from_iterable(batches)


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; nothing was updated from it."""


class ATVTrainer(Trainer):
    """Trainer with coupled-decay Adam in two learning rates, that stops before a non-finite loss does damage.

    Its checkpoints hold generator and expansion alone, since the LLM is not a submodule of `ATVModel`.
    """

    def __init__(self, *args: Any, train_config: TrainConfig, **kwargs: Any) -> None:
        self.train_config = train_config
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adam with L2 in the gradient (the paper's; AdamW decouples it), one group per part of the ATV."""
        del model
        if self.optimizer is None:
            atv, config = cast(ATVModel, self.model), self.train_config
            rates = {atv.expansion: config.learning_rate, atv.generator: config.generator_learning_rate}
            self.optimizer = torch.optim.Adam(
                [
                    {
                        "params": [p for p in part.parameters() if p.requires_grad],
                        "lr": config.learning_rate if rate is None else rate,
                    }
                    for part, rate in rates.items()
                ],
                weight_decay=config.weight_decay,
                fused=True,  # one pass over memory instead of one per term: several times faster on a CPU
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return Batches(
            train_dataset or cast(Rows, self.train_dataset), self.train_config.batch_size, self.train_config.seed
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; NonFiniteLoss before it can reach a weight."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and not math.isfinite(loss.item()):
            raise NonFiniteLoss
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights as safetensors and nothing else: the Trainer's own version also pickles its arguments."""
        from safetensors.torch import save_file

        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in (state_dict or cast(ATVModel, self.model).state_dict()).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class _Progress(TrainerCallback):
    """Turns the rows' templates, draws the bar, marks complete checkpoints."""

    def __init__(self, rows: Rows, progress: Bar, epochs: int) -> None:
        self.rows, self.progress, self.epochs = rows, progress, epochs
        self.accuracy: float | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.rows.epoch = round(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.progress.reach(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        del args, control
        metrics = about["metrics"]
        accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
        self.progress.describe(f"train: epoch {round(state.epoch)}, valid {accuracy:.2f}")
        note(f"epoch {round(state.epoch)} of {self.epochs}: valid loss {loss:.4f}, accuracy {accuracy:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del control
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind."""

    adapter: Path
    """Folder of the adapter."""
    record: dict[str, Any]
    """What `train.json` holds: settings, history, seconds, versions."""


def train(
    atv: ATVModel, tasks: Sequence[Task], out: str | Path, config: TrainConfig | None = None, force: bool = False
) -> TrainResult:
    """Train an ATV on the training splits of tasks, validate each epoch, keep the best epoch.

    Writes `out/adapter` (the adapter), `out/train.json` (settings and history) and, until it is done,
    `out/checkpoints`. Called again with the same arguments after an interruption it goes on from the last complete
    epoch and ends with the same weights, bit for bit on a CPU; called again after the end it trains nothing.

    Args:
        atv: made under `set_seed(config.seed)` if the result is to be repeatable.
        tasks: trained on together, shuffled.
        out: folder of this training.
        config: the default is the paper's.
        force: begin anew, even if `out` holds a training.

    Raises:
        ATVError: `out` holds another training; a prompt is too long; the wiring self-test failed; or the loss became
            NaN or infinite: then `out/adapter` holds the best epoch before it, if there was one.
    """
    config, out = config or TrainConfig(), Path(out)
    settings = _settings(atv, tasks, config)
    record = _former(out, settings, force)
    if record is not None and record["finished"]:
        note(f"{out} holds this training already, finished; nothing to do (train it anew with --force).")
        return TrainResult(out / "adapter", record)
    rows = Rows(_encoded(atv, tasks, "train"), config.templates_per_row)
    valid = Rows(_encoded(atv, tasks, "valid"), config.templates_per_row)
    note("Wiring self-test")
    require_wiring(atv)
    if record is None:  # nothing is written before everything that can be checked has been
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        record = {"finished": False, "settings": settings} | provenance()
        write_json(out / RECORD_FILE, record)
    set_seed(config.seed)
    atv.read_prefix = _filled_store(atv, [*rows.rows, *(valid[index] for index in range(len(valid)))]).read
    checkpoints = out / "checkpoints"
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    with bar("train", steps) as progress:
        trainer = _trainer(atv, rows, valid, config, checkpoints, _Progress(rows, progress, config.epochs))
        last = _last_complete(checkpoints)
        if last is not None:
            note(f"Going on from {last}")
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except NonFiniteLoss:
            raise ATVError(_after_non_finite(trainer, atv, record, out)) from None
        finally:
            atv.read_prefix = read_prefix
    _finish(trainer, atv, record, out)
    return TrainResult(out / "adapter", record)


def _settings(atv: ATVModel, tasks: Sequence[Task], config: TrainConfig) -> dict[str, Any]:
    """What decides the weights: everything that a resumed training must share with the interrupted one."""
    described = {
        task.name: {
            "train": len(task.train),
            "valid": len(task.valid),
            "templates": list(task.templates),
            "digest": task.digest("train", "valid"),
        }
        for task in tasks
    }
    return {
        "llm": cast(Any, atv.llm).name_or_path,
        "dtype": str(next(atv.llm.parameters()).dtype),
        "quantization": quantization(atv.llm),
        "config": atv.config.to_dict(),
        "train": config.to_dict(),
        "tasks": described,
    }


def _former(out: Path, settings: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The record of the training that `out` holds, if it is to be gone on with; its settings must be the same."""
    file = out / RECORD_FILE
    if file.exists() and not force:
        record: dict[str, Any] = read_json(file, "the record of a training")
        same_settings(record.get("settings", {}), settings, out)
        return record
    if occupied(out) and not file.exists():
        raise ATVError(f"{out} exists and is not a training; choose a new folder, so that nothing there is lost.")
    return None


def _encoded(atv: ATVModel, tasks: Sequence[Task], split: str) -> list[EncodedRow]:
    rows = [row for task in tasks for row in training_rows(task, split)]
    if len(rows) < 2000:
        return [atv.encode_row(row) for row in rows]
    encoded = []
    with bar(f"tokenise {split}", len(rows)) as progress:
        for row in rows:
            encoded.append(atv.encode_row(row))
            progress.advance()
    return encoded


def _filled_store(atv: ATVModel, rows: Sequence[EncodedRow]) -> PrefixStore:
    """Keys and values of every prompt up to its first edited token."""
    store, edited = PrefixStore(), atv.positions.prompt_tokens
    if edited is not None:
        prefixes = {tuple(prompt[:-edited]) for row in rows for prompt, _ in row.pairs} - {()}
        with bar("read prompts", len(prefixes)) as progress:
            store.fill(atv.llm, prefixes, progress.advance)
        note(f"Kept {store.used / 2**20:.0f} MiB of prompt prefixes" + (", as many as fit" if store.full else ""))
    return store


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(prediction.predictions.mean())}


def _trainer(
    atv: ATVModel, rows: Rows, valid: Rows, config: TrainConfig, checkpoints: Path, progress: _Progress
) -> ATVTrainer:
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_grad_norm or 0.0,
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,  # and the best one
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=next(atv.parameters()).device.type == "cpu",
    )
    trainer = ATVTrainer(
        model=atv,
        args=arguments,
        data_collator=atv.collator(),
        train_dataset=rows,
        eval_dataset=valid,
        compute_metrics=_accuracy,
        callbacks=[progress],
        train_config=config,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_complete(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a half-written one is removed."""
    complete = []
    for folder in checkpoints.glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            complete.append(folder)
        else:
            shutil.rmtree(folder)
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _save(trainer: ATVTrainer, atv: ATVModel, record: dict[str, Any], out: Path) -> None:
    state = trainer.state
    history = [entry for entry in state.log_history if "eval_loss" in entry or "loss" in entry]
    best = Path(state.best_model_checkpoint).name.split("-")[1] if state.best_model_checkpoint else None
    record |= {"history": history, "best_step": int(best) if best else None, "best_eval_loss": state.best_metric}
    settings = record["settings"]
    atv.training_summary = {
        "tasks": {name: task["templates"] for name, task in settings["tasks"].items()},
        "train": settings["train"],
        "best_step": record["best_step"],
        "best_eval_loss": record["best_eval_loss"],
    }
    atv.eval()
    atv.save_pretrained(out / "adapter")


def _finish(trainer: ATVTrainer, atv: ATVModel, record: dict[str, Any], out: Path) -> None:
    _save(trainer, atv, record, out)
    runtime = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    record |= {"finished": True, "seconds": runtime[-1] if runtime else None}
    write_json(out / RECORD_FILE, record)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _after_non_finite(trainer: ATVTrainer, atv: ATVModel, record: dict[str, Any], out: Path) -> str:
    """Keep the best epoch before the loss became NaN, and say what there is."""
    state = trainer.state
    said = f"The loss became NaN or infinite after step {state.global_step} (epoch {state.epoch:.2f})."
    advice = "Try a lower --lr or --scale, or --max-grad-norm 1; then train anew with --force."
    if state.best_model_checkpoint is None:
        return f"{said} No epoch had been completed, so there is no adapter to keep. {advice}"
    trainer._load_best_model()
    _save(trainer, atv, record, out)
    return f"{said} {out / 'adapter'} holds the best epoch before that. {advice}"
