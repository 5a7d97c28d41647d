"""Galleries of misclassified pairs, with the original images out of their archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.verification import Pairs, image_name
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

    errors holds the indices of the pairs to show, by kind: "fp" and "fn". The originals come out
    of source, an archive or a folder; the aligned faces (n, 112, 112, 3) stand in for those that it
    does not have. Older galleries are removed first. Returns a notice, empty where all went well.
    """
    make_folder(images_dir)
    for kind in errors:
        for stale in images_dir.glob(f"*_{kind}_[01].jpg"):
            if stale.name.partition("_")[0].isdecimal():
                stale.unlink()
    shown = {
        f"{number}_{kind}_{side}.jpg": int(ends[pair])
        for kind, indices in errors.items()
        for number, pair in enumerate(indices)
        for side, ends in enumerate((pairs.first, pairs.second))
    }
    names = {pairs.names[face] for face in shown.values()}
    originals, notice = read_originals(source, names) if names else ({}, "")
    for name, face in shown.items():
        jpeg = originals.get(pairs.names[face]) or encode_jpeg(faces[face].numpy())
        with atomic_write(images_dir / name) as file:
            file.write(jpeg)
    return notice


def read_originals(source: str, names: set[str]) -> tuple[dict[str, bytes], str]:
    """JPEG bytes of images by name, and a sentence where not all of them are there.

    source is an archive or a folder; an image's name is what verification.image_name makes of
    its path.
    """
    found: dict[str, bytes] = {}
    if not source:
        return found, "The galleries show aligned faces; --lfw-source can name the originals."
    try:
        with open_source(source) as archive:
            wanted = [entry for entry in archive.entries() if image_name(entry.name) in names]
            for entry, data in archive.read(wanted):
                jpeg = None if isinstance(data, ArchiveError) else _as_jpeg(data)
                if jpeg:
                    found[image_name(entry.name)] = jpeg
    except ArchiveError as error:
        return found, f"The galleries show aligned faces. {error}"
    missing = len(names) - len(found)
    if missing:
        return found, f"{missing} of {len(names)} originals in the galleries are not in {source}."
    return found, ""


def _as_jpeg(data: bytes) -> bytes | None:
    """An image file as JPEG: untouched where it is one, None where it cannot be decoded."""
    if data.startswith(b"\xff\xd8"):
        return data
    try:
        return encode_jpeg(decode_image(data))
    except ImageError:
        return None
