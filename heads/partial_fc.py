"""Partial FC: the classifier sharded over processes, without all logits in memory at once.

An et al., "Killing Two Birds with One Stone" (2203.15565). Each process holds a range of the
classes (its class shard) and computes their logits for the embeddings of the whole batch. With a
sample rate of 1 this is exact: the loss and the gradients are those of the dense head. Below 1, a
step uses the classes of its batch and a random sample of the others, and only their centres (and
those centres' momentum) change.

How the softmax is put together: the loss of an image depends on two numbers only, the logit t of
its true class and o = log Σ exp(logits of all other classes), since the probability of the true
class is p = e^t / (e^t + e^o). Each process contributes its classes' part of both. Then (t, o) are
the logits of a problem with two classes that has the same p, so that cross entropy, focal loss and
any other function of p is called on them as it is.

Example, 10 classes on 3 processes, 4 images each: the class shards are 0-2, 3-5 and 6-9. All
processes gather the 12 embeddings and labels. An image of class 4 has its true logit on process 1,
as local class 1; for processes 0 and 2 all of their classes are negatives of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.sgd import sgd

from distributed.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    gather_to_main,
    rank_slice,
)
from distributed.process_group import rank
from heads.base import Criterion, Head, HeadLoss

# Logits computed at a time; with what the margin makes of them, five times as many numbers.
CHUNK = 1 << 24
# Below all logits and cosines. Finite, so that the difference of two is a number, not nan.
LOWEST = -1e30
NO_LABEL = -1  # of padding rows

Margin = Callable[[Tensor, Tensor], Tensor]


class PartialFC(Head):
    """This process's shard of the class centres, and the loss over all shards.

    `margin(cosine, label)` takes cosines (n, k) and labels (n,) to logits (n, k), as ArcFace.margin
    does. The logit that it gives to a class other than the true one may depend on that class's
    cosine and on the true class's, not on others.
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
        self.sampled: Tensor | None = None  # local classes of this step, ascending; None: all
        self._sampled_weight: Tensor | None = None  # a copy of their centres, with its own gradient

    @property
    def active(self) -> Tensor:
        """The centres that this step uses and whose gradient it computes."""
        return self.weight if self.sampled is None else self._sampled_weight

    # -------------------------------------------------------------------------- a step

    def sample(self, label: Tensor, slice_size: int, step: int) -> Tensor | int:
        """Choose the classes of step number `step`; returns the number of images in its batch."""
        label = self._gather_labels(label, slice_size)
        if self.sample_rate < 1:
            self.sample_classes(label, step)
        return (label != NO_LABEL).sum()

    def _gather_labels(self, label: Tensor, slice_size: int) -> Tensor:
        """The labels of the whole batch (processes * slice_size,); NO_LABEL where slices end."""
        return all_gather_rows(F.pad(label, (0, slice_size - len(label)), value=NO_LABEL))

    @torch.no_grad()
    def sample_classes(self, label: Tensor, step: int) -> None:
        """Choose the local classes of a step: those of the batch's labels (n,), then random ones.

        The choice depends on the seed, the step, the labels and the number of processes alone, so
        that a resumed run chooses the same.
        """
        # A random priority per class; the highest `count` are taken.
        generator = torch.Generator(self.weight.device)
        seeds = np.random.default_rng([self.seed, 3, step, rank()])
        generator.manual_seed(int(seeds.integers(2**63)))
        size = len(self.weight)
        priority = torch.rand(size, generator=generator, device=self.weight.device)
        # The batch's own classes come before all others. Labels of other processes go to a further
        # place at the end: choosing by a mask would have the host wait for the GPU.
        own = torch.where(self._is_local(label), label - self.shard.start, size)
        priority = F.pad(priority, (0, 1)).index_fill_(0, own, 2.0)[:size]
        count = int(self.sample_rate * size)
        if count < len(label):  # perhaps too small for the batch's classes: here the host waits
            count = max(count, int((priority == 2).sum()))
        self.sampled = priority.topk(count).indices.sort().values
        self._sampled_weight = self.weight[self.sampled].requires_grad_()

    def loss(
        self, embedding: Tensor, label: Tensor, criterion: Criterion, slice_size: int = 0
    ) -> HeadLoss:
        """The loss of the whole batch, of which (n, emb_size) and labels (n,) are this slice.

        Every process must call it, with the same `slice_size` >= n. `criterion(logits, label)` has
        to be the mean of a function of the true class's probability.
        """
        padding = slice_size - len(label)
        with torch.autocast(embedding.device.type, enabled=False):
            # All-gather takes slices of one length only, hence the padding.
            unit = F.pad(F.normalize(embedding.float()), (0, 0, 0, padding))
            unit = all_gather_rows(unit)  # (B, emb_size), B = processes * slice_size
            label = self._gather_labels(label, slice_size)  # (B,)
            target, others, target_cosine, highest_cosine = _ShardedSoftmax.apply(
                unit, self.active, self._local_index(label), self.margin, self.chunk
            )  # (B,) each
            is_image = label != NO_LABEL
            count = is_image.sum()
            # Padding gets two logits that cannot be wrong: no loss, no gradient.
            target, others = target.where(is_image, 60.0), others.where(is_image, -60.0)
            logits = torch.stack([target, others], 1)
            # The criterion averages over padding, too, which adds zero to the sum.
            loss = criterion(logits, torch.zeros_like(label)) * (len(label) / count)
            is_correct = (target_cosine > highest_cosine) & is_image
            return HeadLoss(loss, is_correct.float().sum(), count)

    def _is_local(self, label: Tensor) -> Tensor:
        """Which of the labels (n,) are classes of this process, bool."""
        return (label >= self.shard.start) & (label < self.shard.stop)

    def _local_index(self, label: Tensor) -> Tensor:
        """Rows of `active` that are the true classes of labels (n,), -1 where another process's.

        Shard 3-5, labels [4, 0, 5]: [1, -1, 2]. If classes 3 and 5 are sampled, with labels [3, 5]
        they are rows 0 and 1.
        """
        index = label - self.shard.start
        if self.sampled is not None:
            # Every true class is among the sampled ones; the clamps are for the other labels.
            index = torch.searchsorted(self.sampled, index.clamp(min=0))
            index = index.clamp(max=max(len(self.sampled) - 1, 0))
        return torch.where(self._is_local(label), index, -1)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.SGD, overflow: Tensor | None = None) -> None:
        """SGD on the sampled centres; the next step uses all classes again unless it samples.

        The optimizer has left the weight alone, which has no gradient, but has its settings and its
        momentum, one row per class. `overflow` is 1.0 if the step changes nothing, else 0.0.
        """
        if self.sampled is None:
            return
        (group,) = [g for g in optimizer.param_groups if any(p is self.weight for p in g["params"])]
        state = optimizer.state[self.weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(self.weight)
        rows = state["momentum_buffer"][self.sampled]
        settings = {name: group[name] for name in ("lr", "momentum", "weight_decay", "fused")}
        settings |= {"dampening": 0, "nesterov": False, "maximize": False, "found_inf": overflow}
        sgd([self.active], [self.active.grad], [rows], **settings)
        state["momentum_buffer"][self.sampled] = rows
        self.weight[self.sampled] = self.active.detach()
        self.use_all_classes()

    def use_all_classes(self) -> None:
        """Forget the sample."""
        self.sampled = self._sampled_weight = None

    # -------------------------------------------------------------------------- shards

    def sharded_parameters(self) -> list[Tensor]:
        """The active centres: each process has its own."""
        return [self.active]

    def gather_rows(self, tensor: Tensor) -> Tensor | None:
        """The shards of a tensor like the weight, put together in rank 0; None in the others."""
        return gather_to_main(tensor, self.num_classes)

    def local_rows(self, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor with a row per class."""
        return tensor[self.shard]


def _initial_rows(num_classes: int, emb_size: int, shard: slice) -> Tensor:
    """Rows of the random initial weight that the dense head has, computed block by block.

    All rows are generated and those outside the shard discarded, so that a run begins the same for
    any number of processes. In blocks of a multiple of 16 numbers PyTorch's generator gives what it
    gives for all at once.
    """
    rows = torch.empty(shard.stop - shard.start, emb_size)
    block = 1 << 16
    for start in range(0, num_classes, block):
        stop = min(start + block, num_classes)
        if num_classes - stop < 16:  # the last block includes what would be too short for one
            stop = num_classes
        generated = torch.empty(stop - start, emb_size).normal_(0, 0.01)
        low, high = max(start, shard.start), min(stop, shard.stop)
        if low < high:
            rows[low - shard.start : high - shard.start] = generated[low - start : high - start]
        if stop == num_classes:
            break
    return rows


class _ShardedSoftmax(torch.autograd.Function):
    """(target, others, target_cosine, highest_cosine), (B,) each, of B embeddings.

    `target` is the true class's logit, `others` the log of the sum of exponentials of all other
    logits. The cosines, which have no gradient, are the true class's and the highest of the others.

    Arguments: unit embeddings (B, d); this process's centres (k, d); the row of each true class in
    them, -1 where another process has it (B,); the margin; the number of logits in a chunk. Logits
    are computed chunk by chunk, and once more in the backward pass: they are never all in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, unit: Tensor, weight: Tensor, index: Tensor, margin: Margin, chunk: int
    ) -> tuple[Tensor, ...]:
        # 1. The true classes' cosines. One process has each; the others add zero.
        cosine = unit.new_zeros(len(unit))
        if len(weight):
            cosine = _target_cosine(unit, weight[index.clamp(min=0)]) * (index >= 0)
        cosine = all_reduce_sum(cosine)

        # 2. log Σ exp over this process's other classes: `total` is the sum of exp(logit - peak)
        # with the highest logit so far as peak, so that no exponential overflows. When a chunk has
        # a higher one, the sum so far is rescaled by exp(old peak - new peak).
        highest = unit.new_full((2, len(unit)), LOWEST)  # logit, cosine
        total = unit.new_zeros(len(unit))
        for start, centres in _chunks(weight, len(unit), chunk):
            logits, cosines = _other_logits(unit, centres, cosine, index - start, margin)
            peak = torch.stack([logits.amax(1), cosines.amax(1)]).maximum(highest)
            total = total * (highest[0] - peak[0]).exp()
            total += (logits - peak[0][:, None]).exp_().sum(1)
            highest = peak

        # 3. Over all processes, in the same way: the common peak, then the rescaled sums.
        local_peak = highest[0].clone()
        all_reduce_max(highest)
        total = all_reduce_sum(total * (local_peak - highest[0]).exp())
        others = highest[0] + total.log()

        # 4. The true classes' logits, which every process computes from their cosines.
        target = margin(cosine[:, None], torch.zeros_like(index))[:, 0]
        ctx.save_for_backward(unit, weight, index, cosine, others)
        ctx.margin, ctx.chunk = margin, chunk
        highest_cosine = highest[1].clone()
        ctx.mark_non_differentiable(cosine, highest_cosine)
        return target, others, cosine, highest_cosine

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_target: Tensor, grad_others: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        unit, weight, index, cosine, others = ctx.saved_tensors
        grad_unit, grad_weight = torch.zeros_like(unit), torch.zeros_like(weight)
        grad_cosine = torch.zeros_like(cosine)
        unit, cosine = unit.detach().requires_grad_(), cosine.detach().requires_grad_()

        # 1. Through `others`: d others / d logit_j = exp(logit_j - others), the softmax among the
        # other classes. The logits are computed again, and autograd takes the gradient from there.
        for start, centres in _chunks(weight, len(unit), ctx.chunk):
            centres = centres.detach().requires_grad_()
            with torch.enable_grad():
                logits, _ = _other_logits(unit, centres, cosine, index - start, ctx.margin)
            grad = (logits.detach() - others[:, None]).exp_() * grad_others[:, None]
            inputs = (unit, centres, cosine)
            # Most margins do not use the true class's cosine in the other logits: no gradient then.
            grads = torch.autograd.grad(logits, inputs, grad, allow_unused=True)
            grad_unit += grads[0]
            grad_weight[start : start + len(centres)] = grads[1]
            grad_cosine += 0 if grads[2] is None else grads[2]
            del logits, grad, grads  # before the next chunk takes memory
        all_reduce_sum(grad_cosine)  # each process has the share of its own classes

        # 2. Through `target`, the true class's logit, to its cosine.
        with torch.enable_grad():
            target = ctx.margin(cosine[:, None], torch.zeros_like(index))[:, 0]
        grad_cosine += torch.autograd.grad(target, cosine, grad_target)[0]

        # 3. From the true classes' cosines to the embeddings and to their centres, in the process
        # that has them. A class can be several images' (index_add_ sums).
        if len(weight):
            centres = weight[index.clamp(min=0)].detach().requires_grad_()
            with torch.enable_grad():
                local_cosine = _target_cosine(unit, centres)
            grads = torch.autograd.grad(local_cosine, (unit, centres), grad_cosine * (index >= 0))
            grad_unit += grads[0]
            grad_weight.index_add_(0, index.clamp(min=0), grads[1])
        # grad_unit is this process's share; all_gather_rows' backward pass sums the shares.
        return grad_unit, grad_weight, None, None, None


def _target_cosine(unit: Tensor, centres: Tensor) -> Tensor:
    """Unit embeddings (B, d) and their true classes' centres (B, d) to cosines (B,)."""
    return (unit * F.normalize(centres)).sum(1)


def _chunks(weight: Tensor, batch: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first class, its centres) of ranges of classes of at most `chunk` logits, and numbers."""
    size = max(1, chunk // max(batch, weight.shape[1]))
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size]


def _other_logits(
    unit: Tensor, centres: Tensor, cosine: Tensor, index: Tensor, margin: Margin
) -> tuple[Tensor, Tensor]:
    """Logits (B, k) of k classes as negatives, and their cosines; the lowest where one is true.

    `cosine` (B,) is the true class's; `index` (B,) is its column, outside 0 ... k - 1 if it is not
    among these classes.
    """
    cosines = unit @ F.normalize(centres).T  # (B, k)
    # The margin is applied to a problem of 1 + k classes, of which the first is the true one.
    logits = margin(torch.cat([cosine[:, None], cosines], 1), torch.zeros_like(index))[:, 1:]
    is_target = torch.arange(len(centres), device=unit.device) == index[:, None]
    logits = logits.masked_fill(is_target, -torch.inf)
    return logits, cosines.detach().masked_fill(is_target, LOWEST)
