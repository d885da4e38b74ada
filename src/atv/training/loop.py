"""Training with transformers' Trainer, a wiring test before the first step, and an adapter saved at the end."""

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from atv.config import TrainConfig
from atv.data import Task
from atv.data.collate import IGNORED, Collator, EncodedRow
from atv.data.rendering import chat_template_digest
from atv.doctor import require_wiring
from atv.errors import ATVError
from atv.files import follow_umask, local, occupied, read_json, same_settings, write_json
from atv.lm.adapter_model import AdapterModel
from atv.lm.attention import grouped
from atv.lm.hooks import base_llm, input_device, quantization
from atv.lm.prefix_store import PrefixStore
from atv.lm.quiet import quiet_libraries
from atv.lm.scoring import answers_right, note_shared, training_options
from atv.model import ATVModel
from atv.processes import barrier, is_main, local_rank, rank, world_size
from atv.progress import Bar, bar, log
from atv.provenance import provenance
from atv.training.batches import Batches, Rows, training_rows

with quiet_libraries():  # the Trainer imports bitsandbytes
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

RECORD_FILE = "train.json"
JUDGED = "judged"
"""Key in a batch, in addition to the model's inputs: the number of tokens that identify each answer, (batch,)."""
WARM_UP = 0.05
"""Share of the steps in which a linear schedule rises."""
WEIGHTS_FILE = "model.safetensors"
"""Weights of a checkpoint, as the Trainer names them."""
ENOUGH_TO_CHOOSE = 100
"""With fewer validation rows than this, differences between epochs are mostly chance."""
COMPLETE = "complete"
"""Empty file that marks a completely written checkpoint folder."""


def first_step(start: float, steps: int) -> int:
    """Return the first of `steps` steps at which a share of `start` is done."""
    return sum(step / steps < start for step in range(steps))


