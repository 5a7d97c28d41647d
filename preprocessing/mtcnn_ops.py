"""The steps between MTCNN's networks, on whole batches: resize, boxes, NMS, crops.

Each gives what the mtcnn package (ipazc/mtcnn 1.0.0) computes with TensorFlow and NumPy, image by
image; here one call serves all images, on any device.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 12  # pixels; P-Net's window
CELL_STRIDE = 2  # pixels between two windows
MAX_BOXES = 2048  # per image (and level) that compete in non-maximum suppression


@functools.lru_cache(maxsize=256)
def area_weights(size: int, new_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Area resampling of `size` pixels to `new_size`: a new pixel averages the old ones it covers.

    Returns, as embedding_bag takes them, the old pixels and their weights of all new pixels one
    after the other, and the positions at which those of each new pixel begin.

    Example: 5 pixels to 2, each of which covers 2.5. New pixel 0 covers old pixels 0 and 1 and
    half of 2, new pixel 1 the other half of 2, and 3 and 4: pixels 0 1 2 2 3 4, weights 0.4 0.4
    0.2 0.2 0.4 0.4, starts 0 3.
    """
    edges = np.arange(new_size + 1) * (size / new_size)
    # 1e-9: an edge between two old pixels stays there despite rounding errors, and no pixel of
    # weight zero is read.
    first = np.floor(edges[:-1] + 1e-9).astype(np.int64)
    counts = np.minimum(np.ceil(edges[1:] - 1e-9), size).astype(np.int64) - first
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(new_size), counts)
    pixel = np.arange(len(row)) - starts[row] + first[row]
    overlap = np.minimum(edges[row + 1], pixel + 1) - np.maximum(edges[row], pixel)
    weights = (overlap * (new_size / size)).astype(np.float32)
    return tuple(torch.from_numpy(a).to(device) for a in (pixel, weights, starts))


