"""Partial FC: the class centres sharded over processes, the softmax over them never in one piece.

An et al., "Killing Two Birds with One Stone" (2203.15565). Each process holds a run of the classes
and sees the embeddings of the whole batch. Exact at a sample rate of 1: the loss and the gradients
are those of the dense head. Below it, a step uses its batch's own classes and a random part of the
others, and only those rows (with their momentum) change.

The loss of a sample follows from two numbers, its true class's logit and the log of the sum of
exponentials of all others; so cross entropy, focal loss and whatever else depends on the true
class's probability is called on these two as on the logits of a problem with two classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distributed.collectives import all_gather_rows, all_reduce_max, all_reduce_sum, rank_slice
from distributed.process_group import rank

# Logits computed at a time; with what the margin makes of them, five times as many numbers.
CHUNK = 1 << 24
LOWEST = -1e30  # a logit below all; finite, so that differences of two are numbers

Margin = Callable[[Tensor, Tensor], Tensor]


class HeadLoss(NamedTuple):
    """What a head says of a batch."""

    loss: Tensor  # the criterion's mean over the batch
    right: Tensor  # how many are nearest to their own class, a float
    count: Tensor | int  # how many samples there are


class PartialFC(nn.Module):
    """This process's shard of the class centres, and the loss over all shards.

    `margin(cosine, label)` takes cosines (n, k) and classes (n,) to logits (n, k), as
    ArcMarginModel.margin does; what it makes of a class that is not the true one may depend on
    that class's cosine and on the true one's alone.
    """

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin: Margin,
        *,
        sample_rate: float = 1.0,
        seed: int = 0,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        self.num_classes, self.margin, self.chunk = num_classes, margin, chunk
        self.sample_rate, self.seed = sample_rate, seed
        self.shard = rank_slice(num_classes)
        self.weight = nn.Parameter(_initial_rows(num_classes, emb_size, self.shard))
        self.rows: Tensor | None = None  # those sampled for this step, ascending; None: all
        self._sampled: Tensor | None = None  # their centres

    @property
    def active(self) -> Tensor:
        """The centres that take this step's gradient."""
        return self.weight if self.rows is None else self._sampled

    @torch.no_grad()
    def sample(self, label: Tensor, step: int) -> None:
        """Choose the classes of a step: those of the batch's labels (n,) and, at random, others.

        The choice depends on the seed, the step, the labels and the number of processes alone.
        """
        if self.sample_rate == 1:
            return
        generator = torch.Generator(self.weight.device)
        chosen = np.random.default_rng([self.seed, 3, step, rank()])
        generator.manual_seed(int(chosen.integers(2**63)))
        priority = torch.rand(len(self.weight), generator=generator, device=self.weight.device)
        local = label - self.shard.start
        local = local[(label >= self.shard.start) & (label < self.shard.stop)]
        priority[local] = 2  # above any random number
        wanted = int(self.sample_rate * len(self.weight))
        count = min(max(wanted, len(local.unique())), len(self.weight))
        self.rows = priority.topk(count).indices.sort().values
        self._sampled = self.weight[self.rows].requires_grad_()

    @torch.no_grad()
    def update(self, momentum: Tensor, *, lr: float, decay: float, weight_decay: float) -> None:
        """SGD on the sampled rows; `momentum` (like the weight) is kept for every class.

        PyTorch's update with momentum `decay`: v = decay * v + g, w = w - lr * v.
        """
        speed = momentum[self.rows].mul_(decay).add_(self.active.grad)
        speed.add_(self.active, alpha=weight_decay)
        momentum[self.rows] = speed
        self.weight[self.rows] = self.active - lr * speed
        self.all_classes()

    def all_classes(self) -> None:
        """Forget the sample: all classes count again."""
        self.rows = self._sampled = None

    def forward(
        self, embedding: Tensor, label: Tensor, criterion: Callable[..., Tensor], width: int
    ) -> HeadLoss:
        """The loss of the whole batch from this process's slice (n, emb_size) and (n,), n <= width.

        Every process must call it with the same `width`. `criterion(logits, label)` is the mean of
        a function of the true class's probability.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            missing = width - len(label)
            rows = F.pad(F.normalize(embedding.float()), (0, 0, 0, missing))
            rows = all_gather_rows(rows)
            label = all_gather_rows(F.pad(label, (0, missing), value=-1))
            place = label - self.shard.start
            mine = (label >= self.shard.start) & (label < self.shard.stop)
            if self.rows is not None:
                found = torch.searchsorted(self.rows, place.clamp(min=0))
                place = found.clamp(max=max(len(self.rows) - 1, 0))
            place = torch.where(mine, place, -1)
            target, others, cosine, top = _ShardedSoftmax.apply(
                rows, self.active, place, self.margin, self.chunk
            )
            there = label >= 0
            # A row of padding is one that cannot go wrong: no loss, no gradient.
            two = torch.where(there[:, None], torch.stack([target, others], 1), _sure(rows))
            count = there.sum()
            loss = criterion(two, torch.zeros_like(label)) * (len(label) / count)
            return HeadLoss(loss, ((cosine > top) & there).float().sum(), count)


def _sure(like: Tensor) -> Tensor:
    """Logits of a problem with two classes whose loss is zero in float32."""
    return torch.tensor([60.0, -60.0], dtype=like.dtype, device=like.device)


def _initial_rows(num_classes: int, emb_size: int, shard: slice) -> Tensor:
    """Rows of the dense head's random initial weight, without having it whole.

    In blocks of a multiple of 16 numbers PyTorch's generator gives what it gives in one piece.
    """
    kept = torch.empty(shard.stop - shard.start, emb_size)
    block = 1 << 16
    for start in range(0, num_classes, block):
        stop = min(start + block, num_classes)
        if num_classes - stop < 16:  # the last block takes in what would be too short for one
            stop = num_classes
        rows = torch.empty(stop - start, emb_size).normal_(0, 0.01)
        low, high = max(start, shard.start), min(stop, shard.stop)
        if low < high:
            kept[low - shard.start : high - shard.start] = rows[low - start : high - start]
        if stop == num_classes:
            break
    return kept


class _ShardedSoftmax(torch.autograd.Function):
    """Of each row: the true class's logit, and the others' log of the sum of exponentials.

    Then, without gradients, the true class's cosine and the largest of the others. Logits are
    computed chunk by chunk of the local classes, and once more in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, place: Tensor, margin: Margin, chunk: int
    ) -> tuple[Tensor, ...]:
        mine = place >= 0
        cosine = _target_cosine(rows, weight[place.clamp(min=0)]) * mine if len(weight) else None
        cosine = all_reduce_sum(rows.new_zeros(len(rows)) if cosine is None else cosine)
        highest = rows.new_full((2, len(rows)), LOWEST)  # logit, cosine
        total = rows.new_zeros(len(rows))
        for start, centres in _chunks(weight, len(rows), chunk):
            logits, cosines = _others(rows, centres, cosine, place - start, margin)
            peak = torch.stack([logits.amax(1), cosines.amax(1)]).maximum(highest)
            total = total * (highest[0] - peak[0]).exp()
            total += (logits - peak[0][:, None]).exp_().sum(1)
            highest = peak
        local = highest[0].clone()
        all_reduce_max(highest)
        total = all_reduce_sum(total * (local - highest[0]).exp())
        others = highest[0] + total.log()
        target = margin(cosine[:, None], torch.zeros_like(place))[:, 0]
        ctx.save_for_backward(rows, weight, place, cosine, others)
        ctx.margin, ctx.chunk = margin, chunk
        top = highest[1].clone()
        ctx.mark_non_differentiable(cosine, top)
        return target, others, cosine, top

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_target: Tensor, grad_others: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        rows, weight, place, cosine, others = ctx.saved_tensors
        grad_rows, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight)
        grad_cosine = torch.zeros_like(cosine)
        rows, cosine = rows.detach().requires_grad_(), cosine.detach().requires_grad_()
        for start, centres in _chunks(weight, len(rows), ctx.chunk):
            centres = centres.detach().requires_grad_()
            with torch.enable_grad():
                logits, _ = _others(rows, centres, cosine, place - start, ctx.margin)
            grad = (logits.detach() - others[:, None]).exp_() * grad_others[:, None]
            wanted = (rows, centres, cosine)
            found = torch.autograd.grad(logits, wanted, grad, allow_unused=True)
            grad_rows += found[0]
            grad_weight[start : start + len(centres)] = found[1]
            grad_cosine += 0 if found[2] is None else found[2]
            del logits, grad, found
        all_reduce_sum(grad_cosine)  # each process knows what its own classes make of it
        with torch.enable_grad():
            target = ctx.margin(cosine[:, None], torch.zeros_like(place))[:, 0]
        grad_cosine += torch.autograd.grad(target, cosine, grad_target)[0]
        if len(weight):
            own = weight[place.clamp(min=0)].detach().requires_grad_()
            with torch.enable_grad():
                found = _target_cosine(rows, own)
            found = torch.autograd.grad(found, (rows, own), grad_cosine * (place >= 0))
            grad_rows += found[0]
            grad_weight.index_add_(0, place.clamp(min=0), found[1])
        return grad_rows, grad_weight, None, None, None


