"""Augmentation of whole batches on the device; each image's numbers follow from its position.

    augment = build_augmentation("adaface", seed=0, epoch=3)
    images = augment(images, positions)    # (n, 112, 112, 3) uint8 on the device, (n,) positions

An image's random numbers are a hash of (seed, epoch, position in the training set), not the next
ones of a generator. So a resumed run, or one with another number of processes, changes every image
in the same way.

They are computed on the host: it knows which images a transform changes, and the device works on
those only, without a boolean mask whose size the host would have to wait for. Nothing loops over
images. Mirroring is data_gen.py's, with --flip.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_gen import Augment
from utils import FACE_SIZE, splitmix64


class AugmentPolicy(NamedTuple):
    """The independent probability of each transform, and the transforms' strength."""

    crop: float = 0.0
    low_resolution: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    grey: float = 0.0
    min_area: float = 0.2  # of the image, that a crop leaves
    min_ratio: float = 0.2  # of the side that an image is downsampled to, to its own
    jitter_strength: float = 0.5  # 0.5: brightness, contrast and saturation times 0.5 to 1.5
    max_sigma: float = 1.5  # of the blur, in pixels; the least is 0.3


AUGMENTATIONS = {
    "none": AugmentPolicy(),
    "mild": AugmentPolicy(
        low_resolution=0.1, colour=0.2, blur=0.05, grey=0.05, min_ratio=0.5, jitter_strength=0.2
    ),
    # Kim et al., "AdaFace" (CVPR 2022, arXiv 2204.00964), section 4.1
    "adaface": AugmentPolicy(crop=0.2, low_resolution=0.2, colour=0.2),
}
DOWNSAMPLING = ("nearest", "bilinear", "bicubic", "area")
UPSAMPLING = ("nearest", "bilinear", "bicubic")
# The six orders of brightness (0), contrast (1) and saturation (2).
JITTER_ORDERS = np.array(list(itertools.permutations(range(3))))
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601


def build_augmentation(name: str, *, seed: int, epoch: int) -> Augment | None:
    """The policy AUGMENTATIONS[name] for one epoch as a function of a batch and its positions.

    None for a policy that changes nothing.
    """
    policy = AUGMENTATIONS[name]
    if not any(getattr(policy, transform) for transform in TRANSFORMS):
        return None
    return functools.partial(augment_batch, policy=policy, seed=seed, epoch=epoch)


def augment_batch(
    images: Tensor, positions: np.ndarray, *, policy: AugmentPolicy, seed: int, epoch: int
) -> Tensor:
    """Transform each image with the policy's probabilities: (n, 112, 112, 3) uint8 to the same.

    `positions` (n,) are the images' positions in the training set. `images` is not changed.
    """
    # Per image: a number for each transform, which decides whether to apply it, then parameters.
    numbers = hashed_uniform(positions, seed, epoch, len(TRANSFORMS) + PARAMETERS)
    probabilities = np.array([getattr(policy, transform) for transform in TRANSFORMS])
    chosen = numbers[:, : len(TRANSFORMS)] < probabilities  # (n, transforms) bool
    parameters = numbers[:, len(TRANSFORMS) :]  # (n, PARAMETERS)
    changed = np.flatnonzero(chosen.any(1))  # of the batch, m images
    if not len(changed):
        return images

    rows = _to_device(changed, images.device)
    work = images.index_select(0, rows)  # (m, 112, 112, 3) uint8
    work = work.permute(0, 3, 1, 2).contiguous().float()  # (m, 3, 112, 112)
    for transform, mask in zip(TRANSFORMS.values(), chosen[changed].T, strict=True):
        subset = np.flatnonzero(mask)  # of the m images, those that this transform changes
        if not len(subset):
            continue
        index = _to_device(subset, images.device)
        result = transform(work.index_select(0, index), parameters[changed[subset]], policy)
        work.index_copy_(0, index, result)
    work = work.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)  # (m, 112, 112, 3)
    return images.index_copy(0, rows, work)


def hashed_uniform(positions: np.ndarray, seed: int, epoch: int, count: int) -> np.ndarray:
    """(n, count) float64, uniform in [0, 1); each row is a hash of its position, seed and epoch.

    SplitMix64 (Steele et al., OOPSLA 2014), started for each row at a hash of its position.
    """
    salt = np.random.default_rng([seed, 7, epoch]).integers(2**64, dtype=np.uint64)
    state = splitmix64(positions.astype(np.uint64) + salt)  # (n,)
    # The generator's state grows by this odd constant, 2^64 / golden ratio, from number to number.
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    # The upper 53 bits, which a float64 holds exactly.
    return (splitmix64(state[:, None] + step) >> np.uint64(11)) * 2.0**-53


