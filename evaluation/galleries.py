"""Galleries of wrongly predicted pairs, with the original images read from their archive.

read_originals("data/lfw-funneled.tgz", {"Ann_Lee/Ann_Lee_0001"})
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.face_folders import image_name
from evaluation.verification import Pairs
from fileio.archive_source import ArchiveError
from fileio.archives import open_source
from fileio.images import ImageError, decode_image, encode_jpeg
from fileio.safe_files import atomic_write, make_folder


def write_galleries(
    images_dir: Path,
    pairs: Pairs,
    faces: Tensor,
    errors: dict[str, np.ndarray],
    source: str = "",
) -> str:
    """Write both images of each wrong pair as {i}_{kind}_0.jpg and {i}_{kind}_1.jpg.

    errors has the indices of the pairs by kind: "fp" (false positives) and "fn" (false negatives).
    The originals are read from source, an archive or a folder; aligned faces (n, 112, 112, 3) stand
    in for those that it does not have. Galleries of an earlier evaluation are deleted first.
    Returns a notice to print; it is empty if there is nothing to say.
    """
    make_folder(images_dir)
    for kind in errors:
        # An earlier model may have had more errors than this one: its files must not stay.
        for stale in images_dir.glob(f"*_{kind}_[01].jpg"):
            if stale.name.partition("_")[0].isdecimal():
                stale.unlink()
    face_of_file = {
        f"{number}_{kind}_{side}.jpg": int(ends[pair])
        for kind, indices in errors.items()
        for number, pair in enumerate(indices)
        for side, ends in enumerate((pairs.first, pairs.second))
    }
    names = {pairs.names[face] for face in face_of_file.values()}
    originals, notice = read_originals(source, names) if names else ({}, "")
    for file_name, face in face_of_file.items():
        jpeg = originals.get(pairs.names[face]) or encode_jpeg(faces[face].numpy())
        with atomic_write(images_dir / file_name) as file:
            file.write(jpeg)
    return notice


def read_originals(source: str, names: set[str]) -> tuple[dict[str, bytes], str]:
    """JPEG bytes of the original images by name, and a notice if some of them are missing.

    source is an archive or a folder. An image's name is face_folders.image_name of its path.
    """
    originals: dict[str, bytes] = {}
    if not source:
        return originals, "The galleries show aligned faces; --lfw-source can name the originals."
    try:
        with open_source(source) as archive:
            wanted = [entry for entry in archive.entries() if image_name(entry.name) in names]
            for entry, data in archive.read(wanted):
                jpeg = None if isinstance(data, ArchiveError) else _as_jpeg(data)
                if jpeg:
                    originals[image_name(entry.name)] = jpeg
    except ArchiveError as error:
        # What was read before the archive broke off is still shown.
        return originals, f"The galleries show aligned faces. {error}"
    missing = len(names) - len(originals)
    if missing:
        return originals, (
            f"{missing} of {len(names)} originals in the galleries are not in {source}."
        )
    return originals, ""


def _as_jpeg(data: bytes) -> bytes | None:
    """An image file as JPEG: unchanged if it is one, None if it cannot be decoded."""
    if data.startswith(b"\xff\xd8"):  # JPEG's start-of-image marker
        return data
    try:
        return encode_jpeg(decode_image(data))
    except ImageError:
        return None
