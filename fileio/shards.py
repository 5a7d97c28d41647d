"""Sharded training sets: many record files, for sets that no memory holds.

    reader = ShardReader("data/faces_webface_shards")
    reader.image(0), reader.labels_of(np.array([0, 1, 2])), reader.num_classes

`python -m tools.make_shards` deals the images of a set out at random to train-00000.rec,
train-00001.rec ... So each file is a random sample of the whole set, and reading a few of them at a
time is as good as a shuffle. `python train.py --train-set data/faces_webface_shards` reads such a
folder file by file, each process its own part of it.

Each .rec is a record file (fileio/recordio.py) of images alone, with ids from 0 and its .idx
beside it, so any tool reads it by itself; files that other tools wrote may have a record 0 and
vectors of labels. A .npy beside it has, for each image, its record's byte offset and its label: 12
bytes (`INDEX_DTYPE`). It is memory-mapped: what a process does not use takes no memory, and the
processes of a machine share what they use. A missing .npy is written anew. One property file is for
all shards.
"""

from __future__ import annotations

import functools
import hashlib
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
    read_property,
    record_end,
    split_payload,
)
from fileio.safe_files import (
    atomic_write,
    describe_write_errors,
    fsync_file,
    make_folder,
    open_for_writing,
)
from utils import FACE_SIZE

SHARD_PATTERN = "train-*.rec"
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("label", "<i4")])
MAX_OPEN_SHARDS = 256  # mapped at a time: each takes two of 1024 file descriptors


def is_sharded(folder: Path | str) -> bool:
    """Whether a folder holds numbered record files and no train.rec."""
    folder = Path(folder)
    if (folder / "train.rec").exists():
        return False
    return next(folder.glob(SHARD_PATTERN), None) is not None


class _Shard(NamedTuple):
    """One file, mapped."""

    path: Path
    data: Any  # its bytes
    index: np.ndarray  # INDEX_DTYPE of each image


class ShardReader:
    """Images of a folder of shards, numbered through in the order of the files.

    `starts` (number of files + 1,) int64: the number of each shard's first image; with shards of 3
    and 2 images, [0, 3, 5]. `num_classes` and `size` come from property. Memory does not grow with
    the number of images. Threads may share a reader. Raises RecordError if a file is missing,
    corrupt or inconsistent.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder)
        self.files = sorted(self.path.glob(SHARD_PATTERN))
        if not self.files:
            raise RecordError(f"There is no {self.path / 'train-00000.rec'}; correct the path.")
        self.num_classes, self.size = self._read_property()
        counts = [len(_checked_index(file)) for file in self.files]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        # The least recently used shards are unmapped.
        self._open = functools.lru_cache(MAX_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _read_property(self) -> tuple[int, tuple[int, int]]:
        num_classes, size = read_property(self.path)
        if num_classes is None or size is None:
            raise RecordError(
                f"There is no {self.path / 'property'}, the line 'classes,height,width': write "
                "the shards again (python -m tools.make_shards), or the line if others wrote them."
            )
        if size != (FACE_SIZE, FACE_SIZE):
            raise RecordError(
                f"{self.path} holds faces of {size[1]}x{size[0]} pixels, not "
                f"{FACE_SIZE}x{FACE_SIZE}; align them with pre_process.py."
            )
        return num_classes, size

    def _map(self, number: int) -> _Shard:
        path = self.files[number]
        index = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        return _Shard(path, map_file(path), index)

    def _locate(self, i: int) -> tuple[_Shard, int]:
        """The shard of image i and its number there; with starts [0, 3, 5], image 4 is 1 of it."""
        number = int(np.searchsorted(self.starts, i, "right")) - 1
        return self._open(number), i - int(self.starts[number])

    def labels_of(self, positions: np.ndarray) -> np.ndarray:
        """The classes (n,) int64 of images (n,)."""
        labels = np.empty(len(positions), np.int64)
        for i, position in enumerate(positions.tolist()):
            shard, record = self._locate(position)
            labels[i] = shard.index["label"][record]
        is_wrong = (labels < 0) | (labels >= self.num_classes)
        if np.any(is_wrong):
            first = int(np.argmax(is_wrong))
            shard, record = self._locate(int(positions[first]))
            raise RecordError(
                f"Record {record} of {shard.path} has label {labels[first]}, not one "
                f"below {self.num_classes}; correct property or write the shards again."
            )
        return labels

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, 0 <= i < len(self)."""
        shard, record = self._locate(i)
        payload = payload_at(shard.data, int(shard.index["offset"][record]))
        # An index of another file is noticed here: offsets or labels do not fit.
        label, encoded = split_payload(payload)
        if label != shard.index["label"][record]:
            raise RecordError(
                f"{shard.path} and its .npy do not belong together; delete the .npy and it will be "
                "written anew."
            )
        return encoded

    def image(self, i: int) -> np.ndarray:
        """Image i as (height, width, 3) uint8 RGB; RecordError names the record if it cannot."""
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            shard, record = self._locate(i)
            raise RecordError(f"Record {record} of {shard.path}: {error}") from None
        if image.shape[:2] != self.size:
            shard, record = self._locate(i)
            raise RecordError(
                f"Record {record} of {shard.path} is {image.shape[1]}x{image.shape[0]} pixels; "
                "write the shards again."
            )
        return image

    def fingerprint(self) -> str:
        """A hash that tells this set from another, in time that does not grow with the images.

        Hexadecimal SHA-256 of the files' names, sizes and counts, and of 1000 labels.
        """
        digest = hashlib.sha256(str(self.num_classes).encode())
        for file, start in zip(self.files, self.starts.tolist(), strict=False):
            digest.update(f"{file.name} {file.stat().st_size} {start}\n".encode())
        sample = np.linspace(0, len(self) - 1, 1000).astype(np.int64)
        digest.update(self.labels_of(sample).tobytes())
        return digest.hexdigest()


