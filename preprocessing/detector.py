"""MTCNN: faces with five points, for whole batches of same-sized images, on a CPU or a GPU.

    python face_detect.py image.jpg ...

prints a line an image: file, status (ok, retried, no_face), score, box and the five points of the
face that would be aligned, in pixels, tab-separated.

The cascade, its thresholds and its coordinates are those of the `mtcnn` package (ipazc/mtcnn
1.0.0, MIT), whose weights are used: three small networks (Zhang et al., arXiv 1604.02878). P-Net
looks through a pyramid of the image for proposals, R-Net and O-Net look closer at each, O-Net
adds the points. TensorFlow is never imported.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from preprocessing.mtcnn_networks import ONet, PNet, RNet
from preprocessing.mtcnn_ops import (
    CELL,
    area_resize,
    crop,
    move_boxes,
    pack_pixels,
    suppress,
    to_square,
    window_boxes,
)
from utils import FACE_SIZE, TEMPLATE, UserError, core_count, exit_on_user_error, get_device

MIN_FACE = 20  # pixels; the smallest face that is ever looked for unless asked
FACE_PART = 0.16  # of the shorter side: the smallest face looked for at first
MAX_SIDE = 1600  # pixels; larger images are shrunk to it
PYRAMID_FACTOR = 0.709

RETRY_THRESHOLDS = (0.5, 0.6, 0.6)
RETRY_SIDE = 500  # pixels; up to here an image is enlarged twice for the retry
CENTRAL_CROP = 0.525  # side of the square that becomes the aligned face, in shorter sides

CPU_PIXELS = 2**20  # images that one thread takes at a time: 16 of 250x250
CACHE_PIXELS = 2**16  # inputs of a network at a time: their layers fit a core's cache
GPU_PIXELS = 2**26


class Faces(NamedTuple):
    """The k faces of one image, best score first; coordinates in pixels."""

    boxes: np.ndarray  # (k, 4) float32: x1, y1, x2, y2
    scores: np.ndarray  # (k,) float32
    points: np.ndarray  # (k, 5, 2) float32: left eye as seen in the image first, as in TEMPLATE


class Detection(NamedTuple):
    """The one face of an image; all but the status are None where there is none."""

    status: str  # "ok", "retried" or "no_face"
    score: float | None = None
    box: np.ndarray | None = None  # (4,)
    points: np.ndarray | None = None  # (5, 2)


def default_min_face(height: int, width: int) -> float:
    """The smallest face looked for at first: a sixth of the shorter side, at least 20 pixels.

    Rounded down to 20 / 0.709^k, so that the pyramid is the upper part of the one from 20 pixels
    and larger faces come out the same; for 250x250 it is 39.8.
    """
    smallest = max(FACE_PART * min(height, width), MIN_FACE)
    steps = math.floor(math.log(smallest / MIN_FACE) / -math.log(PYRAMID_FACTOR) + 1e-9)
    return MIN_FACE / PYRAMID_FACTOR**steps


def pyramid_scales(height: int, width: int, min_face: float) -> list[float]:
    """Scales at which P-Net's 12 pixels are faces of `min_face` pixels and up, by factor 0.709."""
    scales = []
    scale = CELL / min_face
    while min(height, width) * scale >= CELL:
        scales.append(scale)
        scale *= PYRAMID_FACTOR
    return scales


