"""Rank and number of processes, which a launcher (torchrun, accelerate launch) sets in the environment.

A process started without a launcher is the main process, and the functions that synchronise are no-ops.
"""

import os
import time


def rank() -> int:
    """Return this process's rank over all machines, from 0."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's rank on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """Return the number of processes over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes files and logs."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process. If one has failed, the launcher ends the others."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        distributed.init_process_group()  # gloo for CPU tensors and, with a GPU, NCCL for GPU tensors
    distributed.all_reduce(torch.zeros(1))  # through gloo: a barrier that needs no GPU


def leave() -> None:
    """Destroy the process group at the end of a process.

    If this is left to the interpreter's exit, the group's threads sometimes outlive their memory, and the process
    aborts after all its work is done.
    """
    if world_size() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait_turn_to_fail() -> None:
    """Let the main process report an error first, before this process reports its own and ends.

    Most errors occur in all processes. Once the main process has ended, which may take seconds, the launcher ends the
    others silently. A process that still runs after its wait has an error that the main process does not have.
    """
    if not is_main():
        time.sleep(10)
