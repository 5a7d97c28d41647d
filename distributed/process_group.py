"""Processes that train as one: the group that torchrun starts, and who does what in it.

    torchrun --nproc-per-node=4 train.py

Each process has a rank and a device of its own: NCCL joins GPUs, gloo CPUs. Rank 0 prints, logs
and writes files. Without torchrun there is no group, and every function here does nothing more
than its name says of one process.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from utils import UserError, get_device

# Longer than rank 0 needs to evaluate or to write a checkpoint while the others wait for it.
TIMEOUT = datetime.timedelta(minutes=30)


def rank() -> int:
    """This process's number in the group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return rank() == 0


def local_world_size() -> int:
    """How many processes of the group share this machine and its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def local_device(name: str) -> torch.device:
    """This process's device for --device `name`: each process of a machine has a GPU of its own.

    Raises UserError where the machine has fewer GPUs than processes.
    """
    device = get_device(name)
    if world_size() == 1 or device.type != "cuda":
        return device
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(
            f"--device {name} is one GPU for {world_size()} processes; give --device cuda."
        )
    if local >= gpus:
        raise UserError(
            f"torchrun started {local_world_size()} processes on a machine with {gpus} GPUs; give "
            f"--nproc-per-node={gpus}."
        )
    return torch.device("cuda", local)


@contextlib.contextmanager
def process_group(device: str, timeout: datetime.timedelta = TIMEOUT) -> Iterator[None]:
    """Join torchrun's group for the block, if it started this process; only rank 0 prints in it.

    `device` is the setting's value: CPU tensors go by gloo, those of GPUs by NCCL. A process that
    dies is noticed at once, one that does nothing after `timeout`.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    on_gpu = get_device(device).type == "cuda"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The processes did not find each other ({reason}); start them with torchrun, which "
            "docs/scaling.md shows for one machine and for several."
        ) from None
    if on_gpu:
        torch.cuda.set_device(local_device(device))
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise UserError(
                f"Another of the {world_size()} processes has ended or cannot be reached, so this "
                f"one (rank {rank()}) ends, too; if it was not killed, what it printed says why. "
                "What is done is kept: start again and go on."
            ) from None
    dist.destroy_process_group()  # after an error, NCCL could wait here for who has gone


# What gloo, NCCL and their sockets say when the other side has gone.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "imed out", "timeout")
_LOST += ("NCCL", "Gloo", "gloo", "refused", "ProcessGroup")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended or cannot be reached."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def seed_per_rank(seed: int, step: int) -> None:
    """Seed PyTorch anew, differently in each process but rank 0: else all drop the same units."""
    if not is_main():
        numbers = np.random.default_rng([seed, 4, step, rank()])
        torch.manual_seed(int(numbers.integers(2**63)))
