"""Write InsightFace's training sets: train.rec, train.idx and property, image by image.

    with RecordWriter("data/my_set/train.rec") as writer:
        writer.append(jpeg, label=0)
        ...
        writer.finish(num_images_per_identity=[12, 7, ...])

The format is described in fileio/recordio.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fileio.recordio import (
    HEADER,
    LABEL_LIMIT,
    RecordError,
    pack_record,
    range_record,
    record_offsets,
)
from fileio.safe_files import atomic_write, describe_write_errors, fsync_file, open_for_writing
from utils import FACE_SIZE


class RecordWriter:
    """Appends images to a `.rec`; `finish` makes it a data set with `.idx` and `property`.

    `resume_at` is a byte offset, one of those that `record_offsets` returns: the file is cut there
    and continued, and the result has the same bytes as an unbroken run. Until `finish`, record 0
    says "unfinished", an empty range that begins at 0, which RecordReader refuses.
    """

    def __init__(self, rec_path: str | Path, resume_at: int | None = None):
        self.path = Path(rec_path)
        unfinished = range_record(0, 0, 0)  # as long as the final record 0
        offsets = np.array([0, len(unfinished)])
        if resume_at:
            offsets = record_offsets(self.path)
            offsets = offsets[offsets <= resume_at]
            if offsets[-1] != resume_at:
                raise RecordError(
                    f"No record of {self.path} begins at byte {resume_at}; delete it to start anew."
                )
        # Offsets of the records so far; `array` takes 8 bytes each where a list takes 40.
        self._offsets, self._end = array("q", offsets[:-1].tolist()), int(offsets[-1])
        with describe_write_errors(self.path):
            # Left over from an earlier set, they would make an unfinished file look finished.
            for name in (self.path.with_suffix(".idx"), self.path.parent / "property"):
                name.unlink(missing_ok=True)
        self._file = open_for_writing(self.path, "r+b" if resume_at else "wb")
        # Also when resuming: a run killed while finishing may have written the final record 0.
        self._file.write(unfinished)
        with describe_write_errors(self.path):
            self._file.truncate(self._end)
        self._file.seek(self._end)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, encoded: bytes, label: int) -> tuple[int, int]:
        """Add an encoded image of class `label`; returns its record id (from 1) and byte offset."""
        if not 0 <= label < LABEL_LIMIT:
            raise RecordError(f"{label} cannot be a label in {self.path}: 0 to 2^24 - 1 can.")
        return self._append(pack_record(HEADER.pack(0, label, len(self._offsets), 0) + encoded))

    def _append(self, record: bytes) -> tuple[int, int]:
        offset = self._end
        self._file.write(record)
        self._offsets.append(offset)
        self._end += len(record)
        return len(self._offsets) - 1, offset

    def tell(self) -> int:
        """The byte at which the next record will begin."""
        return self._end

    def flush(self) -> None:
        """Sync what was appended to the disk."""
        fsync_file(self._file, self.path)

    def finish(
        self, num_images_per_identity: Sequence[int], size: tuple[int, int] = (FACE_SIZE, FACE_SIZE)
    ) -> None:
        """Append identity records, then write record 0, property and .idx; closes the file.

        Identities are in the order of the labels; `size` is (height, width). RecordError if the
        numbers do not add up to the images written.
        """
        first, next_image = len(self._offsets), 1
        if sum(num_images_per_identity) != first - 1:
            raise RecordError(
                f"{self.path} has {first - 1} images, but its identities should have "
                f"{sum(num_images_per_identity)}; start anew."
            )
        for count in num_images_per_identity:
            end = next_image + int(count)
            self._append(range_record(len(self._offsets), next_image, end))
            next_image = end
        # Record 0 only when all else is on disk: it is what makes the file a finished one.
        self.flush()
        self._file.seek(0)
        self._file.write(range_record(0, first, len(self._offsets)))
        self.flush()
        self._file.close()
        with atomic_write(self.path.parent / "property") as file:
            file.write(b"%d,%d,%d" % (len(num_images_per_identity), *size))
        with atomic_write(self.path.with_suffix(".idx")) as file:
            file.writelines(b"%d\t%d\n" % pair for pair in enumerate(self._offsets))


def write_dataset(
    folder: str | Path, encoded_images: Iterable[bytes], labels: Sequence[int]
) -> None:
    """Write train.rec, train.idx and property of 112x112 images; labels ascend from 0."""
    labels = np.asarray(labels, np.int64)
    if np.any(np.diff(labels) < 0):
        raise RecordError(f"The labels for {folder} are not in ascending order; sort the images.")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with RecordWriter(Path(folder) / "train.rec") as writer:
        for encoded, label in zip(encoded_images, labels.tolist(), strict=True):
            writer.append(encoded, label)
        writer.finish(np.bincount(labels).tolist())
