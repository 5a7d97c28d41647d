"""Margins of the softmax: the true class's logit is lowered, cross entropy or focal loss follows.

In all formulas θ_j is the angle between an embedding x and the centre w_j of class j, y the true
class, s the scale (margin_s) and m the margin (margin_m). Everything is computed in float32, even
under autocast (in float64 if the embedding is).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import Criterion, MarginHead, target_cosine


class ArcFace(MarginHead):
    """s·cos(θ_y + m) for the true class, s·cos θ_j for the others (Deng et al., 1801.07698, eq. 3).

    With s = 64 and m = 0.5, a true class at 60 degrees gets 64·cos(60° + 28.6°) = 1.5 in place of
    32: its angle has to be 28.6 degrees smaller for the logit that it had without the margin.

    `easy` 1 leaves angles over 90 degrees without a margin.
    """

    options = ("easy",)
    shardable = True

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float = 64.0,
        margin_m: float = 0.5,
        easy: int = 0,
    ) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.easy = easy

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits (N, classes)."""
        target = self.add_margin(target_cosine(cosine, label), self.margin_m)
        return self.scaled_logits(cosine, label, target)

    def add_margin(self, cosine: Tensor, m: Tensor | float) -> Tensor:
        """cos θ to cos(θ + m), any shape; `m` is a number or a tensor that broadcasts."""
        cos_m, sin_m = (m.cos(), m.sin()) if isinstance(m, Tensor) else (math.cos(m), math.sin(m))
        # The addition formula, since the slope of arccos is infinite at θ = 0 and π.
        sine = sine_of(cosine)
        shifted = cosine * cos_m - sine * sin_m
        if self.easy:
            return torch.where(cosine > 0, shifted, cosine)
        # Beyond θ + m = π, which is cos θ < cos(π − m) = −cos m, cos(θ + m) would rise again. The
        # line cos θ − m·sin m takes over, so that the logit falls with θ everywhere.
        return torch.where(cosine > -cos_m, shifted, cosine - m * sin_m)


def sine_of(cosine: Tensor) -> Tensor:
    """sin θ of cos θ, with a finite slope.

    The root's slope is infinite at θ = 0 and π; rounding alone moves 1 − cos² by about 1e-7, so the
    clamp loses nothing.
    """
    return (1 - cosine * cosine).clamp(min=1e-7).sqrt()


def angle_of(cosine: Tensor) -> Tensor:
    """θ of cos θ; at 0 and π it is off by 3e-4, and its slope, unlike that of acos, is finite."""
    return torch.atan2(sine_of(cosine), cosine)


def monotone_cosine(angle: Tensor) -> Tensor:
    """(−1)^k·cos φ − 2k with k = ⌊φ/π⌋: cos φ made to fall beyond π (SphereFace, 1704.08063).

    At φ = 1.5·π, k is 1 and the value −cos(1.5·π) − 2 = −2, between cos π = −1 and −3 at 2·π.
    """
    k = (angle / math.pi).floor().clamp(min=0)
    sign = 1 - 2 * (k % 2)
    return sign * angle.cos() - 2 * k


# ------------------------------------------------------------------------------ without a margin


class Softmax(MarginHead):
    """s·(w_j·x + b_j): the plain softmax, nothing normalised; s is usually 1."""

    has_margin = False

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to w_j·x + b_j, (N, classes), used where other heads use the cosine."""
        with torch.autocast(embedding.device.type, enabled=False):
            return F.linear(embedding.to(self.weight.dtype), self.weight, self.bias)

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """(N, classes) to logits."""
        return cosine * self.margin_s


class NormSoftmax(MarginHead):
    """s·cos θ_j for every class (NormFace, Wang et al., 1704.06369)."""

    shardable = True
    has_margin = False

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) to logits."""
        return cosine * self.margin_s


# ------------------------------------------------------------------------------ a fixed margin


