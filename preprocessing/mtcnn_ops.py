"""What MTCNN does between its networks, on whole batches: resampling, boxes, suppression, crops.

Each agrees with what the mtcnn package (ipazc/mtcnn 1.0.0) does with TensorFlow and NumPy, image
by image; here one call serves all images, on any device.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 12  # P-Net's window, pixels
STRIDE = 2  # P-Net's step, pixels
MAX_BOXES = 2048  # of one image (and level) that compete in non-maximum suppression


@functools.lru_cache(maxsize=256)
def area_weights(size: int, new_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Area resampling of `size` pixels to `new_size`: a new pixel averages the stretch it covers.

    Returns the old pixels that count and their weights, new pixel by new pixel, and where each
    new pixel's begin, as embedding_bag takes them.
    """
    edges = np.arange(new_size + 1) * (size / new_size)
    first = np.floor(edges[:-1] + 1e-9).astype(np.int64)
    counts = np.minimum(np.ceil(edges[1:] - 1e-9), size).astype(np.int64) - first
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(new_size), counts)
    pixel = np.arange(len(row)) - starts[row] + first[row]
    overlap = np.minimum(edges[row + 1], pixel + 1) - np.maximum(edges[row], pixel)
    weights = (overlap * (new_size / size)).astype(np.float32)
    return tuple(torch.from_numpy(a).to(device) for a in (pixel, weights, starts))


def resample_rows(x: Tensor, new_size: int) -> Tensor:
    """(N, size, values) float -> (N, new_size, values) by area resampling.

    Every new row is a weighted sum of a few old ones, which is what embedding_bag is fast at.
    """
    n, size, values = x.shape
    pixel, weights, starts = area_weights(size, new_size, x.device)
    image = torch.arange(n, device=x.device)[:, None]
    rows = F.embedding_bag(
        (image * size + pixel).flatten(),
        x.reshape(n * size, values),
        (image * len(pixel) + starts).flatten(),
        mode="sum",
        per_sample_weights=weights.repeat(n),
    )
    return rows.view(n, new_size, values)


def area_resize(images: Tensor, height: int, width: int) -> Tensor:
    """(N, H, W, 3) float -> (N, height, width, 3), as TensorFlow's and OpenCV's "area"."""
    n, _, old_width, _ = images.shape
    x = resample_rows(images.reshape(n, -1, old_width * 3), height)
    x = x.view(n, height, old_width, 3).transpose(1, 2).reshape(n, old_width, height * 3)
    return resample_rows(x, width).view(n, width, height, 3).transpose(1, 2)


def window_boxes(x: Tensor, y: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """(k, 4) boxes in the image of P-Net's cells (x, y), moved by (k, 4) offsets.

    The package takes the window of cell 0 as 1 to 12, 11 pixels wide; the offsets are in units
    of that.
    """
    low, high = torch.stack([x, y], 1) * STRIDE + 1, torch.stack([x, y], 1) * STRIDE + CELL
    return (torch.cat([low, high], 1) + offsets * (CELL - 1)) / scale


def move_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """(k, 4) boxes moved by offsets in units of their sides (counting both edge pixels)."""
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * torch.cat([size, size], 1)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, method: str = "union"
) -> Tensor:
    """Non-maximum suppression in every group at once: indices kept, by group, best score first.

    A box goes if it overlaps *any* better one of its group by more than `threshold`, even one that
    goes itself; that is how the mtcnn package does it, and it needs no loop over boxes. `method`
    "union" divides the intersection by the union, "min" by the smaller area. Of a group with
    thousands of boxes the best MAX_BOXES compete.
    """
    if len(boxes) == 0:
        return groups.new_zeros(0)
    # of equal scores (1.0 is frequent) the last comes first, as in the package's reversed sort
    order = torch.argsort(scores, stable=True).flip(0)
    order = order[torch.argsort(groups[order], stable=True)]
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    row = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), counts)
    column = torch.arange(len(order), device=boxes.device) - (counts.cumsum(0) - counts)[row]
    if len(order) > MAX_BOXES:
        best = column < MAX_BOXES
        order, row, column = order[best], row[best], column[best]
    width = int(column.max()) + 1
    padded = boxes.new_zeros(len(counts), width, 4)
    padded[row, column] = boxes[order]
    step = max(1, MAX_BOXES**2 // width**2)  # bounds the memory that the pairs take
    kept = [~(_overlap(part, method) > threshold).triu(1).any(1) for part in padded.split(step)]
    return order[torch.cat(kept)[row, column]]


def _overlap(boxes: Tensor, method: str) -> Tensor:
    """(..., k, 4) boxes -> (..., k, k) intersections over unions, or over the smaller areas."""
    a, b = boxes[..., :, None, :], boxes[..., None, :, :]
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = size.clamp_(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    first, second = area[..., :, None], area[..., None, :]
    if method == "min":
        return intersection / torch.minimum(first, second)
    return intersection / (first + second - intersection)


def to_square(boxes: Tensor) -> Tensor:
    """(k, 4) boxes made square about their centres, by the longer side."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.amax(1, keepdim=True)
    corner = boxes[:, :2] + size * 0.5 - side * 0.5
    return torch.cat([corner, corner + side], 1)


def pack_pixels(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, H, W) int32, the three bytes and a fourth that counts nothing."""
    n, height, width, _ = images.shape
    if images.device.type == "cpu" and len(images):  # twenty times faster than the general way
        rows = cv2.cvtColor(images.numpy().reshape(n * height, width, 3), cv2.COLOR_RGB2RGBA)
        packed = torch.from_numpy(rows)
    else:
        packed = F.pad(images, (0, 1))
    return packed.view(torch.int32).view(n, height, width)


def crop(pixels: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(k, 4, size, size) bilinear crops of (N, H, W) int32 pixels (RGBA bytes), grey outside.

    As TensorFlow's crop_and_resize with boxes given as fractions of the image: the first and the
    last sample lie on the box's edges, and boxes shrink by (W - 1) / W. One gather of a word
    fetches a pixel's channels, several times faster than rows of three bytes or floats.
    """
    _, height, width = pixels.shape
    top, bottom, down, inside_y = _samples(boxes[:, 1], boxes[:, 3], height, size)
    left, right, across, inside_x = _samples(boxes[:, 0], boxes[:, 2], width, size)
    first = index[:, None] * height
    flat = pixels.view(-1)

    def take(row: Tensor, column: Tensor) -> Tensor:
        at = ((first + row) * width)[:, :, None] + column[:, None, :]
        return flat.index_select(0, at.view(-1)).view(torch.uint8).view(-1, size, size, 4).float()

    across = across[:, None, :, None]
    upper = take(top, left).lerp_(take(top, right), across)
    lower = take(bottom, left).lerp_(take(bottom, right), across)
    out = upper.lerp_(lower, down[:, :, None, None])
    outside = ~(inside_y[:, :, None] & inside_x[:, None, :])
    return out.masked_fill_(outside[..., None], 127.5).permute(0, 3, 1, 2)


def _samples(low: Tensor, high: Tensor, length: int, size: int) -> tuple[Tensor, ...]:
    """Where (k,) edges put `size` samples on one axis: pixel before, pixel after, way, inside."""
    steps = torch.arange(size, device=low.device, dtype=low.dtype) / (size - 1)
    at = (low[:, None] + (high - low)[:, None] * steps) * ((length - 1) / length)
    inside = (at >= 0) & (at <= length - 1)
    at = at.clamp(0, length - 1)
    before = at.floor()
    way = at - before
    before = before.long()
    return before, (before + 1).clamp_(max=length - 1), way, inside
