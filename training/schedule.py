"""The learning rate over a run, as a pure function."""

from __future__ import annotations

import math


def learning_rate(
    epoch: float,
    *,
    lr: float,
    epochs: int,
    schedule: str = "step",
    milestones: tuple[int, ...] = (),
    poly_power: float = 2.0,
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate at a moment of training, in epochs (2.5: the middle of the third).

    It rises from zero over `warmup_epochs`; then "step" divides it by ten at each milestone,
    "cosine" and "poly" take it to zero at the end.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "step":
        return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    rest = 1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    rest = min(max(rest, 0.0), 1.0)
    if schedule == "cosine":
        return lr * (1 - math.cos(math.pi * rest)) / 2
    return lr * rest**poly_power
