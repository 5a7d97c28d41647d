"""The sets that verification is tested on: prepared folders with a pairs file, and .bin files.

    from evaluation.pair_sets import load_set
    test_set = load_set("data/faces_lfw_112x112", "data/pairs.txt")    # or "data/cfp_fp.bin"
    test_set.images, test_set.pairs.same

A set in memory holds each face once, however many pairs it stands in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from data_gen import load_images
from evaluation import verification
from evaluation.face_folders import open_faces
from evaluation.metrics import Metrics
from fileio.bin_sets import read_bin
from fileio.images import ImageError, decode_image
from utils import UserError


@dataclass(frozen=True)
class PairSet:
    """A test set in memory: the aligned faces that its pairs use, each once, and the pairs."""

    path: Path
    name: str  # "lfw", "cfp_fp", ...
    images: Tensor  # (n, 112, 112, 3) uint8 RGB, in the order of pairs.names
    pairs: verification.Pairs
    missed: int  # faces among them that the detector did not find: cropped centrally
    source: str = ""  # the archive or folder that the images came from, where known
    # What index.tsv says of each face; None for sets that have none, nan for faces not found.
    faces_status: list[str] | None = None  # "ok", "retried", "central_crop"
    box: np.ndarray | None = None  # (n, 4) float32, in pixels of the original image
    points: np.ndarray | None = None  # (n, 5, 2) float32, likewise
    identity: list[str] | None = None

    def __str__(self) -> str:
        """The set in a line, to be printed."""
        return (
            f"{self.path}, {len(self.pairs.same):,} pairs of {len(self.images):,} faces, "
            f"{self.missed} of them missed by the detector and cropped centrally"
        )


class SetResult(NamedTuple):
    """A model on a test set: what the report is made of."""

    test_set: PairSet
    scores: np.ndarray  # (pairs,) float64 cosines
    metrics: Metrics
    embeddings: np.ndarray  # (n, d) float32


# ------------------------------------------------------------------------------ finding


def find_set(name: str, data_dir: Path | str, train_set: Path | str = "") -> Path | None:
    """The set of a name such as "cfp_fp", or at a path; None where there is none.

    Looked for as data_dir/faces_<name>_112x112, <name>.bin in the training set's folder or in
    data_dir, and then as a path.
    """
    data_dir = Path(data_dir)
    train_set = Path(train_set) if train_set else data_dir / "faces_webface_112x112"
    prepared = data_dir / f"faces_{name}_112x112"
    found = [prepared] if (prepared / "train.rec").is_file() else []
    found += [p for p in (train_set / f"{name}.bin", data_dir / f"{name}.bin") if p.is_file()]
    found += [p for p in [Path(name)] if p.exists()]
    return found[0] if found else None


def find_sets(names: Sequence[str], data_dir: Path | str, train_set: Path | str = "") -> list[Path]:
    """find_set of each name; raises UserError where a set is missing."""
    paths = []
    for name in names:
        path = find_set(name, data_dir, train_set)
        if path is None:
            folder = f"{Path(data_dir, f'faces_{name}_112x112')} and no {name}.bin"
            if name == "lfw":
                raise UserError(
                    f"There is no prepared LFW at {folder} beside the training set; get LFW and "
                    "prepare it (python pre_process.py --download-lfw), or try everything on "
                    "synthetic faces (make demo)."
                )
            raise UserError(
                f"There is no prepared set at {folder} in {data_dir} or beside the training set, "
                "nor a file or folder of that name; correct --sets."
            )
        paths.append(path)
    return paths


def find_pairs(path: Path, data_dir: Path | str, given: str = "") -> Path:
    """The pairs file of a folder: the one given, its own pairs.txt, else one in data_dir.

    That is <name>_pairs.txt where it exists, and pairs.txt otherwise, there or not.
    """
    if given:
        return Path(given)
    choices = [path / "pairs.txt", Path(data_dir, f"{set_name(path)}_pairs.txt")]
    return next((p for p in choices if p.is_file()), Path(data_dir, "pairs.txt"))


def set_name(path: Path) -> str:
    """What a set is called in tables: faces_lfw_112x112 is "lfw", cfp_fp.bin is "cfp_fp"."""
    return path.name.removesuffix(".bin").removeprefix("faces_").removesuffix("_112x112")


# ------------------------------------------------------------------------------ reading


def load_set(path: Path | str, pairs_path: Path | str, workers: int = 0) -> PairSet:
    """Decode the faces of a folder that its pairs file names, or all of a .bin set.

    A .bin carries its pairs, and its folds are contiguous tenths. Raises UserError where files are
    missing or damaged, or where the pairs name images that the folder has not.
    """
    path = Path(path)
    test_set = _load_bin(path) if path.suffix == ".bin" else _load_folder(path, pairs_path, workers)
    where = path if path.suffix == ".bin" else pairs_path
    if test_set.pairs.same.all() or not test_set.pairs.same.any():
        raise UserError(f"{where}: the pairs are all of one kind; both kinds are needed.")
    if len(np.unique(test_set.pairs.folds)) < 2:
        raise UserError(f"{where} has one fold only; cross-validation needs two or more.")
    return test_set


def read_pairs(path: Path | str) -> verification.Pairs:
    """Read a pairs file, LFW's format or lines "path1 path2 0/1"; UserError where it is neither."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no {path}; get LFW's pairs.txt (python pre_process.py --download-lfw "
            "fetches it too) or name one with --pairs."
        )
    form = "in the form of LFW's pairs.txt"
    try:
        text = path.read_text("utf-8")
        if len(text.lstrip().partition("\n")[0].split()) == 3:
            form = "a list of 'path1 path2 0/1'"
            return verification.parse_pair_list(text)
        return verification.parse_pairs(text)
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise UserError(f"{path} is not {form}: {error}.") from None


