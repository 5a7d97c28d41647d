"""Records in, batches on the device out.

    reader = RecordReader("data/faces_webface_112x112")
    faces = split(reader.labels, valid_fraction=0.02)
    store = ImageStore(reader, faces.indices, device)
    for batch in train_batches(store, faces.train, batch_size=512, seed=0, epoch=0): ...

An image is decoded once, into a uint8 cache on the GPU or in memory (or, where neither holds the
set, again and again by threads); mirroring and normalisation work on whole batches on the device.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distributed.collectives import rank_slice
from distributed.process_group import local_world_size, world_size
from fileio.recordio import RecordError, RecordReader
from utils import FACE_SIZE, UserError, core_count

FACE_BYTES = FACE_SIZE * FACE_SIZE * 3
BLOCK = 8192  # images decoded before they are copied to a GPU
CHUNK = 32  # images a thread takes at a time
NORMALISED = ((np.arange(256) - 127.5) / 127.5).astype(np.float32)  # by the byte of a pixel


class LoadingError(UserError):
    """A thread that loads images died of something that is not an image's fault."""


class Batch(NamedTuple):
    """What the training loop sees of `n` images."""

    images: Tensor  # (n, 3, 112, 112) float32 in [-1, 1], channels_last
    labels: Tensor  # (n,) int64
    positions: np.ndarray  # (n,) rows of the store, for naming records


# Augmentation of a batch: uint8 images (n, 112, 112, 3) and their positions (n,) to images.
Augment = Callable[[Tensor, np.ndarray], Tensor]

# Of each batch the images' positions (n,), and which of them are mirrored.
Parts = Sequence[tuple[np.ndarray, np.ndarray | None]]


class Split(NamedTuple):
    """Which images of a record file are used, and for what."""

    indices: np.ndarray  # (n,) int64, images of the reader that are used at all
    labels: np.ndarray  # (n,) int64 classes of those, 0 ... num_classes - 1
    num_classes: int
    train: np.ndarray  # positions in `indices`
    valid: np.ndarray  # positions in `indices`


def split(
    labels: np.ndarray,
    *,
    valid_fraction: float,
    max_classes: int = 0,
    seed: int = 0,
    used: np.ndarray | None = None,
) -> Split:
    """Choose the identities, then hold out images of each for validation.

    Of the images with `labels` (n,), those for which `used` (n,) bool is false do not exist.
    `max_classes` keeps the identities with most images (0: all). Each identity gives
    `valid_fraction` of its images, rounded up or down at random so that the sum is right, and keeps
    at least one for training. The result depends on the arguments alone.
    """
    there = np.arange(len(labels)) if used is None else np.flatnonzero(used)
    counts = np.bincount(labels[there], minlength=1)
    chosen = np.flatnonzero(counts)
    if 0 < max_classes < len(chosen):
        chosen = np.sort(np.argsort(-counts, kind="stable")[:max_classes])
    new_label = np.full(len(counts), -1)
    new_label[chosen] = np.arange(len(chosen))
    indices = there[new_label[labels[there]] >= 0]
    labels = new_label[labels[indices]]

    rng = np.random.default_rng([seed, 0])
    counts = np.bincount(labels, minlength=len(chosen))
    held_out = np.floor(counts * valid_fraction + rng.random(len(chosen))).astype(np.int64)
    held_out = np.minimum(held_out, counts - 1)
    order = np.lexsort((rng.random(len(labels)), labels))  # identities in order, images shuffled
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_valid = rank < np.repeat(held_out, counts)
    return Split(indices, labels, len(chosen), np.sort(order[~is_valid]), np.sort(order[is_valid]))


def load_images(
    reader: RecordReader,
    indices: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: str = "",
) -> tuple[Tensor, dict[int, str]]:
    """Decode images by threads: ((n, 112, 112, 3) uint8 RGB, {place: why it stayed black}).

    They end on `device`; of a set that goes to a GPU, main memory holds one block at a time.
    `progress` is the title of a progress bar, none if empty.
    """
    images = torch.empty((len(indices), FACE_SIZE, FACE_SIZE, 3), dtype=torch.uint8, device=device)
    errors: dict[int, str] = {}
    bar = tqdm(total=len(indices), desc=progress, unit="img", disable=not progress)
    with bar, ThreadPoolExecutor(workers or core_count()) as pool:
        for start in range(0, len(indices), BLOCK):
            block = images[start : start + BLOCK]
            staged = block if block.device.type == "cpu" else torch.empty_like(block, device="cpu")
            found = _decode(reader, indices[start : start + BLOCK], staged.numpy(), pool, bar)
            errors |= {start + place: why for place, why in found.items()}
            if staged is not block:
                block.copy_(staged)
    return images, errors


