"""Records in, batches on the device out.

    reader = RecordReader("data/faces_webface_112x112")
    split = make_split(reader.labels, valid_fraction=0.02)
    store = ImageStore(reader, split, torch.device("cpu"))
    for batch in train_batches(store, split.train, batch_size=512, seed=0, epoch=0):
        batch.images, batch.labels    # (512, 3, 112, 112) float32 in [-1, 1], (512,) int64

An image is decoded once, into a uint8 cache in GPU memory or in RAM (if neither has room for the
set, threads decode it anew in each epoch). Mirroring and normalisation work on whole batches, the
latter on the device.

A *position* is the index of an image in a store, a *record id* its key in train.rec.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from distributed.collectives import any_rank, rank_slice, run_on_all
from distributed.process_group import local_world_size, world_size
from fileio.image_loader import decode_records, load_images
from fileio.recordio import RecordReader
from utils import FACE_SIZE, UserError, core_count, is_out_of_memory

FACE_BYTES = FACE_SIZE * FACE_SIZE * 3
CHUNK_SIZE = 32  # images that a thread gathers at least
NORMALISED = ((np.arange(256) - 127.5) / 127.5).astype(np.float32)  # by the value of a pixel


class LoadingError(UserError):
    """A loader thread failed, and not because of a corrupt image."""


class Batch(NamedTuple):
    """`n` images for the training loop, on the device."""

    images: Tensor  # (n, 3, 112, 112) float32 in [-1, 1], channels_last
    labels: Tensor  # (n,) int64
    positions: np.ndarray  # (n,) in the store, for naming records


# Augmentation of a batch: uint8 images (n, 112, 112, 3) and their positions (n,) to images.
Augment = Callable[[Tensor, np.ndarray], Tensor]

# This process's slice of each batch: positions (n,), and which are mirrored (n,) bool, None: none.
BatchSlices = Sequence[tuple[np.ndarray, np.ndarray | None]]


class Split(NamedTuple):
    """Which images of a record file are used, and for what."""

    indices: (
        np.ndarray
    )  # (n,) int64 into the reader: the images that are used; gives them positions
    labels: np.ndarray  # (n,) int64 classes of those, 0 ... num_classes - 1
    num_classes: int
    train: np.ndarray  # positions, that is, indices into `indices`
    valid: np.ndarray  # positions of the held-out images


# ------------------------------------------------------------------------------ the split


def make_split(
    labels: np.ndarray,
    *,
    valid_fraction: float,
    max_classes: int = 0,
    seed: int = 0,
    used: np.ndarray | None = None,
) -> Split:
    """Choose the identities, then hold out images of each for validation.

    `labels` (n,) are those of all images of a reader; where `used` (n,) bool is false, an image is
    left out. `max_classes` keeps the identities with most images (0: all). Each identity gives
    `valid_fraction` of its images, rounded up or down at random so that the expected sum is right,
    and keeps at least one for training. The result depends on the arguments alone.
    """
    indices = np.arange(len(labels)) if used is None else np.flatnonzero(used)
    counts = np.bincount(labels[indices], minlength=1)  # images per identity
    identities = np.flatnonzero(counts)
    if 0 < max_classes < len(identities):
        identities = np.sort(np.argsort(-counts, kind="stable")[:max_classes])
    # Labels are renumbered without gaps: identities 2, 5 and 9 become classes 0, 1 and 2.
    class_of = np.full(len(counts), -1)
    class_of[identities] = np.arange(len(identities))
    indices = indices[class_of[labels[indices]] >= 0]
    classes = class_of[labels[indices]]

    rng = np.random.default_rng([seed, 0])
    counts = np.bincount(classes, minlength=len(identities))
    # With a fraction of 0.02, 120 images give 2 with probability 0.6 and 3 with 0.4.
    held_out = np.floor(counts * valid_fraction + rng.random(len(identities))).astype(np.int64)
    held_out = np.minimum(held_out, counts - 1)
    # Sorted by class, shuffled within each. The first `held_out` of a class are for validation:
    # an image's rank within its class is its place in this order minus that of its class's first.
    order = np.lexsort((rng.random(len(classes)), classes))
    rank = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_valid = rank < np.repeat(held_out, counts)
    train, valid = np.sort(order[~is_valid]), np.sort(order[is_valid])
    return Split(indices, classes, len(identities), train, valid)


# ------------------------------------------------------------------------------ the store


def available_memory() -> int:
    """Bytes of RAM that can be used without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if not hasattr(os, "sysconf"):  # Windows
        return 4 << 30
    # On other systems: half of the physical memory is a cautious guess.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def choose_cache(count: int, device: torch.device, gpu_room: float | None = None) -> str:
    """Where `count` decoded images are cached: "gpu", "ram" or "none", the first with enough room.

    Enough in every process of a group; each must call it. `gpu_room` is how many bytes of a GPU's
    memory they may take, by default half of what is free. 490,000 images are 18.4 GB.
    """
    size = count * FACE_BYTES
    if gpu_room is None:
        gpu_room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 0.0
    # Each process of this machine has a cache of its own.
    fits = {"gpu": size < gpu_room, "ram": size * local_world_size() < available_memory() * 0.7}
    lacking = any_rank(*(not enough for enough in fits.values()))
    return next((cache for cache, lacks in zip(fits, lacking, strict=True) if not lacks), "none")


