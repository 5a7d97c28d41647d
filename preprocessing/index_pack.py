"""A training set that others packed: every record checked, index.tsv and report.json written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fileio.archive_source import Tally
from fileio.images import ImageError, decode_image
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write
from utils import FACE_SIZE, UserError, core_count

STEP = 4096  # records checked at a time


def index_pack(rec_path: Path, output: Path, workers: int = 0) -> tuple[Tally, dict[str, Any]]:
    """Decode every image of a pack and write `output`/index.tsv; returns statuses and labels.

    A row's status is "ok", "unreadable" or "wrong_size"; its identity is the label, as packs carry
    no names.  Raises RecordError if the pack cannot be read at all, UserError if it is of another
    size than 112x112 throughout.
    """
    reader = RecordReader(rec_path)
    size = reader.size or (FACE_SIZE, FACE_SIZE)
    if size != (FACE_SIZE, FACE_SIZE):
        raise UserError(
            f"{reader.path} holds images of {size[1]}x{size[0]} pixels, not "
            f"{FACE_SIZE}x{FACE_SIZE}; training needs an aligned pack of that size."
        )
    statuses = Tally()
    # The check has threads, which end when it is closed; the file may fail before its last record.
    with (
        contextlib.closing(check_records(reader, workers)) as checked,
        atomic_write(output / "index.tsv") as file,
    ):
        file.write(INDEX_HEADER.encode())
        for i, status in enumerate(checked):
            label = int(reader.labels[i])
            row = IndexRow(int(reader.keys[i]), label, str(label), reader.path.name, status)
            file.write(format_index_row(row).encode())
            statuses.add(status, reader.path.name)
    used = len(np.unique(reader.labels))
    return statuses, {
        "identities": used,
        "identities_in_source": used,
        "classes": reader.num_classes,
        "classes_without_image": reader.num_classes - used,
    }


def check_records(reader: RecordReader, workers: int = 0) -> Iterator[str]:
    """ "ok", "unreadable" or "wrong_size" for each image, in order."""

    def check(i: int) -> str:
        try:
            image = decode_image(reader.encoded(i))
        except ImageError:
            return "unreadable"
        return "ok" if image.shape[:2] == (FACE_SIZE, FACE_SIZE) else "wrong_size"

    bar = tqdm(total=len(reader), unit=" images", desc=f"checking {reader.path.name}")
    with bar, ThreadPoolExecutor(workers or core_count(), "check") as pool:
        for start in range(0, len(reader), STEP):
            found = list(pool.map(check, range(start, min(start + STEP, len(reader)))))
            bar.update(len(found))
            yield from found
