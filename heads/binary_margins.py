"""One-vs-all (binary) losses with a shared threshold.

Softmax compares the classes of one image with each other. These losses compare every cosine with a
learned threshold b instead, as verification does later: above it for the true class, below it for
all others. Each brings its own loss and does not use the criterion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import Criterion, MarginHead, target_mask
from heads.softmax_margins import CosFace


def binary_losses(
    logits: Tensor, label: Tensor, ignored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log(1 + e^-p) of each true class's logit p, and Σ log(1 + e^n) of the others' n, (N,) each.

    Of logits (N, C) and labels (N,). The classes where `ignored` (C,) bool is true add nothing.
    """
    is_target = target_mask(logits, label)
    losses = -F.logsigmoid(torch.where(is_target, logits, -logits))  # (N, C)
    if ignored is not None:
        losses = losses.masked_fill(ignored, 0)
    positive = losses.gather(1, label.unsqueeze(1))[:, 0]
    return positive, losses.masked_fill(is_target, 0).sum(1)


class SphereFace2(MarginHead):
    """Binary classification with g(z) = 2·((z + 1) / 2)^t − 1 (Wen et al., 2108.01513).

    λ/r·log(1 + exp(−r·(g(cos θ_y) − m) − b)) + (1 − λ)/r·Σ log(1 + exp(r·(g(cos θ_j) + m) + b)),
    j ≠ y, times 50, without which the paper's learning rates would be far too small for it.
    r is margin_s, λ = 0.7, t = 3; b is learned and starts at the minimum of the loss for cosines of
    zero, which is about where all are at the start.
    """

    is_softmax = False
    LAMBDA, T, WEIGHT = 0.7, 3, 50.0

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        # With all cosines zero the loss depends on b alone. Its derivative vanishes where a
        # quadratic in e^b does, of which this is the positive root.
        z = self.LAMBDA / ((1 - self.LAMBDA) * max(num_classes - 1, 1))
        level = 2 * 0.5**self.T - 1  # g(0)
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(-2 * margin_s * margin_m))
        bias = math.log(2 * z) - margin_s * (level + margin_m) - math.log(1 - z + root)
        self.bias = nn.Parameter(torch.full((1,), bias))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to r·(g ∓ m) + b, with −m for the true class."""
        g = 2 * ((cosine.clamp(-1, 1) + 1) / 2) ** self.T - 1
        sign = 1 - 2 * target_mask(cosine, label).to(g.dtype)  # -1 for the true class, else 1
        return self.margin_s * (g + self.margin_m * sign) + self.bias

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        positive, negative = binary_losses(self.margin(cosine, label), label)
        total = self.LAMBDA * positive + (1 - self.LAMBDA) * negative
        return self.WEIGHT / self.margin_s * total.mean()


class UniFace(MarginHead):
    """Unified cross entropy with one learned threshold (Zhou et al., ICCV 2023).

    log(1 + exp(−s·(cos θ_y − m) + b)) + Σ log(1 + exp(s·cos θ_j − b)), j ≠ y; b starts at
    log(10·classes), where all wrong classes together add next to nothing to the loss.
    """

    is_softmax = False

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.threshold = nn.Parameter(torch.full((1,), math.log(10 * max(num_classes, 1))))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to s·(cos θ − m for the true class) − b."""
        is_target = target_mask(cosine, label).to(cosine.dtype)
        return self.margin_s * (cosine - self.margin_m * is_target) - self.threshold

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        positive, negative = binary_losses(self.margin(cosine, label), label)
        return (positive + negative).mean()


class UniTSFace(CosFace):
    """CosFace and, between samples, a loss with a unified threshold (UniTSFace, NeurIPS 2023).

    Added to CosFace's loss:
    log(1 + exp(−s·(cos(x, x_y) − 0.1) + b)) + Σ log(1 + exp(s·cos(x, x_j) − b)), j ≠ y,
    where x_j is the last embedding of class j in any batch so far, stored without its gradient.
    Classes that no batch has had yet add nothing. b is learned and starts at log(10·classes).
    """

    shardable = False
    SAMPLE_MARGIN = 0.1

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.threshold = nn.Parameter(torch.full((1,), math.log(10 * max(num_classes, 1))))
        self.register_buffer("memory", torch.zeros(num_classes, emb_size))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        sample_loss = self.sample_to_sample_loss(embedding, label)
        if self.training:
            self.update_memory(embedding.detach(), label)
        return criterion(self.margin(cosine, label), label) + sample_loss

    def sample_to_sample_loss(self, embedding: Tensor, label: Tensor) -> Tensor:
        """The mean of the added term over embeddings (N, emb_size) with labels (N,)."""
        cosine = F.linear(F.normalize(embedding), F.normalize(self.memory.to(embedding.dtype)))
        is_target = target_mask(cosine, label).to(cosine.dtype)
        logits = self.margin_s * (cosine - self.SAMPLE_MARGIN * is_target) - self.threshold
        not_seen = (self.memory == 0).all(1)
        positive, negative = binary_losses(logits, label, ignored=not_seen)
        return (positive + negative).mean()

    @torch.no_grad()
    def update_memory(self, embedding: Tensor, label: Tensor) -> None:
        """Store each class's last embedding of the batch.

        With labels [1, 0, 1], class 1 has rows 0 and 2 and stores row 2.
        """
        row = torch.arange(len(label), device=label.device)
        last = torch.full((len(self.memory),), -1, device=label.device)  # last row of each class
        last.scatter_reduce_(0, label, row, "amax")
        # All rows of a class write the same values, so the order of the writes does not matter.
        self.memory[label] = embedding[last[label]].to(self.memory.dtype)
