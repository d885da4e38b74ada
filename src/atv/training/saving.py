"""Checkpoints while a training runs, and the adapter at its end."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atv.data import table_of
from atv.data.rendering import chat_template_digest
from atv.errors import ATVError
from atv.files import write_json
from atv.lm.adapter_model import AdapterModel
from atv.processes import barrier, is_main
from atv.training.record import RECORD_FILE, clear
from atv.training.trainer import COMPLETE, ATVTrainer


def last_complete(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint; remove incomplete ones."""
    if is_main():
        for folder in checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():
                shutil.rmtree(folder)
    barrier()
    complete = checkpoints.glob("checkpoint-*")
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _save(
    trainer: ATVTrainer, model: AdapterModel, record: dict[str, Any], out: Path, found: Mapping[str, dict[str, Any]]
) -> None:
    state = trainer.state
    history = [entry for entry in state.log_history if "eval_loss" in entry or "loss" in entry]
    best = int(Path(state.best_model_checkpoint).name.split("-")[1]) if state.best_model_checkpoint else None
    kept = next((entry for entry in history if "eval_loss" in entry and entry["step"] == best), {})
    record |= {"history": history, "best_step": best}
    record |= {f"best_eval_{name}": kept.get(f"eval_{name}") for name in ("accuracy", "loss")}
    settings = record["settings"]
    model.training_summary = {
        "tasks": {
            name: task["asking"] | table_of(record.get("data", {}).get(name, {})) | found.get(name, {})
            for name, task in settings["tasks"].items()
        },
        "chat_template": chat_template_digest(model.tokenizer),
        "train": settings["train"],
        "train_rows": {name: task["train"] for name, task in settings["tasks"].items()},
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


def finish(
    trainer: ATVTrainer,
    model: AdapterModel,
    record: dict[str, Any],
    out: Path,
    found: Mapping[str, dict[str, Any]],
    seconds: float,
) -> None:
    """Write the adapter, mark the record as finished and remove what only a running training needs.

    Args:
        trainer: after its training.
        model: with the weights to save.
        record: the record of the training.
        out: its folder.
        found: facts about each task's answers that the adapter records, by the task's name.
        seconds: that the whole training took, which includes reading the prompts.
    """
    _save(trainer, model, record, out, found)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record |= {"finished": True, "seconds": round(seconds, 3), "trainable_parameters": parameters}
    if is_main():
        write_json(out / RECORD_FILE, record)
        clear(out)
    barrier()


def after_non_finite(trainer: ATVTrainer, model: AdapterModel, record: dict[str, Any], out: Path, loss: str) -> str:
    """Save the best epoch before the loss of this name became NaN, if any, and return an error message."""
    state = trainer.state
    said = f"The {loss} became NaN or infinite after step {state.global_step} (epoch {state.epoch:.2f})."
    advice = (
        "Try a lower --lr or --scale, --max-grad-norm 1, or a --dtype other than float16; then start over with --force."
    )
    if state.best_model_checkpoint is None:
        return f"{said} No epoch had been completed, so there is no adapter to keep. {advice}"
    _save(trainer, model, record, out, {})
    return f"{said} {out / 'adapter'} holds the best epoch before that. {advice}"
