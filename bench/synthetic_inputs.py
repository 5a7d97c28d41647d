"""Synthetic images for the benchmarks, made anew for each run and deleted after it."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from fileio.images import encode_jpeg
from fileio.record_writer import write_dataset
from tools.synthetic import Task, draw_image
from utils import core_count

PEOPLE = 16


@functools.cache
def drawn_images(count: int) -> list[bytes]:
    """JPEGs of 250x250, `PEOPLE` people in turn."""
    tasks = [Task(1, i % PEOPLE, i // PEOPLE) for i in range(count)]
    with ProcessPoolExecutor(core_count()) as pool:
        return list(pool.map(draw_image, tasks, chunksize=8))


@contextlib.contextmanager
def drawn_records(data: Path | None, count: int) -> Iterator[Path]:
    """`data` where given, else a folder of `count` records: the images' middles at 112x112."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        faces = []
        for jpeg in drawn_images(count):
            image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB)
            faces.append(encode_jpeg(np.ascontiguousarray(image[69:181, 69:181])))
        order = sorted(range(count), key=lambda i: i % PEOPLE)
        labels = [i % PEOPLE for i in order]
        write_dataset(folder, [faces[i] for i in order], labels)
        yield Path(folder)


@contextlib.contextmanager
def drawn_archive(data: Path | None, count: int) -> Iterator[Path]:
    """`data` where given, else a .zip of `count` synthetic images in CASIA-WebFace's layout."""
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "CASIA-WebFace.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, jpeg in enumerate(drawn_images(count)):
                name = f"CASIA-WebFace/{i % PEOPLE:07d}/{i // PEOPLE + 1:03d}.jpg"
                archive.writestr(name, jpeg)
        yield path
