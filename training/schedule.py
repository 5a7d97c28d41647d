"""What changes with the epoch: the learning rate, and whether the backbone is trained."""

from __future__ import annotations

import math


def learning_rate(
    epoch: float,
    *,
    lr: float,
    epochs: int,
    schedule: str = "step",
    milestones: tuple[int, ...] = (),
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate at `epoch`, a fraction in mid-epoch: 2.5 is the middle of the third.

    It rises linearly from 0 to `lr` over `warmup_epochs`. After that, "step" divides it by ten at
    each of `milestones`; "cosine", "linear" and "poly" let it fall from `lr` to 0 at the end of the
    run: lr · (1 + cos(π·t)) / 2, lr · (1 − t) and lr · (1 − t)², t the fraction of the rest that is
    done.
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
    return lr * remaining ** (1 if schedule == "linear" else 2)


def frozen_epochs(freeze_epochs: int, backbone_lr: float) -> float:
    """How many epochs train the head alone: all of them if the backbone's learning rate is 0.

    In training mode its batch normalisation would still follow the images, away from the statistics
    that belong to its weights.
    """
    return freeze_epochs if backbone_lr else math.inf