class SphereFace(MarginHead):
    """SphereFace-R, first form, features normalised (Liu et al., 2109.05565).

    The true logit is s·ψ(θ_y) with ψ(θ) = cos(min(m·θ, π)), the others are s·cos θ_j. In the
    paper's stable form ("characteristic gradient detachment") the forward pass has ψ(θ) and the
    backward pass the slope of cos θ: cos θ + [ψ(θ) − cos θ], the bracket without a gradient.
    """

    shardable = True

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits."""
        target = target_cosine(cosine, label)
        with torch.no_grad():
            difference = (self.margin_m * target.acos()).clamp(max=math.pi).cos() - target
        return self.scaled_logits(cosine, label, target + difference)


class CosFace(MarginHead):
    """s·(cos θ_y − m) for the true class, s·cos θ_j for others (Wang et al., 1801.09414, eq. 4)."""

    shardable = True

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits."""
        return self.scaled_logits(cosine, label, target_cosine(cosine, label) - self.margin_m)


class Combined(MarginHead):
    """s·(cos(m1·θ_y + m2) − m3), m2 being margin_m (Deng et al., 1801.07698, eq. 4).

    Beyond m1·θ + m2 = π, where the paper's cosine would rise again, `monotone_cosine` replaces it.
    """

    options = ("m1", "m3")
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
        """Cosines (N, classes) and labels (N,) to logits."""
        angle = angle_of(target_cosine(cosine, label))
        target = monotone_cosine(self.m1 * angle + self.margin_m) - self.m3
        return self.scaled_logits(cosine, label, target)


class SubcenterArc(ArcFace):
    """ArcFace with K centres per class, of which the nearest counts (Deng et al., ECCV 2020).

    cos θ_j is the largest of the cosines to the centres of class j, which are rows K·j ... K·j +
    K − 1 of the weight. With K = 3, class 2 has rows 6, 7 and 8.
    """

    options = ("subcenters",)
    shardable = False

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

    def set_centres(self, directions: Tensor) -> None:
        """The first centre of each class; the others stay random, for what is unlike the rest."""
        rows = torch.zeros_like(self.weight).view(len(directions), self.subcenters, -1)
        rows[:, 0] = directions
        super().set_centres(rows.flatten(0, 1))

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to the cosines to each class's nearest centre, (N, classes)."""
        cosine = super().cosine(embedding)  # (N, classes * K)
        return cosine.unflatten(1, (-1, self.subcenters)).max(2).values


# ------------------------------------------------------------------------------ an adaptive margin


class CurricularFace(ArcFace):
    """Hard negative classes weigh more as training proceeds (Huang et al., 2004.00288).

    True class: s·T, T = cos(θ_y + m) as in ArcFace. Others: s·cos θ_j where cos θ_j <= T, and
    s·cos θ_j·(t + cos θ_j) where it is larger. t = 0.01·r + 0.99·t, r being a batch's mean cos θ_y.
    """

    options = ()
    shardable = False
    RATE = 0.01

    def __init__(self, emb_size: int, num_classes: int, margin_s: float, margin_m: float) -> None:
        super().__init__(emb_size, num_classes, margin_s, margin_m)
        self.register_buffer("t", torch.zeros(1))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits; t is not updated."""
        cosine = cosine.clamp(-1, 1)
        target = self.add_margin(target_cosine(cosine, label), self.margin_m)
        others = torch.where(cosine > target, cosine * (self.t + cosine), cosine)
        return self.scaled_logits(others, label, target)

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.t.lerp_(target_cosine(cosine, label).mean().to(self.t.dtype), self.RATE)
        return criterion(self.margin(cosine, label), label)


class MagFace(ArcFace):
    """A margin that grows with the embedding's norm a (Meng et al., 2103.06627).

    The true logit is s·cos(θ_y + m(a)) as in ArcFace, with m(a) rising linearly from margin_m at
    a = 10 to margin_m + 0.35 at a = 110, and a clamped to that range. The loss has the term
    λ·g(a), g(a) = a / 110² + 1 / a, λ = 35, which rewards large norms.
    """

    options = ()
    shardable = False
    LOW, HIGH, RISE, LAMBDA = 10.0, 110.0, 0.35, 35.0

    def margin(self, cosine: Tensor, label: Tensor, norm: Tensor) -> Tensor:
        """Cosines (N, classes), labels (N,) and norms (N,) to logits."""
        norm = norm.clamp(self.LOW, self.HIGH).unsqueeze(1)
        m = self.margin_m + self.RISE * (norm - self.LOW) / (self.HIGH - self.LOW)  # (N, 1)
        return self.scaled_logits(cosine, label, self.add_margin(target_cosine(cosine, label), m))

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and labels (N,) to logits (N, classes)."""
        return self.margin(self.cosine(embedding), label, embedding.norm(dim=1))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        norm = embedding.norm(dim=1)
        clamped = norm.clamp(self.LOW, self.HIGH)
        regulariser = (clamped / self.HIGH**2 + 1 / clamped).mean()
        return criterion(self.margin(cosine, label, norm), label) + self.LAMBDA * regulariser