def area_resample(x: Tensor, new_size: int) -> Tensor:
    """(N, size, values) float -> (N, new_size, values) by area resampling.

    Every new row is a weighted sum of a few old ones. That is what embedding_bag computes: the rows
    of all images are its table, each new row is a bag.
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
    # The averages along the two axes are independent: rows first, then columns as rows.
    n, _, old_width, _ = images.shape
    x = area_resample(images.reshape(n, -1, old_width * 3), height)
    x = x.view(n, height, old_width, 3).transpose(1, 2).reshape(n, old_width, height * 3)
    return area_resample(x, width).view(n, width, height, 3).transpose(1, 2)


def cell_boxes(x: Tensor, y: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """(k, 4) boxes in the image of the cells (x, y) of P-Net's result, moved by (k, 4) offsets.

    The package takes the window of cell 0 as pixels 1 to 12, 11 wide, and the offsets are in units
    of that.
    """
    low = torch.stack([x, y], 1) * CELL_STRIDE + 1
    high = torch.stack([x, y], 1) * CELL_STRIDE + CELL
    return (torch.cat([low, high], 1) + offsets * (CELL - 1)) / scale


def apply_offsets(boxes: Tensor, offsets: Tensor) -> Tensor:
    """(k, 4) boxes moved by offsets in units of their sides, which count both edge pixels."""
    size = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * torch.cat([size, size], 1)


def mtcnn_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, method: str = "union"
) -> Tensor:
    """Non-maximum suppression within each group, all groups at once: (k, 4), (k,), (k,) int64.

    A group is an image, or a level of one. Returns the indices of the boxes that are kept, by
    group, best score first. A box is suppressed if its overlap with *any* better box of its group
    exceeds `threshold`: "union" is the intersection over union, "min" the intersection over the
    smaller area. Only the best MAX_BOXES of a group compete.

    Not torchvision.ops.batched_nms, which is greedy: there a box that is suppressed itself
    suppresses no other. Example, in the order of their scores, where b overlaps a and c, but a and
    c do not overlap: greedy NMS keeps a and c; the mtcnn package, whose boxes we reproduce, keeps a
    alone. On real faces greedy NMS would move the points of one image in five by up to 9 pixels; it
    is no faster, and has no "min".
    """
    if len(boxes) == 0:
        return groups.new_zeros(0)
    # By group, best score first. Of equal scores (1.0 is frequent) the last comes first, as in
    # the package, which reverses an ascending sort.
    order = torch.argsort(scores, stable=True).flip(0)
    order = order[torch.argsort(groups[order], stable=True)]

    # One row per group, padded with empty boxes. Groups 0 0 0 4 4 become rows 0 0 0 1 1 and columns
    # 0 1 2 0 1: a box's position, less the number of boxes in the groups before its own.
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    row = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), counts)
    column = torch.arange(len(order), device=boxes.device) - (counts.cumsum(0) - counts)[row]
    if len(order) > MAX_BOXES:
        best = column < MAX_BOXES
        order, row, column = order[best], row[best], column[best]
    width = int(column.max()) + 1
    padded = boxes.new_zeros(len(counts), width, 4)
    padded[row, column] = boxes[order]

    # All pairs of a group at once, for as many groups as have MAX_BOXES^2 pairs together: that
    # bounds the memory. Entry (i, j) above the diagonal: better box i suppresses box j. Padding
    # comes last in its row, so it can suppress nothing but padding.
    step = max(1, MAX_BOXES**2 // width**2)
    kept = []
    for chunk in padded.split(step):
        suppressed = (_pairwise_overlap(chunk, method) > threshold).triu(1).any(1)
        kept.append(~suppressed)
    return order[torch.cat(kept)[row, column]]


def _pairwise_overlap(boxes: Tensor, method: str) -> Tensor:
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
    """(N, H, W, 3) uint8 -> (N, H, W) int32: the bytes R, G, B and a fourth that is ignored."""
    n, height, width, _ = images.shape
    if images.device.type == "cpu" and len(images):  # twenty times as fast as F.pad
        rows = cv2.cvtColor(images.numpy().reshape(n * height, width, 3), cv2.COLOR_RGB2RGBA)
        packed = torch.from_numpy(rows)
    else:
        packed = F.pad(images, (0, 1))
    return packed.view(torch.int32).view(n, height, width)


def crop_and_resize(pixels: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """(k, 4, size, size) bilinear crops of (N, H, W) int32 pixels (RGBA bytes), grey outside.

    Box i is in image index[i]. As TensorFlow's crop_and_resize with boxes as fractions of the
    image: the first and the last sample lie on the box's edges, and boxes shrink by (W - 1) / W.
    """
    _, height, width = pixels.shape
    top, bottom, down, inside_y = _sample_positions(boxes[:, 1], boxes[:, 3], height, size)
    left, right, across, inside_x = _sample_positions(boxes[:, 0], boxes[:, 2], width, size)
    first_row = index[:, None] * height
    flat = pixels.view(-1)

    def take(row: Tensor, column: Tensor) -> Tensor:
        # One gather of a machine word reads all channels of a pixel, several times as fast as rows
        # of three bytes or floats.
        position = ((first_row + row) * width)[:, :, None] + column[:, None, :]
        words = flat.index_select(0, position.view(-1))
        return words.view(torch.uint8).view(-1, size, size, 4).float()

    across = across[:, None, :, None]
    upper = take(top, left).lerp_(take(top, right), across)
    lower = take(bottom, left).lerp_(take(bottom, right), across)
    out = upper.lerp_(lower, down[:, :, None, None])
    outside = ~(inside_y[:, :, None] & inside_x[:, None, :])
    # 127.5 is zero once the network's first layer has normalised it.
    return out.masked_fill_(outside[..., None], 127.5).permute(0, 3, 1, 2)


def _sample_positions(low: Tensor, high: Tensor, length: int, size: int) -> tuple[Tensor, ...]:
    """Pixel before, pixel after, weight of the latter and validity of `size` samples on one axis.

    The samples run from `low` to `high` (k,), each result is (k, size).
    """
    steps = torch.arange(size, device=low.device, dtype=low.dtype) / (size - 1)
    x = (low[:, None] + (high - low)[:, None] * steps) * ((length - 1) / length)
    inside = (x >= 0) & (x <= length - 1)
    x = x.clamp(0, length - 1)
    before = x.floor()
    weight = x - before
    before = before.long()
    return before, (before + 1).clamp_(max=length - 1), weight, inside
