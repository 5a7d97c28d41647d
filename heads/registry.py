"""Every margin by its name, and the head that it makes.

    head = build_head("cosface", 512, num_classes, margin_s=64.0, margin_m=0.35)
    result = head.loss(embedding, label, torch.nn.CrossEntropyLoss())

softmax_margins.py has the margins of the softmax, binary_margins.py those with a loss of their own.
"""

from __future__ import annotations

from typing import Any

import config
from distributed.process_group import world_size
from heads import binary_margins, softmax_margins
from heads.base import Head, MarginHead
from heads.partial_fc import PartialFC

# config.MARGINS has the names, and for each its class, default scale, margin and options.
HEADS: dict[str, type[MarginHead]] = {
    name: getattr(softmax_margins, margin.head, None) or getattr(binary_margins, margin.head)
    for name, margin in config.MARGINS.items()
}

# A gigabyte of logits: from there on one process computes them in chunks, too.
MAX_DENSE_LOGITS = 1 << 28


def build_head(
    margin: str,
    emb_size: int,
    num_classes: int,
    *,
    margin_s: float,
    margin_m: float,
    options: dict[str, Any] | None = None,
    batch_size: int = 0,
    sample_rate: float = 1.0,
    seed: int = 0,
) -> Head:
    """The head called `margin` with random centres; PartialFC where its classes are sharded.

    That is the case in a group of processes, with a sample rate below 1, and if all logits of a
    batch would take too much memory. Raises ValueError where the arguments do not fit together.
    """
    head, options = HEADS[margin], options or {}
    if margin_s <= 0:
        raise ValueError("--margin-s 0 makes all logits equal; give a scale above zero.")
    if margin_m and not head.has_margin:
        raise ValueError(f"--margin {margin} has no margin; leave --margin-m out.")
    sharded = world_size() > 1 or sample_rate < 1
    if sharded and not head.shardable:
        shardable = ", ".join(name for name, other in HEADS.items() if other.shardable)
        raise ValueError(
            f"--margin {margin} needs all identities in one process, so it works neither under "
            f"torchrun nor with --sample-rate; take one of {shardable}."
        )
    if sharded or (head.shardable and batch_size * num_classes > MAX_DENSE_LOGITS):
        # Its margin alone is used, not its weight, which has no rows.
        rule = head(emb_size, 0, margin_s, margin_m, **options).margin
        return PartialFC(emb_size, num_classes, rule, sample_rate=sample_rate, seed=seed)
    return head(emb_size, num_classes, margin_s, margin_m, **options)