class AdaFace(MarginHead):
    """A margin by image quality, for which the embedding's norm stands (Kim et al., 2204.00964).

    The true logit is s·(cos(θ_y − m·z) − (m·z + m)), θ_y − m·z clamped to 0 ... π and
    z = (‖x‖ − μ) / (σ / h) to −1 ... 1, without a gradient. μ and σ are the running mean and
    standard deviation of the norms, to which each batch contributes a hundredth.
    """

    options = ("h",)
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
        self.register_buffer("deviation", torch.full((1,), 100.0))  # its name in checkpoints

    def margin(self, cosine: Tensor, label: Tensor, norm: Tensor) -> Tensor:
        """Cosines (N, classes), labels (N,) and norms (N,) to logits; μ, σ are not updated."""
        norm = norm.detach().clamp(1e-3, 100)
        z = (norm - self.mean) / (self.deviation + 1e-3) * self.h
        z = z.clamp(-1, 1).unsqueeze(1)  # (N, 1)
        angle = angle_of(target_cosine(cosine, label)) - self.margin_m * z
        target = angle.clamp(0, math.pi).cos() - (self.margin_m * z + self.margin_m)
        return self.scaled_logits(cosine, label, target)

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and labels (N,) to logits (N, classes)."""
        return self.margin(self.cosine(embedding), label, embedding.norm(dim=1))

    def _loss(
        self, embedding: Tensor, cosine: Tensor, label: Tensor, criterion: Criterion
    ) -> Tensor:
        norm = embedding.detach().norm(dim=1)
        if self.training:
            clamped = norm.clamp(1e-3, 100).to(self.mean.dtype)
            self.mean.lerp_(clamped.mean(), self.RATE)
            # With Bessel's correction (1), a batch of one image would give nan.
            self.deviation.lerp_(clamped.std(correction=min(1, len(clamped) - 1)), self.RATE)
        return criterion(self.margin(cosine, label, norm), label)


# ------------------------------------------------------------------------------ a random margin


class ElasticArc(ArcFace):
    """ArcFace with a random margin per image and step, m ~ N(margin_m, std) (2109.09416).

    In evaluation mode the margin is margin_m.
    """

    options = ("std",)
    shardable = False

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

    def sample_margins(self, target: Tensor) -> Tensor:
        """A margin for each of the true classes' cosines (N, 1)."""
        if not self.training:
            return torch.full_like(target, self.margin_m)
        return self.margin_m + self.std * torch.randn_like(target)

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, classes) and labels (N,) to logits."""
        target = target_cosine(cosine, label)
        return self.scaled_logits(
            cosine, label, self.add_margin(target, self.sample_margins(target))
        )


class ElasticCos(ElasticArc):
    """CosFace with a random margin per image and step, m ~ N(margin_m, std) (2109.09416)."""

    def add_margin(self, cosine: Tensor, m: Tensor | float) -> Tensor:
        """cos θ to cos θ − m, any shape."""
        return cosine - m
