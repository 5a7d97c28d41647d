"""Test sets for verification: prepared folders with a pairs file, and .bin or .xz files.

    from evaluation.pair_sets import load_set
    test_set = load_set("data/faces_lfw_112x112", "data/pairs.txt")  # or "data/cfp_fp.bin"
    test_set.images, test_set.pairs.same

In memory a set holds each face once, however many pairs it is in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from evaluation import verification
from evaluation.face_folders import open_face_folder
from evaluation.metrics import Metrics
from evaluation.pair_lists import read_pairs
from fileio.bin_sets import BIN_SUFFIXES, read_bin
from fileio.image_loader import load_images
from fileio.images import ImageError, decode_image
from utils import FACE_SIZE, UserError


@dataclass(frozen=True)
class PairSet:
    """A test set in memory: the aligned faces of its pairs, each once, and the pairs."""

    path: Path
    name: str  # "lfw", "cfp_fp", ...
    images: Tensor  # (n, 112, 112, 3) uint8 RGB, in the order of pairs.names
    pairs: verification.Pairs
    # Faces that the detector did not find, cropped centrally; None where that is not known.
    missed: int | None = None
    # Of each face in a folder: where its reader has it, and what index.tsv says of it: None for
    # sets without one, nan for faces not found.
    positions: np.ndarray | None = None  # (n,) int64
    source: str = ""  # the archive or folder that the images came from, if known
    faces_status: list[str] | None = None  # "ok", "retried", "central_crop"
    box: np.ndarray | None = None  # (n, 4) float32, in pixels of the original image
    points: np.ndarray | None = None  # (n, 5, 2) float32, likewise
    identity: list[str] | None = None

    def __str__(self) -> str:
        """The set in one line, to be printed."""
        text = f"{self.path}, {len(self.pairs.same):,} pairs of {len(self.images):,} faces"
        if self.missed is not None:
            text += f", {self.missed} of them missed by the detector and cropped centrally"
        return text


class SetResult(NamedTuple):
    """The result of a model on a test set; the report is made of it."""

    test_set: PairSet
    scores: np.ndarray  # (pairs,) float64 cosines
    metrics: Metrics
    embeddings: np.ndarray  # (n, d) float32


# ------------------------------------------------------------------------------ finding


def find_set(name: str, data_dir: Path | str, train_set: Path | str = "") -> Path | None:
    """The path of the set of a name such as "cfp_fp", or of a path; None if there is none.

    The order is: data_dir/faces_<name>_112x112, <name>.bin or .xz in the training set's folder, the
    same in data_dir, and name as a path. But "lfw" is no path: it is the default, and a folder of
    that name in the working directory may be anything ("./lfw" is a path).
    """
    data_dir = Path(data_dir)
    train_set = Path(train_set) if train_set else data_dir / "faces_webface_112x112"
    prepared = data_dir / f"faces_{name}_112x112"
    if (prepared / "train.rec").is_file():
        return prepared
    for folder in (train_set, data_dir):
        for suffix in BIN_SUFFIXES:
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    return Path(name) if name != "lfw" and Path(name).exists() else None


def find_sets(names: Sequence[str], data_dir: Path | str, train_set: Path | str = "") -> list[Path]:
    """find_set of each name; raises UserError where a set is missing."""
    paths = []
    for name in names:
        path = find_set(name, data_dir, train_set)
        if path is None:
            missing = f"{Path(data_dir, f'faces_{name}_112x112')} and no {name}.bin"
            if name == "lfw":
                raise UserError(
                    f"There is no prepared LFW at {missing} beside the training set; download LFW "
                    "and prepare it (python pre_process.py --download-lfw), name another set "
                    "(--lfw ./lfw), or try everything on synthetic faces (make demo)."
                )
            raise UserError(
                f"There is no prepared set at {missing} in {data_dir} or beside the training set, "
                "nor a file or folder of that name; correct --sets."
            )
        paths.append(path)
    return paths


def find_pairs(path: Path, data_dir: Path | str, given: str = "") -> Path:
    """The pairs file of a folder: the one given, its own pairs.txt, or one in data_dir.

    In data_dir that is <name>_pairs.txt if it exists, else pairs.txt, which may not exist.
    """
    if given:
        return Path(given)
    for pairs in (path / "pairs.txt", Path(data_dir, f"{set_name(path)}_pairs.txt")):
        if pairs.is_file():
            return pairs
    return Path(data_dir, "pairs.txt")


def set_name(path: Path) -> str:
    """A set's name in tables: faces_lfw_112x112 is "lfw", cfp_fp.bin is "cfp_fp"."""
    name = path.stem if path.suffix in BIN_SUFFIXES else path.name
    return name.removeprefix("faces_").removesuffix("_112x112")


# ------------------------------------------------------------------------------ reading


