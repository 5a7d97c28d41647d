"""Every margin by its name, and the head that it makes.

    head = build_head("cosface", 512, num_classes, margin_s=64, margin_m=0.35)
    found = head.loss(embedding, label, torch.nn.CrossEntropyLoss())  # loss, right, count

angular_margins.py has those of the softmax, binary_margins.py those with a loss of their own.
Defaults of scale and margin, by name, are config.MARGINS.
"""

from __future__ import annotations

from typing import Any

import config
from heads import binary_margins, softmax_margins
from heads.softmax_margins import MarginHead

# By name: config.MARGINS has the names, and the class of each.
MARGINS: dict[str, type[MarginHead]] = {
    name: getattr(softmax_margins, margin.head, None) or getattr(binary_margins, margin.head)
    for name, margin in config.MARGINS.items()
}


def build_head(
    margin: str,
    emb_size: int,
    num_classes: int,
    *,
    margin_s: float,
    margin_m: float,
    **settings: Any,
) -> MarginHead:
    """The head called `margin` with fresh centres; of `settings` it takes those that it has.

    Raises ValueError for a scale of zero, or a margin_m for a head that has no margin.
    """
    kind = MARGINS[margin]
    if margin_s <= 0:
        raise ValueError("--margin-s 0 makes all logits equal; give a scale above zero.")
    if margin_m and not kind.has_margin:
        raise ValueError(f"--margin {margin} has no margin; leave --margin-m out.")
    own = {name: value for name, value in settings.items() if name in kind.settings}
    return kind(emb_size, num_classes, margin_s, margin_m, **own)
