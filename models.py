"""Backbones; tensors in, tensors out: no files, no configuration, no device.

    model = build_model("r50")
    embedding = model(images)    # (N, 3, 112, 112) in [-1, 1] to (N, 512), unnormalised

| network | what it is | from |
|---|---|---|
| r18 ... r200 | IResNet, ArcFace's "improved ResNet" | 1801.07698, InsightFace's `iresnet.py` |
| the same with `use_se` | with squeeze-and-excitation | 1709.01507 |
| mobilefacenet | 1 M parameters, for phones | 1804.07573 |
| tiny | a small IResNet for CPUs, tests and the demo | ours |
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

# ------------------------------------------------------------------------------ IResNet


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1, without bias since batch normalisation follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the channels' means (Hu et al., 1709.01507)."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        # 1x1 convolutions instead of linear layers, as face.evoLVe has them: no reshaping.
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.prelu = nn.PReLU(channels // reduction)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        # As (N, H, W, C), the order of channels_last: the gradient has the same.
        gate = x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]  # (N, C, 1, 1)
        gate = self.prelu(self.fc1(gate))  # (N, C / 16, 1, 1)
        gate = self.fc2(gate).sigmoid()  # (N, C, 1, 1)
        return x * gate


class IRBlock(nn.Module):
    """The improved residual unit BN-Conv-BN-PReLU-Conv-BN (ArcFace, 1801.07698, section 3.2.2).

    Unlike ResNet's basic block it normalises first, strides in the second convolution, and has no
    activation after the addition, so that the shortcuts pass a signal of either sign.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, use_se: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
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
        x = self.prelu(self.bn2(self.conv1(self.bn1(x))))  # (N, channels, H, W)
        x = self.bn3(self.conv2(x))  # (N, channels, H / stride, W / stride)
        return self.se(x) + shortcut


class IResNet(nn.Module):
    """ArcFace's residual network: a stem at full resolution and stages of IRBlocks.

    Parameters have the names of InsightFace's `iresnet`, so its checkpoints load as they are.
    `blocks` and `widths` are the residual blocks and the channels of each stage. `stem_stride` 2
    halves the resolution at once and takes about a quarter of the time.
    """

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
        self.prelu = nn.PReLU(stem_width)
        # Stages are attributes layer1, layer2 ..., not a ModuleList: InsightFace's names.
        self.stages = []
        in_channels = stem_width
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            stage = [IRBlock(in_channels, width, 2, use_se)]
            stage += [IRBlock(width, width, 1, use_se) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            self.stages.append(f"layer{number}")
            in_channels = width
        # Each stage halves the sides: 112, 56, 28, 14, 7.
        side = 112 // stem_stride // 2 ** len(blocks)
        self.bn2 = nn.BatchNorm2d(in_channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels * side * side, emb_size)
        self.features = nn.BatchNorm1d(emb_size)
        # L2 normalisation divides the embedding's scale out, so, like InsightFace, do not learn it.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 112, 112) to (N, emb_size), unnormalised."""
        x = self.prelu(self.bn1(self.conv1(x)))  # (N, 64, 112, 112)
        for stage in self.stages:
            x = getattr(self, stage)(x)  # (N, 64, 56, 56) ... (N, 512, 7, 7)
        x = self.dropout(self.bn2(x).flatten(1))  # (N, 512 * 7 * 7)
        x = self.fc(x)  # (N, emb_size)
        # Batch statistics of embeddings need float32: bfloat16 has 8 bits of precision.
        return self.features(x.float())


# ------------------------------------------------------------------------------ MobileFaceNet


class ConvBNPReLU(nn.Sequential):
    """Convolution, batch normalisation and, unless the layer is `linear`, PReLU.

    (N, in_channels, H, W) to (N, channels, H', W').
    """

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
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )
        if not linear:
            self.append(nn.PReLU(channels))


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual (Sandler et al., 1801.04381) with PReLU.

    A 1x1 convolution expands the channels, a 3x3 depthwise one filters them, a linear 1x1 one
    projects back; between narrow ends there is a shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            ConvBNPReLU(in_channels, width, 1),  # (N, width, H, W)
            ConvBNPReLU(width, width, 3, stride, 1, groups=width),  # (N, width, H', W')
            ConvBNPReLU(width, channels, 1, linear=True),  # (N, channels, H', W')
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H / stride, W / stride)."""
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileFaceNet(nn.Module):
    """Chen et al., "MobileFaceNets" (1804.07573), table 1: 1 M parameters, 0.22 G multiply-adds.

    The last convolution is "global depthwise": it weights the 7x7 positions, where average pooling
    would count the corners of a face as much as its middle.
    """

    # Rows of table 1: expansion, channels, repetitions, stride of the first.
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
        """(N, 3, 112, 112) to (N, emb_size), unnormalised."""
        x = self.stem(x)  # (N, 64, 56, 56)
        x = self.blocks(x)  # (N, 128, 7, 7)
        x = self.head(x)  # (N, 512, 7, 7)
        x = self.gdconv(x).flatten(1)  # (N, 512)
        x = self.fc(self.dropout(x))  # (N, emb_size)
        # In float32, as in IResNet.
        return self.features(x.float())


# ------------------------------------------------------------------------------ by name


def _mobilefacenet(emb_size: int, dropout: float, use_se: bool) -> MobileFaceNet:
    if use_se:
        raise ValueError("mobilefacenet has no squeeze-and-excitation variant; leave --use-se out.")
    return MobileFaceNet(emb_size, dropout)


# Each value takes emb_size, dropout and use_se. The numbers are the blocks of each stage, of two
# convolutions: with the stem and the last layer r50 has 2 * (3 + 4 + 14 + 3) + 2 = 50 layers.
# (r152 has 102; it keeps the name of face.evoLVe's IR-152, as r200 keeps InsightFace's.)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "r18": functools.partial(IResNet, (2, 2, 2, 2)),
    "r34": functools.partial(IResNet, (3, 4, 6, 3)),
    "r50": functools.partial(IResNet, (3, 4, 14, 3)),
    "r100": functools.partial(IResNet, (3, 13, 30, 3)),
    "r152": functools.partial(IResNet, (3, 8, 36, 3)),
    "r200": functools.partial(IResNet, (6, 26, 60, 6)),
    "mobilefacenet": _mobilefacenet,
    # 114 M multiply-adds, where r18 has 2.6 G.
    "tiny": functools.partial(
        IResNet, (1, 2, 2), widths=(32, 64, 128), stem_width=32, stem_stride=2
    ),
}


def build_model(
    network: str,
    emb_size: int = 512,
    dropout: float = 0.0,
    use_se: bool = False,
    zero_init: bool = False,
) -> nn.Module:
    """The backbone called `network` with fresh weights: (N, 3, 112, 112) to (N, emb_size).

    `zero_init` zero-initialises the last BN weight of each residual branch, so that every block
    starts as its shortcut (Goyal et al., 1706.02677, section 5.1).
    Raises ValueError for an unknown name and for `use_se` where the network has no such variant.
    """
    if network not in NETWORKS:
        raise ValueError(f"There is no network {network!r}; choose one of {', '.join(NETWORKS)}.")
    model = NETWORKS[network](emb_size=emb_size, dropout=dropout, use_se=use_se)
    if zero_init:
        for block in model.modules():
            if isinstance(block, IRBlock):
                nn.init.zeros_(block.bn3.weight)
            elif isinstance(block, Bottleneck) and block.residual:
                nn.init.zeros_(block.layers[-1][1].weight)
    return model
