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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from utils import UserError, get_device

# Longer than rank 0 needs to evaluate or to write a checkpoint while the others wait for it.
TIMEOUT = datetime.timedelta(minutes=30)
T = TypeVar("T")


# ------------------------------------------------------------------------------ the group


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
            if not lost_peer(error):
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


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended or cannot be reached."""
    if world_size() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


# ------------------------------------------------------------------------------ agreeing


def together(work: Callable[[], T]) -> T:
    """The result of `work`, which every process runs by itself.

    Where it is a UserError or OSError for some, the first of them raises it and the others end
    without a word.
    """
    result, error = _attempt(work)
    failed: list[bool] = [error is not None] * world_size()
    if world_size() > 1:
        dist.all_gather_object(failed, error is not None)
    if any(failed):
        if error is not None and rank() == failed.index(True):
            raise error
        raise SystemExit(2)
    return result


def from_main(work: Callable[[], T]) -> T:
    """The result of `work`, which rank 0 runs for all; where it fails there, all of them end."""
    if world_size() == 1:
        return work()
    result, error = _attempt(work) if is_main() else (None, None)
    box = [(result, error is not None)]
    dist.broadcast_object_list(box)  # of our own making: there is no stranger in the group
    if error is not None:
        raise error
    result, failed = box[0]
    if failed:
        raise SystemExit(2)
    return result


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (UserError, OSError) as error:
        if world_size() == 1:
            raise
        return None, error


def any_of(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any process has it set; all come to the same answer."""
    if world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(bool(number) for number in numbers)


def gather_objects(value: T) -> list[T]:
    """Everyone's value, by rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def own_random_numbers(seed: int, step: int) -> None:
    """Seed PyTorch anew, differently in each process but rank 0: else all drop the same units."""
    if not is_main():
        numbers = np.random.default_rng([seed, 4, step, rank()])
        torch.manual_seed(int(numbers.integers(2**63)))


# ------------------------------------------------------------------------------ tensors


def part(count: int, number: int | None = None, parts: int | None = None) -> slice:
    """Which of `count` things are this process's: slices that differ by one in length at most."""
    number, parts = rank() if number is None else number, parts or world_size()
    return slice(number * count // parts, (number + 1) * count // parts)


def reduce_(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum a tensor (or take the maximum) over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor


class _GatherRows(torch.autograd.Function):
    """(n, ...) of every process to (world size * n, ...), in the order of the ranks.

    What follows is computed by every process, each adding its share of the gradient, so the
    backward pass sums the shares and each process keeps its rows (a reduce-scatter).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather(list(out.chunk(world_size())), rows.contiguous())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter(mine, list(grad.contiguous().chunk(world_size())))
        return mine


def gather_rows(rows: Tensor) -> Tensor:
    """(n, ...), n the same everywhere, to (world size * n, ...) with gradients."""
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def gather_shards(shard: Tensor, count: int) -> Tensor | None:
    """A (count, ...) tensor of which each process has its `part`, whole, in rank 0's main memory.

    None on the others. One shard at a time is on its way.
    """
    if world_size() == 1:
        return shard
    if not is_main():
        dist.send(shard.detach().cpu().contiguous(), 0)
        return None
    whole = torch.empty(count, *shard.shape[1:], dtype=shard.dtype)
    whole[part(count)] = shard.detach().cpu()
    for other in range(1, world_size()):
        dist.recv(whole[part(count, other)], other)
    return whole


# ------------------------------------------------------------------------------ the network


def replicate(model: nn.Module) -> nn.Module:
    """The network as every process runs it on its slice of the batch; itself in one process.

    Gradients are summed over the processes bucket by bucket while backward still runs. They are
    summed, not averaged as DistributedDataParallel does by itself: each process has its slice's
    part of the loss, which is the mean over the whole batch, whatever the slices' sizes.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Otherwise the buckets change after the first step, and with them the order of summing: a run
    # that is gone on with would not come to the same bits.
    options = {"find_unused_parameters": True}
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    replica = DistributedDataParallel(model, [device] if device.type == "cuda" else None, **options)
    replica.register_comm_hook(None, _sum)
    return replica


def _sum(state, bucket):  # PyTorch checks annotations, and takes no postponed ones
    reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return reduced.then(lambda done: done.value()[0])


def gradients_kept(replica: nn.Module, kept: bool) -> contextlib.AbstractContextManager[None]:
    """For a block with forward and backward: if `kept`, its gradients are not summed yet."""
    if kept and isinstance(replica, DistributedDataParallel):
        return replica.no_sync()
    return contextlib.nullcontext()


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's running statistics."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Have batch normalisation use the statistics of the whole batch, not of a process's slice."""
    if world_size() == 1:
        return model
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SyncBatchNormOnCPU
    return model


class _Sum(torch.autograd.Function):
    """The sum over all processes, each of which goes on with it in its own way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return reduce_(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return reduce_(grad.clone())


class _SyncBatchNormOnCPU(nn.modules.batchnorm._BatchNorm):
    """PyTorch's has no CPU kernel; this one is slow, and lets CPUs compute what GPUs would."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, ...) to the same shape."""
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        over = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        wide = x.double()
        count = wide.new_full((1,), x.numel() / x.shape[1])
        total = _Sum.apply(torch.cat([wide.sum(over), count]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(over)) / count
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            with torch.no_grad():
                self.running_mean.lerp_(mean.float(), self.momentum)
                self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
