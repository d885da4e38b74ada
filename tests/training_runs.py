"""Tiny trainings that several files of tests run."""

import functools
from pathlib import Path

import torch
from conftest import make_atv
from safetensors.torch import load_file

from atv.config import TrainConfig


def quick(**options):
    """The paper's training, shorter."""
    quicker = {"epochs": 3, "batch_size": 4, "learning_rate": 5e-3, "templates_per_row": 1} | options
    return TrainConfig.paper(**({"generator_learning_rate": quicker["learning_rate"]} | quicker))


def tiny(**options):
    return make_atv(dtype=torch.float32, scale=0.5, **options)


def weights(folder):
    files = sorted((Path(folder) / "adapter").rglob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def break_loss_after(atv, steps):
    forward, calls = atv.forward, []

    @functools.wraps(forward)
    def broken(**batch):
        output = forward(**batch)
        if atv.training:
            calls.append(1)
            if len(calls) > steps:
                output.loss = output.loss * float("nan")
        return output

    atv.forward = broken