def _to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, integers as int64 and floats as float32; the host does not wait."""
    dtype = torch.int64 if values.dtype.kind == "i" else torch.float32
    return torch.from_numpy(values).to(device, dtype, non_blocking=True)


# ------------------------------------------------------------------------------ random transforms
#
# Each takes (m, 3, 112, 112) float images in 0 to 255, the policy, and parameters (m, PARAMETERS)
# uniform in [0, 1), of which it uses columns of its own; it returns new images.


def random_crop(images: Tensor, parameters: np.ndarray, policy: AugmentPolicy) -> Tensor:
    """Blacken all but a random rectangle; columns 0 to 3."""
    boxes = random_crop_boxes(parameters[:, 0:4], policy.min_area)
    return zero_outside(images, _to_device(boxes, images.device))


def random_low_resolution(images: Tensor, parameters: np.ndarray, policy: AugmentPolicy) -> Tensor:
    """Downsample to a random size and back by random interpolations; columns 4 to 6."""
    ratio = policy.min_ratio + (1 - policy.min_ratio) * parameters[:, 4]
    small = np.rint(ratio * FACE_SIZE).astype(np.int64)
    down = (parameters[:, 5] * len(DOWNSAMPLING)).astype(np.int64)
    up = (parameters[:, 6] * len(UPSAMPLING)).astype(np.int64)
    return lower_resolution(images, *(_to_device(a, images.device) for a in (small, down, up)))


def random_colour_jitter(images: Tensor, parameters: np.ndarray, policy: AugmentPolicy) -> Tensor:
    """Brightness, contrast and saturation by random factors in a random order; columns 7 to 10."""
    factors = 1 + policy.jitter_strength * (2 * parameters[:, 7:10] - 1)
    order = JITTER_ORDERS[(parameters[:, 10] * len(JITTER_ORDERS)).astype(np.int64)]
    return colour_jitter(
        images, _to_device(factors, images.device), _to_device(order, images.device)
    )


def random_blur(images: Tensor, parameters: np.ndarray, policy: AugmentPolicy) -> Tensor:
    """Gaussian blur of a random sigma; column 11."""
    sigma = 0.3 + (policy.max_sigma - 0.3) * parameters[:, 11]
    return gaussian_blur(images, _to_device(sigma, images.device))


def random_grey(images: Tensor, parameters: np.ndarray, policy: AugmentPolicy) -> Tensor:
    """Greyscale, which has no parameter."""
    return to_grey(images)


# By the name of their probability in AugmentPolicy, in the order in which they are applied.
TRANSFORMS: dict[str, Callable[[Tensor, np.ndarray, AugmentPolicy], Tensor]] = {
    "crop": random_crop,
    "low_resolution": random_low_resolution,
    "colour": random_colour_jitter,
    "blur": random_blur,
    "grey": random_grey,
}
PARAMETERS = 12  # numbers per image for all transforms


# ------------------------------------------------------------------------------ the operations


def random_crop_boxes(numbers: np.ndarray, min_area: float) -> np.ndarray:
    """Rectangles (m, 4) int64 of top, left, height and width, from numbers (m, 4) in [0, 1).

    As torchvision's RandomResizedCrop: area uniform from `min_area` to 1 of the image, aspect ratio
    from 3/4 to 4/3, uniform on a logarithmic scale. A side that would be longer than the image is
    cut to it, where torchvision tries again.
    """
    area = (min_area + (1 - min_area) * numbers[:, 0]) * FACE_SIZE**2
    aspect = (4 / 3) ** (2 * numbers[:, 1] - 1)
    sides = np.sqrt(np.stack([area / aspect, area * aspect], 1))  # (m, 2) height, width
    sides = np.rint(sides).clip(1, FACE_SIZE).astype(np.int64)
    corners = (numbers[:, 2:4] * (FACE_SIZE - sides + 1)).astype(np.int64)  # (m, 2) top, left
    return np.concatenate([corners, sides], 1)


def zero_outside(images: Tensor, boxes: Tensor) -> Tensor:
    """Keep a rectangle where it is and blacken the rest, as AdaFace does: the face does not move.

    images (m, 3, h, w), boxes (m, 4) of top, left, height and width.
    """
    top, left, height, width = boxes.T[..., None]  # (m, 1) each
    y = torch.arange(images.shape[2], device=images.device)
    x = torch.arange(images.shape[3], device=images.device)
    rows = (y >= top) & (y < top + height)  # (m, h)
    columns = (x >= left) & (x < left + width)  # (m, w)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def lower_resolution(images: Tensor, small: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Downsample to `small` (m,) pixels a side and upsample again: (m, 3, 112, 112) to the same.

    `down` and `up` (m,) index DOWNSAMPLING and UPSAMPLING. AdaFace picks both from five of OpenCV's
    methods; here it is four and three: no Lanczos, and upsampling by area is close to bilinear.
    """
    # Sizes and methods differ from image to image, so F.interpolate cannot take the batch. But
    # resizing is linear and separable: one matrix per image does both steps, one product does all.
    shrink, enlarge = _resize_matrices(images.device)
    return _separable(images, enlarge[up, small] @ shrink[down, small])


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of standard deviation `sigma` (m,) pixels; (m, 3, 112, 112) to the same.

    Weights beyond the edge are left out and the others sum to one.
    """
    position = torch.arange(FACE_SIZE, device=images.device, dtype=torch.float32)
    distance = (position[:, None] - position) / sigma[:, None, None]  # (m, 112, 112)
    weights = torch.exp(-0.5 * distance.square())
    return _separable(images, weights / weights.sum(2, keepdim=True))


def _separable(images: Tensor, matrices: Tensor) -> Tensor:
    """M @ image @ M^T, columns and rows by the same matrix: (m, 3, h, h) and (m, h, h)."""
    matrices = matrices[:, None]  # (m, 1, h, h)
    return (matrices @ images @ matrices.mT).clamp_(0, 255)  # bicubic overshoots


@functools.cache
def _resize_matrices(device: torch.device) -> tuple[Tensor, Tensor]:
    """All matrices that resize a line of 112 pixels to k pixels, and those from k pixels to 112.

    (4, 113, 112, 112) by method and k, of which the first k rows are used, and (3, 113, 112, 112),
    of which the first k columns are; the rest is zero, so that every k fits into one tensor.
    """
    size = FACE_SIZE
    shrink = torch.zeros(len(DOWNSAMPLING), size + 1, size, size)
    enlarge = torch.zeros(len(UPSAMPLING), size + 1, size, size)
    for k in range(1, size + 1):
        for index, method in enumerate(DOWNSAMPLING):
            shrink[index, k, :k] = _resize_matrix(size, k, method)
        for index, method in enumerate(UPSAMPLING):
            enlarge[index, k, :, :k] = _resize_matrix(k, size, method)
    return shrink.to(device, non_blocking=True), enlarge.to(device, non_blocking=True)


def _resize_matrix(old: int, new: int, method: str) -> Tensor:
    """The matrix (new, old) that resizes a line of pixels."""
    if method == "area":
        # The overlap of each new pixel, an interval of old/new old pixels, with each old one:
        # from 4 to 3, the first new pixel is 3/4 of old pixel 0 and 1/4 of old pixel 1.
        edges, pixels = torch.arange(new + 1) * (old / new), torch.arange(old)
        upper = torch.minimum(edges[1:, None], pixels + 1)
        lower = torch.maximum(edges[:-1, None], pixels)
        return (upper - lower).clamp(min=0) * (new / old)
    if method == "nearest":
        return torch.eye(old)[torch.arange(new) * old // new]
    # A linear map's matrix has the images of the unit vectors as its columns.
    line = torch.eye(old)[None, None]
    return F.interpolate(line, (old, new), mode=method, align_corners=False)[0, 0].T


def colour_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation by `factors` (m, 3), one after the other.

    `order` (m, 3) says which of the three comes first, second and third. Each is torchvision's: a
    blend of the image with black, with its mean grey, and with its own greyscale.
    """
    for operation in order.T:  # (m,) each: 0 brightness, 1 contrast, 2 saturation
        luma = _luma(images)  # (m, 1, 112, 112)
        # Images have different operations at the same time, so all three targets are computed.
        target = torch.where(
            (operation == 1)[:, None, None, None],
            luma.mean((2, 3), keepdim=True),
            luma * (operation == 2)[:, None, None, None],  # black for brightness
        )
        factor = factors.gather(1, operation[:, None])[..., None, None]  # (m, 1, 1, 1)
        images = torch.lerp(target, images, factor).clamp_(0, 255)
    return images


def to_grey(images: Tensor) -> Tensor:
    """Luma in all three channels: (m, 3, h, w) to the same."""
    return _luma(images).expand(-1, 3, -1, -1)


def _luma(images: Tensor) -> Tensor:
    """(m, 3, h, w) to (m, 1, h, w)."""
    red, green, blue = images.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
