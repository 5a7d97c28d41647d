"""MTCNN: faces with five points, for batches of same-sized images, on a CPU or a GPU.

    detector = FaceDetector("cuda")
    detections = detector.detect(images)         # (N, H, W, 3) uint8: all faces of each image
    chosen = find_face(detector, images)         # the one face of each image that is aligned

The cascade, its thresholds and its coordinates are those of the `mtcnn` package (ipazc/mtcnn
1.0.0, MIT), whose weights are used: three small networks (Zhang et al., arXiv 1604.02878). P-Net
slides over an image pyramid and proposes boxes, R-Net refines them, O-Net refines them again and
adds the points. A batch shares one pyramid, and the boxes of all its images go through R-Net and
O-Net together. TensorFlow is never imported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from preprocessing.mtcnn_networks import ONet, PNet, RNet
from preprocessing.mtcnn_ops import (
    CELL,
    apply_offsets,
    area_resize,
    cell_boxes,
    crop_and_resize,
    mtcnn_nms,
    pack_pixels,
    to_square,
)
from utils import FACE_SIZE, TEMPLATE, core_count, exact_float32

MIN_FACE = 20  # pixels; no smaller face is looked for unless asked
MIN_FACE_FRACTION = 0.16  # of the shorter side; the smallest face looked for at first
MAX_DETECTOR_SIDE = 1600  # pixels; larger images are shrunk to it
PYRAMID_FACTOR = 0.709  # from one level to the next: about sqrt(1/2), each has half the pixels

RETRY_THRESHOLDS = (0.5, 0.6, 0.6)
RETRY_SIDE = 500  # pixels; up to here an image is enlarged twice for the retry
CENTRAL_CROP = 0.525  # side of the central square that is taken for a face, in shorter sides

CPU_PIXELS = 2**20  # of images that one thread processes at a time: 16 of 250x250
CACHE_PIXELS = 2**16  # of inputs that a network processes at a time: its layers fit a core's cache
GPU_PIXELS = 2**26  # of images that a GPU processes at a time: 1,073 of 250x250
# Of inputs that a network processes there at a time: 14,563 boxes for R-Net, 3,640 for O-Net. Its
# first layer and PReLU take 235 bytes for each, 2 GB together.
CROP_PIXELS = 2**23


class Detections(NamedTuple):
    """All k faces of one image, best score first; coordinates in pixels."""

    boxes: np.ndarray  # (k, 4) float32: x1, y1, x2, y2
    scores: np.ndarray  # (k,) float32
    points: np.ndarray  # (k, 5, 2) float32: left eye as seen in the image first, as in TEMPLATE


class Detection(NamedTuple):
    """The one face of an image that is aligned; all but the status are None if there is none."""

    status: str  # "ok", "retried" or "no_face"
    score: float | None = None
    box: np.ndarray | None = None  # (4,)
    points: np.ndarray | None = None  # (5, 2)
    others: np.ndarray | None = None  # (k, 4), the boxes of the image's other faces


def default_min_face(height: int, width: int) -> float:
    """The smallest face looked for at first: a sixth of the shorter side, at least 20 pixels.

    It is rounded down to 20 / 0.709^k pixels. So the pyramid has the same levels as the one that
    begins at 20 pixels, only without the k largest, and larger faces are found at the same places.
    Example: for 250x250, 0.16 * 250 = 40 is rounded down to 20 / 0.709^2 = 39.8.
    """
    smallest = max(MIN_FACE_FRACTION * min(height, width), MIN_FACE)
    # 1e-9: where `smallest` is such a number itself, rounding errors must not cost a level.
    steps = math.floor(math.log(smallest / MIN_FACE) / -math.log(PYRAMID_FACTOR) + 1e-9)
    return MIN_FACE / PYRAMID_FACTOR**steps


def pyramid_scales(height: int, width: int, min_face: float) -> list[float]:
    """The pyramid's scales: at scale 12 / f P-Net's window of 12 pixels is a face of f pixels.

    They begin at `min_face` pixels and fall by 0.709 while the shorter side holds a window.
    """
    scales = []
    scale = CELL / min_face
    while min(height, width) * scale >= CELL:
        scales.append(scale)
        scale *= PYRAMID_FACTOR
    return scales


class FaceDetector:
    """MTCNN on one device.

    `min_face` is in pixels, 0: chosen from the image's size. On a CPU `threads` threads (0: one per
    core) process several images each: PyTorch's own threads, which share every single operation,
    are slower for operations this small, and much slower when other processes use the cores, too.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        min_face: float = 0,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        threads: int = 0,
    ):
        self.device = torch.device(device)
        self.min_face = min_face
        self.thresholds = thresholds
        self.pnet = PNet().to(self.device)
        self.rnet = RNet().to(self.device)
        self.onet = ONet().to(self.device)
        self.on_cpu = self.device.type == "cpu"
        self.pool = ThreadPoolExecutor(threads or core_count() if self.on_cpu else 1)

    def detect(
        self,
        images: np.ndarray | Tensor,
        min_face: float = 0,
        thresholds: tuple[float, float, float] | None = None,
    ) -> list[Detections]:
        """Every face of every image: (N, H, W, 3) uint8 RGB -> N Detections.

        `min_face` and `thresholds` replace the detector's own. Images with a side over
        MAX_DETECTOR_SIDE are shrunk to it first; coordinates are still the given image's.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, np.uint8, "CW"))
        if len(images) == 0:
            return []
        _, height, width, _ = images.shape
        min_face = min_face or self.min_face or default_min_face(height, width)
        pixels = CPU_PIXELS if self.on_cpu else GPU_PIXELS
        chunks = images.split(max(1, pixels // (height * width)))
        detect = functools.partial(
            self._detect, min_face=min_face, thresholds=thresholds or self.thresholds
        )
        # A GPU in TF32 would find other points than a CPU, and so prepare another data set.
        with contextlib.nullcontext() if self.on_cpu else exact_float32():
            return [detections for chunk in self.pool.map(detect, chunks) for detections in chunk]

    @torch.inference_mode()
    def _detect(
        self, images: Tensor, min_face: float, thresholds: tuple[float, float, float]
    ) -> list[Detections]:
        """`detect` for as many images as are processed at once.

        The boxes of all images are in one tensor; `index` (k,) says which image each belongs to.
        """
        if self.on_cpu:
            torch.set_num_threads(1)  # of this thread only
        images = images.to(self.device)
        n, height, width, _ = images.shape
        shrink = MAX_DETECTOR_SIDE / max(height, width)
        if shrink < 1:
            size = max(1, round(height * shrink)), max(1, round(width * shrink))
            images = area_resize(images.float(), *size).round().to(torch.uint8)
            min_face = max(min_face * shrink, CELL)

        index, boxes, scores = self._propose(images, min_face, thresholds[0])
        pixels = pack_pixels(images)

        boxes = to_square(boxes)
        offsets, scores = self._refine(self.rnet, 24, pixels, index, boxes)
        boxes = apply_offsets(boxes, offsets)
        keep = torch.nonzero(scores > thresholds[1])[:, 0]
        keep = keep[mtcnn_nms(boxes[keep], scores[keep], index[keep], 0.7)]

        index, boxes = index[keep], to_square(boxes[keep])
        offsets, scores, points = self._refine(self.onet, 48, pixels, index, boxes)
        # From fractions of the box to pixels; the package counts both edges (+ 1) and from 1 (- 1).
        points = boxes[:, None, :2] + points * (boxes[:, 2:] - boxes[:, :2] + 1)[:, None] - 1
        boxes = apply_offsets(boxes, offsets)
        keep = torch.nonzero(scores > thresholds[2])[:, 0]
        # "min": of a box inside another one, say eyes and nose inside the face, only one stays,
        # though the small box is too small a part of the union for "union".
        keep = keep[mtcnn_nms(boxes[keep], scores[keep], index[keep], 0.7, "min")]

        if shrink < 1:  # a pixel's centre is at a whole number in both images
            boxes = (boxes + 0.5) / shrink - 0.5
            points = (points + 0.5) / shrink - 0.5
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width - 1, height - 1] * 2))
        return _split_by_image(n, index[keep], boxes[keep], scores[keep], points[keep])

    def _propose(
        self, images: Tensor, min_face: float, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P-Net on every level of the pyramid: image index, box and score of each proposal."""
        height, width = images.shape[1:3]
        x = images.float()
        levels = []
        for level, scale in enumerate(pyramid_scales(height, width, min_face)):
            smaller = area_resize(x, int(height * scale), int(width * scale)).permute(0, 3, 1, 2)
            offsets, scores = self._run(self.pnet, smaller)
            i, row, column = torch.nonzero(scores > threshold, as_tuple=True)
            boxes = cell_boxes(column, row, offsets[i, :, row, column], scale)
            levels.append((i, boxes, scores[i, row, column], torch.full_like(i, level)))
        if not levels:  # the images are smaller than P-Net's window
            none = torch.zeros(0, dtype=torch.long, device=x.device)
            levels = [(none, x.new_zeros(0, 4), x.new_zeros(0), none)]
        index, boxes, scores, level = (torch.cat(values) for values in zip(*levels, strict=True))
        # First within each level of each image: neighbouring cells propose the same face. The
        # group of level l of image i is i * levels + l. Then across the levels of each image.
        keep = mtcnn_nms(boxes, scores, index * len(levels) + level, 0.5)
        keep = keep[mtcnn_nms(boxes[keep], scores[keep], index[keep], 0.7)]
        return index[keep], boxes[keep], scores[keep]

    def _refine(
        self, network: nn.Module, size: int, pixels: Tensor, index: Tensor, boxes: Tensor
    ) -> tuple[Tensor, ...]:
        """The network on the boxes (k, 4) of images `index` (k,), cropped to `size` pixels."""
        chunk = CROP_PIXELS // size**2  # a crowd's boxes would not fit into memory at once
        chunks = zip(index.split(chunk), boxes.split(chunk), strict=True)
        return _concatenate(
            [self._run(network, crop_and_resize(pixels, i, b, size)) for i, b in chunks]
        )

    def _run(self, network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The network on chunks of x whose activations fit a core's cache, or a GPU's memory."""
        pixels = CACHE_PIXELS if self.on_cpu else CROP_PIXELS
        chunks = x.split(max(1, pixels // (x.shape[2] * x.shape[3])))
        return _concatenate([network(chunk) for chunk in chunks])


def _concatenate(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of chunks as those of all."""
    if len(results) == 1:
        return results[0]
    return tuple(torch.cat(values) for values in zip(*results, strict=True))


def _split_by_image(
    n: int, index: Tensor, boxes: Tensor, scores: Tensor, points: Tensor
) -> list[Detections]:
    """The faces of a batch, which are ordered by image, as one Detections per image."""
    bounds = np.searchsorted(index.cpu().numpy(), np.arange(n + 1))
    arrays = [a.cpu().numpy() for a in (boxes, scores, points)]
    return [Detections(*(a[i:j] for a in arrays)) for i, j in itertools.pairwise(bounds)]


def choose_face(detections: Detections, height: int, width: int) -> int | None:
    """The index of the face that is large and central; None if there is no face.

    It has the largest area minus twice the squared distance of its centre from the image's, in
    pixels, as in facenet and insightface (`align_dataset_mtcnn.py`).
    """
    if len(detections.boxes) == 0:
        return None
    boxes = detections.boxes.astype(np.float64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([width, height]) / 2
    return int(np.argmax(area - 2 * (offset**2).sum(1)))


def find_face(detector: FaceDetector, images: np.ndarray) -> list[Detection]:
    """The one face of each image, retried if there is none: (N, H, W, 3) uint8 RGB."""
    height, width = images.shape[1:3]
    chosen = [_chosen("ok", faces, height, width) for faces in detector.detect(images)]
    missed = [i for i, detection in enumerate(chosen) if detection.status == "no_face"]
    if missed:
        retried = retry_detection(detector, images[missed])
        for i, faces in zip(missed, retried, strict=True):
            chosen[i] = _chosen("retried", faces, height, width)
    return chosen


def retry_detection(detector: FaceDetector, images: np.ndarray) -> list[Detections]:
    """A slower detection with lower thresholds, from faces of 20 pixels, in enlarged images.

    (N, H, W, 3) uint8 RGB. Images up to RETRY_SIDE are enlarged twice, so that faces from 10 pixels
    are found in them. Coordinates are the given image's.
    """
    factor = 2 if max(images.shape[1:3]) <= RETRY_SIDE else 1
    larger = np.stack([cv2.resize(image, None, fx=factor, fy=factor) for image in images])
    # The centre of pixel x is at 2 x + 0.5 in the enlarged image.
    return [
        Detections((d.boxes + 0.5) / factor - 0.5, d.scores, (d.points + 0.5) / factor - 0.5)
        for d in detector.detect(larger, MIN_FACE, RETRY_THRESHOLDS)
    ]


def _chosen(status: str, detections: Detections, height: int, width: int) -> Detection:
    """The chosen face as a Detection, or "no_face"."""
    best = choose_face(detections, height, width)
    if best is None:
        return Detection("no_face")
    boxes, scores, points = detections
    others = np.delete(boxes, best, 0)
    return Detection(status, float(scores[best]), boxes[best], points[best], others)


def central_crop_points(height: int, width: int) -> np.ndarray:
    """(5, 2) points whose alignment is the image's central square, for an image without a face."""
    side = CENTRAL_CROP * min(height, width)
    corner = np.array([width - side, height - side]) / 2
    return corner + TEMPLATE * (side / FACE_SIZE)
