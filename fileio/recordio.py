"""InsightFace's training sets, read without mxnet: train.rec, train.idx and property.

    reader = RecordReader("data/faces_webface_112x112")
    reader.image(0), reader.labels[0], reader.num_classes

train.rec is RecordIO (dmlc-core, src/recordio.cc): records one after the other, each at a multiple
of 4 bytes. All numbers are little-endian.

    0  magic number 0xced7230a (4)
    4  cflag << 29 | length of the payload (4)
    8  payload, then zeros up to a multiple of 4

cflag is 0 for a record in one piece. Where the payload itself has the magic number at a multiple of
4, it is cut there: the pieces have cflag 1 (first), 2 (middle) and 3 (last), and the magic number
between them is left out. So a magic number at a multiple of 4 always begins a record or a piece.

The payload is an image record of mxnet (python/mxnet/recordio.py):

    0  flag: the number of labels in the vector below (4)
    4  label, float32, valid if flag is 0 (4)
    8  record id (8), then a second id that is always 0 (8)
   24  `flag` labels, float32, then the encoded image

Record 0 and the identity records have labels and no image: a range of records. Record 0 says which
records are the identities', each of those which images are the identity's. With 5 images of 3
identities, the records are

    0           [6, 9): records 6 to 8 are identities, so records 1 to 5 are images
    1 2 3 4 5   images, with labels 0 0 1 2 2
    6 7 8       [1, 3) [3, 4) [4, 6)

As InsightFace's loader does, the reader takes from record 0 only where the images end: its other
numbers and the identity records differ from writer to writer (one number or three, no identity
records, a dummy image in record 0), and beyond 2^24 records float32 rounds them.

train.idx has a line "record id, tab, byte offset" for each record; property is the line
"classes,height,width".
"""

from __future__ import annotations

import io
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fileio.images import ImageError, decode_image
from utils import UserError

MAGIC_WORD = 0xCED7230A
MAGIC = struct.pack("<I", MAGIC_WORD)
LENGTH_MASK = (1 << 29) - 1
HEADER = struct.Struct("<IfQQ")
LABEL_LIMIT = 1 << 24  # labels are float32, which has all integers only up to here


class RecordError(UserError):
    """A record file, its index or a test set that is missing, corrupt or inconsistent."""


# ------------------------------------------------------------------------------ single records


def _align(position: Any) -> Any:
    """The next multiple of 4, of an int or an array."""
    return (position + 3) & ~3


def _piece_spans(data: Any, offset: int) -> list[tuple[int, int]] | None:
    """(start, stop) bytes of each piece of the record at `offset`; None if it is incomplete."""
    spans: list[tuple[int, int]] = []
    while 0 <= offset <= len(data) - 8:
        magic, word = struct.unpack_from("<4sI", data, offset)
        cflag, start, stop = word >> 29, offset + 8, offset + 8 + (word & LENGTH_MASK)
        offset = _align(stop)
        allowed = (2, 3) if spans else (0, 1)  # after the first piece only middle and last
        if magic != MAGIC or offset > len(data) or cflag not in allowed:
            return None
        spans.append((start, stop))
        if cflag in (0, 3):
            return spans
    return None


def payload_at(data: Any, offset: int) -> bytes:
    """The payload of the record at `offset`; empty if no complete record is there."""
    spans = _piece_spans(data, offset) or []
    return MAGIC.join([data[start:stop] for start, stop in spans])


def split_payload(payload: bytes) -> tuple[float, bytes]:
    """The (first) label of an image record's payload and its encoded image; nan if it is none."""
    flag, label = struct.unpack_from("<If", payload.ljust(HEADER.size, b"\xff"))
    if flag:
        (label,) = struct.unpack_from("<f", payload.ljust(HEADER.size + 4, b"\xff"), HEADER.size)
    return label, payload[HEADER.size + 4 * flag :]


def record_end(data: Any, offset: int) -> int:
    """The offset after the record at `offset` and its padding; -1 if it is incomplete."""
    spans = _piece_spans(data, offset)
    return _align(spans[-1][1]) if spans else -1


