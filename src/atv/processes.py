"""Which of several processes this is. A launcher (torchrun, accelerate launch) says so in the environment.

Started alone, a process is the main one of one, and nothing here does anything.
"""

import os
import time


def rank() -> int:
    """This process's number, from 0, over all machines."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes there are, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """This is the process that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here. Where one has failed, the launcher ends the others."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        distributed.init_process_group()  # gloo for tensors on the CPU and, where there is a GPU, NCCL for its own
    distributed.all_reduce(torch.zeros(1))  # through gloo: a barrier that needs no GPU


def leave() -> None:
    """At the end of a process: end what it has in common with the others.

    Left to the interpreter's exit, the group's threads are sometimes still running when their memory goes, and the
    process aborts after all its work is done.
    """
    if world_size() == 1:
        return
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def wait_turn_to_fail() -> None:
    """Before a process says what is wrong and ends: let the main one do so.

    What is wrong for one is mostly wrong for all, and once the main process has ended, which may take seconds, the
    launcher ends the others unheard. One that is still there after its wait has a fault that the main one has not.
    """
    if not is_main():
        time.sleep(10)
