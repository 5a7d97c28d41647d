"""Synthetic images for the benchmarks, made for each run and deleted after it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from fileio.images import decode_image, encode_jpeg
from fileio.record_writer import write_dataset
from tools.synthetic import Task, draw_image
from utils import core_count

IDENTITIES = 16
CENTRE = slice(69, 181)  # 112 of 250 pixels, the middle ones


@functools.cache
def synthetic_jpegs(count: int) -> list[bytes]:
    """JPEGs of 250x250, one of each of `IDENTITIES` identities in turn."""
    tasks = [Task(1, i % IDENTITIES, i // IDENTITIES) for i in range(count)]
    with ProcessPoolExecutor(core_count()) as pool:
        return list(pool.map(draw_image, tasks, chunksize=8))


@contextlib.contextmanager
def records_or_synthetic(data: Path | None, count: int) -> Iterator[Path]:
    """`data` if given, else a folder of `count` records: central 112x112 crops."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        faces = []
        for jpeg in synthetic_jpegs(count):
            crop = decode_image(jpeg)[CENTRE, CENTRE]
            faces.append(encode_jpeg(np.ascontiguousarray(crop)))
        # A data set has its records sorted by identity.
        order = sorted(range(count), key=lambda i: i % IDENTITIES)
        labels = [i % IDENTITIES for i in order]
        write_dataset(folder, [faces[i] for i in order], labels)
        yield Path(folder)


@contextlib.contextmanager
def archive_or_synthetic(data: Path | None, count: int) -> Iterator[Path]:
    """`data` if given, else a .zip of `count` synthetic images in CASIA-WebFace's layout."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "CASIA-WebFace.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, jpeg in enumerate(synthetic_jpegs(count)):
                name = f"CASIA-WebFace/{i % IDENTITIES:07d}/{i // IDENTITIES + 1:03d}.jpg"
                archive.writestr(name, jpeg)
        yield path
