"""Lists of what a training set leaves out: images with wrong labels, held-out identities.

    used = training_mask(reader, keep="data/keep.tsv", hold_out="data/held_out.txt")    # (n,) bool

held_out.txt has one label of train.rec per line, under a line with a checksum of the records that
it is for. keep.tsv has one image per line, with the columns record, label, angle, other,
other_angle and kept, of which the first two and the last are read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder
from utils import UserError


def records_checksum(reader: RecordReader) -> str:
    """A checksum of a set's record ids and labels, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for numbers in (reader.keys, reader.labels):
        digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    return digest.hexdigest()[:16]


def write_held_out(path: Path | str, reader: RecordReader, identities: np.ndarray) -> None:
    """Write a list of labels (k,) of the reader's records."""
    path = Path(path)
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        file.write(f"# identities held out of records {records_checksum(reader)}\n")
        file.writelines(f"{identity}\n" for identity in identities.tolist())


def read_held_out(path: Path | str, reader: RecordReader) -> np.ndarray:
    """The labels (k,) int64 of a list; UserError if it is no list, or for another set."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There is no {path}; make it with python -m tools.held_out --make-pairs 6000."
        )
    head, *lines = path.read_bytes().decode("utf-8", "replace").splitlines() or [""]
    words = head.split()
    if words[:-1] != ["#", "identities", "held", "out", "of", "records"] or not lines:
        raise UserError(f"{path} is no list of held-out identities, as tools.held_out writes it.")
    if words[-1] != records_checksum(reader):
        raise UserError(
            f"{path} was made for other records than those of {reader.path}; name the set that it "
            "was made for (--train-set), or make it again (tools.held_out --make-pairs 6000)."
        )
    if not all(line.isdecimal() and int(line) < reader.num_classes for line in lines):
        raise UserError(
            f"{path} is corrupt; make it again (python -m tools.held_out --make-pairs 6000)."
        )
    return np.unique(np.array(lines, np.int64))


class KeepList(NamedTuple):
    """The columns of keep.tsv, (n,) each."""

    record: np.ndarray  # int64 ids
    label: np.ndarray  # int64, as in train.rec
    angle: np.ndarray  # degrees to the centre of the class
    other: np.ndarray  # int64, the nearest other class
    other_angle: np.ndarray  # degrees to that
    kept: np.ndarray  # bool


def write_keep_list(path: Path | str, rows: KeepList) -> None:
    """Write keep.tsv."""
    path = Path(path)
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        file.write("\t".join(KeepList._fields) + "\n")
        for record, label, angle, other, far, kept in zip(*rows, strict=True):
            file.write(f"{record}\t{label}\t{angle:.2f}\t{other}\t{far:.2f}\t{int(kept)}\n")


def read_keep_list(path: Path | str, reader: RecordReader) -> np.ndarray:
    """The mask (n,) bool of the reader's images that a keep.tsv keeps; unlisted ones are kept.

    Raises UserError if it is no such list, or for other records or labels.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no {path}; python -m tools.label_noise makes it.")
    head, *lines = path.read_bytes().decode("utf-8", "replace").splitlines() or [""]
    if head != "\t".join(KeepList._fields):
        raise UserError(f"{path} is no list of kept images, as tools.label_noise writes it.")
    used = np.ones(len(reader), bool)
    index_of = {key: index for index, key in enumerate(reader.keys.tolist())}
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        numbers = [cells[0], cells[1 % len(cells)], cells[-1]]
        if len(cells) != len(KeepList._fields) or not all(cell.isdecimal() for cell in numbers):
            raise UserError(f"Line {number} of {path} cannot be read: {line[:60]!r}.")
        index = index_of.get(int(cells[0]))
        if index is None or reader.labels[index] != int(cells[1]):
            raise UserError(
                f"{path} was made for other records than those of {reader.path}: line {number} "
                f"names record {cells[0]} with label {cells[1]}."
            )
        used[index] = cells[-1] != "0"
    return used


def training_mask(reader: RecordReader, *, keep: str = "", hold_out: str = "") -> np.ndarray | None:
    """The mask (n,) bool of the reader's images that both lists leave; None: all of them."""
    if not keep and not hold_out:
        return None
    used = read_keep_list(keep, reader) if keep else np.ones(len(reader), bool)
    if hold_out:
        used &= ~np.isin(reader.labels, read_held_out(hold_out, reader))
    return used