def pack_record(payload: bytes) -> bytes:
    """The record of a payload, in the same pieces as dmlc-core writes.

    Raises RecordError if the payload is longer than the format can say.
    """
    if len(payload) > LENGTH_MASK:
        raise RecordError(
            f"a record cannot hold {len(payload)} bytes; the format ends at 2^29 - 1."
        )
    record, begin, position = [], 0, payload.find(MAGIC)
    while position >= 0:
        if position % 4 == 0:
            cflag = 2 if begin else 1
            record += [MAGIC, struct.pack("<I", cflag << 29 | (position - begin))]
            record.append(payload[begin:position])  # the magic number itself is left out
            begin = position + 4
        # Elsewhere than at a multiple of 4, it does no harm and stays; one that overlaps it may
        # follow at the next byte.
        position = payload.find(MAGIC, position + (1 if position % 4 else 4))
    cflag = 3 if begin else 0
    record += [MAGIC, struct.pack("<I", cflag << 29 | (len(payload) - begin))]
    return b"".join([*record, payload[begin:], bytes(-len(payload) % 4)])


def range_record(key: int, first: float, end: float) -> bytes:
    """A record without an image, for the range of records [first, end)."""
    # mxnet's pack() puts 0 into the header's own label when there is a vector of labels.
    return pack_record(HEADER.pack(2, 0.0, key, 0) + struct.pack("<2f", first, end))


def map_file(path: Path) -> Any:
    """A file's bytes, memory-mapped; RecordError if it is missing."""
    if not path.is_file():
        raise RecordError(f"There is no {path}; prepare the data set or correct the path.")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_property(folder: Path) -> tuple[int | None, tuple[int, int] | None]:
    """The number of classes and the images' (height, width); None each without a property file."""
    path = folder / "property"
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


def record_offsets(rec_path: str | Path) -> np.ndarray:
    """Walk a record file as far as it is complete: to resume, or if train.idx is missing.

    Returns (n + 1,) int64: where each of n complete records begins, and where the last one ends
    (before the file's end if that is cut short).
    """
    data = map_file(Path(rec_path))
    offsets = [0]
    while (end := record_end(data, offsets[-1])) >= 0:
        offsets.append(end)
    return np.array(offsets, np.int64)


# ------------------------------------------------------------------------------ reading a set


class _Headers(NamedTuple):
    """The headers of n records."""

    flags: np.ndarray  # (n,) int64, labels in the vector
    is_range: np.ndarray  # (n,) bool: a vector of labels and no image
    labels: np.ndarray  # (n, 2) float32, the label, or the first two of the vector
    ids: np.ndarray  # (n,) int64


