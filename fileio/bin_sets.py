"""InsightFace's test sets (lfw.bin, agedb_30.bin ...), read without trusting them, and written.

A .bin is a pickle of a pair: a list of 2n encoded images (bytes), and a list of n bools. Images 2i
and 2i + 1 are a pair; bool i says whether they show the same identity. An .xz is the same under
LZMA compression, as Hadrian, Eclipse and ND-Twins are published.
"""

from __future__ import annotations

import io
import lzma
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from fileio.recordio import RecordError
from fileio.safe_files import atomic_write
from fileio.safe_pickle import load_two_lists

BIN_SUFFIXES = (".bin", ".xz")
# JPEG files hardly shrink: what grows beyond both of these is a decompression bomb.
MAX_XZ_RATIO, MAX_XZ_BYTES = 100, 1 << 28


def read_bin(path: str | Path) -> tuple[list[bytes], np.ndarray]:
    """Read a test set: 2n encoded images, and (n,) bool, true for genuine pairs.

    The pickle may come from Python 2 or 3 and runs no code. RecordError if it is no test set.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"There is no {path}; correct the path.")
    with path.open("rb") as file:
        try:
            content = _decompress(file) if path.suffix == ".xz" else file
            images, is_same = load_two_lists(content)
        except (pickle.UnpicklingError, lzma.LZMAError, EOFError) as error:
            raise RecordError(
                f"{path} is not a test set, a pickle of (list of JPEG bytes, list of bool): "
                f"{error}. Download it again, from a source you trust."
            ) from None
    wrong = [image for image in images if not isinstance(image, bytes)]
    wrong += [value for value in is_same if value not in (0, 1)]
    if wrong:
        raise RecordError(
            f"{path} has {str(wrong[0])[:40]!r} for an image or for True or False; "
            "it is no test set."
        )
    if not is_same or len(images) != 2 * len(is_same):
        raise RecordError(
            f"{path} has {len(images)} images for {len(is_same)} pairs, not two for each; "
            "download it again."
        )
    return images, np.array(is_same, bool)


def _decompress(file: IO[bytes]) -> IO[bytes]:
    """The content of an .xz file; pickle.UnpicklingError if it is a decompression bomb."""
    limit = max(MAX_XZ_BYTES, MAX_XZ_RATIO * os.fstat(file.fileno()).st_size)
    content = io.BytesIO()
    with lzma.open(file) as blocks:
        while block := blocks.read(1 << 20):  # a read of `limit` would allocate as much
            content.write(block)
            if content.tell() > limit:
                raise pickle.UnpicklingError(f"uncompressed it has more than {limit:,} bytes")
    content.seek(0)
    return content


def write_bin(path: str | Path, images: Sequence[bytes], is_same: Sequence[bool]) -> None:
    """Write a test set as InsightFace's `pickle.load(file, encoding="bytes")` reads it."""
    if len(images) != 2 * len(is_same):
        raise RecordError(f"{len(images)} images do not make {len(is_same)} pairs for {path}.")
    with atomic_write(path) as file:
        # bytes and bool: a bytearray or numpy.bool_ would pickle as a call of its class.
        pair = ([bytes(image) for image in images], [bool(value) for value in is_same])
        pickle.dump(pair, file, protocol=4)