def _target_cosine(rows: Tensor, centres: Tensor) -> Tensor:
    """(n, d) unit rows and (n, d) centres to (n,)."""
    return (rows * F.normalize(centres)).sum(1)


def _chunks(weight: Tensor, rows: int, chunk: int) -> list[tuple[int, Tensor]]:
    """(first class, its centres) of runs of classes of at most `chunk` logits, and numbers."""
    size = max(1, chunk // max(rows, weight.shape[1]))
    return [(start, weight[start : start + size]) for start in range(0, len(weight), size)]


def _others(
    rows: Tensor, centres: Tensor, cosine: Tensor, place: Tensor, margin: Margin
) -> tuple[Tensor, Tensor]:
    """Logits (n, k) of classes as wrong ones, and their cosines; the lowest where one is true.

    `cosine` (n,) is the true class's, `place` (n,) where in this chunk it is, if it is.
    """
    cosines = rows @ F.normalize(centres).T
    # The margin sees a problem of 1 + k classes, the first of them the true one.
    together = torch.cat([cosine[:, None], cosines], 1)
    logits = margin(together, torch.zeros_like(place))[:, 1:]
    true = torch.arange(len(centres), device=rows.device) == place[:, None]
    return logits.masked_fill(true, -torch.inf), cosines.detach().masked_fill(true, LOWEST)
