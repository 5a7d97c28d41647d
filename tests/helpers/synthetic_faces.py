"""Synthetic faces and small archives of them, for the tests that need faces to be found."""

import functools
import zipfile

import numpy as np

from tools.synthetic import Task, draw_image


@functools.cache
def face(identity: int, index: int = 0) -> bytes:
    """JPEG of a synthetic face, 250x250."""
    return draw_image(Task(7, identity, index))


@functools.cache
def image_without_face(index: int = 0) -> bytes:
    """JPEG of a background alone."""
    return draw_image(Task(7, 0, index, "empty"))


def casia_files(identities: int, images: int) -> dict[str, bytes]:
    """{name: JPEG} as in CASIA-WebFace's archive, `images` of each identity."""
    return {
        f"CASIA-WebFace/{1000 + identity:07d}/{i + 1:03d}.jpg": face(identity, i)
        for identity in range(identities)
        for i in range(images)
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
