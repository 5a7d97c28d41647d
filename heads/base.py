"""What the training step asks of a head: class centres, a loss, and rows that processes may share.

    head = ArcFace(512, num_classes, margin_s=64.0, margin_m=0.5)
    result = head.loss(embedding, label, nn.CrossEntropyLoss())
    result.loss, result.num_correct, result.count

A head is the last, linear layer: row j of its weight is the centre of class j, and cos θ_j is the
cosine of the angle between an embedding and that centre.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]  # logits (N, classes), labels (N,) to a mean loss


class HeadLoss(NamedTuple):
    """The result of a head on a batch."""

    loss: Tensor  # the criterion's mean over the batch, with the margin
    num_correct: Tensor  # images whose nearest class centre is their own, without the margin; float
    count: Tensor | int  # images in the batch


class Head(nn.Module):
    """The interface of all heads. As written here, one process holds all classes.

    PartialFC overrides what differs when each process holds some of the classes only, or when a
    step uses some of them only.
    """

    weight: nn.Parameter  # (classes, emb_size): the class centres, unnormalised

    def sample(self, label: Tensor, slice_size: int, step: int) -> Tensor | int:
        """Choose the classes of step number `step`; returns the number of images in its batch.

        `label` (n,) are those of this process's slice of the batch, of which the largest slice has
        `slice_size`. Here a step always uses all classes.
        """
        return len(label)

    def loss(
        self, embedding: Tensor, label: Tensor, criterion: Criterion, slice_size: int = 0
    ) -> HeadLoss:
        """The loss of embeddings (n, emb_size) with labels (n,), n <= slice_size.

        With several processes, that of the whole batch, of which these are this process's slice.
        """
        raise NotImplementedError

    def update(self, optimizer: torch.optim.SGD, overflow: Tensor | None = None) -> None:
        """What is left to do after optimizer.step(): nothing, it has updated all parameters.

        `overflow` is 1.0 if the step has been skipped; None where no step is.
        """

    @torch.no_grad()
    def set_centres(self, directions: Tensor) -> None:
        """Turn the centres into these directions (classes, emb_size); rows of zeros change nothing.

        Each keeps its length, that of a random centre. Cosines do not depend on it, but how far a
        step turns a centre does, as the inverse square: at length 1, where a random one of 512
        numbers has 0.23, learning rates would act as if they were 20 times smaller.
        """
        rows = self.local_rows(directions).to(self.weight)
        rows = F.normalize(rows) * self.weight.norm(dim=1, keepdim=True)
        self.weight.copy_(torch.where(rows.any(1, keepdim=True), rows, self.weight))

    def sharded_parameters(self) -> list[Tensor]:
        """The tensors whose gradients are this process's alone; all others are equal everywhere."""
        return []

    def gather_rows(self, tensor: Tensor) -> Tensor | None:
        """The rows of all classes, for a checkpoint, of a tensor that is like the weight.

        With several processes rank 0 gets them, the others None; every process must call it.
        """
        return tensor

    def local_rows(self, tensor: Tensor) -> Tensor:
        """The rows that this process holds, out of those of all classes: undoes `gather_rows`."""
        return tensor


class MarginHead(Head):
    """A head whose margin changes the logit of the true class, by a formula in `margin`."""

    # Constructor arguments besides margin_s and margin_m, from --margin-option.
    options: ClassVar[tuple[str, ...]] = ()
    # Partial FC can use `margin`: each logit depends on its own and the true class's cosine only.
    shardable: ClassVar[bool] = False
    is_softmax: ClassVar[bool] = True  # uses the criterion that it is given
    has_margin: ClassVar[bool] = True  # uses margin_m

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, emb_size).normal_(0, 0.01))
        self.margin_s = margin_s
        self.margin_m = margin_m

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to (N, classes) cosines, in float32 (or 64) even under autocast.

        In bfloat16 a cosine near 1 has steps of 1/256, after the scale of 64 a quarter of a logit.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            dtype = torch.promote_types(embedding.dtype, torch.float32)
            return F.linear(F.normalize(embedding.to(dtype)), F.normalize(self.weight.to(dtype)))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits (N, classes)."""
        raise NotImplementedError

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and labels (N,) to logits (N, classes)."""
        return self.margin(self.cosine(embedding), label)

    def loss(
        self, embedding: Tensor, label: Tensor, criterion: Criterion, slice_size: int = 0
    ) -> HeadLoss:
        """The mean loss of (N, emb_size) embeddings with labels (N,).

        In training mode it also updates the statistics that some margins keep of the batches.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            cosine = self.cosine(embedding)  # (N, classes)
            is_correct = cosine.detach().argmax(1) == label
            loss = self._loss(embedding, cosine, label, criterion)
        return HeadLoss(loss, is_correct.float().sum(), len(label))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        return criterion(self.margin(cosine, label), label)

    def scaled_logits(self, cosine: Tensor, label: Tensor, target: Tensor) -> Tensor:
        """margin_s times cosines (N, classes), the true classes' replaced by `target` (N, 1)."""
        return cosine.scatter(1, label.unsqueeze(1), target) * self.margin_s


def target_cosine(cosine: Tensor, label: Tensor) -> Tensor:
    """cos θ_y: cosines (N, classes) and labels (N,) to the true classes' (N, 1), in -1 ... 1."""
    return cosine.gather(1, label.unsqueeze(1)).clamp(-1, 1)  # rounding can exceed 1


def target_mask(cosine: Tensor, label: Tensor) -> Tensor:
    """(N, classes) bool: true at each row's own class, given by labels (N,)."""
    return torch.arange(cosine.shape[1], device=label.device) == label.unsqueeze(1)
