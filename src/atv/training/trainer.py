"""transformers' Trainer as this project uses it: optimiser, rates, batches, progress, and the choice of the epoch."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from atv.config import TrainConfig
from atv.data.collate import IGNORED, Collator, EncodedRow, split_by_length
from atv.data.taught import divergence, stacked
from atv.errors import ATVError
from atv.files import follow_umask
from atv.lm.adapter_model import AdapterModel
from atv.lm.quiet import quiet_libraries
from atv.lm.scoring import answers_right
from atv.processes import barrier, is_main, world_size
from atv.progress import Bar, log
from atv.training.batches import Batches, Rows
from atv.training.record import LOGS

with quiet_libraries():  # the Trainer imports bitsandbytes
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.integrations.integration_utils import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback

JUDGED = "judged"
"""Key in a batch, in addition to the model's inputs: the number of tokens that identify each answer, (batch,)."""
SOFT = ("soft_ids", "soft_probabilities")
"""Two more keys: the distributions of a teacher (`atv.data.taught.stacked`), if the batch has one."""
WEIGHTS = "weights"
"""Another such key: the factor of each row's loss, (batch,) float32."""
ANSWER_TOKENS = 2048
"""Most answer tokens whose logits are in memory at once, padding included: 0.4 GB for 50,000 tokens in float32."""
WARM_UP = 0.05
"""Share of the steps in which a linear schedule rises."""
WEIGHTS_FILE = "model.safetensors"
"""Weights of a checkpoint, as the Trainer names them."""
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages that a tracker may come from, if not only one of its name."""
ValidationScore = Callable[[AdapterModel], float]
"""A user's score of a model in eval mode on validation rows; higher is better."""
COMPLETE = "complete"
"""Empty file that marks a completely written checkpoint folder."""


def latest_of_the_best(accuracies: Sequence[float], rows: int) -> float:
    """Return the value of the latest epoch; the highest value of all epochs belongs to the one to keep.

    That is the last epoch whose accuracy is at most one standard error below the best one. Accuracies on few rows
    differ by chance, and the later one of two such epochs has learned with a lower learning rate.

    Args:
        accuracies: of all epochs up to this one, from 0 to 1.
        rows: number of validation rows.
    """
    best = max(accuracies)
    error = math.sqrt(best * (1 - best) / rows)
    return float(len(accuracies)) if accuracies[-1] >= best - error else 0.0


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
    """A loss, which the message names, became NaN or infinite; no weight was updated with it."""


