"""Example images before and after alignment: images/0_raw.jpg, images/0_img.jpg and so on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fileio.archive_source import Source
from fileio.images import decode_image, encode_jpeg
from fileio.locks import lock_folder
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
    make_folder(images_dir)
    # Two processes that prepare two sets would each write half of the examples.
    with describe_write_errors(images_dir), lock_folder(images_dir, "pre_process.py", wait=True):
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
