"""Folders of aligned faces - prepared by pre_process.py, or plain images - and finding images.

    from evaluation.face_folders import open_face_folder
    folder = open_face_folder("data/faces_lfw_112x112")
    folder.find(["Aaron_Eckhart/Aaron_Eckhart_0001"], "pairs.txt")  # indices into folder.names

Pairs files of all kinds name an image by the end of its path in the archive, without the suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.verification import IMAGE_SUFFIXES, without_suffix
from fileio.images import ImageError, decode_image
from fileio.index_tsv import IndexTable, read_index
from fileio.recordio import RecordError, RecordReader
from utils import FACE_SIZE, UserError


class ImageFolder:
    """The images in a folder and its subfolders, sorted by path, with RecordReader's methods."""

    def __init__(self, folder: Path):
        self.path = folder
        paths = [
            path
            for path in folder.rglob("*")
            if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
        ]
        self.keys = sorted(path.relative_to(folder).as_posix() for path in paths)
        if not self.keys:
            raise UserError(
                f"{folder} holds neither a train.rec nor images; prepare it with pre_process.py."
            )

    def __len__(self) -> int:
        return len(self.keys)

    def encoded(self, i: int) -> bytes:
        """The encoded bytes of image i, in whichever format they are."""
        return (self.path / self.keys[i]).read_bytes()

    def image(self, i: int) -> np.ndarray:
        """Image i as (112, 112, 3) uint8 RGB; RecordError, naming the file, if it is not one."""
        path = self.path / self.keys[i]
        try:
            image = decode_image(self.encoded(i))
        except ImageError as error:
            raise RecordError(f"{path}: {error}") from None
        height, width = image.shape[:2]
        if (height, width) != (FACE_SIZE, FACE_SIZE):
            raise RecordError(
                f"{path} is {width}x{height}, not an aligned face of {FACE_SIZE}x{FACE_SIZE}; "
                "prepare the folder with pre_process.py."
            )
        return image


@dataclass(frozen=True)
class FaceFolder:
    """The images of a folder by their names in the archive."""

    reader: RecordReader | ImageFolder
    names: list[str]  # (n,) paths in the archive or in the folder
    positions: np.ndarray  # (n,) int64, position of each image in the reader
    table: IndexTable | None = None  # index.tsv
    rows: np.ndarray | None = None  # (n,) int64, row of each image in the table

    def find(self, wanted: Sequence[str], named_by: Path | str) -> np.ndarray:
        """Indices (wanted,) of images, each given by the end of its path without the suffix.

        "Name/Name_0001" is found whatever the root folder of the archive is called. Raises
        UserError where images are missing or a name fits several; `named_by` is the file that names
        them, for the message.
        """
        # Every end of every path, as long as the longest name wanted: of "lfw/A/A_1.jpg" and a
        # wanted "A/A_1", the ends "A/A_1" and "A_1". -1 marks ends that several images share.
        depth = max((name.count("/") + 1 for name in wanted), default=1)
        index: dict[str, int] = {}
        for i, name in enumerate(self.names):
            parts = without_suffix(name).split("/")
            for start in range(max(0, len(parts) - depth), len(parts)):
                end = "/".join(parts[start:])
                index[end] = -1 if end in index else i
        missing = [name for name in wanted if name not in index]
        if missing:
            examples = ", ".join(missing[:3])
            if len(missing) > 3:
                examples += ", ..."
            raise UserError(
                f"{named_by} names {len(missing)} of {len(wanted)} images that {self.reader.path} "
                f"does not have ({examples}); prepare the archive that it was made for "
                "(pre_process.py)."
            )
        indices = np.array([index[name] for name in wanted], np.int64)
        if np.any(indices < 0):
            name = wanted[int(np.argmin(indices))]
            raise UserError(
                f"{named_by} names {name}, but several images in {self.reader.path} have that "
                "name; write more of the path."
            )
        return indices


def open_face_folder(folder: Path | str) -> FaceFolder:
    """Open a prepared folder (train.rec and index.tsv), or a folder of aligned images.

    Raises UserError where the folder is neither.
    """
    folder = Path(folder)
    if not (folder / "train.rec").is_file() and folder.is_dir():
        images = ImageFolder(folder)
        return FaceFolder(images, images.keys, np.arange(len(images)))
    reader = RecordReader(folder)
    table = read_index(folder, reader)
    rows = np.flatnonzero(table.record >= 0)  # the others were skipped by pre_process.py
    names = [table.source[row] for row in rows]
    return FaceFolder(reader, names, np.searchsorted(reader.keys, table.record[rows]), table, rows)
