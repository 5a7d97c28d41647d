"""A gallery: the embeddings of the faces in a folder of photos, in one .npz file.

    gallery = open_gallery(Path("photos.npz"))
    gallery.embeddings @ query        # (n,) cosines; the embeddings are memory-mapped

numpy.load(path, allow_pickle=False) reads the same arrays. Row i of each is one photo with a face;
photos without one are in skipped_names and skipped_statuses. The file is untrusted input.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.embedding_cache import CORRUPT_NPZ
from fileio.safe_files import atomic_write
from utils import UserError

DIGEST_BYTES = 16  # of BLAKE2b over a photo's bytes
# Of each array: the kind of its numbers, and the shape of a row; None is any size.
FACE_ARRAYS = {
    "names": ("U", ()),
    "statuses": ("U", ()),
    "digests": ("u1", (DIGEST_BYTES,)),
    "boxes": ("f4", (4,)),
    "points": ("f4", (5, 2)),
    "embeddings": ("f4", (None,)),
}
SKIPPED_ARRAYS = {
    "skipped_names": ("U", ()),
    "skipped_statuses": ("U", ()),
    "skipped_digests": ("u1", (DIGEST_BYTES,)),
}
ZIP_HEADER = struct.Struct("<26xHH")  # a member's local header; lengths of its name and extra field


@dataclasses.dataclass(frozen=True)
class PhotoGallery:
    """n photos with a face and m without, the former sorted as their source is."""

    made: dict[str, Any]  # how: source, model and its input, versions
    names: np.ndarray  # (n,) str, paths in the source
    statuses: np.ndarray  # (n,) str: "ok", "retried" or "aligned"
    digests: np.ndarray  # (n, 16) uint8, of the photo's bytes
    boxes: np.ndarray  # (n, 4) float32, in pixels of the photo; nan of an aligned face
    points: np.ndarray  # (n, 5, 2) float32, likewise
    embeddings: np.ndarray  # (n, d) float32, L2-normalised
    skipped_names: np.ndarray  # (m,) str
    skipped_statuses: np.ndarray  # (m,) str: why, "no_face" or "truncated" for example
    skipped_digests: np.ndarray  # (m, 16) uint8

    def __len__(self) -> int:
        return len(self.names)

    @property
    def folders(self) -> np.ndarray:
        """The folder of each photo with a face, (n,) str; "" outside of any."""
        return np.array([name.rpartition("/")[0] for name in self.names.tolist()], dtype=str)


def select_rows(
    galleries: Sequence[PhotoGallery], kept: np.ndarray, skipped: np.ndarray, made: dict[str, Any]
) -> PhotoGallery:
    """A gallery of rows of others: indices (k,) and (s,) into their concatenation."""
    arrays = {}
    for group, rows in ((FACE_ARRAYS, kept), (SKIPPED_ARRAYS, skipped)):
        for name in group:
            parts = [getattr(gallery, name) for gallery in galleries]
            # Those without any face know no embedding dimension.
            joined = np.concatenate([part for part in parts if len(part)] or parts[:1])
            # A second copy of the embeddings only where the order changes.
            in_order = np.array_equal(rows, np.arange(len(joined)))
            arrays[name] = joined if in_order else joined[rows]
    return PhotoGallery(made, **arrays)


def save_gallery(path: Path, gallery: PhotoGallery) -> None:
    """Write a gallery, completely or not at all; equal galleries have the same bytes."""
    # The embeddings first: their header is 64 bytes there, so that their memory map is aligned; of
    # one that is not, NumPy makes a copy for each product.
    names = sorted((*FACE_ARRAYS, *SKIPPED_ARRAYS), key="embeddings".__ne__)
    arrays = {name: getattr(gallery, name) for name in names}
    with atomic_write(path) as file:
        np.savez(file, **arrays, made=np.array(json.dumps(gallery.made)))


def open_gallery(path: Path) -> PhotoGallery:
    """Open a gallery, its embeddings as a memory map; all bytes are checked (zip's CRC).

    Raises UserError where the file is missing, no gallery, or corrupt.
    """
    if not path.is_file():
        raise UserError(f"There is no gallery {path}; `python -m tools.embed FOLDER` makes one.")
    try:
        with np.load(path, allow_pickle=False) as stored:
            made = json.loads(str(stored["made"]))
            if not isinstance(made, dict):
                raise ValueError("it does not say how it was made")
            arrays = {
                name: stored[name]
                for name in (*FACE_ARRAYS, *SKIPPED_ARRAYS)
                if name != "embeddings"
            }
        arrays["embeddings"] = _map_array(path, "embeddings.npy")
        for group in (FACE_ARRAYS, SKIPPED_ARRAYS):
            for name, (kind, row) in group.items():
                _check_array(name, arrays[name], kind, (len(arrays[next(iter(group))]), *row))
    except CORRUPT_NPZ as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{path} is not a gallery, or is corrupt ({reason}); `python -m tools.embed FOLDER` "
            "makes one."
        ) from None
    return PhotoGallery(made, **arrays)


def _check_array(name: str, array: np.ndarray, kind: str, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless an array has this kind of numbers and this shape."""
    same_kind = array.dtype.kind == "U" if kind == "U" else array.dtype == kind
    same_shape = array.ndim == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not (same_kind and same_shape):
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")


def _map_array(path: Path, member: str) -> np.ndarray:
    """An array of an .npz as a memory map; ValueError where its CRC does not match."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member} is compressed")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        start = info.header_offset + ZIP_HEADER.size + sum(ZIP_HEADER.unpack(file.read(30)))
        content = np.memmap(path, np.uint8, "r", start, (info.file_size,))
        if zlib.crc32(content) != info.CRC:
            raise ValueError(f"the checksum of {member} does not match")
        file.seek(start)
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member} is in another version of the format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran_order or dtype != np.float32:
            raise ValueError(f"{member} is {dtype}")
        if 0 in shape:  # an empty map is an error
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", file.tell(), shape)
