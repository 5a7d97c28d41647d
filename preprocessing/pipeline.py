"""The way of one image through preprocessing: decode, detect, warp, encode; many at a time.

    read the source in order          one thread          `align_blocks`
    decode                            worker threads      `decode_entry`
    detect the faces of a batch       detector, GPU       `find_faces`
    warp to 112x112, encode as JPEG   worker threads      `align_and_encode`
    yield block by block, in order    the caller's thread

The images are processed in blocks, which follow from the source's list alone, and a detection batch
never crosses a block. So a run that is resumed at a block forms the same batches as an
uninterrupted one, and its results have the same bytes.
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
from utils import (
    FACE_SIZE,
    UserError,
    core_count,
    is_out_of_memory,
    similarity_transform,
    warp_face,
)

BLOCK_IMAGES = 256
BLOCK_BYTES = 16 << 20
MIN_IMAGE_SIDE = 20  # pixels; MTCNN finds no smaller faces
SEARCH_SIDE = 1024  # pixels; faces of larger images are searched in a copy shrunk to this
BATCH_PIXELS = 250 * 250  # per image; batches of larger images have fewer of them
ALIGN_THREADS = "align"  # what the names of the threads begin with

_T = TypeVar("_T")
_Batches = list[tuple[list[int], Future]]  # positions in a block, and their detections to come


class DecodedImage(NamedTuple):
    """A decoded image; without `image`, `status` is the reason."""

    entry: Entry
    status: str = ""
    image: np.ndarray | None = None  # (H, W, 3) uint8 RGB, shrunk if it was larger than SEARCH_SIDE
    factor: float = 1.0  # by which it was shrunk
    data: bytes = b""  # the file, kept if the image was shrunk: the face is cut from the original


class AlignResult(NamedTuple):
    """The result for one entry: its row of index.tsv, and its JPEG unless it was skipped."""

    entry: Entry
    status: str
    jpeg: bytes | None = None
    score: float | None = None
    box: np.ndarray | None = None  # (4,) in pixels of the original image
    points: np.ndarray | None = None  # (5, 2) likewise
    others: np.ndarray | None = None  # (k, 4), the boxes of the image's other faces
    was_face_size: bool = False  # whether the image was 112x112, as aligned faces are


# ------------------------------------------------------------------------------ many images


def plan_blocks(entries: Sequence[Entry], most: int = BLOCK_IMAGES) -> list[tuple[int, int]]:
    """(start, stop) of consecutive runs of entries, each of at most `most` and about 16 MB.

    Example: files of 6, 9, 4 and 20 MB give (0, 2), (2, 3), (3, 4): 6 + 9 + 4 would be too many,
    and a file that is too large by itself gets a block of its own.
    """
    blocks, start, size = [], 0, 0
    for i, entry in enumerate(entries):
        if i > start and (i - start == most or size + entry.size > BLOCK_BYTES):
            blocks.append((start, i))
            start, size = i, 0
        size += entry.size
    if entries:
        blocks.append((start, len(entries)))
    return blocks


def align_blocks(
    source: Source,
    blocks: Sequence[tuple[int, int]],
    detector: FaceDetector | None,
    crop_missed: bool,
    detect_batch: int = 64,
    workers: int = 0,
) -> Iterator[list[AlignResult]]:
    """Yield the results of each block, in order; without a detector, the images are aligned faces.

    Reading, decoding, detecting and encoding overlap, each some blocks ahead of the next. Raises
    UserError if one of the threads fails.

    Close it (`contextlib.closing`) unless it is read to its end: its threads end with it. Left to
    the garbage collector, they would be joined at any time and in any thread, even in one that
    holds the lock they need to end: a deadlock.
    """
    workers = workers or core_count()
    wanted = [entry for start, stop in blocks for entry in source.entries()[start:stop]]
    contents = source.read(wanted)
    # In blocks. A block of 256 images is four detection batches, work for four threads.
    ahead = 1 + workers // 4
    reader = ThreadPoolExecutor(1, ALIGN_THREADS)
    pool = ThreadPoolExecutor(workers, ALIGN_THREADS)
    # The detector computes in threads of its own; these only wait for it. With at least two batches
    # under way it never waits for the next one to be stacked.
    searcher = ThreadPoolExecutor(1 + workers // 2, ALIGN_THREADS)

    def decode(block: tuple[int, int]) -> list[Future]:
        first_task = take_aligned if detector is None else decode_entry
        return [pool.submit(first_task, *next(contents)) for _ in range(*block)]

    def search(images: list[DecodedImage]) -> tuple[list[DecodedImage], _Batches]:
        batches = plan_batches(images, detect_batch)
        futures = [searcher.submit(find_faces, detector, images, batch) for batch in batches]
        return images, list(zip(batches, futures, strict=True))

    def align(images: list[DecodedImage], batches: _Batches) -> list[Future]:
        detections = [Detection("no_face")] * len(images)  # of those in no batch, too
        for batch, future in batches:
            for i, detection in zip(batch, future.result(), strict=True):
                detections[i] = detection
        pairs = zip(images, detections, strict=True)
        return [pool.submit(align_and_encode, *pair, crop_missed) for pair in pairs]

    try:
        # Each line is a generator over blocks that asks the one above it for some blocks early, so
        # that their tasks are queued before they are needed.
        decoding = prefetch((reader.submit(decode, block) for block in blocks), 1 + ahead)
        decoded = ([image.result() for image in block.result()] for block in decoding)
        if detector is None:
            yield from decoded
            return
        searching = prefetch((search(images) for images in decoded), ahead)
        aligning = prefetch((align(*block) for block in searching), 1)
        for block in aligning:
            yield [result.result() for result in block]
    except (UserError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"A thread that aligns images failed ({reason}); the images before it are kept. Start "
            "again to resume there, with fewer --workers if memory is short."
        ) from error
    finally:
        for threads in (reader, searcher, pool):
            threads.shutdown(cancel_futures=True)  # on Ctrl-C, too: what is queued is dropped
        contents.close()  # not earlier: the reader may have been inside it


def prefetch(items: Iterable[_T], depth: int) -> Iterator[_T]:
    """The same items, each taken from `items` as many as `depth` items before it is needed."""
    waiting: deque[_T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def plan_batches(images: Sequence[DecodedImage], most: int) -> list[list[int]]:
    """Positions of images of the same size, at most `most` in a batch, fewer if they are large.

    Example: with `most` = 64, a batch has 64 images of 250x250 or 4 of 1000x1000, which has 16
    times as many pixels. Images that are missing or too small for a face are in no batch.
    """
    positions_by_size: dict[tuple[int, int], list[int]] = {}
    for i, decoded in enumerate(images):
        if decoded.image is not None and min(decoded.image.shape[:2]) >= MIN_IMAGE_SIDE:
            positions_by_size.setdefault(decoded.image.shape[:2], []).append(i)
    batches = []
    for (height, width), positions in positions_by_size.items():
        step = min(most, max(1, most * BATCH_PIXELS // (height * width)))
        batches += [positions[i : i + step] for i in range(0, len(positions), step)]
    return batches


# ------------------------------------------------------------------------------ one image


def decode_entry(entry: Entry, data: bytes | ArchiveError) -> DecodedImage:
    """Decode a file, and shrink a large image for the face search."""
    if isinstance(data, ArchiveError):
        return DecodedImage(entry, data.status)
    try:
        image = decode_image(data)
    except ImageError as error:
        return DecodedImage(entry, error.status)
    short, long = sorted(image.shape[:2])
    # The longer side becomes SEARCH_SIDE, but a very long image keeps MIN_IMAGE_SIDE.
    factor = max(SEARCH_SIDE / long, MIN_IMAGE_SIDE / short)
    if factor >= 1 or short < MIN_IMAGE_SIDE:
        return DecodedImage(entry, "", image)
    smaller = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    # The original is dropped, and decoded again to be warped: the blocks under way may hold some
    # dozens of photos, of 36 MB each once decoded.
    return DecodedImage(entry, "", smaller, factor, data)


def find_faces(
    detector: FaceDetector, images: Sequence[DecodedImage], batch: Sequence[int]
) -> list[Detection]:
    """The face of each image of a batch."""
    return find_face(detector, np.stack([images[i].image for i in batch]))


def align_and_encode(decoded: DecodedImage, detection: Detection, crop_missed: bool) -> AlignResult:
    """Align and encode the face that was detected; `crop_missed`: else the image's centre."""
    entry, status, image, factor, data = decoded
    if image is None:
        return AlignResult(entry, status)
    was_face_size = image.shape[:2] == (FACE_SIZE, FACE_SIZE)
    if detection.points is None:
        if not crop_missed:
            too_small = min(image.shape[:2]) < MIN_IMAGE_SIDE
            return AlignResult(entry, "too_small" if too_small else "no_face")
        jpeg = encode_jpeg(align_face(image, central_crop_points(*image.shape[:2])))
        return AlignResult(entry, "central_crop", jpeg, was_face_size=was_face_size)
    # From the shrunk copy to the original. Whole numbers are the centres of pixels: shrunk by 1/4,
    # pixel 0 covers the original's pixels 0 to 3, and its centre is at 1.5 = (0 + 0.5) * 4 - 0.5.
    box, points, others = (
        (np.asarray(array, np.float64) + 0.5) / factor - 0.5
        for array in (detection.box, detection.points, detection.others)
    )
    if data:
        image = decode_image(data)
    jpeg = encode_jpeg(align_face(image, points))
    return AlignResult(
        entry, detection.status, jpeg, detection.score, box, points, others, was_face_size
    )


