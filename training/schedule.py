"""The learning-rate schedule as a pure function of the epoch."""

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
    """The learning rate at `epoch`, a fraction in mid-epoch: 2.5 is the middle of the third.

    It rises linearly from 0 to `lr` over `warmup_epochs`. After that, "step" divides it by ten at
    each of `milestones`; "cosine" and "poly" let it fall from `lr` to 0 at the end of the run:
    lr · (1 + cos(π·t)) / 2 and lr · (1 − t)^poly_power, t the fraction of the rest that is done.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "step":
        return lr * 0.1 ** sum(epoch >= milestone for milestone in milestones)
    # 1 - t, clipped: a run that is extended past `epochs` has a rate of 0, not a negative one.
    remaining = 1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    remaining = min(max(remaining, 0.0), 1.0)
    if schedule == "cosine":
        return lr * (1 - math.cos(math.pi * remaining)) / 2
    return lr * remaining**poly_power
