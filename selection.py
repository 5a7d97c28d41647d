"""Which pictures of a training set are trained on: lists of identities held out, and of labels.

    used = used_pictures(RecordReader(folder), hold_out="data/held_out.txt")    # (n,) bool

held_out.txt has a class of train.rec a line, under a line that says which records it speaks of.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from recordio import RecordReader
from utils import UserError, atomic_write, make_folder


def records_checksum(reader: RecordReader) -> str:
    """What identifies a set's records and labels, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for numbers in (reader.keys, reader.labels):
        digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    return digest.hexdigest()[:16]


def write_held_out(path: Path | str, reader: RecordReader, identities: np.ndarray) -> None:
    """Write a list of classes (k,) of the reader's records."""
    path = Path(path)
    make_folder(path.parent)
    with atomic_write(path, "w") as file:
        file.write(f"# identities held out of records {records_checksum(reader)}\n")
        file.writelines(f"{identity}\n" for identity in identities.tolist())


def read_held_out(path: Path | str, reader: RecordReader) -> np.ndarray:
    """The classes (k,) int64 of a list; UserError where it is none, or another set's."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no {path}; make it with held_out.py --make-pairs 6000.")
    head, *lines = path.read_bytes().decode("utf-8", "replace").splitlines() or [""]
    words = head.split()
    if words[:-1] != ["#", "identities", "held", "out", "of", "records"] or not lines:
        raise UserError(f"{path} is no list of held-out identities, which held_out.py writes.")
    if words[-1] != records_checksum(reader):
        raise UserError(
            f"{path} was made for other records than those of {reader.path}; name the set that it "
            "was made for (--train-set), or make it again (held_out.py --make-pairs 6000)."
        )
    if not all(line.isdecimal() and int(line) < reader.num_classes for line in lines):
        raise UserError(f"{path} is damaged; make it again (held_out.py --make-pairs 6000).")
    return np.unique(np.array(lines, np.int64))


def used_pictures(reader: RecordReader, *, hold_out: str = "") -> np.ndarray | None:
    """Which of the reader's pictures are trained on, (n,) bool; None: all of them."""
    if not hold_out:
        return None
    return ~np.isin(reader.labels, read_held_out(hold_out, reader))
