"""InsightFace's test sets, lfw.bin and others of its kind: pairs of images in one pickle."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fileio.recordio import RecordError
from fileio.safe_files import atomic_write
from fileio.safe_pickle import load_two_lists


def read_bin(path: str | Path) -> tuple[list[bytes], np.ndarray]:
    """Read a test set: 2n encoded images, and (n,) bool, whether images 2i and 2i + 1 match.

    The file is a pickle, of Python 2 or 3, and is not trusted. RecordError where it is not that.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"There is no {path}; correct the path.")
    with path.open("rb") as file:
        try:
            images, same = load_two_lists(file)
        except pickle.UnpicklingError as error:
            raise RecordError(
                f"{path} is not a test set, a pickle of (list of JPEG bytes, list of bool): "
                f"{error}. Get it again, from a source you trust."
            ) from None
    bad = [image for image in images if not isinstance(image, bytes)]
    bad += [value for value in same if value not in (0, 1)]
    if bad:
        raise RecordError(
            f"{path} has {str(bad[0])[:40]!r} for an image or for True or False; "
            "it is no .bin test set."
        )
    if not same or len(images) != 2 * len(same):
        raise RecordError(
            f"{path} has {len(images)} images for {len(same)} pairs, not two for each; "
            "get it again."
        )
    return images, np.array(same, bool)


def write_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a test set as InsightFace's `pickle.load(file, encoding="bytes")` reads it."""
    if len(images) != 2 * len(same):
        raise RecordError(f"{len(images)} images do not make {len(same)} pairs for {path}.")
    with atomic_write(path) as file:
        pickle.dump(([bytes(i) for i in images], [bool(s) for s in same]), file, protocol=4)
