"""The images of a source, decoded, detected and aligned block by block: pre_process.py's engine.

    images are read in order > decoded (threads) > detected (device) > warped and encoded
    (threads) > handed over in order

All goes by blocks of images that follow from the source's list alone, and detection batches never
cross a block: whoever starts again after a kill forms the same batches, hence the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from fileio.archive_source import ArchiveError, Entry, Source
from fileio.images import ImageError, decode_image, encode_jpeg
from preprocessing.detector import Detection, FaceDetector, central_crop_points, find_face
from utils import UserError, core_count, is_out_of_memory, similarity_transform, warp_face

BLOCK_IMAGES = 256
BLOCK_BYTES = 16 << 20
MIN_SIDE = 20  # pixels; MTCNN finds no smaller faces
MAX_SIDE = 1024  # larger images are searched in a smaller copy, and aligned from the whole
USUAL_PIXELS = 250 * 250  # batches of larger images have fewer of them
THREADS = "align"  # what the names of the threads begin with

T = TypeVar("T")
Batches = list[tuple[list[int], Future]]  # places in a block, and the detections to come


class LoadedImage(NamedTuple):
    """A decoded image, or the reason why there is none; `factor` is how much it was shrunk."""

    entry: Entry
    status: str = ""
    image: np.ndarray | None = None  # what is searched for faces
    factor: float = 1.0
    data: bytes = b""  # the file, where the image is a smaller copy


class Aligned(NamedTuple):
    """What became of one entry: its line of index.tsv, and its JPEG unless it was passed over."""

    entry: Entry
    status: str
    jpeg: bytes | None = None
    score: float | None = None
    box: np.ndarray | None = None
    points: np.ndarray | None = None


def plan_blocks(entries: Sequence[Entry], most: int = BLOCK_IMAGES) -> list[tuple[int, int]]:
    """(start, stop) of runs of entries: `most` of them at most, and about 16 MB."""
    blocks, start, size = [], 0, 0
    for i, entry in enumerate(entries):
        if i > start and (i - start == most or size + entry.size > BLOCK_BYTES):
            blocks.append((start, i))
            start, size = i, 0
        size += entry.size
    return [*blocks, (start, len(entries))] if entries else []


def align_blocks(
    source: Source,
    blocks: Sequence[tuple[int, int]],
    detector: FaceDetector,
    crop_missed: bool,
    detect_batch: int = 64,
    workers: int = 0,
) -> Iterator[list[Aligned]]:
    """What becomes of the entries of each block, in order.

    Reading, decoding, detecting and encoding overlap, each some blocks ahead of the next. Raises
    UserError where one of the threads dies.

    Close it (`contextlib.closing`) where not all blocks may be taken: the threads end with it. Left
    to the garbage collector, they would be joined at any time and in any thread, even by one that
    holds the lock they need to end: a deadlock.
    """
    workers = workers or core_count()
    wanted = [entry for start, stop in blocks for entry in source.entries()[start:stop]]
    contents = source.read(wanted)
    ahead = 1 + workers // 4  # blocks; each gives four threads a batch
    reader = ThreadPoolExecutor(1, THREADS)
    pool = ThreadPoolExecutor(workers, THREADS)
    # the detector has threads of its own; with two batches or more it never waits for us
    searcher = ThreadPoolExecutor(1 + workers // 2, THREADS)

    def load(block: tuple[int, int]) -> list[Future]:
        return [pool.submit(load_image, *next(contents)) for _ in range(*block)]

    def search(images: list[LoadedImage]) -> tuple[list[LoadedImage], Batches]:
        batches = plan_batches(images, detect_batch)
        found = [searcher.submit(search_batch, detector, images, batch) for batch in batches]
        return images, list(zip(batches, found, strict=True))

    def cut(images: list[LoadedImage], batches: Batches) -> list[Future]:
        detections = [Detection("no_face")] * len(images)
        for batch, found in batches:
            for i, detection in zip(batch, found.result(), strict=True):
                detections[i] = detection
        pairs = zip(images, detections, strict=True)
        return [pool.submit(cut_face, *pair, crop_missed) for pair in pairs]

    try:
        loading = run_ahead((reader.submit(load, block) for block in blocks), 1 + ahead)
        loaded = ([image.result() for image in block.result()] for block in loading)
        searching = run_ahead((search(images) for images in loaded), ahead)
        cutting = run_ahead((cut(*block) for block in searching), 1)
        for block in cutting:
            yield [face.result() for face in block]
    except (UserError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"A thread that aligns images died ({reason}); the images before it are kept. "
            "Start again to go on there, with fewer --workers if memory is short."
        ) from error
    finally:  # on Ctrl-C what is queued is dropped, not waited for
        for threads in (reader, searcher, pool):
            threads.shutdown(cancel_futures=True)
        contents.close()  # only now: until then the reader may be inside it


def run_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The same items, each asked for `depth` items early: so tasks are started before needed."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def load_image(entry: Entry, data: bytes | ArchiveError) -> LoadedImage:
    """Decode a file, and make a smaller copy of a large image for the search."""
    if isinstance(data, ArchiveError):
        return LoadedImage(entry, data.status)
    try:
        image = decode_image(data)
    except ImageError as error:
        return LoadedImage(entry, error.status)
    short, long = sorted(image.shape[:2])
    factor = max(MAX_SIDE / long, MIN_SIDE / short)
    if factor >= 1 or short < MIN_SIDE:
        return LoadedImage(entry, "", image)
    return LoadedImage(entry, "", _shrink(image, factor), factor, data)


def _shrink(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def plan_batches(images: Sequence[LoadedImage], most: int) -> list[list[int]]:
    """Places of images of one size, `most` together, fewer where they are large."""
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        if image.image is not None and min(image.image.shape[:2]) >= MIN_SIDE:
            sizes.setdefault(image.image.shape[:2], []).append(i)
    batches = []
    for (height, width), places in sizes.items():
        step = min(most, max(1, most * USUAL_PIXELS // (height * width)))
        batches += [places[i : i + step] for i in range(0, len(places), step)]
    return batches


def search_batch(
    detector: FaceDetector, images: Sequence[LoadedImage], batch: Sequence[int]
) -> list[Detection]:
    """The face of each image of a batch."""
    return find_face(detector, np.stack([images[i].image for i in batch]))


def cut_face(loaded: LoadedImage, detection: Detection, crop_missed: bool) -> Aligned:
    """Align and encode one face; coordinates in pixels of the whole image."""
    entry, status, image, factor, data = loaded
    if image is None:
        return Aligned(entry, status)
    if detection.points is None:
        if not crop_missed:
            small = min(image.shape[:2]) < MIN_SIDE
            return Aligned(entry, "too_small" if small else "no_face")
        jpeg = encode_jpeg(align_face(image, central_crop_points(*image.shape[:2])))
        return Aligned(entry, "central_crop", jpeg)
    # pixel centres, not corners, have whole numbers
    points = (np.asarray(detection.points, np.float64) + 0.5) / factor - 0.5
    box = (np.asarray(detection.box, np.float64) + 0.5) / factor - 0.5
    if data:
        image = decode_image(data)
    jpeg = encode_jpeg(align_face(image, points))
    return Aligned(entry, detection.status, jpeg, detection.score, box, points)


def align_face(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 and (5, 2) points in its pixels -> (112, 112, 3) on ArcFace's template.

    Faces twice as large as the template or more are halved first: bilinear sampling looks at four
    pixels only.
    """
    matrix = similarity_transform(points)
    scale = np.hypot(matrix[0, 0], matrix[1, 0])
    halvings = int(np.log2(1 / scale)) if 0 < scale <= 0.5 else 0
    if halvings:
        height, width = (max(1, round(side / 2**halvings)) for side in image.shape[:2])
        factor = np.array([width / image.shape[1], height / image.shape[0]])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        matrix = similarity_transform((points + 0.5) * factor - 0.5)
    return warp_face(image, matrix)