class ImageStore:
    """Images of a record file by position, as uint8 tensors on the device.

    `cache` is "gpu", "ram", "none" or "auto". Images that cannot be decoded are listed in `corrupt`
    (position to reason): with a cache from the start, without one as they are encountered.
    """

    labels: Tensor | None  # (n,) by position, on the device; None if they are read as needed
    can_cache = True

    def __init__(
        self,
        reader: RecordReader,
        split: Split,
        device: torch.device,
        *,
        cache: str = "auto",
        room: dict[str, float] | None = None,
        workers: int = 0,
        progress: str = "",
    ) -> None:
        self.reader = reader
        self.indices = split.indices
        self.device = device
        self.labels = torch.from_numpy(split.labels).to(device)
        self.corrupt: dict[int, str] = {}
        self.cache, self.images = "none", None
        self.workers = workers or core_count()
        self.pool = ThreadPoolExecutor(self.workers)
        if cache == "auto":
            cache = choose_cache(len(split.indices), device)
        if cache != "none":
            self.fill_cache(cache, progress)

    def fill_cache(self, cache: str, progress: str = "") -> None:
        """Decode all images into a cache, "gpu" or "ram"; "none" decodes nothing.

        If memory fills in one process of a group, all take the next cache; each must call it.
        """
        self.cache = "ram" if cache == "gpu" and self.device.type != "cuda" else cache
        while self.cache != "none":
            has_room = run_on_all(lambda: self._decode_all(progress))
            if not any_rank(not has_room)[0]:
                return
            self.images, full = None, self.cache
            ram = choose_cache(len(self.indices), torch.device("cpu"))
            self.cache = ram if full == "gpu" else "none"
            print(f"Memory was full for --cache {full}; taking --cache {self.cache} instead.")

    def _decode_all(self, progress: str) -> bool:
        """Fill the cache; whether memory sufficed."""
        device = self.device if self.cache == "gpu" else "cpu"
        options = {"device": device, "workers": self.workers, "progress": progress}
        try:
            self.images, self.corrupt = load_images(self.reader, self.indices, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    # -------------------------------------------------------------------------- images

    def fetch(self, positions: np.ndarray, mirrored: np.ndarray | None = None) -> Tensor:
        """Images at `positions` (n,): (n, 112, 112, 3) uint8 on the device.

        Those for which `mirrored` (n,) bool is true come as their mirror images.
        """
        if self.images is not None and self.images.device.type != "cpu":
            index = torch.from_numpy(positions).to(self.device, non_blocking=True)
            images = self.images.index_select(0, index)
            if mirrored is None:
                return images
            # Both are computed: choosing rows by a mask would wait for the GPU.
            flipped = torch.from_numpy(mirrored).to(self.device, non_blocking=True)
            return torch.where(flipped[:, None, None, None], images.flip(2), images)
        images = torch.from_numpy(self._gather(positions, mirrored))
        if images.device != self.device:
            if self.device.type == "cuda":  # a copy from pinned memory does not wait
                images = images.pin_memory()
            images = images.to(self.device, non_blocking=True)
        return images

    def _gather(self, positions: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
        """`fetch` from RAM or from the file, by threads."""
        out = np.empty((len(positions), FACE_SIZE, FACE_SIZE, 3), np.uint8)
        if self.images is None:
            errors = decode_records(self.reader, self.indices[positions], out, self.pool)
            self.corrupt |= {int(positions[row]): reason for row, reason in errors.items()}
        cached = None if self.images is None else self.images.numpy()

        def fill(rows: slice) -> None:
            if cached is not None:
                # "clip": in the default mode NumPy copies the result once more.
                cached.take(positions[rows], 0, out=out[rows], mode="clip")
            if mirrored is not None:
                for row in np.flatnonzero(mirrored[rows]) + rows.start:
                    cv2.flip(out[row], 1, out[row])

        size = max(CHUNK_SIZE, -(-len(out) // self.workers))
        slices = [slice(start, start + size) for start in range(0, len(out), size)]
        for _ in self.pool.map(fill, slices):
            pass  # waits, and raises what a thread raised
        return out

    def labels_of(self, positions: np.ndarray) -> Tensor:
        """The classes (n,) of the images at `positions`, on the device."""
        index = torch.from_numpy(positions).to(self.device, non_blocking=True)
        return self.labels.index_select(0, index)

    def readable(self, positions: np.ndarray) -> np.ndarray:
        """`positions` without those of images known to be corrupt."""
        if not self.corrupt:
            return positions
        return positions[~np.isin(positions, list(self.corrupt))]

    def in_file_order(self, positions: np.ndarray) -> np.ndarray:
        """The positions (n,) of a split's part, in the order in which reading is fastest."""
        return np.sort(positions)

    def record_ids(self, positions: np.ndarray) -> list[int]:
        """The record ids of the images at `positions`."""
        return self.reader.keys[self.indices[positions]].tolist()

    # -------------------------------------------------------------------------- batches

    def global_batch(
        self, positions: np.ndarray, batch_size: int, seed: int, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """A step's images, those of all processes, and which are mirrored: (batch_size,) both."""
        order, mirrored = epoch_order(positions, seed, epoch)
        batch = slice(step * batch_size, (step + 1) * batch_size)
        return order[batch], mirrored[batch]

    def batch_slices(
        self,
        positions: np.ndarray,
        batch_size: int,
        seed: int,
        epoch: int,
        steps: range,
        flip: bool,
    ) -> BatchSlices:
        """This process's slice of the batches of an epoch's `steps`."""
        order, mirrored = epoch_order(positions, seed, epoch)
        slices = [_own_rows(step * batch_size, min(batch_size, len(order))) for step in steps]
        return [(order[rows], mirrored[rows] if flip else None) for rows in slices]

    def slice_size(self, batch_size: int) -> int:
        """The size of the largest slice of a batch: 512 images on 3 processes, 171."""
        return -(-batch_size // world_size())

    # -------------------------------------------------------------------------- the set

    def sample(self, positions: np.ndarray, count: int, seed: int) -> np.ndarray:
        """At most `count` of the positions, at random, to look at before training."""
        return np.random.default_rng([seed, 2]).permutation(positions)[:count]

    def fingerprint(self, train: np.ndarray, valid: np.ndarray) -> str:
        """What identifies the images of a run: their ids, labels and split, and the file's size.

        `train` and `valid` are positions. Hexadecimal SHA-256.
        """
        digest = hashlib.sha256(str(self.reader.path.stat().st_size).encode())
        keys = self.reader.keys[self.indices]
        for numbers in (keys, self.labels.cpu().numpy(), train, valid):
            digest.update(len(numbers).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------ batches


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
    """Complete batches in an epoch, at least 1: of 1,000 images in batches of 64, 15.

    The 40 images that are left wait for the next epoch, in which others are left.
    """
    return max(1, count // batch_size)


def epoch_order(positions: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch: `positions` (n,) shuffled, and which of them are mirrored (n,) bool.

    It depends on the arguments alone, so that a resumed run sees the same.
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

    In a group of processes each gets its slice of every batch. `augment` changes uint8 images. Who
    may stop early closes the iterator (contextlib.closing): it can hold a loader thread, which the
    garbage collector would join at some moment, perhaps while another thread is being started.
    """
    steps = range(first_step, steps_per_epoch(len(positions), batch_size))
    slices = store.batch_slices(positions, batch_size, seed, epoch, steps, flip)
    with contextlib.closing(_prefetch(store, slices)) as loaded:
        for (own, _), images in zip(slices, loaded, strict=True):
            yield _make_batch(store, images, own, augment)


def valid_batches(store: ImageStore, positions: np.ndarray, *, batch_size: int) -> Iterator[Batch]:
    """All images at `positions` in order; the last batch may be smaller.

    In a group of processes each gets its slice of every batch.
    """
    starts = range(0, len(positions), batch_size)
    sizes = [min(batch_size, len(positions) - start) for start in starts]
    rows = [_own_rows(start, size) for start, size in zip(starts, sizes, strict=True)]
    slices = [(positions[own], None) for own in rows]
    with contextlib.closing(_prefetch(store, slices)) as loaded:
        for (own, _), images in zip(slices, loaded, strict=True):
            yield _make_batch(store, images, own)


def _own_rows(start: int, size: int) -> slice:
    """This process's slice of the `size` rows from `start` on."""
    own = rank_slice(size)
    return slice(start + own.start, start + own.stop)


def _make_batch(
    store: ImageStore, images: Tensor, positions: np.ndarray, augment: Augment | None = None
) -> Batch:
    # Without a cache, an image is found to be corrupt only when it is fetched: leave it out now.
    if store.images is None and store.corrupt:
        readable = ~np.isin(positions, list(store.corrupt))
        positions = positions[readable]
        images = images[torch.from_numpy(readable).to(images.device)]
    if augment is not None:
        images = augment(images, positions)
    return Batch(normalise(images), store.labels_of(positions), positions)


def _prefetch(store: ImageStore, slices: BatchSlices) -> Iterator[Tensor]:
    """The images of each slice, one slice ahead in a thread if they have to be decoded or moved."""
    if store.images is not None and store.images.device == store.device:
        yield from (store.fetch(*batch_slice) for batch_slice in slices)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending = [pool.submit(store.fetch, *batch_slice) for batch_slice in slices[:1]]
        for index in range(len(slices)):
            images = _loaded(pending.pop())
            following = slices[index + 1 : index + 2]  # none after the last
            pending += [pool.submit(store.fetch, *batch_slice) for batch_slice in following]
            yield images


def _loaded(future: Future[Tensor]) -> Tensor:
    """What a loader thread has loaded; LoadingError if it failed."""
    try:
        return future.result()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise LoadingError(
            f"A loader thread failed ({reason}); free some memory, check that the training set can "
            "be read, or take fewer --workers."
        ) from error
