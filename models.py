"""Backbones and the ArcFace head; tensors in, tensors out: no files, no configuration, no device.

`build_model(name)` takes (N, 3, 112, 112) images in [-1, 1] to (N, emb_size) embeddings.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding and without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)


class _PReLUOnCPU(torch.autograd.Function):
    """PReLU for training on a CPU, where PyTorch's own backward pass is not vectorised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.prelu(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(grad, x, 0)  # grad where x > 0, else 0
        negative = grad - positive
        slope = weight.to(x.dtype).view(-1, *[1] * (x.dim() - 2))
        grad_x = torch.addcmul(positive, negative, slope)
        others = [dim for dim in range(x.dim()) if dim != 1]
        return grad_x, negative.mul_(x).sum(others, dtype=weight.dtype)


class PReLU(nn.PReLU):
    """max(0, x) + weight·min(0, x), a weight a channel (He et al., 1502.01852, eq. 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        # Compilers write a kernel of their own.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.device.type == "cpu":
            return _PReLUOnCPU.apply(x, self.weight)
        return F.prelu(x, self.weight)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the channels' means (Hu et al., 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.prelu = PReLU(channels // reduction)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        gate = F.adaptive_avg_pool2d(x, 1)  # (N, C, 1, 1)
        return x * self.fc2(self.prelu(self.fc1(gate))).sigmoid()


class IRBlock(nn.Module):
    """The improved residual unit BN-Conv-BN-PReLU-Conv-BN (ArcFace, 1801.07698, section 3.2.2)."""

    def __init__(self, in_channels: int, channels: int, stride: int, use_se: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = PReLU(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels) if use_se else nn.Identity()
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.se(self.bn3(self.conv2(x))) + shortcut


class IResNet(nn.Module):
    """ArcFace's residual network; its parameters carry the names of InsightFace's `iresnet`."""

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        stem_stride: int = 1,
        emb_size: int = 512,
        dropout: float = 0.0,
        use_se: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, stem_width, stem_stride)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.prelu = PReLU(stem_width)
        in_channels = stem_width
        self.stages = []
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = [IRBlock(in_channels, width, 2, use_se)]
            stage += [IRBlock(width, width, 1, use_se) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            self.stages.append(f"layer{number}")
            in_channels = width
        side = 112 // stem_stride // 2 ** len(blocks)
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * side * side, emb_size)
        self.features = nn.BatchNorm1d(emb_size)
        # The scale of an embedding is divided out later; like InsightFace, do not learn it.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 112, 112) to (N, emb_size)."""
        x = self.prelu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = self.dropout(self.bn2(x).flatten(1))  # (N, width * 7 * 7)
        # Batch statistics of embeddings are too delicate for bfloat16.
        return self.features(self.fc(x).float())


