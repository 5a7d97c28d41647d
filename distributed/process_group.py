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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distributed.watchdog import Watchdog, end_process
from utils import UserError, cuda_is_available, get_device, is_out_of_memory

# Longer than rank 0 needs for what it does alone, such as writing a checkpoint of 40 GB to a slow
# disk, or than one process compiles longer than another. Dead ones are noticed by the watchdog.
TIMEOUT = datetime.timedelta(hours=2)


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
    device = get_device(name)
    if dist.is_initialized() and device.type == "cuda":
        # Before anything else uses CUDA: by default each process would make a context on GPU 0.
        torch.cuda.set_device(device)
    return device


class LostPeerError(UserError):
    """Another process of the group has ended, so this one ends too."""


def _describe_loss(error: BaseException) -> str:
    """What a process prints before it ends because of another one."""
    return (
        f"{describe_lost_peer(error)} Finished work is saved: run the same command again to "
        "continue."
    )


@contextlib.contextmanager
def losses_described_by(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """For the block, what is printed if another process is lost while this one waits for a GPU."""
    global _describe_loss
    before, _describe_loss = _describe_loss, describe
    try:
        yield
    finally:
        _describe_loss = before


@contextlib.contextmanager
def process_group(device: str, timeout: datetime.timedelta = TIMEOUT) -> Iterator[None]:
    """Join torchrun's group for the block, if it started this process; only rank 0 prints in it.

    `device` is the value of --device: all but "cpu" joins GPUs, too, where there are any. A process
    that dies or fails ends the others within seconds, one that hangs after `timeout`. Raises
    UserError if the group cannot be joined.
    """
    # torchrun's interface: it tells each process its place in the group by these variables.
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield
        return
    # Flags and Python objects travel as CPU tensors by gloo even where gradients use NCCL, which
    # connects GPUs only once tensors on them are exchanged.
    on_gpu = device != "cpu" and cuda_is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
        watchdog = Watchdog(lambda error: _describe_loss(error))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The processes cannot connect to each other ({reason}); start them with torchrun, as "
            "docs/scaling.md shows for one machine and for several."
        ) from None
    with contextlib.ExitStack() as stack:
        if not is_main():
            devnull = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
        try:
            yield
        except BaseException as error:
            if isinstance(error, LostPeerError) or is_lost_peer(error):
                is_told = isinstance(error, LostPeerError)
                end_process(str(error) if is_told else _describe_loss(error))
            # SystemExit: what all processes have agreed on, a stop or another one's error.
            agreed = isinstance(error, SystemExit) or hasattr(error, "is_known_to_all")
            if watchdog.leave(failed=True, agreed=agreed) and agreed:
                dist.destroy_process_group()
            raise
        # After other errors NCCL could wait here for a process that has ended.
        if watchdog.leave():
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
