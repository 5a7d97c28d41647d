"""Folders of aligned faces, prepared by pre_process.py or plain images, and looking them up.

    from evaluation.face_folders import open_faces
    faces = open_faces("data/faces_lfw_112x112")
    faces.find(["Aaron_Eckhart/Aaron_Eckhart_0001"], "pairs.txt")    # numbers of faces.names

Pairs files of all kinds name images by the end of their path in the archive, without its suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.verification import SUFFIXES, without_suffix
from fileio.images import ImageError, decode_image
from fileio.index_tsv import IndexTable, read_index
from fileio.recordio import RecordError, RecordReader
from utils import FACE_SIZE, UserError


class ImageFolder:
    """The images below a folder, sorted by path, read as RecordReader reads records."""

    def __init__(self, folder: Path):
        self.path = folder
        found = (path for path in folder.rglob("*") if path.suffix[1:].lower() in SUFFIXES)
        self.keys = sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
        if not self.keys:
            raise UserError(
                f"{folder} holds neither a train.rec nor images; prepare it with pre_process.py."
            )

    def __len__(self) -> int:
        return len(self.keys)

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, whichever format they have."""
        return (self.path / self.keys[i]).read_bytes()

    def image(self, i: int) -> np.ndarray:
        """Image i as (112, 112, 3) uint8 RGB; RecordError names the file where it cannot."""
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            raise RecordError(f"{self.path / self.keys[i]}: {error}") from None
        if image.shape[:2] != (FACE_SIZE, FACE_SIZE):
            height, width = image.shape[:2]
            raise RecordError(
                f"{self.path / self.keys[i]} is {width}x{height}, not an aligned face of "
                f"{FACE_SIZE}x{FACE_SIZE}; prepare the folder with pre_process.py."
            )
        return image


@dataclass(frozen=True)
class Faces:
    """A folder's images, by the names that they had in the archive."""

    reader: RecordReader | ImageFolder
    names: list[str]  # (n,) paths as the archive or the folder has them
    places: np.ndarray  # (n,) int64, where each is in the reader
    table: IndexTable | None = None
    rows: np.ndarray | None = None  # (n,) int64, the line of each in the table

    def find(self, wanted: Sequence[str], who: Path | str) -> np.ndarray:
        """Numbers (wanted,) of images, each named by the end of its path, without the suffix.

        Whatever the archive's root is called, "Name/Name_0001" is found. Raises UserError, which
        says that `who` names them, where images are missing or a name fits several.
        """
        depth = max((name.count("/") + 1 for name in wanted), default=1)
        index: dict[str, int] = {}
        for number, name in enumerate(self.names):
            parts = without_suffix(name).split("/")
            for start in range(max(0, len(parts) - depth), len(parts)):
                end = "/".join(parts[start:])
                index[end] = -1 if end in index else number
        missing = [name for name in wanted if name not in index]
        if missing:
            few = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
            raise UserError(
                f"{who} names {len(missing)} of {len(wanted)} images that {self.reader.path} "
                f"does not have ({few}); prepare the archive that belongs to it (pre_process.py)."
            )
        found = np.array([index[name] for name in wanted], np.int64)
        if np.any(found < 0):
            name = wanted[int(np.argmin(found))]
            raise UserError(
                f"{who} names {name}, which several images in {self.reader.path} are called; "
                "write more of the path."
            )
        return found


def open_faces(folder: Path | str) -> Faces:
    """The faces of a prepared folder (train.rec and index.tsv), or of a folder of images."""
    folder = Path(folder)
    if not (folder / "train.rec").is_file() and folder.is_dir():
        images = ImageFolder(folder)
        return Faces(images, images.keys, np.arange(len(images)))
    reader = RecordReader(folder)
    table = read_index(folder, reader)
    rows = np.flatnonzero(table.record >= 0)
    names = [table.source[row] for row in rows]
    return Faces(reader, names, np.searchsorted(reader.keys, table.record[rows]), table, rows)
