"""What the processes of a group tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distributed.process_group import is_main, rank, world_size
from utils import UserError

T = TypeVar("T")


def run_on_all(work: Callable[[], T]) -> T:
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


def run_on_main(work: Callable[[], T]) -> T:
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


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether any process has it set; all come to the same answer."""
    if world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(bool(number) for number in numbers)


def all_gather_objects(value: T) -> list[T]:
    """Everyone's value, by rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------ tensors


def even_slice(count: int, index: int, parts: int) -> slice:
    """Part `index` (from 0) of `count` items cut into `parts` slices, whose sizes differ by one.

    10 items in 3 parts: 0 to 3, 3 to 6, 6 to 10.
    """
    return slice(index * count // parts, (index + 1) * count // parts)


def rank_slice(count: int) -> slice:
    """The slice of `count` items that this process works on; all of them in one process."""
    return even_slice(count, rank(), world_size())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
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


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...), n the same everywhere, to (world size * n, ...) with gradients."""
    return _GatherRows.apply(rows) if world_size() > 1 else rows


def gather_to_main(shard: Tensor, count: int) -> Tensor | None:
    """A (count, ...) tensor of which each process has its `part`, whole, in rank 0's main memory.

    None on the others. One shard at a time is on its way.
    """
    if world_size() == 1:
        return shard
    if not is_main():
        dist.send(shard.detach().cpu().contiguous(), 0)
        return None
    whole = torch.empty(count, *shard.shape[1:], dtype=shard.dtype)
    whole[rank_slice(count)] = shard.detach().cpu()
    for other in range(1, world_size()):
        dist.recv(whole[even_slice(count, other, world_size())], other)
    return whole