def load_set(path: Path | str, pairs_path: Path | str, workers: int = 0) -> PairSet:
    """Decode the faces of a folder that its pairs file names, or all faces of a .bin or .xz set.

    A .bin contains its pairs; its folds are contiguous tenths. Prints a warning where folds that
    the format fixes hold one kind of pair only. Raises UserError where files are missing or
    corrupt, or where the pairs name images that the folder does not have.
    """
    path = Path(path)
    if path.suffix in BIN_SUFFIXES:
        test_set, pairs_path = _load_bin(path), path
    else:
        test_set = _load_folder(path, pairs_path, workers)
    same, folds = test_set.pairs.same, test_set.pairs.folds
    if same.all() or not same.any():
        raise UserError(f"{pairs_path}: the pairs are all of one kind; both kinds are needed.")
    if len(np.unique(folds)) < 2:
        raise UserError(f"{pairs_path} has one fold only; cross-validation needs two or more.")
    sizes = np.bincount(folds)
    genuine = np.bincount(folds, weights=same)
    if single := np.count_nonzero((sizes > 0) & ((genuine == 0) | (genuine == sizes))):
        print(
            f"Warning: {single} of the {np.count_nonzero(sizes)} folds of {pairs_path} hold pairs "
            "of one kind only, so that thresholds are fitted to other proportions than they are "
            "tested on. The format fixes the folds; a list of 'path1 path2 0/1' leaves them open."
        )
    return test_set


def _load_folder(path: Path, pairs_path: Path | str, workers: int) -> PairSet:
    folder = open_face_folder(path)
    pairs, used = read_pairs(pairs_path, folder)
    positions = folder.positions[used]
    images, errors = load_images(folder.reader, positions, workers=workers)
    if errors:
        raise UserError(f"{next(iter(errors.values()))} Prepare {path} again.")
    test_set = PairSet(path, set_name(path), images, pairs, positions=positions)
    if folder.table is None or folder.rows is None:  # a folder of images
        return test_set
    table, rows = folder.table, folder.rows[used]
    status = [table.status[row] for row in rows]
    return dataclasses.replace(
        test_set,
        missed=status.count("central_crop"),
        source=_read_source(path / "report.json"),
        faces_status=status,
        box=table.box[rows].astype(np.float32),
        points=table.points[rows].astype(np.float32),
        identity=[table.identity[row] for row in rows],
    )


def _read_source(path: Path) -> str:
    """The source of a prepared folder, by pre_process.py's summary; empty without a summary."""
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_text("utf-8"))["source"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is corrupt; delete it or run pre_process.py again.") from None


def _load_bin(path: Path) -> PairSet:
    encoded, same = read_bin(path)
    # A face that is in several pairs is stored once for each. Equal bytes are one face, which is
    # embedded once: face_of[i] is the face of image i of the file.
    faces: dict[bytes, int] = {}
    face_of = np.array([faces.setdefault(data, len(faces)) for data in encoded])
    first_image = np.unique(face_of, return_index=True)[1]  # in the file, of each face
    # It grows with what has been decoded, not with what an untrusted file claims to hold.
    pixels = bytearray()
    for data, face in faces.items():
        try:
            image = decode_image(data)
        except ImageError as error:
            raise UserError(f"Image {first_image[face]} of {path}: {error}") from None
        height, width = image.shape[:2]
        if height != width:
            raise UserError(
                f"{path} holds an image of {width}x{height}; faces must be {FACE_SIZE}x{FACE_SIZE}."
            )
        if width != FACE_SIZE:  # as InsightFace's reader does
            image = cv2.resize(image, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA)
        pixels += image.tobytes()
    images = np.frombuffer(pixels, np.uint8).reshape(-1, FACE_SIZE, FACE_SIZE, 3)
    names = [f"{path.stem}/{number}" for number in first_image]
    folds = verification.contiguous_folds(len(same))
    # Images 2 i and 2 i + 1 are pair i.
    pairs = verification.Pairs(names, face_of[0::2], face_of[1::2], np.asarray(same, bool), folds)
    return PairSet(path, set_name(path), torch.from_numpy(images), pairs)


# ------------------------------------------------------------------------------ identities


def identity_groups(test_set: PairSet) -> tuple[np.ndarray, str]:
    """The identity of each face, (n,) int64 from 0, and how it is known.

    For sets without names identities are the connected components of the genuine pairs: if a, b and
    b, c are genuine, then a, b, c are one identity. Without a link two groups may be the same
    identity, but one group holds two identities only if a label is wrong.
    """
    if test_set.identity is not None:
        return np.unique(test_set.identity, return_inverse=True)[1], "by name"
    pairs, count = test_set.pairs, len(test_set.images)
    ends = (pairs.first[pairs.same], pairs.second[pairs.same])
    links = coo_array((np.ones(len(ends[0])), ends), shape=(count, count))
    groups = connected_components(links, directed=False)[1]
    return groups.astype(np.int64), "by chains of genuine pairs, since the set has no names"