class RecordReader:
    """Images and labels of a folder with `train.rec`, or of any `.rec`, memory-mapped.

    `keys` (n,) int64: the images' record ids, ascending; `offsets` (n,) int64: where their records
    begin; `labels` (n,) int64; `num_classes`; `size`: (height, width), None without a property
    file. Threads may share a reader. Raises RecordError if a file is missing, cut short or
    inconsistent with another.
    """

    def __init__(self, folder_or_rec: str | Path):
        path = Path(folder_or_rec)
        self.path = path if path.suffix == ".rec" and not path.is_dir() else path / "train.rec"
        self._idx = self.path.with_suffix(".idx")
        self._data = map_file(self.path)
        self._words = np.frombuffer(self._data, "<u4", len(self._data) // 4)
        if len(self._data) < 8:  # not even the frame of a record
            raise self._incomplete(0)
        if self._idx.is_file():
            keys, offsets = self._read_idx()
            headers = self._read_headers(keys, offsets)
        else:
            *begins, end = record_offsets(self.path)
            if end != len(self._data):
                raise self._incomplete(len(begins))
            offsets = np.array(begins)
            headers = self._read_headers(np.arange(len(offsets)), offsets)
            # face2rec2 writes record 0 last, so the order of the file is not that of the ids. Some
            # tools write no ids; then the order is all there is.
            ids_are_unique = len(np.unique(headers.ids)) == len(headers.ids)
            keys = headers.ids if ids_are_unique else np.arange(len(headers.ids))
        order = np.argsort(keys)
        keys, offsets = keys[order], offsets[order]
        images = self._find_images(keys, _Headers(*(column[order] for column in headers)))
        self.keys, self.offsets = keys[images], offsets[images]
        self.num_classes, self.size = read_property(self.path.parent)
        self.labels = self._check_labels(headers.labels[order][images, 0])

    def __len__(self) -> int:
        return len(self.keys)

    def encoded(self, i: int) -> bytes:
        """The encoded bytes (JPEG, or any format of `decode_image`) of image i, 0 <= i < len."""
        return split_payload(payload_at(self._data, int(self.offsets[i])))[1]

    def image(self, i: int) -> np.ndarray:
        """Image i as (height, width, 3) uint8 RGB; RecordError names the record if it cannot."""
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            raise RecordError(f"Record {self.keys[i]} of {self.path}: {error}") from None
        if self.size and image.shape[:2] != self.size:
            raise RecordError(
                f"Record {self.keys[i]} of {self.path} is {image.shape[1]}x{image.shape[0]} "
                f"pixels, the property file says {self.size[1]}x{self.size[0]}; all images of a "
                "set have one size: correct it or prepare the set again."
            )
        return image

    def _incomplete(self, key: Any) -> RecordError:
        return RecordError(
            f"{self.path} is cut short or corrupt: record {key} is not complete (the file ends at "
            f"byte {len(self._data)}); copy or prepare it again."
        )

    def _idx_mismatch(self, reason: str) -> RecordError:
        return RecordError(
            f"{self._idx} does not belong to {self.path.name}: {reason}. Copy both again, or "
            f"delete {self._idx.name}: {self.path.name} can be read without it."
        )

    def _read_idx(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and offsets (n,) of train.idx; a record begins at each that is inside the file."""
        # Ids may be written "8.0", by way of a table of floats.
        text = re.sub(r"(?m)^(\d+)\.0*(?=\s)", r"\1", self._idx.read_text("latin-1").strip())
        try:
            keys, offsets = np.loadtxt(io.StringIO(text or "-"), np.int64, comments=None, ndmin=2).T
        except ValueError:
            raise self._idx_mismatch("its lines are not 'record id, tab, byte offset'") from None
        # The first two words at each offset, at once; offsets outside the file are clipped here
        # and told apart below.
        first_words = np.clip(offsets // 4, 0, len(self._words) - 2)
        magic, lrec = self._words[first_words], self._words[first_words + 1]
        begins = (magic == MAGIC_WORD) & (lrec >> 29 <= 1)
        begins &= (offsets >= 0) & (offsets % 4 == 0)
        # Beyond the end: a file cut short, which _read_headers reports by the record.
        is_beyond = offsets > len(self._data) - 8
        if not np.all(begins | is_beyond):
            i = int(np.argmin(begins | is_beyond))
            raise self._idx_mismatch(f"record {keys[i]} does not begin at byte {offsets[i]}")
        if len(np.unique(keys)) < len(keys):
            raise self._idx_mismatch("a record id is there twice")
        return keys, offsets

    def _read_headers(self, keys: np.ndarray, offsets: np.ndarray) -> _Headers:
        """The headers of the records at `offsets` (n,), all at once, since sets have millions.

        Checks that the records are complete and that together they fill the file.
        """
        # Words of a record: 0 magic, 1 cflag and length, 2 flag, 3 label, 4-5 id, 6-7 second id,
        # 8-9 the first two labels of the vector (or the image's first bytes, which nobody uses).
        columns = np.minimum((offsets // 4)[:, None] + np.arange(1, 10), len(self._words) - 1)
        lrec, words = np.split(self._words[columns], [1], axis=1)  # words 1 | 2 to 9
        lengths = (lrec[:, 0] & LENGTH_MASK).astype(np.int64)
        ends = _align(offsets + 8 + lengths)
        for i in np.flatnonzero(lrec[:, 0] >> 29):  # in several pieces: one record in a million
            spans = _piece_spans(self._data, int(offsets[i])) or [(0, len(self._data) + 1)]
            payload = payload_at(self._data, int(offsets[i]))
            lengths[i], ends[i] = len(payload), _align(spans[-1][1])
            words[i] = np.frombuffer(payload[:32].ljust(32, b"\0"), "<u4")
        flags, floats = words[:, 0].astype(np.int64), words.view("<f4")
        is_incomplete = (ends > len(self._data)) | (lengths < HEADER.size + 4 * flags)
        if np.any(is_incomplete):
            raise self._incomplete(keys[np.argmax(is_incomplete)])
        # Sorted, each record must begin where the one before ends: 0, ends == begins, file's end.
        begins = np.append(np.sort(offsets), len(self._data))
        expected = np.insert(np.sort(ends), 0, 0)
        is_gap = begins != expected
        # Where an idx leaves images out, as people do to clean a set, their records are there.
        first_words = self._words[expected.clip(max=len(self._data) - 4) // 4]
        is_left_out = (begins > expected) & (first_words == MAGIC_WORD)
        self._is_subset = bool(np.any(is_gap))
        if is_gap[0] or is_gap[-1] or np.any(is_gap & ~is_left_out):
            before = begins[np.argmax(is_gap)]
            raise self._idx_mismatch(f"the record before byte {before} is missing")
        if self._is_subset:
            print(f"{self._idx} lists {len(keys):,} records of {self.path.name}, not all of them.")
        return _Headers(
            flags=flags,
            is_range=(flags > 0) & (lengths == HEADER.size + 4 * flags),
            labels=np.where(flags[:, None] > 0, floats[:, 6:], floats[:, 1:2]),
            ids=words[:, 2:4].copy().view("<i8")[:, 0],
        )

    def _find_images(self, keys: np.ndarray, headers: _Headers) -> slice:
        """The slice of the images, by record 0 if there is one; in the example above slice(1, 6).

        Record 0 is told from an image with a vector of labels by what it lacks (an image), or, if
        it has a dummy one, by other labels than record 1's or by numbers that fit the file.
        """
        first, end = headers.labels[0]
        if keys[0] != 0 or not headers.flags[0]:
            return slice(None)
        fits = headers.flags[0] != headers.flags[:2][-1] or keys[-1] + 1 in (first, end)
        if not headers.is_range[0] and not (first >= 2 and fits):
            return slice(None)
        if first == 0:  # see RecordWriter
            raise RecordError(f"{self.path} was never finished; run what wrote it again.")
        # What float32 may have made of the number: beyond 2^24 not all integers exist.
        tolerance = max(1, np.spacing(np.float32(first)) / 2) if np.isfinite(first) else 0
        last = int(np.flatnonzero(np.append(True, ~headers.is_range[1:]))[-1])
        if self._is_subset or first < keys[last] + 1 - tolerance:
            stop = int(np.searchsorted(keys, first))
        else:
            stop = last + 1
        if not 1 <= first <= keys[last] + 1 + tolerance and not (self._is_subset and first >= 1):
            raise RecordError(
                f"Record 0 of {self.path} announces images 1 to {first - 1:.0f}, which are not "
                f"all there (images up to {keys[last]} are); copy or prepare the set again."
            )
        return slice(1, stop)

    def _check_labels(self, labels: np.ndarray) -> np.ndarray:
        """Labels as int64, all in [0, num_classes); counts the classes without a property."""
        if not len(labels):
            raise RecordError(f"{self.path} holds no image; prepare or copy it again.")
        is_class = np.isfinite(labels) & (labels >= 0) & (labels == np.floor(labels))
        limit = LABEL_LIMIT if self.num_classes is None else min(self.num_classes, LABEL_LIMIT)
        is_wrong = ~is_class | (labels >= limit)
        if np.any(is_wrong):
            i = int(np.argmax(is_wrong))
            raise RecordError(
                f"Record {self.keys[i]} of {self.path} has label {labels[i]:g}, not a whole number "
                f"below {limit}; correct the first number in property or prepare the set again."
            )
        if self.num_classes is None:
            self.num_classes = int(labels.max()) + 1
        return labels.astype(np.int64)
