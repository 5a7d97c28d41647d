"""Data sets spread over many record files, for those that no memory holds.

    python -m tools.make_shards --source data/faces_webface_112x112 --output data/webface_shards

deals the images of a set out at random to train-00000.rec, train-00001.rec ... (each with its
.idx; each can be read by itself like any .rec), so that a file is a sample of the whole and reading
a few at a time is as good as a shuffle. `python train.py --train-set data/webface_shards`
reads such a folder file by file, each process its own part of it.

Beside each .rec lies a .npy with the byte offset and label of every image, 12 bytes each. It is
mapped, not read: what a process does not use costs it no memory, and processes of a machine share
what they use. Where it is missing it is made.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fileio.images import ImageError, decode_image
from fileio.recordio import (
    HEADER,
    RecordError,
    RecordReader,
    map_file,
    pack_record,
    payload_at,
    record_end,
)
from fileio.safe_files import atomic_write, make_folder, open_to_write, sync, write_errors
from utils import FACE_SIZE

SHARD = "train-*.rec"
ENTRY = np.dtype([("offset", "<i8"), ("label", "<i4")])  # 12 bytes an image
OPEN_SHARDS = 256  # mapped at a time, at two file descriptors each


def is_sharded(folder: Path | str) -> bool:
    """Whether a folder holds record files by number and no train.rec."""
    folder = Path(folder)
    return not (folder / "train.rec").exists() and next(folder.glob(SHARD), None) is not None


class Shard(NamedTuple):
    """One file, mapped: its bytes, and ENTRY of each image."""

    path: Path
    data: Any
    entries: np.ndarray


class ShardReader:
    """Images of a folder of shards by number, in the order of the files; no list of them.

    `num_classes` and `size` come from property. Threads may share a reader. Raises RecordError
    where a file is missing or is not what it should be.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        self.files = sorted(self.path.glob(SHARD))
        if not self.files:
            raise RecordError(f"There is no {self.path / 'train-00000.rec'}; correct the path.")
        declared = self.path / "property"
        numbers = declared.read_text("latin-1").split(",") if declared.is_file() else []
        numbers = [number.strip() for number in numbers]
        if len(numbers) != 3 or not all(re.fullmatch(r"[0-9]{1,9}", n) for n in numbers):
            raise RecordError(
                f"{declared} should be 'classes,height,width'; write the shards again."
            )
        self.num_classes, height, width = map(int, numbers)
        self.size = (height, width)
        if self.size != (FACE_SIZE, FACE_SIZE):
            raise RecordError(
                f"{self.path} holds faces of {width}x{height} pixels, not {FACE_SIZE}x{FACE_SIZE}; "
                "align them with pre_process.py."
            )
        counts = [len(_checked_entries(file)) for file in self.files]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # of each shard's first image
        self._open = functools.lru_cache(OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _map(self, number: int) -> Shard:
        path = self.files[number]
        entries = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        return Shard(path, map_file(path), entries)

    def _find(self, i: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self.starts, i, "right")) - 1
        return self._open(number), i - int(self.starts[number])

    def labels_of(self, numbers: np.ndarray) -> np.ndarray:
        """The classes (n,) int64 of images (n,)."""
        found = [int(shard.entries["label"][i]) for shard, i in map(self._find, numbers.tolist())]
        labels = np.array(found, np.int64)
        wrong = (labels < 0) | (labels >= self.num_classes)
        if np.any(wrong):
            shard, place = self._find(int(numbers[np.argmax(wrong)]))
            raise RecordError(
                f"Record {place} of {shard.path} has label {labels[np.argmax(wrong)]}, not one "
                f"below {self.num_classes}; correct property or write the shards again."
            )
        return labels

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, 0 <= i < len(self)."""
        shard, place = self._find(i)
        payload = payload_at(shard.data, int(shard.entries["offset"][place]))
        label = np.frombuffer(payload[4:8], "<f4")
        if len(payload) < HEADER.size or label[0] != shard.entries["label"][place]:
            raise RecordError(
                f"{shard.path} and its .npy do not belong together; delete the latter to have it "
                "made."
            )
        return payload[HEADER.size :]

    def image(self, i: int) -> np.ndarray:
        """Image i as (height, width, 3) uint8 RGB; RecordError names it where it cannot."""
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            shard, place = self._find(i)
            raise RecordError(f"Record {place} of {shard.path}: {error}") from None
        if image.shape[:2] != self.size:
            shard, place = self._find(i)
            raise RecordError(
                f"Record {place} of {shard.path} is {image.shape[1]}x{image.shape[0]} pixels; "
                "write the shards again."
            )
        return image

    def fingerprint(self) -> str:
        """What tells this set from another: names, sizes and counts of the files, a few labels.

        Hexadecimal SHA-256, in time that does not grow with the images.
        """
        digest = hashlib.sha256(str(self.num_classes).encode())
        for file, start in zip(self.files, self.starts.tolist(), strict=False):
            digest.update(f"{file.name} {file.stat().st_size} {start}\n".encode())
        some = np.linspace(0, len(self) - 1, 1000).astype(np.int64)
        digest.update(self.labels_of(some).tobytes())
        return digest.hexdigest()


def _checked_entries(path: Path) -> np.ndarray:
    """ENTRY of each image of a record file, mapped; made first where it is missing."""
    index = path.with_suffix(".npy")
    if not index.is_file():
        reader = RecordReader(path)
        entries = np.empty(len(reader), ENTRY)
        entries["offset"], entries["label"] = reader.offsets, reader.labels
        _write_entries(index, entries)
    try:
        entries = np.load(index, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen kinds for damaged headers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecordError(
            f"{index} cannot be read ({reason}); delete it to have it made."
        ) from None
    if entries.dtype != ENTRY or entries.ndim != 1 or not len(entries):
        raise RecordError(f"{index} is no index of a record file; delete it to have it made.")
    if record_end(map_file(path), int(entries["offset"][-1])) != path.stat().st_size:
        raise RecordError(
            f"{index} does not belong to {path.name}, or that is cut short: its last record is not "
            "where the file ends. Copy the set again, or delete the index to have it made."
        )
    return entries


def _write_entries(path: Path, entries: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, entries, allow_pickle=False)


# ------------------------------------------------------------------------------ writing


def write_shards(
    folder: Path | str, jpegs: Iterable[bytes], labels: np.ndarray, count: int, seed: int = 0
) -> None:
    """Deal images out at random to `count` files of equal length, in the order they come."""
    folder = Path(folder)
    make_folder(folder)
    numbers = np.arange(len(labels)) % count
    numbers = np.random.default_rng([seed, 7]).permutation(numbers)
    entries = [np.empty(int((numbers == n).sum()), ENTRY) for n in range(count)]
    filled, ends = [0] * count, [0] * count
    names = [folder / f"train-{n:05d}.rec" for n in range(count)]
    files = [open_to_write(name.with_suffix(".rec.tmp"), "wb", name) for name in names]
    for jpeg, label, n in zip(jpegs, labels.tolist(), numbers.tolist(), strict=True):
        record = pack_record(HEADER.pack(0, label, filled[n], 0) + jpeg)
        files[n].write(record)
        entries[n][filled[n]] = (ends[n], label)
        filled[n], ends[n] = filled[n] + 1, ends[n] + len(record)
    for name, file, found in zip(names, files, entries, strict=True):
        sync(file, name)
        file.close()
        with write_errors(name):
            name.with_suffix(".rec.tmp").replace(name)
        with atomic_write(name.with_suffix(".idx")) as index:
            index.writelines(b"%d\t%d\n" % pair for pair in enumerate(found["offset"].tolist()))
        _write_entries(name.with_suffix(".npy"), found)
    with atomic_write(folder / "property") as file:
        file.write(b"%d,112,112" % (int(labels.max()) + 1))
