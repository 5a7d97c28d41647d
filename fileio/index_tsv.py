r"""index.tsv: what became of every image of the source, one line each, in the source's order.

UTF-8; a header line first; columns separated by tabs:

    record, label      record id and class, empty if the image was skipped
    identity, source   the folder that the image lies in, and its name in the archive
    status             "ok", "retried", "central_crop", or the reason for skipping the image
    score              the detector's probability, empty if no face was found; so the rest:
    x1 y1 x2 y2        the box, in pixels of the image
    left_eye_x left_eye_y ... right_mouth_x right_mouth_y    the five points

A line of an image that has record 1 and label 0, and one of an image without a face (both without
the columns after the score):

    1   0   0000045   CASIA/0000045/001.jpg   ok        0.991235
            0000045   CASIA/0000045/002.jpg   no_face

In names, tabs, line ends and backslashes are written as \t, \n, \r and \\, and bytes that are not
UTF-8 as \x80 to \xff.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import UserError

_POINTS = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_POINT_COLUMNS = tuple(f"{point}_{axis}" for point in _POINTS for axis in "xy")
_FIRST_COLUMNS = ("record", "label", "identity", "source", "status", "score")
INDEX_COLUMNS = (*_FIRST_COLUMNS, "x1", "y1", "x2", "y2", *_POINT_COLUMNS)
INDEX_HEADER = "\t".join(INDEX_COLUMNS) + "\n"
TEXT_COLUMNS = 5  # record to status; score and what follows are floats
FLOAT_COLUMNS = len(INDEX_COLUMNS) - TEXT_COLUMNS
CHECK_ROWS = 1024  # rows that check_index has in memory at a time


class IndexRow(NamedTuple):
    """One image of the source: `box` (4,) and `points` (5, 2) in its pixels.

    `record` and `label` are None if it was skipped; `score`, `box` and `points` are None if no face
    was found.
    """

    record: int | None
    label: int | None
    identity: str
    source: str
    status: str
    score: float | None = None
    box: Sequence[float] | None = None
    points: Sequence[Sequence[float]] | None = None


class IndexTable(NamedTuple):
    """index.tsv by columns, n rows; an empty cell is -1 or nan."""

    record: np.ndarray  # (n,) int64
    label: np.ndarray  # (n,) int64
    identity: list[str]
    source: list[str]
    status: list[str]
    score: np.ndarray  # (n,) float64
    box: np.ndarray  # (n, 4) float64
    points: np.ndarray  # (n, 5, 2) float64


# ------------------------------------------------------------------------------ lines

_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped[1]: plain for plain, escaped in _ESCAPES.items()}


def _escape(name: str) -> str:
    # In Python, a byte of a file name that is not UTF-8 is a lone surrogate, which no UTF-8 file
    # can hold: byte ff is U+DCFF, and written as the four characters \xff.
    return re.sub(
        "[\\\\\t\n\r\udc80-\udcff]",
        lambda match: _ESCAPES.get(match[0]) or f"\\x{ord(match[0]) - 0xDC00:02x}",
        name,
    )


def _unescape(name: str) -> str:
    return re.sub(
        r"\\(x[89a-f][0-9a-f]|.)",
        lambda match: _UNESCAPES.get(match[1]) or chr(0xDC00 + int(match[1][1:], 16)),
        name,
    )


def format_index_row(row: IndexRow) -> str:
    """The line of index.tsv, with its newline; valid UTF-8 whatever the names are."""
    record = "" if row.record is None else str(row.record)
    label = "" if row.label is None else str(row.label)
    names = [_escape(name) for name in (row.identity, row.source, row.status)]
    score = "" if row.score is None else f"{row.score:.6f}"
    box = [""] * 4 if row.box is None else [f"{x:.4f}" for x in row.box]
    points = [""] * 10 if row.points is None else [f"{x:.4f}" for x in np.ravel(row.points)]
    return "\t".join([record, label, *names, score, *box, *points]) + "\n"


def parse_index_row(line: str) -> IndexRow:
    """The row of one line; ValueError if the line is incomplete or a number makes no sense."""
    cells = line.removesuffix("\n").split("\t")
    if len(cells) != len(INDEX_COLUMNS) or not line.endswith("\n"):
        raise ValueError(f"{len(cells)} columns, not {len(INDEX_COLUMNS)}, or no end of line")
    record, label = (int(cell) if cell else None for cell in cells[:2])
    if not 0 <= min(record or 0, label or 0) <= max(record or 0, label or 0) < 1 << 63:
        raise ValueError("a record id or label out of range")
    score = float(cells[5]) if cells[5] else None
    box = [float(cell) for cell in cells[6:10]] if cells[6] else None
    points = None
    if cells[10]:
        points = np.reshape([float(cell) for cell in cells[10:]], (5, 2)).tolist()
    return IndexRow(record, label, *map(_unescape, cells[2:5]), score, box, points)


def _parse_lines(lines: list[str]) -> IndexTable:
    """All lines at once, several times as fast as one by one.

    Raises ValueError or OverflowError where `parse_index_row` raises for one of the lines.
    """
    # The floats of a line stay one string: its last "column" here.
    columns = list(zip(*(line.split("\t", TEXT_COLUMNS) for line in lines), strict=True))
    columns = columns or [()] * (TEXT_COLUMNS + 1)
    if len(columns) <= TEXT_COLUMNS:
        raise ValueError("a line of fewer columns")
    *texts, floats = columns
    if any(cells.count("\t") != FLOAT_COLUMNS - 1 for cells in floats):
        raise ValueError("a line of more or fewer columns")  # NumPy skips empty lines
    if any("-" in cell for column in texts[:2] for cell in column):
        raise ValueError("a negative record id or label")  # -1 stands for an empty cell below
    record, label = (
        np.array([int(cell or -1) for cell in column], np.int64) for column in texts[:2]
    )
    identity, source, status = (
        [_unescape(cell) if "\\" in cell else cell for cell in column] for column in texts[2:]
    )
    # NumPy's parser is much faster than float(), but wants nan for empty cells.
    values = np.empty((0, FLOAT_COLUMNS))
    if floats:
        filled = [_fill_empty_cells(cells) for cells in floats]
        values = np.loadtxt(filled, delimiter="\t", comments=None, ndmin=2)
    values = np.reshape(values, (len(lines), FLOAT_COLUMNS))
    score, box, points = values[:, 0], values[:, 1:5], values[:, 5:].reshape(-1, 5, 2)
    return IndexTable(record, label, identity, source, status, score, box, points)


def _fill_empty_cells(cells: str) -> str:
    """With "nan" in empty cells: most lines have none, and are not taken apart."""
    if "\t\t" not in cells and not cells.startswith("\t") and not cells.endswith("\t"):
        return cells
    return "\t".join(cell or "nan" for cell in cells.split("\t"))


# ------------------------------------------------------------------------------ files


def read_index(folder: str | Path, reader: Any = None) -> IndexTable:
    """Read a data set's index.tsv; with its `reader`, check that both list the same records.

    UserError names the line that cannot be read, or the record that differs.
    """
    path = Path(folder) / "index.tsv"
    if not path.is_file():
        raise UserError(f"There is no {path}; it is written by pre_process.py.")
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    if lines[0] != INDEX_HEADER[:-1] or lines[-1]:
        raise UserError(f"{path} has no header line or is cut short; run pre_process.py again.")
    rows = lines[1:-1]
    try:
        table = _parse_lines(rows)
    except (ValueError, OverflowError):  # OverflowError: a record id of more than 64 bits
        # Parse again one by one, to name the line.
        for number, line in enumerate(rows, 2):
            try:
                parse_index_row(line + "\n")
            except ValueError as error:
                raise UserError(
                    f"Line {number} of {path} cannot be read ({error}); run pre_process.py again."
                ) from None
        raise UserError(f"{path} cannot be read; run pre_process.py again.") from None
    if reader is not None:
        _check_records(path, table, reader)
    return table


def check_index(folder: str | Path, reader: Any) -> None:
    """Check what `read_index` with a reader checks, in memory that does not grow with the rows."""
    checked = 0  # records so far
    with (Path(folder) / "index.tsv").open(encoding="utf-8", newline="\n") as file:
        file.readline()  # the header
        while lines := list(itertools.islice(file, CHECK_ROWS)):
            table = _parse_lines([line.removesuffix("\n") for line in lines])
            has_record = table.record >= 0
            records, labels = table.record[has_record], table.label[has_record]
            end = checked + len(records)
            same_records = np.array_equal(records, reader.keys[checked:end])
            if not same_records or not np.array_equal(labels, reader.labels[checked:end]):
                break
            checked = end
        else:
            if checked == len(reader):
                return
    read_index(folder, reader)  # raises the error that says where they differ


def _check_records(path: Path, table: IndexTable, reader: Any) -> None:
    has_record = table.record >= 0
    records, labels = table.record[has_record], table.label[has_record]
    if len(records) != len(reader) or np.any(records != reader.keys):
        difference = f"it lists {len(records)} records, there are {len(reader)}"
    elif np.any(labels != reader.labels):
        i = int(np.argmax(labels != reader.labels))
        difference = f"record {records[i]} has label {reader.labels[i]}, there it has {labels[i]}"
    else:
        return
    raise UserError(
        f"{path} does not belong to {reader.path}: {difference}; run pre_process.py again."
    )
