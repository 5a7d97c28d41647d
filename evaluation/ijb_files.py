"""The metadata of IJB-B and IJB-C, in the layout of InsightFace's download.

    from evaluation.ijb_files import read_ijb
    ijb = read_ijb("data/IJBC")

A folder has loose_crop/ with the images and meta/ with, for x of ijbb or ijbc,

    x_face_tid_mid.txt            "1.jpg template media"
    x_name_5pts_score.txt         "1.jpg x1 y1 ... x5 y5 score"
    x_template_pair_label.txt     "template template 0/1"
    x_1N_gallery_G1.csv, _G2.csv  "template,subject,..." (IJB-B: _S1, _S2)
    x_1N_probe_mixed.csv          "template,subject,..."

The .csv files are needed for identification only.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError

READ_BYTES = 1 << 24  # of a text file at a time


class Ijb(NamedTuple):
    """The n images of a benchmark, and where its other files are."""

    name: str  # "ijbb" or "ijbc"
    images: Path  # the folder of images
    meta: Path
    files: list[str]  # (n,) names of images
    points: np.ndarray  # (n, 5, 2) float32, in pixels of the image
    detector_scores: np.ndarray  # (n,) float32
    template_of: np.ndarray  # (n,) int64
    media_of: np.ndarray  # (n,) int64


def read_ijb(folder: Path | str) -> Ijb:
    """Read the metadata of the images.

    Raises UserError where a file is missing or corrupt, or where two files do not match.
    """
    folder = Path(folder)
    meta = folder / "meta"
    paths = sorted(meta.glob("ijb[bc]_face_tid_mid.txt"))
    if not paths:
        raise UserError(
            f"There is no {meta}/ijbc_face_tid_mid.txt (or ijbb_...); --ijb names the folder that "
            "holds meta/ and loose_crop/."
        )
    path = paths[0]
    name = path.name[:4]
    files, ids = _read_named_numbers(path, 2)
    # The file is untrusted: no image may be read outside the folder.
    outside = [file for file in files if file.startswith("/") or ".." in file.split("/")]
    if outside:
        raise UserError(f"{path} names {outside[0][:80]!r}, which is not in loose_crop/.")
    listed, values = _read_named_numbers(meta / f"{name}_name_5pts_score.txt", 11)
    if files != listed:
        shorter = min(len(files), len(listed))
        line = next((i for i in range(shorter) if files[i] != listed[i]), shorter) + 1
        raise UserError(
            f"{path.name} and {name}_name_5pts_score.txt in {meta} do not list the same images: "
            f"they differ from line {line} on. Download both again, from one source."
        )
    return Ijb(
        name,
        folder / "loose_crop",
        meta,
        files,
        points=values[:, :10].reshape(-1, 5, 2).astype(np.float32),
        detector_scores=values[:, 10].astype(np.float32),
        template_of=ids[:, 0].astype(np.int64),
        media_of=ids[:, 1].astype(np.int64),
    )


def _read_named_numbers(path: Path, count: int) -> tuple[list[str], np.ndarray]:
    """Lines "name n1 ... ncount": the names and the numbers (lines, count) float64."""
    try:
        lines = path.read_text("utf-8").split("\n")
        cells = [line.rstrip().partition(" ")[::2] for line in lines if line.strip()]
        names, rest = [list(column) for column in zip(*cells, strict=True)]
        numbers = _parse_numbers("\n".join(rest), np.float64).reshape(-1, count)
    except FileNotFoundError:
        raise UserError(f"There is no {path}; it belongs to the metadata of IJB.") from None
    except ValueError:
        names, numbers = [], np.empty(0)
    if not names or len(names) != len(numbers) or not np.isfinite(numbers).all():
        raise UserError(f"{path} is not lines of a name and {count} numbers; download it again.")
    return names, numbers


def _parse_numbers(text: str | bytes, dtype: type) -> np.ndarray:
    """All numbers in a text; ValueError where anything else is between them.

    np.fromstring, since float() of each word takes minutes on the file of pairs.
    """
    with warnings.catch_warnings():
        # NumPy stops at other text with no more than this warning.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text, dtype=dtype, sep=" ")
        except DeprecationWarning as error:
            raise ValueError(str(error)) from None


def read_template_pairs(ijb: Ijb, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of the 1:1 protocol: indices into ids (pairs,) int32, twice; same (pairs,) bool.

    ids (t,) are template ids, ascending. The file has tens of millions of lines and is read in
    blocks. Raises UserError where it is missing, corrupt, or names templates without an image.
    """
    path = ijb.meta / f"{ijb.name}_template_pair_label.txt"
    if not path.is_file():
        raise UserError(f"There is no {path}; it belongs to the metadata of IJB.")
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_lines, rest = 0, b""
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            # A block ends anywhere: the incomplete line at its end waits for the next one.
            lines, newline, rest = (rest + block).rpartition(b"\n")
            blocks.append(_parse_template_pairs(path, lines + newline, ids, num_lines))
            num_lines += len(blocks[-1][2])
    if rest.strip():  # the last line may have no newline
        blocks.append(_parse_template_pairs(path, rest + b"\n", ids, num_lines))
    if not sum(len(same) for _, _, same in blocks):
        raise UserError(f"{path} is empty; download it again.")
    first, second, same = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return first, second, same


def _parse_template_pairs(
    path: Path, text: bytes, ids: np.ndarray, line: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs in complete lines of the file, of which `line` lines came before."""
    try:
        table = _parse_numbers(text, np.int64)
    except ValueError:
        table = np.full(1, -1)  # fails the next check
    if len(table) != 3 * text.count(b"\n") or not np.isin(table[2::3], (0, 1)).all():
        raise UserError(
            f"{path} is not lines 'template template 0/1' somewhere after line {line}; download "
            "it again."
        )
    columns = []
    for column in (table[0::3], table[1::3]):
        index = np.searchsorted(ids, column).clip(max=len(ids) - 1)
        unknown = np.flatnonzero(ids[index] != column)
        if len(unknown):
            raise UserError(
                f"Line {line + int(unknown[0]) + 1} of {path} names template "
                f"{column[unknown[0]]}, which has no image in {path.name[:4]}_face_tid_mid.txt."
            )
        columns.append(index.astype(np.int32))
    return columns[0], columns[1], table[2::3].astype(bool)


def read_template_subjects(path: Path, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A list of the 1:N protocol: indices into ids (k,) and subjects (k,), each template once.

    Its lines begin "template,subject", after a header. A template has a line for each of its
    images. Raises UserError as read_template_pairs does.
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
    index = np.searchsorted(ids, table[:, 0]).clip(max=len(ids) - 1)
    unknown = table[ids[index] != table[:, 0], 0]
    if len(unknown):
        raise UserError(
            f"{path} names {len(unknown)} templates without an image, e.g. {unknown[0]}."
        )
    return index, table[:, 1]
