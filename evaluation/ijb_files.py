"""The metadata of IJB-B and IJB-C in the layout in which it is passed around.

    from evaluation.ijb_files import read_ijb
    ijb = read_ijb("data/IJBC")

A folder has loose_crop/ with the images and meta/ with, for x of ijbb or ijbc,
x_face_tid_mid.txt ("1.jpg template media"), x_name_5pts_score.txt ("1.jpg x1 y1 ... x5 y5 score"),
x_template_pair_label.txt ("template template 0/1") and, for identification, the lists
x_1N_gallery_G1.csv, _G2.csv (IJB-B: _S1, _S2) and x_1N_probe_mixed.csv ("template,subject,...").
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError

BLOCK = 1 << 24  # bytes of a text file that are read at a time


class Ijb(NamedTuple):
    """The images of a benchmark, n of them, and where its other files are."""

    name: str  # "ijbb" or "ijbc"
    images: Path  # the folder of images
    meta: Path
    files: list[str]  # (n,) names of images
    points: np.ndarray  # (n, 5, 2) float32, in pixels of the image
    detector_scores: np.ndarray  # (n,) float32
    template_of: np.ndarray  # (n,) int64
    media_of: np.ndarray  # (n,) int64


def read_ijb(folder: Path | str) -> Ijb:
    """What is known of each image; UserError where a file is missing, damaged, or at odds."""
    folder = Path(folder)
    meta = folder / "meta"
    found = sorted(meta.glob("ijb[bc]_face_tid_mid.txt"))
    if not found:
        raise UserError(
            f"There is no {meta}/ijbc_face_tid_mid.txt (or ijbb_...); --ijb names the folder that "
            "holds meta/ and loose_crop/."
        )
    name = found[0].name[:4]
    files, numbers = _named_numbers(found[0], 2)
    outside = [file for file in files if file.startswith("/") or ".." in file.split("/")]
    if outside:
        raise UserError(f"{found[0]} names {outside[0][:80]!r}, which is not in loose_crop/.")
    listed, values = _named_numbers(meta / f"{name}_name_5pts_score.txt", 11)
    if files != listed:
        shorter = min(len(files), len(listed))
        at = next((i for i in range(shorter) if files[i] != listed[i]), shorter)
        raise UserError(
            f"{found[0].name} and {name}_name_5pts_score.txt in {meta} do not list the same "
            f"images: they part at line {at + 1}. Get both again, from one place."
        )
    return Ijb(
        name,
        folder / "loose_crop",
        meta,
        files,
        values[:, :10].reshape(-1, 5, 2).astype(np.float32),
        values[:, 10].astype(np.float32),
        *numbers.astype(np.int64).T,
    )


def _named_numbers(path: Path, count: int) -> tuple[list[str], np.ndarray]:
    """Lines "name n1 ... ncount": the names and the numbers (lines, count) float64."""
    try:
        lines = path.read_text("utf-8").split("\n")
        cells = [line.rstrip().partition(" ")[::2] for line in lines if line.strip()]
        names, rest = [list(column) for column in zip(*cells, strict=True)]
        numbers = _numbers("\n".join(rest), np.float64).reshape(-1, count)
    except FileNotFoundError:
        raise UserError(f"There is no {path}; it belongs to the metadata of IJB.") from None
    except ValueError:
        names, numbers = [], np.empty(0)
    if not names or len(names) != len(numbers) or not np.isfinite(numbers).all():
        raise UserError(f"{path} is not lines of a name and {count} numbers; get it again.")
    return names, numbers


def _numbers(text: str | bytes, kind: type) -> np.ndarray:
    """All numbers in a text; ValueError where something else stands between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # which NumPy gives for other text
        try:
            return np.fromstring(text, dtype=kind, sep=" ")
        except DeprecationWarning as error:
            raise ValueError(str(error)) from None


def read_pairs(ijb: Ijb, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of the 1:1 protocol: places in ids (pairs,) int32, twice, and same (pairs,) bool.

    ids (t,) are ascending template ids. The file has tens of millions of lines and is read in
    blocks. Raises UserError where it is missing, damaged, or names templates that are not there.
    """
    path = ijb.meta / f"{ijb.name}_template_pair_label.txt"
    if not path.is_file():
        raise UserError(f"There is no {path}; it belongs to the metadata of IJB.")
    parts: list[tuple[np.ndarray, ...]] = []
    done, rest = 0, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            parts.append(_pairs_of(path, whole + newline, ids, done))
            done += len(parts[-1][2])
    if rest.strip():
        parts.append(_pairs_of(path, rest + b"\n", ids, done))
    if not sum(len(part[2]) for part in parts):
        raise UserError(f"{path} is empty; get it again.")
    first, second, same = (np.concatenate(column) for column in zip(*parts, strict=True))
    return first, second, same


def _pairs_of(path: Path, text: bytes, ids: np.ndarray, line: int) -> tuple[np.ndarray, ...]:
    """The pairs in whole lines of the file; line is how many came before."""
    try:
        table = _numbers(text, np.int64)
    except ValueError:
        table = np.full(1, -1)
    if len(table) != 3 * text.count(b"\n") or not np.isin(table[2::3], (0, 1)).all():
        raise UserError(
            f"{path} is not lines 'template template 0/1' somewhere after line {line}; get it "
            "again."
        )
    columns = []
    for column in (table[0::3], table[1::3]):
        place = np.searchsorted(ids, column).clip(max=len(ids) - 1)
        unknown = np.flatnonzero(ids[place] != column)
        if len(unknown):
            raise UserError(
                f"Line {line + int(unknown[0]) + 1} of {path} names template "
                f"{column[unknown[0]]}, which has no image in {path.name[:4]}_face_tid_mid.txt."
            )
        columns.append(place.astype(np.int32))
    return *columns, table[2::3].astype(bool)


def read_subjects(path: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A list of the 1:N protocol: places in ids (k,) and subjects (k,), each template once.

    Its lines begin "template,subject"; the first is a header. UserError as in read_pairs.
    """
    try:
        with path.open(encoding="utf-8") as file:
            next(file, None)
            rows = {tuple(line.split(",", 2)[:2]) for line in file if line.strip()}
        table = np.array(sorted((int(template), int(subject)) for template, subject in rows))
    except FileNotFoundError:
        raise UserError(f"There is no {path}; it belongs to the 1:N protocol of IJB.") from None
    except ValueError:
        table = np.empty(0)
    if not len(table) or len(np.unique(table[:, 0])) < len(table):
        raise UserError(f"{path} is not lines 'template,subject,...' with one subject each.")
    place = np.searchsorted(ids, table[:, 0]).clip(max=len(ids) - 1)
    unknown = table[ids[place] != table[:, 0], 0]
    if len(unknown):
        raise UserError(
            f"{path} names {len(unknown)} templates without an image, {unknown[0]} for one."
        )
    return place, table[:, 1]
