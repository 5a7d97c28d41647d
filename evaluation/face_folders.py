"""Folders of aligned faces - prepared by pre_process.py, or plain images - and finding images.

    from evaluation.face_folders import open_face_folder
    folder = open_face_folder("data/faces_lfw_112x112")
    folder.find(["Aaron_Eckhart/Aaron_Eckhart_0001.jpg"])  # indices into folder.names

Lists of pairs name an image by its path in the archive or by an end of it, with or without what
their author's own folders were called.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fileio.images import ImageError, decode_image
from fileio.index_tsv import IndexTable, read_index
from fileio.recordio import RecordError, RecordReader
from utils import FACE_SIZE, UserError

IMAGE_SUFFIX = re.compile(
    r"\.(?:jpe?g|jfif|png|bmp|webp|avif|jp2|p[gnp]m|gif|tiff?)$", re.ASCII | re.IGNORECASE
)
ANY_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{0,4}$", re.ASCII | re.IGNORECASE)
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes of file names, as Python keeps them
MISSING, AMBIGUOUS = -2, -1  # in place of an image's index


def image_path(path: str, suffix: re.Pattern[str] = IMAGE_SUFFIX) -> str:
    r"""An image's path as it is compared: "./a.b\c.d.jpg" is "a.b/c.d", as "a.b/c.d" itself is.

    Accented letters are composed (NFC): macOS writes some file names decomposed (NFD). Bytes that
    are not UTF-8 are read as GBK. Of suffixes only those of images are removed, since names may
    contain dots.
    """
    if NOT_UTF8.search(path):
        path = path.encode("utf-8", "surrogateescape").decode("gb18030", "surrogateescape")
    path = unicodedata.normalize("NFC", path).replace("\\", "/")
    return suffix.sub("", path.removeprefix("./"))


def image_name(source: str) -> str:
    """The name of an image in tables: "any/root/Name/Name_0001.jpg" is "Name/Name_0001"."""
    return "/".join(image_path(source).split("/")[-2:])


class ImageFolder:
    """The images in a folder and its subfolders, sorted by path, with RecordReader's methods."""

    def __init__(self, folder: Path):
        self.path = folder
        paths = [
            path for path in folder.rglob("*") if IMAGE_SUFFIX.search(path.name) and path.is_file()
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
    identities: list[str]  # (n,) the folders that the images are in
    positions: np.ndarray  # (n,) int64, position of each image in the reader
    table: IndexTable | None = None  # index.tsv
    rows: np.ndarray | None = None  # (n,) int64, row of each image in the table
    # Images that pre_process.py skipped, and why: {"root/Name/Name_0001.jpg": "no_face"}.
    skipped: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def _ends(self) -> dict[str, int]:
        """{each end of each image's path: its index}, AMBIGUOUS where several images share it."""
        ends: dict[str, int] = {}
        for i, name in enumerate(self.names):
            parts = image_path(name).split("/")
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                ends[end] = AMBIGUOUS if end in ends else i
        return ends

    def find(self, paths: Sequence[str]) -> np.ndarray:
        """Index of each image, (paths,) int64; MISSING or AMBIGUOUS where it has none.

        A path may be an end of the image's path here, so that the root of an archive does not
        matter. It may also begin with folders that are not here ("D:/data/lfw/Name/Name_0001.jpg"),
        as many in each path: single names must not be found in the folder of another identity.
        """
        best = np.full(len(paths), MISSING)
        for suffix in (IMAGE_SUFFIX, ANY_SUFFIX):
            split = {path: image_path(path, suffix).split("/") for path in paths}
            for roots in range(max(map(len, split.values()), default=0)):
                ends = ("/".join(split[path][roots:]) for path in paths)
                indices = np.array([self._ends.get(end, MISSING) for end in ends], np.int64)
                best = max(best, indices, key=lambda i: ((i >= 0).sum(), (i == AMBIGUOUS).sum()))
                if 2 * (best >= 0).sum() > len(paths):
                    return best
        return best

    def explain(self, paths: Sequence[str], indices: np.ndarray, named_by: Path | str) -> str:
        """A sentence about the paths that find gave no index; `named_by` is the file with them."""
        missing = list(dict.fromkeys(p for p, i in zip(paths, indices, strict=True) if i < 0))
        ambiguous = [p for p, i in zip(paths, indices, strict=True) if i == AMBIGUOUS]
        if ambiguous:
            return (
                f"{named_by} names {ambiguous[0]}, but several images in {self.reader.path} have "
                "that name; write more of the path."
            )
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        skipped = FaceFolder(self.reader, list(self.skipped), [], np.empty(0))
        reasons = [self.skipped[skipped.names[i]] for i in skipped.find(missing) if i >= 0]
        if len(reasons) < len(missing):
            return (
                f"{named_by} names {len(missing):,} of {len({*paths}):,} images that "
                f"{self.reader.path} does not have ({examples}); prepare the archive that it was "
                "made for (pre_process.py), or correct the paths."
            )
        if set(reasons) == {"no_face"}:
            return (
                f"{named_by} names {len(missing):,} images in which no face was found "
                f"({examples}), so that {self.reader.path} does not have them; --missed crop keeps "
                "them, cropped centrally (pre_process.py, with a new --output)."
            )
        counts = ", ".join(f"{reason} {n:,}" for reason, n in Counter(reasons).most_common())
        return (
            f"{named_by} names {len(missing):,} images that pre_process.py skipped ({counts}: "
            f"{examples}); replace them in the archive and prepare it again, or leave their pairs "
            "out."
        )


def open_face_folder(folder: Path | str) -> FaceFolder:
    """Open a prepared folder (train.rec and index.tsv), or a folder of aligned images.

    Raises UserError where the folder is neither.
    """
    folder = Path(folder)
    if not (folder / "train.rec").is_file() and folder.is_dir():
        images = ImageFolder(folder)
        identities = [key.rpartition("/")[0] for key in images.keys]
        return FaceFolder(images, images.keys, identities, np.arange(len(images)))
    reader = RecordReader(folder)
    table = read_index(folder, reader)
    rows = np.flatnonzero(table.record >= 0)
    return FaceFolder(
        reader,
        [table.source[row] for row in rows],
        [table.identity[row] for row in rows],
        np.searchsorted(reader.keys, table.record[rows]),
        table,
        rows,
        {table.source[row]: table.status[row] for row in np.flatnonzero(table.record < 0)},
    )
