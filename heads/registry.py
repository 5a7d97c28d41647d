"""Every margin by its name, and the head that it makes.

    head = build_head("cosface", 512, num_classes, margin_s=64, margin_m=0.35)
    found = head.loss(embedding, label, torch.nn.CrossEntropyLoss())  # loss, right, count

angular_margins.py has those of the softmax, binary_margins.py those with a loss of their own.
Defaults of scale and margin, by name, are config.MARGIN_DEFAULTS.
"""

from __future__ import annotations

from typing import Any

from heads.binary_margins import SphereFace2, UniFace, UniTSFace
from heads.softmax_margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    ElasticArc,
    ElasticCos,
    MagFace,
    MarginHead,
    NormSoftmax,
    Softmax,
    SphereFace,
    SubcenterArc,
)

MARGINS: dict[str, type[MarginHead]] = {
    "softmax": Softmax,
    "norm_softmax": NormSoftmax,
    "sphereface": SphereFace,
    "sphereface2": SphereFace2,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": Combined,
    "curricularface": CurricularFace,
    "magface": MagFace,
    "adaface": AdaFace,
    "elastic_arc": ElasticArc,
    "elastic_cos": ElasticCos,
    "subcenter": SubcenterArc,
    "uniface": UniFace,
    "unitsface": UniTSFace,
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