class ATVTrainer(Trainer):
    """A Trainer with the optimiser and rates of a `TrainConfig`, which stops at the first non-finite loss.

    Its checkpoints contain only generator and expansion, since the LLM is not a submodule of `ATVModel`. A batch split
    among processes and accumulation steps gives the loss and gradient of the whole batch, up to rounding.
    """

    def __init__(
        self,
        *args: Any,
        train_config: TrainConfig,
        best_epoch: str,
        metric: ValidationScore | None = None,
        **kwargs: Any,
    ) -> None:
        self.train_config, self.best_epoch, self.metric = train_config, best_epoch, metric
        self._share = 1.0
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

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss of a batch after its backward pass; long answers are read in parts of like lengths.

        Several processes must make as many backward passes each, so they split batches only as configured.
        """
        parts = [(1.0, inputs)] if self._split else split_by_length(inputs, ANSWER_TOKENS)
        losses = []
        for self._share, part in parts:
            losses.append(super().training_step(model, part, num_items_in_batch))
        self._share = 1.0
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted loss; if it is not finite in one process, raise NonFiniteLoss in all of them."""
        inputs.pop(JUDGED)
        weights, soft = inputs.pop(WEIGHTS), _soft(inputs)
        loss, outputs = super().compute_loss(model, inputs, True)
        if soft is not None:
            loss = row_divergence(outputs.logits, *soft).mean()
        elif self.train_config.class_weights == "balanced":
            loss = (outputs.losses * weights.to(outputs.losses.device)).mean()
        loss = loss * self._share
        if num_items_in_batch is not None:
            loss = loss * num_items_in_batch
        if not math.isfinite(self.accelerator.reduce(loss.detach(), "sum").item()):
            raise NonFiniteLoss("training loss")
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> tuple[None, Tensor, Tensor]:
        """Return loss and score of every row, both (rows, prompts), so that their means do not depend on batching."""
        inputs = self._prepare_inputs(inputs)
        judged, _ = inputs.pop(JUDGED), inputs.pop(WEIGHTS)  # the validation loss is not weighted
        soft = _soft(inputs)
        with torch.no_grad():
            output = model(**inputs)
        shape = (len(inputs["query_input_ids"]), -1)
        if soft is not None:  # the score is the share of the teacher's tokens that are the model's too
            agreed = output.right.sum(1) / (inputs["labels"] != IGNORED).sum(1).to(output.right.device)
            return None, row_divergence(output.logits, *soft).view(shape), agreed.view(shape)
        correct = answers_right(output.right, judged.to(output.right.device))
        return None, output.losses.view(shape), correct.view(shape)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Return loss and accuracy of the validation rows, and `eval_choice`, whose maximum selects the epoch.

        Raises:
            NonFiniteLoss: the loss is NaN or infinite; the epoch could be compared with no other.
            ATVError: the metric that selects the epoch is.
        """
        output = super().evaluation_loop(*args, **kwargs)
        metrics = cast(dict[str, float], output.metrics)
        if not math.isfinite(metrics["eval_loss"]):
            raise NonFiniteLoss("validation loss")
        if self.metric is not None:
            score = float(self.metric(cast(AdapterModel, self.model)))
            if not math.isfinite(score):
                raise ATVError(f"The metric that selects the epoch is {score}; expected a finite number.")
            metrics |= {"eval_metric": score, "eval_choice": score + 1e-9 / (1 + metrics["eval_loss"])}
        elif self.best_epoch == "loss":
            metrics["eval_choice"] = -metrics["eval_loss"]
        else:
            before = [entry["eval_accuracy"] for entry in self.state.log_history if "eval_accuracy" in entry]
            found = [*before, metrics["eval_accuracy"]]
            metrics["eval_choice"] = latest_of_the_best(found, len(cast(Rows, self.eval_dataset)))
        return output

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


def _soft(inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Take a teacher's distributions out of a batch; None if there are none."""
    found = [inputs.pop(name, None) for name in SOFT]
    return None if found[0] is None else (found[0], found[1])


def row_divergence(logits: Tensor, ids: Tensor, probabilities: Tensor) -> Tensor:
    """Return the mean divergence from a teacher over each row's answer tokens, (batch,) float32 (`divergence`)."""
    found = divergence(logits, ids.to(logits.device), probabilities.to(logits.device))  # (batch, answer)
    return found.sum(1) / (probabilities.sum(-1) > 0).sum(1).clamp(min=1).to(found.device)