def _decode(
    reader: RecordReader,
    indices: np.ndarray,
    out: np.ndarray,
    pool: ThreadPoolExecutor,
    bar: tqdm | None = None,
) -> dict[int, str]:
    """Decode images into `out` (n, 112, 112, 3) by threads; returns {place: what is wrong}.

    Raises RecordError for an image of another size.
    """

    def decode_some(start: int) -> dict[int, str]:
        errors = {}
        for place, index in enumerate(indices[start : start + CHUNK], start):
            try:
                image = reader.image(int(index))
            except RecordError as error:
                errors[place] = str(error)
                out[place] = 0
                continue
            if image.shape != out.shape[1:]:
                raise RecordError(
                    f"record {reader.keys[index]} of {reader.path} is {image.shape[1]}x"
                    f"{image.shape[0]}, not {FACE_SIZE}x{FACE_SIZE}; align it with pre_process.py."
                )
            out[place] = image
        if bar is not None:
            bar.update(min(CHUNK, len(indices) - start))
        return errors

    errors: dict[int, str] = {}
    for found in pool.map(decode_some, range(0, len(indices), CHUNK)):
        errors |= found
    return errors


def available_memory() -> int:
    """Bytes of main memory that can be used without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Elsewhere: half of the physical memory is a careful guess.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def choose_cache(count: int, device: torch.device) -> str:
    """Where `count` decoded images go: "gpu", "ram" or "none", the first that they fit."""
    size = count * FACE_BYTES
    # Half of the GPU stays for the network, the head and its activations.
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] // 2:
        return "gpu"
    return "ram" if size * local_world_size() < available_memory() * 0.7 else "none"


class ImageStore:
    """Images of a record file by position, as uint8 tensors on the device.

    `cache` is "gpu", "ram", "none" or "auto". Images that cannot be decoded are listed in `bad`
    (position → why); with a cache that is known from the start, without one as they are met.
    """

    def __init__(
        self,
        reader: RecordReader,
        split: Split,
        device: torch.device,
        *,
        cache: str = "auto",
        workers: int = 0,
        progress: str = "",
    ) -> None:
        self.reader = reader
        self.indices = split.indices
        self.device = device
        self.cache = choose_cache(len(split.indices), device) if cache == "auto" else cache
        if self.cache == "gpu" and device.type != "cuda":
            self.cache = "ram"
        self.labels = torch.from_numpy(split.labels).to(device)
        self.bad: dict[int, str] = {}
        self.images: Tensor | None = None
        self.workers = workers or core_count()
        self.pool = ThreadPoolExecutor(self.workers)
        if self.cache != "none":
            self.images, self.bad = load_images(
                reader,
                split.indices,
                device=device if self.cache == "gpu" else "cpu",
                workers=workers,
                progress=progress,
            )

    def fetch(self, positions: np.ndarray, mirrored: np.ndarray | None = None) -> Tensor:
        """Images at `positions` (n,): (n, 112, 112, 3) uint8 on the device.

        Those for which `mirrored` (n,) bool is true come as their mirror images.
        """
        if self.images is not None and self.images.device.type != "cpu":
            index = torch.from_numpy(positions).to(self.device, non_blocking=True)
            images = self.images.index_select(0, index)
            if mirrored is None:
                return images
            turned = torch.from_numpy(mirrored).to(self.device, non_blocking=True)
            return torch.where(turned[:, None, None, None], images.flip(2), images)
        images = torch.from_numpy(self._gather(positions, mirrored))
        if images.device != self.device:
            images = images.pin_memory().to(self.device, non_blocking=True)
        return images

    def _gather(self, positions: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
        """`fetch` from main memory or from the file, by threads."""
        out = np.empty((len(positions), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        if self.images is None:
            errors = _decode(self.reader, self.indices[positions], out, self.pool)
            self.bad |= {int(positions[place]): why for place, why in errors.items()}
        cached = None if self.images is None else self.images.numpy()

        def fill(part: slice) -> None:
            if cached is not None:
                # "clip": with an error to report, NumPy would copy all of it once more
                cached.take(positions[part], 0, out=out[part], mode="clip")
            if mirrored is not None:
                for place in np.flatnonzero(mirrored[part]) + part.start:
                    cv2.flip(out[place], 1, out[place])

        size = max(CHUNK, -(-len(out) // self.workers))
        parts = [slice(start, start + size) for start in range(0, len(out), size)]
        deque(self.pool.map(fill, parts), maxlen=0)  # raises what a thread raised
        return out

    def labels_of(self, positions: np.ndarray) -> Tensor:
        """The classes (n,) of the images at `positions`, on the device."""
        index = torch.from_numpy(positions).to(self.device, non_blocking=True)
        return self.labels.index_select(0, index)

    def whole_batch(
        self, positions: np.ndarray, batch_size: int, seed: int, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A step's images, all processes', and which of them are mirrored: (batch_size,) both."""
        order, mirrored = epoch_order(positions, seed, epoch)
        whole = slice(step * batch_size, (step + 1) * batch_size)
        return order[whole], mirrored[whole]

    def parts(
        self,
        positions: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: int,
        steps: range,
        flip: bool,
    ) -> Parts:
        """This process's part of each batch of the epoch's steps."""
        order, mirrored = epoch_order(positions, seed, epoch)
        slices = [slice_of(step * batch_size, min(batch_size, len(order))) for step in steps]
        return [(order[s], mirrored[s] if flip else None) for s in slices]

    def width(self, batch_size: int) -> int:
        """The most images of a batch that a process computes."""
        return -(-batch_size // world_size())

    def good(self, positions: np.ndarray) -> np.ndarray:
        """`positions` without those of images known to be bad."""
        return positions[~np.isin(positions, list(self.bad))] if self.bad else positions

    def names(self, positions: np.ndarray) -> list[int]:
        """The record ids of the images at `positions`."""
        return self.reader.keys[self.indices[positions]].tolist()


def normalise(images: Tensor) -> Tensor:
    """(n, 112, 112, 3) uint8 to (n, 3, 112, 112) float32 in [-1, 1], strides channels_last."""
    if images.device.type != "cpu":
        return images.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
    out = torch.empty(images.shape, dtype=torch.float32)
    if len(images):  # a table of 256 values: one pass over memory in place of three
        rows = (-1, images.shape[2] * 3)
        cv2.LUT(images.numpy().reshape(rows), NORMALISED, out.numpy().reshape(rows))
    return out.permute(0, 3, 1, 2)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in an epoch; the rest of the shuffled images waits for the next."""
    return max(1, count // batch_size)


def epoch_order(positions: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch: `positions` (n,) shuffled, and which of them are mirrored (n,) bool.

    It depends on the arguments alone.
    """
    rng = np.random.default_rng([seed, 1, epoch])
    return rng.permutation(positions), rng.random(len(positions)) < 0.5


def train_batches(
    store: ImageStore,
    positions: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    flip: bool = True,
    augment: Augment | None = None,
) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on; (seed, epoch) alone decide their order.

    Of many processes each gets its slice of every batch; `augment` changes uint8 images.
    """
    steps = range(first_step, steps_per_epoch(len(positions), batch_size))
    parts = store.parts(positions, batch_size, seed, epoch, steps, flip)
    for (positions, _), images in zip(parts, _prefetch(store, parts), strict=True):
        yield _batch(store, images, positions, augment)


def valid_batches(store: ImageStore, positions: np.ndarray, *, batch_size: int) -> Iterator[Batch]:
    """All images at `positions` in order, the last batch as small as it comes.

    Of many processes each gets its slice of every batch.
    """
    starts = range(0, len(positions), batch_size)
    sizes = [min(batch_size, len(positions) - start) for start in starts]
    slices = [slice_of(start, size) for start, size in zip(starts, sizes, strict=True)]
    parts = [(positions[part], None) for part in slices]
    for (positions, _), images in zip(parts, _prefetch(store, parts), strict=True):
        yield _batch(store, images, positions)


def slice_of(start: int, size: int) -> slice:
    """This process's part of the `size` images from `start` on."""
    mine = rank_slice(size)
    return slice(start + mine.start, start + mine.stop)


def _batch(
    store: ImageStore, images: Tensor, positions: np.ndarray, augment: Augment | None = None
) -> Batch:
    if store.images is None and store.bad:
        good = ~np.isin(positions, list(store.bad))
        positions = positions[good]
        images = images[torch.from_numpy(good).to(images.device)]
    if augment is not None:
        images = augment(images, positions)
    return Batch(normalise(images), store.labels_of(positions), positions)


def _prefetch(store: ImageStore, parts: Parts) -> Iterator[Tensor]:
    """Fetch one batch ahead in a thread where images have to be decoded or moved."""
    if store.images is not None and store.images.device == store.device:
        yield from (store.fetch(*part) for part in parts)
        return
    with ThreadPoolExecutor(1) as ahead:
        waiting = [ahead.submit(store.fetch, *part) for part in parts[:1]]
        for index in range(len(parts)):
            images = _result(waiting.pop())
            waiting += [ahead.submit(store.fetch, *part) for part in parts[index + 1 : index + 2]]
            yield images


def _result(loading: Future[Tensor]) -> Tensor:
    """What a thread loaded; LoadingError where it died of it."""
    try:
        return loading.result()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise LoadingError(
            f"A thread that loads images died ({reason}); see to it that there is memory and "
            "that the training set can be read, or take fewer --workers."
        ) from error