def _load_folder(folder: Path, pairs_path: Path | str, workers: int) -> PairSet:
    faces = open_faces(folder)
    pairs = read_pairs(pairs_path)
    used = faces.find(pairs.names, pairs_path)
    images, errors = load_images(faces.reader, faces.places[used], workers=workers)
    if errors:
        raise UserError(f"{next(iter(errors.values()))} Prepare {folder} again.")
    test_set = PairSet(folder, set_name(folder), images, pairs, missed=0)
    if faces.table is None:
        return test_set
    rows = faces.rows[used]
    status = [faces.table.status[row] for row in rows]
    return dataclasses.replace(
        test_set,
        missed=status.count("central_crop"),
        source=_source_of(folder / "report.json"),
        faces_status=status,
        box=faces.table.box[rows].astype(np.float32),
        points=faces.table.points[rows].astype(np.float32),
        identity=[faces.table.identity[row] for row in rows],
    )


def _source_of(report: Path) -> str:
    """What pre_process.py read the images from, empty where no report tells."""
    if not report.is_file():
        return ""
    try:
        return str(json.loads(report.read_text("utf-8"))["source"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report} is damaged; delete it or run pre_process.py again.") from None


def _load_bin(path: Path) -> PairSet:
    jpegs, same = read_bin(path)
    # A face that stands in several pairs is stored once for each: embed it once.
    places: dict[bytes, int] = {}
    where = np.array([places.setdefault(jpeg, len(places)) for jpeg in jpegs])
    pixels = bytearray()  # it grows with what is decoded, not with what the file claims to hold
    numbers = np.unique(where, return_index=True)[1]  # where each face stands first
    for jpeg, place in places.items():
        try:
            image = decode_image(jpeg)
        except ImageError as error:
            raise UserError(f"Image {numbers[place]} of {path}: {error}") from None
        if image.shape != (112, 112, 3):
            height, width = image.shape[:2]
            raise UserError(f"{path} holds an image of {width}x{height}; faces must be 112x112.")
        pixels += image.tobytes()
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 112, 112, 3)
    names = [f"{path.stem}/{number}" for number in numbers]
    folds = verification.contiguous_folds(len(same))
    pairs = verification.Pairs(names, where[0::2], where[1::2], np.asarray(same, bool), folds)
    return PairSet(path, set_name(path), torch.from_numpy(images), pairs, missed=0)


# ------------------------------------------------------------------------------ who is who


def identity_groups(test_set: PairSet) -> tuple[np.ndarray, str]:
    """The person on each face, (n,) int64 from 0, and how that is known.

    Sets without names have it from their matched pairs: faces that a chain of them connects are one
    person. Two groups may then be one person; one group is two only where a label is wrong.
    """
    if test_set.identity is not None:
        return np.unique(test_set.identity, return_inverse=True)[1], "by name"
    pairs, count = test_set.pairs, len(test_set.images)
    ends = (pairs.first[pairs.same], pairs.second[pairs.same])
    links = coo_array((np.ones(len(ends[0])), ends), shape=(count, count))
    groups = connected_components(links, directed=False)[1]
    return groups.astype(np.int64), "by chains of matched pairs, since the set names nobody"