def _checked_index(rec_path: Path) -> np.ndarray:
    """INDEX_DTYPE of each image of a record file, mapped; written first if it is missing."""
    path = rec_path.with_suffix(".npy")
    if not path.is_file():
        reader = RecordReader(rec_path)
        index = np.empty(len(reader), INDEX_DTYPE)
        index["offset"], index["label"] = reader.offsets, reader.labels
        _write_index(path, index)
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen types for corrupt headers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecordError(
            f"{path} cannot be read ({reason}); delete it and it will be written anew."
        ) from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1 or not len(index):
        raise RecordError(
            f"{path} is no index of a record file; delete it and it will be written anew."
        )
    # Checking every record would read the whole set; the last one is enough to notice a file that
    # is cut short, and an index of another number of records. Only records without an image may
    # follow it.
    data = map_file(rec_path)
    end = record_end(data, int(index["offset"][-1]))
    while 0 <= end < len(data) and not split_payload(payload_at(data, end))[1]:
        end = record_end(data, end)
    if end != len(data):
        raise RecordError(
            f"{path} does not belong to {rec_path.name}, or that is cut short: its last record is "
            "not where the file ends. Copy the set again, or delete the index and it will be "
            "written anew."
        )
    return index


def _write_index(path: Path, index: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, index, allow_pickle=False)


# ------------------------------------------------------------------------------ writing


def write_shards(
    folder: Path | str, encoded: Iterable[bytes], labels: np.ndarray, count: int, seed: int = 0
) -> None:
    """Deal images out at random to `count` files of equal length, in one pass over them.

    With 7 images and 3 files, the files get 3, 2 and 2 images, each in the order in which they
    came. The property file is written last: without it, the folder is no data set.
    """
    folder = Path(folder)
    make_folder(folder)
    shard_of = np.arange(len(labels)) % count
    shard_of = np.random.default_rng([seed, 7]).permutation(shard_of)
    indexes = [np.empty(int((shard_of == n).sum()), INDEX_DTYPE) for n in range(count)]
    num_written, ends = [0] * count, [0] * count  # images and bytes in each file so far
    paths = [folder / f"train-{n:05d}.rec" for n in range(count)]
    files = [open_for_writing(path.with_suffix(".rec.tmp"), "wb", path) for path in paths]
    for image, label, n in zip(encoded, labels.tolist(), shard_of.tolist(), strict=True):
        record = pack_record(HEADER.pack(0, label, num_written[n], 0) + image)
        files[n].write(record)
        indexes[n][num_written[n]] = (ends[n], label)
        num_written[n] += 1
        ends[n] += len(record)
    for path, file, index in zip(paths, files, indexes, strict=True):
        fsync_file(file, path)
        file.close()
        with describe_write_errors(path):
            path.with_suffix(".rec.tmp").replace(path)
        with atomic_write(path.with_suffix(".idx")) as idx:
            idx.writelines(b"%d\t%d\n" % pair for pair in enumerate(index["offset"].tolist()))
        _write_index(path.with_suffix(".npy"), index)
    with atomic_write(folder / "property") as file:
        file.write(b"%d,112,112" % (int(labels.max()) + 1))
