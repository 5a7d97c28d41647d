"""The sets that verification is tested on: prepared folders with a pairs file, and .bin files.

    from eval_sets import load_set
    test_set = load_set("data/faces_lfw_112x112", "data/pairs.txt")
    test_set.images, test_set.pairs.same

A set in memory holds each face once, however many pairs it stands in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import verification
from data_gen import load_images
from index_tsv import read_index
from recordio import RecordError, RecordReader, decode_jpeg, read_bin
from utils import UserError
from verification import picture_name


@dataclass(frozen=True)
class TestSet:
    """A test set in memory: the aligned faces that its pairs use, each once, and the pairs."""

    path: Path
    name: str  # "lfw", "cfp_fp", ...
    images: Tensor  # (n, 112, 112, 3) uint8 RGB, in the order of pairs.names
    pairs: verification.Pairs
    missed: int  # faces among them that the detector did not find: cropped centrally
    source: str = ""  # the archive or folder that the pictures came from, where known
    # What index.tsv says of each face; None for sets that have none, nan for faces not found.
    faces_status: list[str] | None = None  # "ok", "retried", "central_crop"
    box: np.ndarray | None = None  # (n, 4) float32, in pixels of the original picture
    points: np.ndarray | None = None  # (n, 5, 2) float32, likewise

    __test__ = False  # pytest need not look for tests in here


class SetResult(NamedTuple):
    """A model on a test set: what the report is made of."""

    test_set: TestSet
    scores: np.ndarray  # (pairs,) float64 cosines
    report: dict[str, Any]  # what lfw.json says of the set
    embeddings: np.ndarray  # (n, d) float32


def find_lfw(data_dir: Path | str, train_set: Path | str = "") -> Path | None:
    """The prepared LFW, else an lfw.bin in the training set's folder or in data_dir, else None."""
    data_dir = Path(data_dir)
    train_set = Path(train_set) if train_set else data_dir / "faces_webface_112x112"
    prepared = data_dir / "faces_lfw_112x112"
    found = [prepared] if (prepared / "train.rec").is_file() else []
    found += [p for p in (train_set / "lfw.bin", data_dir / "lfw.bin") if p.is_file()]
    return found[0] if found else None


def set_name(path: Path) -> str:
    """What a set is called in tables: faces_lfw_112x112 is "lfw", cfp_fp.bin is "cfp_fp"."""
    return path.name.removesuffix(".bin").removeprefix("faces_").removesuffix("_112x112")


def load_set(path: Path | str, pairs_path: Path | str, workers: int = 0) -> TestSet:
    """Decode the faces of a prepared folder that pairs.txt names, or all of a .bin set.

    A .bin carries its pairs, and its folds are contiguous tenths. Raises UserError where files are
    missing or damaged, or where pairs.txt names pictures that the folder has not.
    """
    path = Path(path)
    test_set = _load_bin(path) if path.suffix == ".bin" else _load_folder(path, pairs_path, workers)
    if test_set.pairs.same.all() or not test_set.pairs.same.any():
        raise UserError(f"{path}: the pairs are all of one kind; both kinds are needed.")
    if len(np.unique(test_set.pairs.folds)) < 2:
        raise UserError(f"{pairs_path} has one fold only; cross-validation needs two or more.")
    return test_set


def _load_folder(folder: Path, pairs_path: Path | str, workers: int) -> TestSet:
    pairs_path = Path(pairs_path)
    reader = RecordReader(folder)
    table = read_index(folder, reader)
    if not pairs_path.is_file():
        raise UserError(
            f"There is no {pairs_path}; get LFW's pairs.txt (python pre_process.py --download-lfw "
            "fetches it too) or name one with --pairs."
        )
    try:
        pairs = verification.parse_pairs(pairs_path.read_text("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise UserError(f"{pairs_path} is not in the form of LFW's pairs.txt: {error}.") from None
    # Whatever the archive's root is called, a picture is Name/Name_0001 and its suffix.
    rows = {
        picture_name(source): row
        for row, source in enumerate(table.source)
        if table.record[row] >= 0
    }
    missing = [name for name in pairs.names if name not in rows]
    if missing:
        raise UserError(
            f"{pairs_path} names {len(missing)} of {len(pairs.names)} pictures that {folder} does "
            f"not have ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); prepare the LFW "
            "archive that belongs to it with pre_process.py."
        )
    used = np.array([rows[name] for name in pairs.names])
    places = np.searchsorted(reader.keys, table.record[used])
    images, errors = load_images(reader, places, workers=workers)
    if errors:
        raise UserError(f"{next(iter(errors.values()))} Prepare {folder} again.")
    status = [table.status[row] for row in used]
    return TestSet(
        path=folder,
        name=set_name(folder),
        images=images,
        pairs=pairs,
        missed=status.count("central_crop"),
        source=_source_of(folder / "report.json"),
        faces_status=status,
        box=table.box[used].astype(np.float32),
        points=table.points[used].astype(np.float32),
    )


def _source_of(report: Path) -> str:
    """What pre_process.py read the pictures from, empty where no report tells."""
    if not report.is_file():
        return ""
    try:
        return str(json.loads(report.read_text("utf-8"))["source"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report} is damaged; delete it or run pre_process.py again.") from None


def _load_bin(path: Path) -> TestSet:
    jpegs, same = read_bin(path)
    # A face that stands in several pairs is stored once for each: embed it once.
    places: dict[bytes, int] = {}
    where = np.array([places.setdefault(jpeg, len(places)) for jpeg in jpegs])
    images = np.empty((len(places), 112, 112, 3), np.uint8)
    numbers = np.unique(where, return_index=True)[1]  # where each face stands first
    for jpeg, place in places.items():
        try:
            image = decode_jpeg(jpeg)
        except RecordError as error:
            raise UserError(f"Picture {numbers[place]} of {path}: {error}") from None
        if image.shape != images.shape[1:]:
            height, width = image.shape[:2]
            raise UserError(f"{path} holds a picture of {width}x{height}; faces must be 112x112.")
        images[place] = image
    names = [f"{path.stem}/{number}" for number in numbers]
    folds = verification.contiguous_folds(len(same))
    pairs = verification.Pairs(names, where[0::2], where[1::2], np.asarray(same, bool), folds)
    return TestSet(path, set_name(path), torch.from_numpy(images), pairs, missed=0)