def take_aligned(entry: Entry, data: bytes | ArchiveError) -> AlignResult:
    """A face that is aligned already, as the bytes that it comes in; UserError if it is not."""
    if isinstance(data, ArchiveError):
        return AlignResult(entry, data.status)
    try:
        height, width = decode_image(data).shape[:2]
    except ImageError as error:
        return AlignResult(entry, error.status)
    if (height, width) != (FACE_SIZE, FACE_SIZE):
        raise UserError(
            f"{entry.name} has {width}x{height} pixels, not an aligned face's "
            f"{FACE_SIZE}x{FACE_SIZE}; without --aligned the faces are found and aligned."
        )
    return AlignResult(entry, "ok", data)


def align_face(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 and (5, 2) points in its pixels -> (112, 112, 3) on ArcFace's template.

    Faces at least twice as large as the template are halved first, once or more: the warp's
    bilinear sampling reads four pixels only, so it would skip most of a large face's and alias.
    """
    matrix = similarity_transform(points)
    scale = np.hypot(matrix[0, 0], matrix[1, 0])  # template pixels per image pixel
    halvings = int(np.log2(1 / scale)) if 0 < scale <= 0.5 else 0
    if halvings:
        height, width = (max(1, round(side / 2**halvings)) for side in image.shape[:2])
        # Not exactly a power of 2, as sides are rounded: 251 pixels become 126.
        factor = np.array([width / image.shape[1], height / image.shape[0]])
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        matrix = similarity_transform((points + 0.5) * factor - 0.5)
    return warp_face(image, matrix)