def make_optimizer(model: AdapterModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW, or the paper's Adam with an L2 penalty in the gradient, for the model's parameter groups."""
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(
        model.parameter_groups(config),
        weight_decay=config.weight_decay,
        fused=True,  # one pass over memory instead of one per term: several times faster on a CPU
    )


class NonFiniteLoss(Exception):
    """The loss became NaN or infinite; no weight was updated with it."""


class ATVTrainer(Trainer):
    """A Trainer with the optimiser and rates of a `TrainConfig`, which stops before a non-finite loss reaches a weight.

    Its checkpoints contain only generator and expansion, since the LLM is not a submodule of `ATVModel`. A batch split
    among processes and accumulation steps gives the loss and gradient of the whole batch, up to rounding.
    """

    def __init__(self, *args: Any, train_config: TrainConfig, **kwargs: Any) -> None:
        self.train_config = train_config
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser of `make_optimizer`."""
        del model
        if self.optimizer is None:
            self.optimizer = make_optimizer(cast(AdapterModel, self.model), self.train_config)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the configured schedule, which begins at each group's start; no later step has a rate of zero."""

        def schedule(start: float) -> Callable[[int], float]:
            first = first_step(start, num_training_steps)
            steps = num_training_steps - first
            rising = math.floor(WARM_UP * steps)

            def share(step: int) -> float:
                done = step - first
                if done < 0 or done == steps:  # before the start or after the last step
                    return 0.0
                if self.train_config.lr_schedule == "constant":
                    return 1.0
                return (done + 1) / (rising + 1) if done < rising else (steps - done) / (steps - rising)

            return share

        if self.lr_scheduler is None:
            trained = optimizer or self.create_optimizer()
            shares = [schedule(group.get("start", 0.0)) for group in trained.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained, shares)
        return cast(torch.optim.lr_scheduler.LRScheduler, self.lr_scheduler)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows, config = train_dataset or cast(Rows, self.train_dataset), self.train_config
        return Batches(rows, config.batch_size, config.seed, fill=self._split)

    @property
    def _split(self) -> bool:
        """Whether a batch is read in several parts, by several processes or one after the other."""
        return bool(self.args.world_size * self.args.gradient_accumulation_steps > 1)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """Return this process's parts of a batch and, as the number of items, the weight of each part's loss.

        The Trainer averages the parts' mean losses, over a process's parts and then over processes. All parts have the
        same number of rows, so this is the batch's mean, except for padding rows: they add 0 but are counted, which
        the weight corrects.
        """
        parts, _ = super().get_batch_samples(*args)
        if not self._split:
            return parts, None
        labelled = torch.cat([(part["labels"] != IGNORED).any(1) for part in parts])
        counts = torch.stack([labelled.new_ones(len(labelled), dtype=torch.long).sum(), labelled.sum()])
        read, real = self.accelerator.reduce(counts.to(self.args.device), "sum").tolist()
        return parts, read / real

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted loss; if it is not finite in one process, raise NonFiniteLoss in all of them."""
        inputs.pop(JUDGED)
        loss, outputs = super().compute_loss(model, inputs, True)
        if num_items_in_batch is not None:
            loss = loss * num_items_in_batch
        if not math.isfinite(self.accelerator.reduce(loss.detach(), "sum").item()):
            raise NonFiniteLoss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
        """Return loss and score of every row, both (rows, prompts), so that their means do not depend on batching."""
        inputs = self._prepare_inputs(inputs)
        judged = inputs.pop(JUDGED)
        with torch.no_grad():
            output = model(**inputs)
        shape = (len(inputs["query_input_ids"]), -1)
        correct = answers_right(output.right, judged.to(output.right.device))
        return None, output.losses.view(shape), correct.view(shape)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save only the weights, as safetensors: the Trainer's own version also pickles its arguments."""
        from safetensors.torch import save_file

        if not self.args.should_save:
            return
        folder = Path(output_dir or cast(str, self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        weights = state_dict or cast(AdapterModel, self.model).state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        follow_umask(folder)


@dataclass
class _JudgedCollator:
    """A model's collator, which also adds the `JUDGED` counts for `ATVTrainer`."""

    collate: Collator

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        return self.collate(rows) | {JUDGED: torch.tensor([row.judged for row in rows for _ in row.pairs])}


class _Progress(TrainerCallback):
    """Rotates the rows' templates, updates the bar, marks complete checkpoints and stops early."""

    def __init__(self, model: AdapterModel, rows: Rows, progress: Bar, epochs: int, config: TrainConfig) -> None:
        self.model, self.rows, self.progress, self.epochs = model, rows, progress, epochs
        self.patience = config.patience_of(epochs)
        self.start = max(group.get("start", 0.0) for group in model.parameter_groups(config))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Point a resumed Trainer to the best checkpoint in its current folder, which may have been moved."""
        del control
        if state.best_global_step is None:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if not (best / WEIGHTS_FILE).is_file():
            raise ATVError(
                f"{best / WEIGHTS_FILE}, the best epoch so far, is missing: the training cannot be resumed. Restore "
                "it, or start over with --force."
            )
        state.best_model_checkpoint = str(best)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.rows.epoch = round(state.epoch or 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.model.reach(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.progress.reach(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        del args
        metrics = about["metrics"]
        accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
        self.progress.describe(f"train: epoch {round(state.epoch)}, valid {accuracy:.2f}")
        log.info(f"epoch {round(state.epoch)} of {self.epochs}: valid loss {loss:.4f}, accuracy {accuracy:.3f}")
        found = [entry["eval_choice"] for entry in state.log_history if "eval_choice" in entry]
        # Epochs before the last group starts training do not count for patience.
        since = len(found) - 1 - max(found.index(max(found)), math.ceil(self.start * self.epochs) - 1)
        if since >= self.patience and len(found) < self.epochs:
            log.info(f"No improvement in {since} epochs: stopped.")
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del control
        barrier()  # every process has written its random state
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


@dataclass(frozen=True)
class TrainResult:
    """The result of a training."""

    adapter: Path
    """Folder of the adapter."""
    record: dict[str, Any]
    """The contents of `train.json`: settings, history, seconds, versions."""


def train(
    model: AdapterModel,
    tasks: Sequence[Task],
    out: str | Path,
    config: TrainConfig | None = None,
    force: bool = False,
    store: PrefixStore | None = None,
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

    Raises:
        ATVError: `out` contains another training; a prompt is too long; a batch cannot be split among the processes;
            the wiring self-test failed; a part of the model differs from what the configuration builds, so that it
            cannot be saved; or the loss became NaN or infinite: then `out/adapter` contains the best epoch before that,
            if there was one.
    """
    config, out = config or TrainConfig(), local(out)
    config.rows_per_call(world_size())
    model.settle(tasks)
    model.require_savable()
    device = input_device(model.llm)
    if device.type == "cuda" and (device.index or 0) != local_rank():
        raise ATVError(
            f"The LLM is on {device}; training expects this process's GPU, cuda:{local_rank()}. Select the GPU with "
            "CUDA_VISIBLE_DEVICES instead."
        )
    train_settings = config.to_dict()
    del train_settings["gradient_accumulation_steps"]
    settings = training_settings(model.llm, tasks, model.describe(), train_settings)
    record = former_record(out, settings, force)
    if record is not None and record["finished"]:
        log.info(f"{out} holds this training already, finished; nothing to do (--force starts over).")
        model.load_weights(out / "adapter")
        model.eval()
        return TrainResult(out / "adapter", record)
    rows = Rows(_encoded(model, tasks, "train"), config.templates_per_row)
    epochs = config.epochs_of(len(rows))
    note_shared(model.tokenizer, tasks)
    valid = Rows(_encoded(model, tasks, "valid"), config.templates_per_row)
    if len(valid) < ENOUGH_TO_CHOOSE:
        error = 50 / math.sqrt(len(valid))
        log.warning(
            f"{len(valid)} validation rows: accuracy on them has a standard error of about {error:.0f} points, "
            "too much to tell most epochs apart. Use more of them for a better choice."
        )
    _require_gradient(model, rows[0])
    barrier()  # nothing is written before every process has passed all checks
    if record is None:
        record = {"finished": False, "settings": settings} | provenance()
        if is_main():
            _clear(out)
            write_json(out / RECORD_FILE, record)
    barrier()  # other processes write nothing before old files have been removed
    set_seed(config.seed)
    store = store or PrefixStore()
    _fill(store, model, [*rows.of_epochs(epochs), *valid.of_epochs(1)], out / "prefixes" / str(rank()))
    checkpoints = out / "checkpoints"
    steps = epochs * math.ceil(len(rows) / config.batch_size)
    # Torch's fused attention has a slow backward pass on a CPU: LoRA's whole step takes 1.4 times as long with it. If
    # prefixes are stored, reading them again must give what was stored, so only the steered part uses the other one.
    attention = grouped() if device.type == "cpu" and model.dependent_tokens is None else nullcontext()
    both = [*rows.rows, *valid.rows]
    with model.in_training(config, store.read, both), bar("train", steps) as progress, attention:
        model.calibrate(rows.rows)
        said = _Progress(model, rows, progress, epochs, config)
        trainer = _trainer(model, rows, valid, config, epochs, checkpoints, said)
        finite = _run(trainer, checkpoints)
        if trainer.state.best_model_checkpoint is not None:
            model.eval()
            model.set_gate(rows.rows, valid.rows)
    if not finite:
        message = _after_non_finite(trainer, model, record, out)
        shutil.rmtree(out / "prefixes" / str(rank()), ignore_errors=True)
        barrier()  # a process that fails first must not end the one that writes
        raise ATVError(message)
    _finish(trainer, model, record, out)
    return TrainResult(out / "adapter", record)


def _run(trainer: ATVTrainer, checkpoints: Path) -> bool:
    """Train, resuming from the last complete checkpoint if any; the model then has its best epoch, if any.

    Returns:
        Whether the loss stayed finite.
    """
    last = _last_complete(checkpoints)
    if last is not None:
        log.info(f"Resuming from {last}")
    if rank() > 0:
        torch.manual_seed(trainer.train_config.seed + rank())  # different dropout in each process
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except NonFiniteLoss:
        if trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        return False
    return True


def _require_gradient(model: AdapterModel, row: EncodedRow) -> None:
    """Raise ATVError if training would change nothing, which a new library version can cause silently."""
    if isinstance(model, ATVModel):
        log.info("Wiring self-test")
        return require_wiring(model)
    batch = {name: value.to(input_device(model.llm)) for name, value in model.collator()([row]).items()}
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(**batch).loss, learned, allow_unused=True)
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise ATVError("No gradient reaches the trained parameters: the method does not work with this LLM.")
    return None


def training_settings(
    llm: nn.Module, tasks: Sequence[Task], config: dict[str, Any], train: dict[str, Any]
) -> dict[str, Any]:
    """Return all settings that determine what is learned, which a resumed training must share with the interrupted one.

    Args:
        llm: the frozen LLM.
        tasks: the training tasks.
        config: the method's configuration.
        train: the training configuration, without the split of a batch: that affects only rounding and dropout masks,
            and a training may be resumed with fewer GPUs.
    """
    described = {
        task.name: {
            "train": len(task.train),
            "valid": len(task.valid),
            "asking": task.asking(),
            "digest": task.digest("train", "valid"),
        }
        for task in tasks
    }
    return {
        "llm": cast(Any, llm).name_or_path,
        "revision": getattr(base_llm(llm).config, "_commit_hash", None),
        "dtype": str(next(llm.parameters()).dtype),
        "quantization": quantization(llm),
        "config": config,
        "train": train,
        "tasks": described,
    }


def former_record(out: Path, settings: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """Return the record of the training in `out`, if it is to be resumed; its settings must be the same."""
    file = out / RECORD_FILE
    if file.exists() and not force:
        record: dict[str, Any] = read_json(file, "the record of a training")
        same_settings(record.get("settings", {}), settings, out)
        return record
    if occupied(out) and not file.exists():
        raise ATVError(f"{out} exists and is not a training; choose a new folder, so that nothing there is lost.")
    return None


def _encoded(model: AdapterModel, tasks: Sequence[Task], split: str) -> list[EncodedRow]:
    judged = {task.name: training_options(model.tokenizer, task).judged for task in tasks}
    rows = [row for task in tasks for row in training_rows(task, split, model.reads)]
    encoded = []
    with bar(f"tokenise {split}", len(rows)) if len(rows) >= 2000 else nullcontext() as progress:
        for row in rows:
            encoded.append(replace(model.encode_row(row), judged=judged[row.task][row.example.output]))
            if progress is not None:
                progress.advance()
    return encoded


def _fill(store: PrefixStore, model: AdapterModel, rows: Sequence[EncodedRow], folder: Path) -> None:
    """Fill the store with every prompt up to its first edited token."""
    if model.dependent_tokens is None:
        return
    prefixes = {tuple(prompt[: -model.dependent_tokens]) for row in rows for prompt, _ in row.pairs} - {()}
    with bar("read prompts", len(prefixes)) as progress:
        store.fill(model.llm, prefixes, progress.advance, folder)
    kept = f"Kept {store.memory_used / 2**20:.0f} MiB of prompt prefixes in memory"
    kept += f" and {store.disk_used / 2**20:.0f} MiB in {folder}" if store.disk_used else ""
    log.info(kept + (f"; {store.left_out} of {len(prefixes)} are read again each time" if store.left_out else ""))


def _clear(out: Path) -> None:
    """Remove the files that a training needs only while it runs."""
    for name in ("checkpoints", "prefixes"):
        shutil.rmtree(out / name, ignore_errors=True)


@dataclass
class _Metrics:
    """Validation metrics from the outputs of `ATVTrainer.prediction_step`, and the value that selects the epoch."""

    best_epoch: str

    def __call__(self, rows: Any) -> dict[str, float]:
        """Return mean loss, share of right answers, and the value whose maximum selects the epoch."""
        loss, accuracy = rows.predictions.mean(dtype=float), rows.label_ids.mean(dtype=float)
        # Accuracies differ by whole answers, so adding less than half an answer's worth only breaks ties.
        ties = 1 / (1 + loss) / (2 * rows.label_ids.size)
        return {"loss": loss, "accuracy": accuracy, "choice": -loss if self.best_epoch == "loss" else accuracy + ties}


def _some_unused(model: AdapterModel, row: EncodedRow) -> bool:
    """Whether a trained weight does not affect the loss; DDP would wait for its gradient unless it looks for these."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in model.collator()([row]).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return any(g is None for g in torch.autograd.grad(model(**batch).loss, trained, allow_unused=True))


def _trainer(
    model: AdapterModel,
    rows: Rows,
    valid: Rows,
    config: TrainConfig,
    epochs: int,
    checkpoints: Path,
    progress: _Progress,
) -> ATVTrainer:
    rows_per_call = config.rows_per_call(world_size())
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        per_device_train_batch_size=rows_per_call,
        per_device_eval_batch_size=rows_per_call,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        ddp_find_unused_parameters=world_size() > 1 and _some_unused(model, rows[0]),
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm or 0.0,
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=1,  # in addition to the best one
        load_best_model_at_end=True,
        metric_for_best_model="eval_choice",
        greater_is_better=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need several processes, never DataParallel
    trainer = ATVTrainer(
        model=model,
        args=arguments,
        data_collator=_JudgedCollator(model.collator()),
        train_dataset=rows,
        eval_dataset=valid,
        compute_metrics=_Metrics(config.best_epoch),
        callbacks=[progress],
        train_config=config,
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _last_complete(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint; remove incomplete ones."""
    if is_main():
        for folder in checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
    barrier()
    complete = checkpoints.glob("checkpoint-*")
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _save(trainer: ATVTrainer, model: AdapterModel, record: dict[str, Any], out: Path) -> None:
    state = trainer.state
    history = [entry for entry in state.log_history if "eval_loss" in entry or "loss" in entry]
    best = int(Path(state.best_model_checkpoint).name.split("-")[1]) if state.best_model_checkpoint else None
    kept = next((entry for entry in history if "eval_loss" in entry and entry["step"] == best), {})
    record |= {"history": history, "best_step": best}
    record |= {f"best_eval_{name}": kept.get(f"eval_{name}") for name in ("accuracy", "loss")}
    settings = record["settings"]
    model.training_summary = {
        "tasks": {name: task["asking"] for name, task in settings["tasks"].items()},
        "chat_template": chat_template_digest(model.tokenizer),
        "train": settings["train"],
        "best_step": record["best_step"],
        "best_eval_accuracy": record["best_eval_accuracy"],
        "best_eval_loss": record["best_eval_loss"],
    }
    if is_main():
        model.save_pretrained(out / "adapter")
    barrier()
    _read_back(model, out / "adapter")


def _read_back(model: AdapterModel, adapter: Path) -> None:
    """Load a model's saved weights; raise ATVError if they changed by more than rounding to the LLM's dtype."""

    def sample() -> list[Tensor]:
        tensors = [*model.parameters(), *model.buffers()]
        return [t.detach().flatten()[:: max(1, t.numel() // 1000)].float().cpu().clone() for t in tensors]

    had = sample()
    model.load_weights(adapter)
    for before, after in zip(had, sample(), strict=True):
        if not torch.isclose(before, after, rtol=2**-7, atol=2**-23, equal_nan=True).all():
            raise ATVError(f"{adapter} does not hold the weights that were saved there: the disk may be faulty.")


def _finish(trainer: ATVTrainer, model: AdapterModel, record: dict[str, Any], out: Path) -> None:
    _save(trainer, model, record, out)
    runtime = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record |= {"finished": True, "seconds": runtime[-1] if runtime else None, "trainable_parameters": parameters}
    if is_main():
        write_json(out / RECORD_FILE, record)
        _clear(out)
    barrier()


def _after_non_finite(trainer: ATVTrainer, model: AdapterModel, record: dict[str, Any], out: Path) -> str:
    """Save the best epoch before the loss became NaN, if any, and return an error message."""
    state = trainer.state
    said = f"The loss became NaN or infinite after step {state.global_step} (epoch {state.epoch:.2f})."
    advice = "Try a lower --lr or --scale, or --max-grad-norm 1; then start over with --force."
    if state.best_model_checkpoint is None:
        return f"{said} No epoch had been completed, so there is no adapter to keep. {advice}"
    _save(trainer, model, record, out)
    return f"{said} {out / 'adapter'} holds the best epoch before that. {advice}"
