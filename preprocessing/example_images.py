"""Example images before and after alignment: images/0_raw.jpg, images/0_img.jpg and so on."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fileio.archive_source import Source
from fileio.images import decode_image, encode_jpeg
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, describe_write_errors, make_folder
from preprocessing.dataset_writer import FACE

EXAMPLES = 10
JPEG_MAGIC = b"\xff\xd8"


def save_examples(
    source: Source, face_kinds: bytes, reader: RecordReader, images_dir: Path
) -> None:
    """Write images before and after alignment, evenly spread over those with a face.

    `face_kinds` holds NO_FACE, CROP or FACE for each entry of the source, `reader` the records of
    those that are not NO_FACE.
    """
    kinds = np.frombuffer(face_kinds, np.uint8)
    candidates = np.flatnonzero(kinds == FACE)
    if len(candidates) == 0:
        candidates = np.flatnonzero(kinds)
    spread = np.linspace(0, len(candidates) - 1, EXAMPLES).round().astype(int)
    rows = candidates[np.unique(spread)]
    entries = [source.entries()[row] for row in rows]
    originals = dict(source.read(entries))
    with describe_write_errors(images_dir), _exclusive(images_dir):
        for i in range(EXAMPLES):
            raw_path, aligned_path = images_dir / f"{i}_raw.jpg", images_dir / f"{i}_img.jpg"
            if i >= len(rows):  # there may be more images from an earlier run
                raw_path.unlink(missing_ok=True)
                aligned_path.unlink(missing_ok=True)
                continue
            original = originals[entries[i]]
            if not original.startswith(JPEG_MAGIC):
                original = encode_jpeg(decode_image(original))
            # The n-th image with a record has record n.
            aligned = reader.encoded(int(np.count_nonzero(kinds[: rows[i]])))
            for path, content in ((raw_path, original), (aligned_path, aligned)):
                with atomic_write(path) as file:
                    file.write(content)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Make a folder and hold a lock on it, waiting for other processes.

    Otherwise two processes that prepare two sets could each write half of the examples.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
