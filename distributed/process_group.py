"""The life of a process group: joining it, rank and world size, devices, seeds, lost peers.

    torchrun --nproc-per-node=4 train.py

    with process_group("auto"):
        device = local_device("auto")
        if is_main():
            print(world_size())

Each process has a rank and a device of its own: NCCL connects GPUs, gloo CPUs. Rank 0 is the main
process: it prints, logs and writes files. Without torchrun there is no group, and every function
answers for a single process.
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

from utils import UserError, get_device, is_out_of_memory

# Longer than rank 0 needs to evaluate or to write a checkpoint while the others wait for it.
TIMEOUT = datetime.timedelta(minutes=30)


def rank() -> int:
    """This process's number in the group, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes in the group, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the process that prints, logs and writes files."""
    return rank() == 0


def local_world_size() -> int:
    """The number of the group's processes on this machine, which share its memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def local_device(name: str) -> torch.device:
    """This process's device for --device `name`: each process of a machine has a GPU of its own.

    Raises UserError if `name` is one GPU for several processes, or the machine has too few.
    """
    if world_size() > 1 and name.startswith("cuda:"):
        raise UserError(
            f"--device {name} is one GPU for {world_size()} processes; use --device cuda."
        )
    return get_device(name)


@contextlib.contextmanager
def process_group(device: str, timeout: datetime.timedelta = TIMEOUT) -> Iterator[None]:
    """Join torchrun's group for the block, if it started this process; only rank 0 prints in it.

    `device` is the value of --device. A peer that dies is noticed at once, one that hangs after
    `timeout`. Raises UserError if the group cannot be joined or loses a process.
    """
    # torchrun's interface: it tells each process its place in the group by these variables.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    own = get_device(device)
    on_gpu = own.type == "cuda"
    if on_gpu:
        # Before anything else uses CUDA: by default each process would make a context on GPU 0.
        torch.cuda.set_device(own)
    # Flags and Python objects travel as CPU tensors by gloo even where gradients use NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The processes cannot connect to each other ({reason}); start them with torchrun, as "
            "docs/scaling.md shows for one machine and for several."
        ) from None
    local_device(device)  # one GPU for all of them is refused here
    with contextlib.ExitStack() as stack:
        if not is_main():
            devnull = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise UserError(
                f"{describe_lost_peer(error)} Finished work is saved: run the same command again "
                "to continue."
            ) from None
    # Not in a `finally`: after an error NCCL could wait here for a process that has ended.
    dist.destroy_process_group()


# PyTorch raises a plain RuntimeError for most of these, so the text has to tell: what gloo, NCCL
# and their sockets say when the other side is gone.
_LOST_PEER_MESSAGES = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Socket closed",
    "imed out",
    "timeout",
    "NCCL",
    "Gloo",
    "gloo",
    "refused",
    "ProcessGroup",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended or cannot be reached."""
    if world_size() == 1 or not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    if isinstance(error, dist.DistError):
        return True
    return any(message in str(error) for message in _LOST_PEER_MESSAGES)


def describe_lost_peer(error: BaseException) -> str:
    """What to say of an error of is_lost_peer: its own text may tell more than that a peer is gone.

    NCCL reports its own failures in the same way, each process those of others.
    """
    reason = " ".join(str(error).split())[:200]
    text = (
        f"Another of the {world_size()} processes has ended or cannot be reached ({reason}), so "
        f"this one (rank {rank()}) ends too; unless it was killed, it has printed why."
    )
    if "shared memory" in reason:  # Docker's default is 64 MB
        text += " NCCL needs more shared memory: docker run --shm-size=1g, or --ipc=host."
    return text


def seed_per_rank(seed: int, step: int) -> None:
    """Seed PyTorch's generators differently in each process, as a function of the seed and step.

    All processes start with the same seed, so that their initial weights are the same. From then
    on they need different random numbers, or dropout would drop the same units in every slice of
    the batch. Rank 0 keeps its state: one process computes the same with and without a group.
    """
    if not is_main():
        rng = np.random.default_rng([seed, 4, step, rank()])  # 4: this use of the seed
        torch.manual_seed(int(rng.integers(2**63)))
