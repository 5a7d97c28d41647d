"""Synthetic faces and small archives of them, for the tests that need faces to be found."""

import functools
import zipfile

import numpy as np

from tools.synthetic import Task, draw_image


@functools.cache
def face(person: int, index: int = 0) -> bytes:
    """JPEG of a synthetic face, 250x250."""
    return draw_image(Task(7, person, index))


@functools.cache
def nobody(index: int = 0) -> bytes:
    """JPEG of a background without a person."""
    return draw_image(Task(7, 0, index, "empty"))


def people(count: int, each: int) -> dict[str, bytes]:
    """{name: JPEG} as in CASIA-WebFace's archive."""
    return {
        f"CASIA-WebFace/{1000 + p:07d}/{i + 1:03d}.jpg": face(p, i)
        for p in range(count)
        for i in range(each)
    }


def write_zip(path, files):
    """A .zip of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def same_pixels(a: np.ndarray, b: np.ndarray, mean: float) -> bool:
    """Whether two images differ by less than `mean` levels on average."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).mean() < mean
