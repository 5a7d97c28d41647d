"""Focal loss for softmax classification, weighted sample by sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """−(1 − p)^γ · log p, p the true class's softmax probability (Lin et al., 1708.02002, eq. 4).

    Each sample has its own weight and the weighted losses are averaged; weighting the batch's mean
    would only rescale the gradient. γ = 0 is cross entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """(N, num_classes) logits and (N,) classes to a scalar."""
        cross_entropy = F.cross_entropy(logits, label, reduction="none")  # −log p, (N,)
        # 1 − p as −expm1(−CE): exact where p is close to one.
        miss = -(-cross_entropy).expm1()
        # A power below one has an infinite slope at zero.
        weight = miss.clamp(min=1e-12) ** self.gamma
        return (weight * cross_entropy).mean()
