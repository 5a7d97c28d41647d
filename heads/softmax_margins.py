"""Margins of the softmax: what a class's logit becomes of the angle to its centre.

A head is ArcMarginModel with another `margin(cosine, label)`, and answers
`loss(embedding, label, criterion)`, where the criterion is cross entropy or focal loss on its
logits. θ is the angle between an embedding and a class centre, y the true class, s the scale.
All is computed in float32, under autocast, too (in float64, if the embedding is).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.partial_fc import HeadLoss
from models import ArcMarginModel

Criterion = Callable[[Tensor, Tensor], Tensor]


class MarginHead(ArcMarginModel):
    """A head with ArcFace's margin, from which the others differ."""

    # Settings that it takes as keywords, besides margin_s and margin_m.
    settings: ClassVar[tuple[str, ...]] = ()
    # PartialFC can use `margin`: it depends on nothing but the class's and the true class's cosine.
    shardable: ClassVar[bool] = False
    is_softmax: ClassVar[bool] = True  # the criterion counts
    has_margin: ClassVar[bool] = True  # margin_m counts

    def loss(self, embedding: Tensor, label: Tensor, criterion: Criterion) -> HeadLoss:
        """The mean loss of (N, emb_size) embeddings of the classes (N,), and who is right.

        In training mode it also updates what the margin keeps of the batches that it has seen.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            cosine = self.cosine(embedding)
            right = cosine.detach().argmax(1) == label
            value = self._loss(embedding, cosine, label, criterion)
        return HeadLoss(value, right.float().sum(), len(label))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        return criterion(self.margin(cosine, label), label)

    def replaced(self, cosine: Tensor, label: Tensor, target: Tensor) -> Tensor:
        """s times the cosines (N, classes), in the true class's place `target` (N, 1)."""
        return cosine.scatter(1, label.unsqueeze(1), target) * self.margin_s


def true_cosine(cosine: Tensor, label: Tensor) -> Tensor:
    """(N, classes) and (N,) to the true class's cosines (N, 1), within -1 ... 1."""
    return cosine.gather(1, label.unsqueeze(1)).clamp(-1, 1)


def sine_of(cosine: Tensor) -> Tensor:
    """sin θ of cos θ; the root's slope is kept finite at θ = 0 and π."""
    return (1 - cosine * cosine).clamp(min=1e-7).sqrt()


def angle_of(cosine: Tensor) -> Tensor:
    """θ of cos θ; at 0 and π it is off by 3e-4, and its slope, unlike that of acos, is finite."""
    return torch.atan2(sine_of(cosine), cosine)


def shifted_cosine(cosine: Tensor, m: Tensor | float) -> Tensor:
    """cos(θ + m) as ArcFace has it: past θ + m = π it goes on as cos θ − m·sin m."""
    m = m if isinstance(m, Tensor) else cosine.new_full((), m)
    shifted = cosine * m.cos() - sine_of(cosine) * m.sin()
    return torch.where(cosine > -m.cos(), shifted, cosine - m * m.sin())


def falling_cosine(angle: Tensor) -> Tensor:
    """(−1)^k·cos φ − 2k with k = ⌊φ/π⌋: cos φ that goes on falling (SphereFace, 1704.08063)."""
    turns = (angle / math.pi).floor().clamp(min=0)
    sign = 1 - 2 * (turns % 2)
    return sign * angle.cos() - 2 * turns


class Softmax(MarginHead):
    """s·(w_j·x + b_j): the plain softmax, nothing normalised; s is 1 as a rule."""

    has_margin = False

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to w_j·x + b_j, (N, num_classes), which are no cosines here."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(embedding.to(self.weight.dtype), self.weight, self.bias)

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """(N, num_classes) to the same, scaled."""
        return cosine * self.margin_s


class NormSoftmax(MarginHead):
    """s·cos θ_j for every class (NormFace, Wang et al., 1704.06369)."""

    shardable = True
    has_margin = False

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) to logits."""
        return cosine * self.margin_s


class SphereFace(MarginHead):
    """SphereFace-R, first form, features normalised (Liu et al., 2109.05565).

    The true logit is s·ψ(θ) with ψ(θ) = cos(min(m·θ, π)), the others s·cos θ_j. The stable form
    detaches the characteristic: s·(cos θ + [ψ(θ) − cos θ]), the bracket without a gradient, so the
    slope is that of cos θ everywhere.
    """

    shardable = True

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits."""
        target = true_cosine(cosine, label)
        with torch.no_grad():
            more = (self.margin_m * target.acos()).clamp(max=math.pi).cos() - target
        return self.replaced(cosine, label, target + more)


class CosFace(MarginHead):
    """s·(cos θ_y − m) for the true class, s·cos θ_j for others (Wang et al., 1801.09414, eq. 4)."""

    shardable = True

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits."""
        return self.replaced(cosine, label, true_cosine(cosine, label) - self.margin_m)


class ArcFace(MarginHead):
    """s·cos(θ_y + m) for the true class, s·cos θ_j for others (Deng et al., 1801.07698, eq. 3)."""

    settings = ("easy_margin",)
    shardable = True


class Combined(MarginHead):
    """s·(cos(m1·θ_y + m2) − m3), m2 being margin_m (Deng et al., 1801.07698, eq. 4).

    Past m1·θ + m2 = π, where the paper's cosine would rise again, it goes on falling as SphereFace
    has it (`falling_cosine`).
    """

    settings = ("m1", "m3")
    shardable = True

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float,
        margin_m: float,
        m1: float = 1.0,
        m3: float = 0.2,
    ) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.m1, self.m3 = m1, m3

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits."""
        angle = angle_of(true_cosine(cosine, label))
        target = falling_cosine(self.m1 * angle + self.margin_m) - self.m3
        return self.replaced(cosine, label, target)