class ConvBNPReLU(nn.Sequential):
    """Convolution, batch normalisation and, unless it is a linear layer, PReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        convolution = nn.Conv2d(
            in_channels, channels, kernel, stride, padding, groups=groups, bias=False
        )
        layers = [convolution, nn.BatchNorm2d(channels)]
        super().__init__(*layers, *([] if linear else [PReLU(channels)]))
        self.is_strided_depthwise = stride > 1 and groups == in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H', W')."""
        if self.is_strided_depthwise and torch.is_grad_enabled() and x.device.type == "cpu":
            # oneDNN's gradients of these layers take eight times as long in bfloat16.
            convolution, *others = self
            with torch.autocast("cpu", enabled=False):
                y = convolution(x.float()).to(x.dtype)
            for layer in others:
                y = layer(y)
            return y
        return super().forward(x)


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual with PReLU: expand, depthwise 3x3, project."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            ConvBNPReLU(in_channels, width, 1),
            ConvBNPReLU(width, width, 3, stride, 1, groups=width),
            ConvBNPReLU(width, channels, 1, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H / stride, W / stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileFaceNet(nn.Module):
    """Chen et al., "MobileFaceNets" (1804.07573), table 1: 1 M parameters, 0.22 G multiply-adds."""

    # expansion, channels, repetitions, stride of the first
    SETTINGS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))

    def __init__(self, emb_size: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvBNPReLU(3, 64, 3, 2, 1), ConvBNPReLU(64, 64, 3, 1, 1, groups=64)
        )
        blocks = []
        in_channels = 64
        for expansion, channels, count, first_stride in self.SETTINGS:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                blocks.append(Bottleneck(in_channels, channels, stride, expansion))
                in_channels = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBNPReLU(in_channels, 512, 1)
        self.gdconv = ConvBNPReLU(512, 512, 7, groups=512, linear=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512, emb_size, bias=False)
        self.features = nn.BatchNorm1d(emb_size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 112, 112) to (N, emb_size)."""
        x = self.blocks(self.stem(x))  # (N, 128, 7, 7)
        x = self.gdconv(self.head(x))  # (N, 512, 1, 1): one learned weight a position and channel
        return self.features(self.fc(self.dropout(x.flatten(1))).float())


def _iresnet(*blocks: int, **shape: object) -> Callable[..., IResNet]:
    """A builder for one depth."""

    def build(**options: object) -> IResNet:
        return IResNet(blocks, **shape, **options)

    return build


def _mobilefacenet(emb_size: int, dropout: float, use_se: bool) -> MobileFaceNet:
    if use_se:
        raise ValueError("mobilefacenet has no squeeze-and-excitation form; leave --use-se out.")
    return MobileFaceNet(emb_size, dropout)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "r18": _iresnet(2, 2, 2, 2),
    "r34": _iresnet(3, 4, 6, 3),
    "r50": _iresnet(3, 4, 14, 3),
    "r100": _iresnet(3, 13, 30, 3),
    "r152": _iresnet(3, 8, 36, 3),
    "r200": _iresnet(6, 26, 60, 6),
    "mobilefacenet": _mobilefacenet,
    # 114 M multiply-adds, for CPUs, tests and the demo.
    "tiny": _iresnet(1, 2, 2, widths=(32, 64, 128), stem_width=32, stem_stride=2),
}


def build_model(
    network: str,
    emb_size: int = 512,
    dropout: float = 0.0,
    use_se: bool = False,
    zero_init: bool = False,
) -> nn.Module:
    """The backbone called `network` with fresh weights: (N, 3, 112, 112) to (N, emb_size).

    With `zero_init` the last batch normalisation of each residual branch has weight zero, so that
    every block begins as its shortcut (Goyal et al., 1706.02677, section 5.1).
    Raises ValueError for a name that is not in NETWORKS.
    """
    if network not in NETWORKS:
        raise ValueError(f"There is no network {network!r}; there are {', '.join(NETWORKS)}.")
    model = NETWORKS[network](emb_size=emb_size, dropout=dropout, use_se=use_se)
    for block in model.modules() if zero_init else ():
        if isinstance(block, IRBlock):
            nn.init.zeros_(block.bn3.weight)
        elif isinstance(block, Bottleneck) and block.residual:
            nn.init.zeros_(block.layers[-1][1].weight)
    return model


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Have the residual blocks keep their inputs only and compute the rest again in backward.

    It saves most of the activations' memory for a third more arithmetic (Chen et al., 1604.06174).
    The second time, batch normalisation leaves its running statistics alone.
    """
    for block in model.modules():
        if isinstance(block, (IRBlock, Bottleneck)):
            block.forward = functools.partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not block.training:
        return forward(x)
    options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in a block
    if not torch.compiler.is_compiling():  # which takes in the statistics once by itself
        options["context_fn"] = lambda: (contextlib.nullcontext(), _statistics_kept(block))
    return checkpoint(forward, x, **options)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the batch's statistics, and takes nothing of them in."""
    layers = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, (momentum, count) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(count)


class ArcMarginModel(nn.Module):
    """ArcFace's head: s·cos(θ + m) for the true class, s·cos θ for the others (1801.07698, eq. 3).

    θ is the angle between an embedding and a class centre. Past θ + m = π the margin goes on as
    cos θ − m·sin m, so that the logit falls with θ everywhere; `easy_margin` leaves angles over
    90 degrees without a margin instead.
    """

    def __init__(
        self,
        emb_size: int,
        num_classes: int,
        margin_s: float = 64.0,
        margin_m: float = 0.5,
        easy_margin: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, emb_size).normal_(0, 0.01))
        self.margin_s = margin_s
        self.margin_m = margin_m
        self.easy_margin = easy_margin

    def cosine(self, embedding: Tensor) -> Tensor:
        """(N, emb_size) to (N, num_classes) cosines, in float32 (or 64) also under autocast."""
        with torch.autocast(embedding.device.type, enabled=False):
            wide = torch.promote_types(embedding.dtype, torch.float32)
            return F.linear(F.normalize(embedding.to(wide)), F.normalize(self.weight.to(wide)))

    def margin(self, cosine: Tensor, label: Tensor) -> Tensor:
        """Cosines (N, num_classes) and classes (N,) to logits (N, num_classes) with the margin."""
        label = label.unsqueeze(1)
        target = cosine.gather(1, label).clamp(-1, 1)
        # The root's slope is infinite at θ = 0 and π; rounding alone moves 1 − cos² by about 1e-7.
        sine = (1 - target * target).clamp(min=1e-7).sqrt()
        shifted = target * math.cos(self.margin_m) - sine * math.sin(self.margin_m)
        if self.easy_margin:
            shifted = torch.where(target > 0, shifted, target)
        else:
            line = target - self.margin_m * math.sin(self.margin_m)
            shifted = torch.where(target > -math.cos(self.margin_m), shifted, line)
        return cosine.scatter(1, label, shifted) * self.margin_s

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(N, emb_size) and (N,) to logits (N, num_classes)."""
        return self.margin(self.cosine(embedding), label)
