"""InsightFace's training sets, read without mxnet: train.rec, train.idx and property.

    from fileio.recordio import RecordReader
    reader = RecordReader("data/faces_webface_112x112")
    reader.image(0), reader.labels[0], reader.num_classes

A record is `uint32 0xced7230a`, `uint32 (cflag << 29 | length)`, payload, padding to 4 bytes
(dmlc-core, src/recordio.cc). A payload is `<IfQQ` flag, label, id, id2, then `flag` float32
labels, then the JPEG (mxnet, python/mxnet/recordio.py).
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fileio.images import ImageError, decode_image
from utils import UserError

MAGIC = struct.pack("<I", 0xCED7230A)
LENGTH_MASK = (1 << 29) - 1
HEADER = struct.Struct("<IfQQ")
LABEL_LIMIT = 1 << 24  # labels are float32: whole numbers are exact up to here


class RecordError(UserError):
    """A record file, index, test set or image that is not what it should be."""


# ------------------------------------------------------------------------------ single records


def _aligned(position: Any) -> Any:
    return (position + 3) & ~3


def _parts(data: Any, offset: int) -> list[tuple[int, int]] | None:
    """Byte spans of the payload of the record at `offset`; None if no whole record is there."""
    spans: list[tuple[int, int]] = []
    while 0 <= offset <= len(data) - 8:
        magic, word = struct.unpack_from("<4sI", data, offset)
        cflag, start, stop = word >> 29, offset + 8, offset + 8 + (word & LENGTH_MASK)
        offset = _aligned(stop)
        if magic != MAGIC or offset > len(data) or cflag not in ((2, 3) if spans else (0, 1)):
            return None
        spans.append((start, stop))
        if cflag in (0, 3):
            return spans
    return None


def payload_at(data: Any, offset: int) -> bytes:
    """The payload of the record at `offset`; empty if no whole record is there."""
    spans = _parts(data, offset) or []
    return MAGIC.join([data[start:stop] for start, stop in spans])


def record_end(data: Any, offset: int) -> int:
    """Where the record at `offset` ends, with its padding; -1 if no whole record is there."""
    spans = _parts(data, offset)
    return _aligned(spans[-1][1]) if spans else -1


def frame(payload: bytes) -> bytes:
    """The record around a payload, in as many parts as dmlc-core writes: it is cut, and the four
    bytes left out, wherever the magic number stands at a multiple of 4.
    """
    if len(payload) > LENGTH_MASK:
        raise RecordError(
            f"a record cannot hold {len(payload)} bytes; the format ends at 2^29 - 1."
        )
    framed, begin, found = [], 0, payload.find(MAGIC)
    while found >= 0:
        if found % 4 == 0:
            framed += [MAGIC, struct.pack("<I", (2 if begin else 1) << 29 | (found - begin))]
            framed.append(payload[begin:found])
            begin = found + 4
        found = payload.find(MAGIC, found + (1 if found % 4 else 4))
    framed += [MAGIC, struct.pack("<I", (3 if begin else 0) << 29 | (len(payload) - begin))]
    return b"".join([*framed, payload[begin:], bytes(-len(payload) % 4)])


def labels_record(key: int, first: float, end: float) -> bytes:
    """A record without an image: the range of records, `first` to one before `end`."""
    # mxnet's pack() puts 0 into the header's own label where there is a vector of labels.
    return frame(HEADER.pack(2, 0.0, key, 0) + struct.pack("<2f", first, end))


def map_file(path: Path) -> Any:
    """A file's bytes, mapped; RecordError where there is none."""
    if not path.is_file():
        raise RecordError(f"There is no {path}; prepare the data set or correct the path.")
    with path.open("rb") as file:
        empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
        return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def record_offsets(rec_path: str | Path) -> np.ndarray:
    """Walk a record file as far as it is whole: for resuming, and where train.idx is missing.

    Returns (n + 1,) int64: where each of the n whole records begins, and where the last one ends
    (before the file's end if that is cut short).
    """
    data = map_file(Path(rec_path))
    offsets = [0]
    while spans := _parts(data, offsets[-1]):
        offsets.append(_aligned(spans[-1][1]))
    return np.array(offsets, np.int64)


# ------------------------------------------------------------------------------ reading a set