class CurricularFace(MarginHead):
    """Hard wrong classes count more as training goes on (Huang et al., 2004.00288).

    True class: s·T, T = cos(θ_y + m) as ArcFace has it. Others: s·cos θ_j where cos θ_j <= T, and
    s·cos θ_j·(t + cos θ_j) where it is more. t = 0.01·r + 0.99·t, r being a batch's mean cos θ_y.
    """

    RATE = 0.01

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.register_buffer("t", torch.zeros(1))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits; t is as it stands."""
        cosine = cosine.clamp(-1, 1)
        target = shifted_cosine(true_cosine(cosine, label), self.margin_m)
        others = torch.where(cosine > target, cosine * (self.t + cosine), cosine)
        return self.replaced(others, label, target)

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.t.lerp_(true_cosine(cosine, label).mean().to(self.t.dtype), self.RATE)
        return criterion(self.margin(cosine, label), label)


class MagFace(MarginHead):
    """A margin that grows with the embedding's length a (Meng et al., 2103.06627).

    The true logit is s·cos(θ_y + m(a)), continued as ArcFace's, with m(a) rising in a straight line
    from margin_m at a = 10 to margin_m + 0.35 at a = 110, and a kept between the two. The loss has
    the term λ·g(a), g(a) = a / 110² + 1 / a, λ = 35, which rewards long embeddings.
    """

    LOW, HIGH, RISE, LAMBDA = 10.0, 110.0, 0.35, 35.0

    def margin(self, cosine: Tensor, label: Tensor, length: Tensor) -> Tensor:
        """Cosines (N, num_classes), classes (N,) and lengths (N,) to logits."""
        length = length.clamp(self.LOW, self.HIGH).unsqueeze(1)
        m = self.margin_m + self.RISE * (length - self.LOW) / (self.HIGH - self.LOW)
        return self.replaced(cosine, label, shifted_cosine(true_cosine(cosine, label), m))

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and (N,) to logits (N, num_classes)."""
        return self.margin(self.cosine(embedding), label, embedding.norm(dim=1))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        length = embedding.norm(dim=1)
        kept = length.clamp(self.LOW, self.HIGH)
        regulariser = (kept / self.HIGH**2 + 1 / kept).mean()
        return criterion(self.margin(cosine, label, length), label) + self.LAMBDA * regulariser


class AdaFace(MarginHead):
    """Margins by quality, of which the embedding's length is the measure (Kim et al., 2204.00964).

    The true logit is s·(cos(θ_y − m·z) − (m·z + m)), θ_y − m·z kept within 0 ... π and
    z = (‖x‖ − μ) / (σ / h) within −1 ... 1 and without a gradient. μ and σ are the
    lengths' running mean and deviation; each batch is a hundredth of them.
    """

    settings = ("h",)
    RATE = 0.01

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float,
        margin_m: float,
        h: float = 0.333,
    ) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.h = h
        self.register_buffer("mean", torch.full((1,), 20.0))
        self.register_buffer("deviation", torch.full((1,), 100.0))

    def margin(self, cosine: Tensor, label: Tensor, length: Tensor) -> Tensor:
        """Cosines (N, num_classes), classes (N,) and lengths (N,) to logits; μ, σ as they stand."""
        length = length.detach().clamp(1e-3, 100)
        z = (length - self.mean) / (self.deviation + 1e-3) * self.h
        z = z.clamp(-1, 1).unsqueeze(1)
        angle = angle_of(true_cosine(cosine, label)) - self.margin_m * z
        target = angle.clamp(0, math.pi).cos() - (self.margin_m * z + self.margin_m)
        return self.replaced(cosine, label, target)

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and (N,) to logits (N, num_classes)."""
        return self.margin(self.cosine(embedding), label, embedding.norm(dim=1))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        length = embedding.detach().norm(dim=1)
        if self.training:
            kept = length.clamp(1e-3, 100).to(self.mean.dtype)
            self.mean.lerp_(kept.mean(), self.RATE)
            self.deviation.lerp_(kept.std(correction=min(1, len(kept) - 1)), self.RATE)
        return criterion(self.margin(cosine, label, length), label)


class ElasticArc(MarginHead):
    """ArcFace with a margin drawn anew for each sample, m ~ N(margin_m, σ) (2109.09416).

    In evaluation mode the margin is margin_m.
    """

    settings = ("std",)

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float,
        margin_m: float,
        std: float = 0.0125,
    ) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.std = std

    def draw(self, target: Tensor) -> Tensor:
        """A margin for each of the true classes' cosines (N, 1)."""
        if not self.training:
            return torch.full_like(target, self.margin_m)
        return self.margin_m + self.std * torch.randn_like(target)

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits."""
        target = true_cosine(cosine, label)
        return self.replaced(cosine, label, shifted_cosine(target, self.draw(target)))


class ElasticCos(ElasticArc):
    """CosFace with a margin drawn anew for each sample, m ~ N(margin_m, σ) (2109.09416)."""

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits."""
        target = true_cosine(cosine, label)
        return self.replaced(cosine, label, target - self.draw(target))


class SubcenterArc(MarginHead):
    """ArcFace with K centres a class, of which the nearest counts (Deng et al., ECCV 2020).

    cos θ_j is the largest of the cosines to the centres of class j; rows K·j ... K·j + K − 1 of the
    weight are those.
    """

    settings = ("subcenters",)

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float,
        margin_m: float,
        subcenters: int = 3,
    ) -> None:
        super().__init__(emb_size, num_classes * subcenters, margin_s, margin_m)
        self.subcenters = subcenters

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to the cosines to each class's nearest centre, (N, num_classes)."""
        every = super().cosine(embedding)
        return every.unflatten(1, (-1, self.subcenters)).max(2).values
