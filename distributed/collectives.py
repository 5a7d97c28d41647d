"""Collectives: what the processes of a group tell each other, each function called by all of them.

In a single process each returns what it was given. Python objects are exchanged by pickle, which
is safe here: every process of the group runs this program.

A collective waits until every process has called it. Where an error ends one process, the others
would wait for it until the timeout, so work that can fail is run by `run_on_all` or `run_on_main`:
after it, all processes know whether it failed, and all of them end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distributed.process_group import is_main, rank, world_size
from utils import UserError

T = TypeVar("T")


# ------------------------------------------------------------------------------ work and errors


def run_on_all(work: Callable[[], T]) -> T:
    """The result of `work`, which every process runs; if it fails in any of them, all end.

    A UserError or OSError is raised by the lowest rank that has one, so that it is printed once;
    the other processes raise SystemExit(2).
    """
    result, error = _attempt(work)
    failed = all_gather_objects(error is not None)  # by rank
    if any(failed):
        _end_all(error if rank() == failed.index(True) else None)
    return result


def run_on_main(work: Callable[[], T], *, broadcast: bool = True) -> T | None:
    """The result of `work`, which rank 0 alone runs; if it fails there, all end.

    The other processes get the same result, or None without `broadcast`: for results that are large
    or cannot be pickled. An error is raised by rank 0; the others raise SystemExit(2).
    """
    if world_size() == 1:
        return work()
    result, error = _attempt(work) if is_main() else (None, None)
    message = [(result if broadcast else None, error is not None)]
    dist.broadcast_object_list(message)  # from rank 0; overwrites the list of the others
    shared, failed = message[0]
    if failed:
        _end_all(error)
    return result if is_main() else shared


def _end_all(error: Exception | None) -> NoReturn:
    """Raise what ends this process, as all do: its error, or SystemExit if another one has it."""
    if error is None:
        raise SystemExit(2)
    error.is_known_to_all = True  # so process_group need not tell the others
    raise error


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result and None, or None and the error that a user can fix; others are raised."""
    try:
        return work(), None
    except (UserError, OSError) as error:
        if world_size() == 1:
            raise  # with its traceback
        return None, error


# ------------------------------------------------------------------------------ flags and objects


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """For each flag, whether any process has it set; the same answer everywhere.

    Only with an answer that all agree on may a process leave the training loop: a signal reaches
    the processes in different steps.
    """
    if world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(bool(number) for number in numbers)


def all_gather_objects(value: T) -> list[T]:
    """The values of all processes, by rank."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------ slices


def even_slice(count: int, index: int, parts: int) -> slice:
    """Slice `index`, counted from 0, of `count` items cut into `parts`, whose sizes differ by one.

    10 items in 3 parts: 0 to 3, 3 to 6, 6 to 10.
    """
    return slice(index * count // parts, (index + 1) * count // parts)


def rank_slice(count: int) -> slice:
    """The slice of `count` items that this process works on; all of them in a single process."""
    return even_slice(count, rank(), world_size())


# ------------------------------------------------------------------------------ tensors


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; any shape, the same everywhere."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """The elementwise maximum over all processes, in place; any shape, the same everywhere."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_gather_rows(rows: Tensor) -> Tensor:
    """(n, ...), n the same everywhere, to (world size * n, ...) by rank, with gradients."""
    return _AllGatherRows.apply(rows) if world_size() > 1 else rows


class _AllGatherRows(torch.autograd.Function):
    """All-gather, whose backward pass is a reduce-scatter.

    Every process gets all rows and computes its own share of the loss from them, so that each ends
    with a partial gradient of every row. A row's gradient is their sum, and goes to its owner.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        dist.all_gather(list(out.chunk(world_size())), rows.contiguous())
        return out  # (world size * n, ...)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        own = grad.new_empty(len(grad) // world_size(), *grad.shape[1:])
        dist.reduce_scatter(own, list(grad.contiguous().chunk(world_size())))
        return own  # (n, ...)


def gather_to_main(
    rows: Tensor, count: int, slices: Sequence[slice] | None = None
) -> Tensor | None:
    """The (count, ...) tensor of which each process has a slice; None but in rank 0.

    `slices` are by rank, by default each process's `rank_slice`; only others than rank 0's may be
    empty. It is in CPU memory, received slice by slice, so that no GPU has to hold all rows. A
    single process gets its tensor back.
    """
    if world_size() == 1:
        return rows
    slices = slices or [even_slice(count, number, world_size()) for number in range(world_size())]
    if not is_main():
        if len(rows):
            dist.send(rows.detach().cpu().contiguous(), 0)
        return None
    gathered = torch.empty(count, *rows.shape[1:], dtype=rows.dtype)
    gathered[slices[0]] = rows.detach().cpu()
    for sender, part in enumerate(slices[1:], 1):
        if part.stop > part.start:
            dist.recv(gathered[part], sender)
    return gathered


def scatter_from_main(rows: Tensor, slices: Sequence[slice]) -> Tensor:
    """This process's slice, `slices` are by rank, of the (n, ...) CPU tensor that rank 0 has.

    The other processes give a tensor of the same type and shape but for its length.
    """
    own = slices[rank()]
    if is_main():
        for receiver, part in enumerate(slices[1:], 1):
            if part.stop > part.start:
                dist.send(rows[part].contiguous(), receiver)
        return rows[own]
    part = rows.new_empty(own.stop - own.start, *rows.shape[1:])
    if len(part):
        dist.recv(part, 0)
    return part
