"""Augmentation of whole batches on the device, decided by an image's place and the epoch alone.

    change = build_augmentation("adaface", seed=0, epoch=3)
    images = change(images, positions)    # (n, 112, 112, 3) uint8 on the device, and their places

Each image shown in an epoch draws its numbers from a hash of (seed, epoch, position), so a run
that is gone on with, or that another number of processes computes, changes every image in the
same way. They are drawn on the host, so that only the chosen images are worked on and the device
never waits; nothing here loops over images. Mirroring is data_gen.py's, with --flip.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_gen import Augment
from utils import FACE_SIZE, splitmix64


class AugmentPolicy(NamedTuple):
    """How likely each change is for an image, and how far it goes; several can fall on one."""

    crop: float = 0.0
    low_resolution: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    grey: float = 0.0
    min_area: float = 0.2  # share of the image that a crop keeps at least
    min_ratio: float = 0.2  # of the size to which an image is shrunk, to its own
    # Brightness, contrast and saturation are multiplied by 1 - jitter_strength to 1 + it.
    jitter_strength: float = 0.5
    max_sigma: float = 1.5  # of the blur, in pixels


AUGMENTATIONS = {
    "none": AugmentPolicy(),
    "mild": AugmentPolicy(
        low_resolution=0.1, colour=0.2, blur=0.05, grey=0.05, min_ratio=0.5, jitter_strength=0.2
    ),
    # Kim et al., "AdaFace" (CVPR 2022, arXiv 2204.00964), section 4.1
    "adaface": AugmentPolicy(crop=0.2, low_resolution=0.2, colour=0.2),
}
TRANSFORMS = ("crop", "low_resolution", "colour", "blur", "grey")  # in the order of their coming
DOWNSAMPLING = ("nearest", "bilinear", "bicubic", "area")
UPSAMPLING = ("nearest", "bilinear", "bicubic")
JITTER_ORDERS = np.array(list(itertools.permutations(range(3))))
NUMBERS = len(TRANSFORMS) + 12  # random ones that an image needs
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601


def build_augmentation(name: str, *, seed: int, epoch: int) -> Augment | None:
    """The policy of a name for one epoch, as a function of a batch and its positions; or None."""
    policy = AUGMENTATIONS[name]
    if not any(getattr(policy, change) for change in TRANSFORMS):
        return None
    return functools.partial(augment_batch, policy=policy, seed=seed, epoch=epoch)


def hashed_uniform(positions: np.ndarray, seed: int, epoch: int, count: int) -> np.ndarray:
    """(n, count) float64 in [0, 1), each row decided by its position, the seed and the epoch."""
    salt = np.random.default_rng([seed, 7, epoch]).integers(2**64, dtype=np.uint64)
    state = splitmix64(positions.astype(np.uint64) + salt)
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (splitmix64(state[:, None] + step) >> np.uint64(11)) * 2.0**-53


def augment_batch(
    images: Tensor, positions: np.ndarray, *, policy: AugmentPolicy, seed: int, epoch: int
) -> Tensor:
    """Change each image by its own chance: (n, 112, 112, 3) uint8 to the same, on one device.

    `positions` (n,) are what the numbers are drawn for. `images` stays as it is.
    """
    drawn = hashed_uniform(positions, seed, epoch, NUMBERS)
    odds = np.array([getattr(policy, change) for change in TRANSFORMS])
    wanted, drawn = drawn[:, : len(TRANSFORMS)] < odds, drawn[:, len(TRANSFORMS) :]
    touched = np.flatnonzero(wanted.any(1))
    if not len(touched):
        return images

    def move(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(values).to(images.device, dtype, non_blocking=True)

    rows = move(touched, torch.int64)
    work = images.index_select(0, rows).permute(0, 3, 1, 2).contiguous().float()
    for change, chosen in zip(TRANSFORMS, wanted[touched].T, strict=True):
        some = np.flatnonzero(chosen)
        if not len(some):
            continue
        function, arguments = _draw(change, policy, drawn[touched[some]])
        index = move(some, torch.int64)
        values = [move(a, torch.int64 if a.dtype.kind == "i" else torch.float32) for a in arguments]
        work.index_copy_(0, index, function(work.index_select(0, index), *values))
    changed = work.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return images.index_copy(0, rows, changed)


def _draw(change: str, policy: AugmentPolicy, drawn: np.ndarray) -> tuple[Any, list[np.ndarray]]:
    """The function of a change and its arguments for m images, of their numbers (m, 12)."""
    if change == "crop":
        return zero_outside, [random_crop_boxes(drawn[:, 0:4], policy.min_area)]
    if change == "low_resolution":
        ratio = policy.min_ratio + (1 - policy.min_ratio) * drawn[:, 4]
        small = np.rint(ratio * FACE_SIZE).astype(np.int64)
        methods = [(drawn[:, 5] * len(DOWNSAMPLING)).astype(np.int64)]
        methods += [(drawn[:, 6] * len(UPSAMPLING)).astype(np.int64)]
        return lower_resolution, [small, *methods]
    if change == "colour":
        factors = 1 + policy.jitter_strength * (2 * drawn[:, 7:10] - 1)
        return colour_jitter, [
            factors,
            JITTER_ORDERS[(drawn[:, 10] * len(JITTER_ORDERS)).astype(np.int64)],
        ]
    if change == "blur":
        return gaussian_blur, [0.3 + (policy.max_sigma - 0.3) * drawn[:, 11]]
    return to_grey, []


# ------------------------------------------------------------------------------ the changes


def random_crop_boxes(drawn: np.ndarray, min_area: float) -> np.ndarray:
    """Rectangles (m, 4) int64 of top, left, height and width, of numbers (m, 4) in [0, 1).

    As torchvision's RandomResizedCrop draws them: area even in `min_area` to 1 of the image,
    aspect from 3/4 to 4/3, even on a logarithmic scale. A side that would be longer than the
    image is cut to it, where torchvision draws again.
    """
    area = (min_area + (1 - min_area) * drawn[:, 0]) * FACE_SIZE**2
    aspect = (4 / 3) ** (2 * drawn[:, 1] - 1)
    sides = np.sqrt(np.stack([area / aspect, area * aspect], 1))
    sides = np.rint(sides).clip(1, FACE_SIZE).astype(np.int64)
    corners = (drawn[:, 2:4] * (FACE_SIZE - sides + 1)).astype(np.int64)
    return np.concatenate([corners, sides], 1)


def zero_outside(images: Tensor, boxes: Tensor) -> Tensor:
    """Keep a rectangle where it is and blacken the rest, as AdaFace does: the face does not move.

    images (m, 3, h, w), boxes (m, 4) of top, left, height and width.
    """
    top, left, height, width = boxes.T[..., None]
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows, columns = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def lower_resolution(images: Tensor, small: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Shrink to `small` (m,) pixels a side and enlarge again: (m, 3, 112, 112) to the same.

    `down` and `up` (m,) index DOWNSAMPLING and UPSAMPLING. AdaFace picks both from five of OpenCV's
    methods; here it is four and three: no Lanczos, and enlarging by area is close to bilinear.
    """
    shrink, enlarge = _resizing(images.device)
    return _separable(images, enlarge[up, small] @ shrink[down, small])


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of deviation `sigma` (m,) pixels; weights beyond the edge count nothing."""
    place = torch.arange(FACE_SIZE, device=images.device, dtype=torch.float32)
    distance = (place[:, None] - place) / sigma[:, None, None]
    weights = torch.exp(-0.5 * distance.square())
    return _separable(images, weights / weights.sum(2, keepdim=True))


def _separable(images: Tensor, matrices: Tensor) -> Tensor:
    """One matrix an image on its columns and its rows: (m, 3, h, h) and (m, h, h)."""
    matrices = matrices[:, None]
    return (matrices @ images @ matrices.mT).clamp_(0, 255)


@functools.cache
def _resizing(device: torch.device) -> tuple[Tensor, Tensor]:
    """Every shrinking and enlarging of a line of 112 pixels as a matrix, zero beyond its size.

    (ways down, 113, 112, 112) from 112 pixels to k, and (ways up, 113, 112, 112) from k to 112.
    """
    size = FACE_SIZE
    shrink = torch.zeros(len(DOWNSAMPLING), size + 1, size, size)
    enlarge = torch.zeros(len(UPSAMPLING), size + 1, size, size)
    for k in range(1, size + 1):
        for place, way in enumerate(DOWNSAMPLING):
            shrink[place, k, :k] = _resize_line(size, k, way)
        for place, way in enumerate(UPSAMPLING):
            enlarge[place, k, :, :k] = _resize_line(k, size, way)
    return shrink.to(device), enlarge.to(device)


def _resize_line(old: int, new: int, way: str) -> Tensor:
    """The matrix (new, old) that resizes a line of pixels."""
    if way == "area":
        edges, pixels = torch.arange(new + 1) * (old / new), torch.arange(old)
        upper = torch.minimum(edges[1:, None], pixels + 1)
        lower = torch.maximum(edges[:-1, None], pixels)
        return (upper - lower).clamp(min=0) * (new / old)
    if way == "nearest":
        return torch.eye(old)[torch.arange(new) * old // new]
    line = torch.eye(old)[None, None]
    return F.interpolate(line, (old, new), mode=way, align_corners=False)[0, 0].T


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation by `factors` (m, 3), one after the other.

    `order` (m, 3) says which of the three comes first, second and third. Each is torchvision's: a
    mixture of the image with black, with its mean grey, and with itself in grey.
    """
    for which in order.T:
        luma = _luma(images)
        target = torch.where(
            (which == 1)[:, None, None, None],
            luma.mean((2, 3), keepdim=True),
            luma * (which == 2)[:, None, None, None],
        )
        factor = factors.gather(1, which[:, None])[..., None, None]
        images = torch.lerp(target, images, factor).clamp_(0, 255)
    return images


def to_grey(images: Tensor) -> Tensor:
    """Luma in all three colours."""
    return _luma(images).expand(-1, 3, -1, -1)


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