@dataclass
class JudgedCollator:
    """A model's collator, which also adds `JUDGED`, `WEIGHTS` and, with a teacher, `SOFT` for `ATVTrainer`."""

    collate: Collator

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Return the tensors of one batch."""
        each = [row for row in rows for _ in row.pairs]
        taught = [row.taught for row in each if row.taught is not None]
        if taught and len(taught) < len(each):
            raise ATVError("Some rows have a teacher's answer and some a given one; train on tasks of one kind.")
        soft = stacked(taught) if taught else {}
        return (
            self.collate(rows)
            | soft
            | {
                JUDGED: torch.tensor([row.judged for row in each]),
                WEIGHTS: torch.tensor([row.weight for row in each]),
            }
        )


class Progress(TrainerCallback):
    """Rotates the rows' templates, updates the bar, records the time, marks complete checkpoints and stops early.

    Args:
        model: the model that is trained.
        rows: its training rows.
        progress: a bar of optimiser steps.
        epochs: most epochs of the training.
        config: its configuration.
        began: `time.perf_counter()` when the work began, which includes reading the prompts.
    """

    def __init__(
        self, model: AdapterModel, rows: Rows, progress: Bar, epochs: int, config: TrainConfig, began: float
    ) -> None:
        self.model, self.rows, self.progress, self.epochs, self.began = model, rows, progress, epochs, began
        self.before = 0.0
        self.patience = config.patience_of(epochs)
        self.start = max(group.get("start", 0.0) for group in model.parameter_groups(config))

    @property
    def seconds(self) -> float:
        """Seconds since the training began, including those of interrupted calls up to the checkpoint resumed from."""
        return self.before + time.perf_counter() - self.began

    def worse_epochs(self, history: Sequence[dict[str, Any]]) -> int:
        """Return the number of epochs since the best one if patience is exhausted before the last epoch; else 0."""
        found = [entry["eval_choice"] for entry in history if "eval_choice" in entry]
        # Epochs before the last group starts training do not count for patience.
        since = len(found) - 1 - max(found.index(max(found)), math.ceil(self.start * self.epochs) - 1)
        return since if since >= self.patience and len(found) < self.epochs else 0

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the time of an entry of the history."""
        del args, control
        state.log_history[-1]["seconds"] = round(self.seconds, 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on with a resumed Trainer's time, and its best checkpoint in its current folder, which may have moved."""
        del control
        self.model.reach(max(0, state.global_step - 1) / state.max_steps)  # as the last step did, if none is left
        self.before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
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
        """Tell the rows their epoch."""
        del args, control
        self.rows.epoch = round(state.epoch or 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the model the share of the steps that are done."""
        del args, control
        self.model.reach(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the bar."""
        del args, control
        self.progress.reach(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Log the epoch's validation scores; stop if the epoch to keep has been the same for long enough."""
        del args
        metrics = about["metrics"]
        accuracy, loss = metrics["eval_accuracy"], metrics["eval_loss"]
        self.progress.describe(f"train: epoch {round(state.epoch)}, valid {accuracy:.2f}")
        also = f", metric {metrics['eval_metric']:.3f}" if "eval_metric" in metrics else ""
        log.info(f"epoch {round(state.epoch)} of {self.epochs}: valid loss {loss:.4f}, accuracy {accuracy:.3f}{also}")
        if since := self.worse_epochs(state.log_history):
            log.info(f"The last {since} epochs are worse than the one that is kept: stopped.")
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as complete."""
        del control
        barrier()  # every process has written its random state
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def validation_metrics(rows: Any) -> dict[str, float]:
    """Return mean loss and share of right answers from the outputs of `ATVTrainer.prediction_step`."""
    return {"loss": rows.predictions.mean(dtype=float), "accuracy": rows.label_ids.mean(dtype=float)}


def _some_unused(model: AdapterModel, row: EncodedRow) -> bool:
    """Whether a trained weight does not affect the loss; DDP would wait for its gradient unless it looks for these."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in model.collator()([row]).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return any(g is None for g in torch.autograd.grad(model(**batch).loss, trained, allow_unused=True))


def make_trainer(
    model: AdapterModel,
    rows: Rows,
    valid: Rows,
    config: TrainConfig,
    epochs: int,
    checkpoints: Path,
    callbacks: Sequence[TrainerCallback],
    metric: ValidationScore | None = None,
) -> ATVTrainer:
    """Return a trainer of `model`, which validates and saves to `checkpoints` after each epoch."""
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
        report_to=config.report_to,
        run_name=checkpoints.parent.name,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need several processes, never DataParallel
    trainer = ATVTrainer(
        model=model,
        args=arguments,
        data_collator=JudgedCollator(model.collator()),
        train_dataset=rows,
        eval_dataset=valid,
        compute_metrics=validation_metrics,
        callbacks=list(callbacks),
        train_config=config,
        best_epoch="loss" if rows.rows[0].taught is not None else config.best_epoch,
        metric=metric,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(checkpoints.parent / LOGS)  # its default, in `checkpoints`, would be removed
    return trainer


def require_tracker(name: str) -> None:
    """Raise ATVError if the package of a tracker is not installed."""
    if name != "none" and not any(find_spec(package) for package in TRACKERS.get(name, (name,))):
        raise ATVError(f"report_to is {name!r}, and the package {name} is not installed: pip install {name}")