class RecordReader:
    """Images and labels of a folder with `train.rec`, or of any `.rec`, memory-mapped.

    `keys` (n,) int64: the images' record ids, ascending; `offsets` (n,) int64: where their records
    begin; `labels` (n,) int64; `num_classes`;
    `identities` (k, 2) int64: first image and one past the last, None without a record 0;
    `size`: (height, width), None without a property file. Threads may share a reader.
    Raises RecordError where a file is missing, is cut short or disagrees with another.
    """

    def __init__(self, folder_or_rec: str | Path):
        path = Path(folder_or_rec)
        self.path = path if path.suffix == ".rec" and not path.is_dir() else path / "train.rec"
        self._idx = self.path.with_suffix(".idx")
        self._data = map_file(self.path)
        self._words = np.frombuffer(self._data, "<u4", len(self._data) // 4)
        if len(self._data) < 8:  # not even the frame of a record
            raise self._damaged(0)
        if self._idx.is_file():
            keys, offsets = self._read_idx()
            bare, labels, _, vectors = self._headers(keys, offsets)
        else:
            *offsets, end = record_offsets(self.path)
            if end != len(self._data):
                raise self._damaged(len(offsets))
            offsets = np.array(offsets)
            bare, labels, ids, vectors = self._headers(np.arange(len(offsets)), offsets)
            # face2rec2 writes record 0 last; where ids say nothing, the order does.
            keys = ids if len(np.unique(ids)) == len(ids) else np.arange(len(ids))
        order = np.argsort(keys)
        keys, offsets = keys[order], offsets[order]
        self.identities, images = self._split(keys, bare[order], vectors[order])
        self.keys, self.offsets = keys[images], offsets[images]
        self.num_classes, self.size = self._read_property()
        self.labels = self._check_labels(labels[order][images])

    def __len__(self) -> int:
        return len(self.keys)

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, 0 <= i < len(self)."""
        payload = payload_at(self._data, int(self.offsets[i]))
        return payload[HEADER.size + 4 * int.from_bytes(payload[:4], "little") :]

    def image(self, i: int) -> np.ndarray:
        """Image i as (height, width, 3) uint8 RGB; RecordError names the record where it cannot."""
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            raise RecordError(f"Record {self.keys[i]} of {self.path}: {error}") from None
        if self.size and image.shape[:2] != self.size:
            found, said = (f"{shape[1]}x{shape[0]}" for shape in (image.shape, self.size))
            raise RecordError(
                f"Record {self.keys[i]} of {self.path} is {found} pixels, the property file says "
                f"{said}; all images of a set have one size: correct it or prepare the set again."
            )
        return image

    def _damaged(self, key: Any) -> RecordError:
        return RecordError(
            f"{self.path} is cut short or damaged: record {key} is not whole (the file ends at "
            f"byte {len(self._data)}); copy or prepare it again."
        )

    def _disagrees(self, how: str) -> RecordError:
        return RecordError(
            f"{self._idx} does not belong to {self.path.name}: {how}. Copy both again, or delete "
            f"{self._idx.name}: it is then worked out from {self.path.name}."
        )

    def _read_idx(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and offsets (n,) of train.idx; a record begins at each, or the file has ended."""
        text = io.StringIO(self._idx.read_text("latin-1").strip() or "-")
        try:
            keys, offsets = np.loadtxt(text, np.int64, comments=None, delimiter="\t", ndmin=2).T
        except ValueError:
            raise self._disagrees("its lines are not 'record id, tab, byte offset'") from None
        words = self._words[np.clip(offsets // 4, 0, len(self._words) - 2)[:, None] + (0, 1)]
        beyond = offsets > len(self._data) - 8
        begins = (words[:, 0] == int.from_bytes(MAGIC, "little")) & (words[:, 1] >> 29 <= 1)
        begins &= (offsets >= 0) & (offsets % 4 == 0)
        if not np.all(begins | beyond):
            i = int(np.argmin(begins | beyond))
            raise self._disagrees(f"record {keys[i]} does not begin at byte {offsets[i]}")
        if len(np.unique(keys)) < len(keys):
            raise self._disagrees("a record id is there twice")
        return keys, offsets

    def _headers(self, keys: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of the records at `offsets`, all at once: whether they have no image, label, id, and
        the first two of a vector of labels: (n,), (n,), (n,), (n, 2).
        """
        # Words of a header: flag, label, id (two words), id2 (two words), then labels or the JPEG.
        at = np.minimum((offsets // 4)[:, None] + np.arange(1, 10), len(self._words) - 1)
        lrec, rows = np.split(self._words[at], [1], axis=1)
        lengths = (lrec[:, 0] & LENGTH_MASK).astype(np.int64)
        ends = _aligned(offsets + 8 + lengths)
        for i in np.flatnonzero(lrec[:, 0] >> 29):  # in several parts: one in a million
            spans = _parts(self._data, int(offsets[i])) or [(0, len(self._data) + 1)]
            payload = payload_at(self._data, int(offsets[i]))
            lengths[i], ends[i] = len(payload), _aligned(spans[-1][1])
            rows[i] = np.frombuffer(payload[:32].ljust(32, b"\0"), "<u4")
        flags, floats = rows[:, 0].astype(np.int64), rows.view("<f4")
        broken = (ends > len(self._data)) | (lengths < HEADER.size + 4 * flags)
        if np.any(broken):
            raise self._damaged(keys[np.argmax(broken)])
        begins = np.append(np.sort(offsets), len(self._data))
        gaps = begins != np.insert(np.sort(ends), 0, 0)
        if np.any(gaps):
            raise self._disagrees(f"the record before byte {begins[np.argmax(gaps)]} is missing")
        bare = (flags == 2) & (lengths == HEADER.size + 4 * flags)
        labels = np.where(flags > 0, floats[:, 6], floats[:, 1])
        return bare, labels, rows[:, 2:4].copy().view("<i8")[:, 0], floats[:, 6:]

    def _split(self, keys: np.ndarray, bare: np.ndarray, ranges: np.ndarray) -> tuple[Any, slice]:
        """The identities' ranges of images (k, 2), and where the images are, by record 0."""
        if keys[0] != 0 or not bare[0]:
            return None, slice(None)
        first, end = (int(n) if np.isfinite(n) else -1 for n in ranges[0])
        if first == 0:
            raise RecordError(f"{self.path} was never finished; run what wrote it again.")
        if not 1 <= first <= end <= len(keys) or keys[end - 1] != end - 1:
            raise RecordError(
                f"Record 0 of {self.path} speaks of images 1 to {first - 1} and identities up to "
                f"record {end - 1}, which are not all there ({len(keys) - 1} records are); "
                "copy or prepare the set again."
            )
        begin, stop = ranges[first:end].T
        wrong = ~(bare[first:end] & (begin >= 1) & (begin <= stop) & (stop <= first))
        if np.any(wrong):
            raise RecordError(
                f"Record {first + np.argmax(wrong)} of {self.path} should say which images are an "
                "identity's and does not; copy or prepare the set again."
            )
        return ranges[first:end].astype(np.int64), slice(1, first)

    def _read_property(self) -> tuple[int | None, tuple[int, int] | None]:
        path = self.path.parent / "property"
        if not path.is_file():
            return None, None
        # Some tools add a second line: the number of images.
        with path.open("rb") as file:
            line = file.readline(100).decode("latin-1").strip()
        if not re.fullmatch(r"\d{1,9}\s*,\s*\d{1,9}\s*,\s*\d{1,9}", line):
            raise RecordError(
                f"{path} begins with {line[:40]!r} instead of 'classes,height,width', for example "
                "'10572,112,112'; correct it, or delete it to have the classes counted."
            )
        classes, height, width = map(int, line.split(","))
        return classes, (height, width)

    def _check_labels(self, labels: np.ndarray) -> np.ndarray:
        """Labels as int64, all in [0, num_classes); fills in `num_classes` without a property."""
        if not len(labels):
            raise RecordError(f"{self.path} holds no image; prepare or copy it again.")
        whole = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
        most = min(LABEL_LIMIT if self.num_classes is None else self.num_classes, LABEL_LIMIT)
        wrong = ~whole | (labels >= most)
        if np.any(wrong):
            i = int(np.argmax(wrong))
            raise RecordError(
                f"Record {self.keys[i]} of {self.path} has label {labels[i]:g}, not a whole number "
                f"below {most}; correct the first number in property or prepare the set again."
            )
        if self.num_classes is None:
            self.num_classes = int(labels.max()) + 1
        return labels.astype(np.int64)
