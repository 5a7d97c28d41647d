"""Losses with one threshold for all: each class is a question of its own, yes or no.

Where softmax compares the classes of one image, these ask of every cosine whether it lies on its
side of a learned threshold b, as verification does later. Each brings its own loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.softmax_margins import CosFace, Criterion, MarginHead


def true_places(cosine: Tensor, label: Tensor) -> Tensor:
    """(N, C) bool: true in each row at its class (N,)."""
    return torch.arange(cosine.shape[1], device=label.device) == label.unsqueeze(1)


def binary_losses(
    logits: Tensor, label: Tensor, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log(1 + e^-p) of each true class's logit p (N,), and Σ log(1 + e^n) of the others' (N,).

    Of logits (N, C) and classes (N,); classes that are `left_out` (C,) cost nothing.
    """
    true = true_places(logits, label)
    losses = -F.logsigmoid(torch.where(true, logits, -logits))
    if left_out is not None:
        losses = losses.masked_fill(left_out, 0)
    own = losses.gather(1, label.unsqueeze(1))[:, 0]
    return own, losses.masked_fill(true, 0).sum(1)


class SphereFace2(MarginHead):
    """Binary classification with g(z) = 2·((z + 1) / 2)^t − 1 (Wen et al., 2108.01513).

    λ/r·log(1 + exp(−r·(g(cos θ_y) − m) − b)) + (1 − λ)/r·Σ log(1 + exp(r·(g(cos θ_j) + m) + b)),
    j ≠ y, times 50, without which the paper's learning rates would be far too small for it.
    r is margin_s, λ = 0.7, t = 3; b is learned and starts where the loss is smallest while all
    angles are right ones.
    """

    is_softmax = False
    LAMBDA, T, WEIGHT = 0.7, 3, 50.0

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        z = self.LAMBDA / ((1 - self.LAMBDA) * max(num_classes - 1, 1))
        level = 2 * 0.5**self.T - 1  # g(0)
        root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(-2 * margin_s * margin_m))
        bias = math.log(2 * z) - margin_s * (level + margin_m) - math.log(1 - z + root)
        self.bias = nn.Parameter(torch.full((1,), bias))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to r·(g ∓ m) + b."""
        g = 2 * ((cosine.clamp(-1, 1) + 1) / 2) ** self.T - 1
        side = 1 - 2 * true_places(cosine, label).to(g.dtype)
        return self.margin_s * (g + self.margin_m * side) + self.bias

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        own, others = binary_losses(self.margin(cosine, label), label)
        total = self.LAMBDA * own + (1 - self.LAMBDA) * others
        return self.WEIGHT / self.margin_s * total.mean()


class UniFace(MarginHead):
    """Unified cross entropy with one learned threshold (Zhou et al., ICCV 2023).

    log(1 + exp(−s·(cos θ_y − m) + b)) + Σ log(1 + exp(s·cos θ_j − b)), j ≠ y; b starts at
    log(10·classes), where the wrong classes together cost next to nothing.
    """

    is_softmax = False

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.threshold = nn.Parameter(torch.full((1,), math.log(10 * max(num_classes, 1))))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to s·(cos θ − m for the true class) − b."""
        true = true_places(cosine, label).to(cosine.dtype)
        return self.margin_s * (cosine - self.margin_m * true) - self.threshold

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        own, others = binary_losses(self.margin(cosine, label), label)
        return (own + others).mean()


class UniTSFace(CosFace):
    """CosFace and, between samples, a loss with a unified threshold (UniTSFace, NeurIPS 2023).

    Added to CosFace's loss:
    log(1 + exp(−s·(cos(x, x_y) − 0.1) + b)) + Σ log(1 + exp(s·cos(x, x_j) − b)), j ≠ y,
    where x_j is the last embedding of identity j that a batch has had, kept without its gradient.
    An identity takes part once it has been seen. b is learned and starts at log(10·classes).
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
        between = self.sample_to_sample(embedding, label)
        if self.training:
            self.remember(embedding.detach(), label)
        return criterion(self.margin(cosine, label), label) + between

    def sample_to_sample(self, embedding: Tensor, label: Tensor) -> Tensor:
        """The term's mean over (N, emb_size) embeddings of the classes (N,)."""
        cosine = F.linear(F.normalize(embedding), F.normalize(self.memory.to(embedding.dtype)))
        true = true_places(cosine, label).to(cosine.dtype)
        logits = self.margin_s * (cosine - self.SAMPLE_MARGIN * true) - self.threshold
        own, others = binary_losses(logits, label, left_out=(self.memory == 0).all(1))
        return (own + others).mean()

    @torch.no_grad()
    def remember(self, embedding: Tensor, label: Tensor) -> None:
        """Keep each identity's last embedding of the batch."""
        place = torch.arange(len(label), device=label.device)
        last = torch.full((len(self.memory),), -1, device=label.device)
        last.scatter_reduce_(0, label, place, "amax")
        # Of an identity's several rows all write the same, so their order is of no matter.
        self.memory[label] = embedding[last[label]].to(self.memory.dtype)