class FaceDetector:
    """MTCNN on one device.

    `min_face` is in pixels, 0: chosen from the image's size. On a CPU it works on several
    images at a time in threads of its own, each on one core; PyTorch's own threads, which share
    every operation, are slower for operations this small, much so when others use the cores too.
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
    ) -> list[Faces]:
        """Every face of every image: (N, H, W, 3) uint8 RGB -> N Faces.

        `min_face` and `thresholds` stand in for the detector's own. Images with a side over
        MAX_SIDE are shrunk to it first; coordinates are the given image's all the same.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, np.uint8, "CW"))
        if len(images) == 0:
            return []
        _, height, width, _ = images.shape
        min_face = min_face or self.min_face or default_min_face(height, width)
        pixels = CPU_PIXELS if self.on_cpu else GPU_PIXELS
        parts = images.split(max(1, pixels // (height * width)))
        work = functools.partial(
            self._detect, min_face=min_face, thresholds=thresholds or self.thresholds
        )
        return [faces for part in self.pool.map(work, parts) for faces in part]

    @torch.inference_mode()
    def _detect(
        self, images: Tensor, min_face: float, thresholds: tuple[float, float, float]
    ) -> list[Faces]:
        """`detect` for as many images as go through at once."""
        if self.on_cpu:
            torch.set_num_threads(1)  # of this thread
        images = images.to(self.device)
        n, height, width, _ = images.shape
        shrink = MAX_SIDE / max(height, width)
        if shrink < 1:
            size = max(1, round(height * shrink)), max(1, round(width * shrink))
            images = area_resize(images.float(), *size).round().to(torch.uint8)
            min_face = max(min_face * shrink, CELL)

        index, boxes, scores = self._propose(images, min_face, thresholds[0])
        pixels = pack_pixels(images)

        boxes = to_square(boxes)
        offsets, scores = self._run(self.rnet, crop(pixels, index, boxes, 24))
        boxes = move_boxes(boxes, offsets)
        keep = torch.nonzero(scores > thresholds[1])[:, 0]
        keep = keep[suppress(boxes[keep], scores[keep], index[keep], 0.7)]

        index, boxes = index[keep], to_square(boxes[keep])
        offsets, scores, points = self._run(self.onet, crop(pixels, index, boxes, 48))
        points = boxes[:, None, :2] + points * (boxes[:, 2:] - boxes[:, :2] + 1)[:, None] - 1
        boxes = move_boxes(boxes, offsets)
        keep = torch.nonzero(scores > thresholds[2])[:, 0]
        keep = keep[suppress(boxes[keep], scores[keep], index[keep], 0.7, "min")]

        if shrink < 1:  # a pixel's centre is at a whole number in both images
            boxes, points = ((a + 0.5) / shrink - 0.5 for a in (boxes, points))
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width - 1, height - 1] * 2))
        return _split(n, index[keep], boxes[keep], scores[keep], points[keep])

    def _propose(
        self, images: Tensor, min_face: float, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P-Net over the pyramid: image index, box and score of every proposal."""
        height, width = images.shape[1:3]
        x = images.float()
        levels = []
        for level, scale in enumerate(pyramid_scales(height, width, min_face)):
            smaller = area_resize(x, int(height * scale), int(width * scale)).permute(0, 3, 1, 2)
            offsets, scores = self._run(self.pnet, smaller)
            i, row, column = torch.nonzero(scores > threshold, as_tuple=True)
            boxes = window_boxes(column, row, offsets[i, :, row, column], scale)
            levels.append((i, boxes, scores[i, row, column], torch.full_like(i, level)))
        if not levels:
            none = torch.zeros(0, dtype=torch.long, device=x.device)
            levels = [(none, x.new_zeros(0, 4), x.new_zeros(0), none)]
        index, boxes, scores, level = (torch.cat(values) for values in zip(*levels, strict=True))
        keep = suppress(boxes, scores, index * len(levels) + level, 0.5)
        keep = keep[suppress(boxes[keep], scores[keep], index[keep], 0.7)]
        return index[keep], boxes[keep], scores[keep]

    def _run(self, network: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """The network in parts whose layers stay in a core's cache; on a GPU in one go."""
        pixels = CACHE_PIXELS if self.on_cpu else GPU_PIXELS
        parts = x.split(max(1, pixels // (x.shape[2] * x.shape[3])))
        results = zip(*[network(part) for part in parts], strict=True)
        return tuple(torch.cat(values) if len(values) > 1 else values[0] for values in results)


def _split(n: int, index: Tensor, boxes: Tensor, scores: Tensor, points: Tensor) -> list[Faces]:
    """What was found in a batch, ordered by image, as one Faces an image."""
    bounds = np.searchsorted(index.cpu().numpy(), np.arange(n + 1))
    arrays = [a.cpu().numpy() for a in (boxes, scores, points)]
    return [Faces(*(a[i:j] for a in arrays)) for i, j in itertools.pairwise(bounds)]


def choose_face(faces: Faces, height: int, width: int) -> int | None:
    """The face that is large and central: largest area minus twice the squared way to the centre.

    Pixels squared, as in facenet and insightface (`align_dataset_mtcnn.py`); None without faces.
    """
    if len(faces.boxes) == 0:
        return None
    boxes = faces.boxes.astype(np.float64)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    offset = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([width, height]) / 2
    return int(np.argmax(area - 2 * (offset**2).sum(1)))


def find_face(detector: FaceDetector, images: np.ndarray) -> list[Detection]:
    """The one face of each image, retried where there is none: (N, H, W, 3) uint8 RGB."""
    height, width = images.shape[1:3]
    result = [_detection("ok", faces, height, width) for faces in detector.detect(images)]
    missed = [i for i, detection in enumerate(result) if detection.status == "no_face"]
    if missed:
        again = retry(detector, images[missed])
        for i, faces in zip(missed, again, strict=True):
            result[i] = _detection("retried", faces, height, width)
    return result


def retry(detector: FaceDetector, images: np.ndarray) -> list[Faces]:
    """A second, slower look: lower thresholds, faces from 20 pixels, small images enlarged.

    (N, H, W, 3) uint8 RGB; an image up to RETRY_SIDE is enlarged twice, so that faces from 10
    pixels are found in it. Coordinates are the given image's.
    """
    factor = 2 if max(images.shape[1:3]) <= RETRY_SIDE else 1
    larger = np.stack([cv2.resize(image, None, fx=factor, fy=factor) for image in images])
    found = detector.detect(larger, MIN_FACE, RETRY_THRESHOLDS)
    # the centre of pixel x is at 2 x + 0.5 in the enlarged image
    return [
        Faces((f.boxes + 0.5) / factor - 0.5, f.scores, (f.points + 0.5) / factor - 0.5)
        for f in found
    ]


def _detection(status: str, faces: Faces, height: int, width: int) -> Detection:
    """The chosen face as a Detection, or "no_face"."""
    best = choose_face(faces, height, width)
    if best is None:
        return Detection("no_face")
    return Detection(status, float(faces.scores[best]), faces.boxes[best], faces.points[best])


def central_crop_points(height: int, width: int) -> np.ndarray:
    """(5, 2) points whose alignment is the image's central square; for want of a face."""
    side = CENTRAL_CROP * min(height, width)
    corner = np.array([width - side, height - side]) / 2
    return corner + TEMPLATE * (side / FACE_SIZE)


@exit_on_user_error
def main(paths: list[str]) -> None:
    """Print the faces of the images named."""
    if not paths:
        raise UserError("Name one or more images: python face_detect.py image.jpg ...")
    detector = FaceDetector(get_device())
    for path in paths:
        image = cv2.imread(path, cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise UserError(f"{path} is not an image that OpenCV can read.")
        face = find_face(detector, image[None])[0]
        numbers = [] if face.box is None else [face.score, *face.box, *face.points.ravel()]
        print("\t".join([path, face.status, *(f"{v:.2f}" for v in numbers)]))


if __name__ == "__main__":
    main(sys.argv[1:])
