"""index.tsv, what became of every image: one line each, in the order of the archive.

Its columns: record and label (empty if the image was skipped), identity, source, status
("ok", "retried", "central_crop" or the reason for skipping it), score, the box and five points
in the image's pixels.
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
INDEX_COLUMNS = (
    *("record", "label", "identity", "source", "status", "score", "x1", "y1", "x2", "y2"),
    *(f"{point}_{axis}" for point in _POINTS for axis in "xy"),
)
INDEX_HEADER = "\t".join(INDEX_COLUMNS) + "\n"


class IndexRow(NamedTuple):
    """An image of the archive: `box` (4,) and `points` (5, 2) in its pixels.

    `record` and `label` are None if it was skipped; `score`, `box` and `points` are None
    where no face was found.
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
    """index.tsv by columns, n rows; -1 and nan stand for what a row has not."""

    record: np.ndarray  # (n,) int64
    label: np.ndarray  # (n,) int64
    identity: list[str]
    source: list[str]
    status: list[str]
    score: np.ndarray  # (n,) float64
    box: np.ndarray  # (n, 4) float64
    points: np.ndarray  # (n, 5, 2) float64


_ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped[1]: plain for plain, escaped in _ESCAPES.items()}


def _escape(name: str) -> str:
    # Bytes of a file name that are no UTF-8 reach Python as lone surrogates U+DC80 to U+DCFF.
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
    """The line of index.tsv, with its newline; always valid UTF-8, whatever the names hold."""
    record, label = ("" if number is None else str(number) for number in row[:2])
    names = [_escape(name) for name in row[2:5]]
    score = "" if row.score is None else f"{row.score:.6f}"
    numbers = [
        *(row.box if row.box is not None else [None] * 4),
        *(np.ravel(row.points).tolist() if row.points is not None else [None] * 10),
    ]
    places = ["" if number is None else f"{number:.4f}" for number in numbers]
    return "\t".join([record, label, *names, score, *places]) + "\n"


def parse_index_row(line: str) -> IndexRow:
    """The row of one line; ValueError where it is not whole."""
    cells = line.removesuffix("\n").split("\t")
    if len(cells) != len(INDEX_COLUMNS) or not line.endswith("\n"):
        raise ValueError(f"{len(cells)} columns, not {len(INDEX_COLUMNS)}, or no end of line")
    record, label = (int(cell) if cell else None for cell in cells[:2])
    if not 0 <= min(record or 0, label or 0) <= max(record or 0, label or 0) < 1 << 63:
        raise ValueError("a record id or label beyond all bounds")
    score = float(cells[5]) if cells[5] else None
    box = [float(cell) for cell in cells[6:10]] if cells[6] else None
    points = [float(cell) for cell in cells[10:]] if cells[10] else None
    points = None if points is None else np.reshape(points, (5, 2)).tolist()
    return IndexRow(record, label, *map(_unescape, cells[2:5]), score, box, points)


def _read_lines(lines: list[str]) -> IndexTable:
    """All lines at once, several times as fast as one by one; ValueError where one is not whole."""
    names_and_numbers = [line.split("\t", 5) for line in lines]
    columns = list(zip(*names_and_numbers, strict=True)) or [()] * 6
    if len(columns) < 6 or any(cells.count("\t") != len(INDEX_COLUMNS) - 6 for cells in columns[5]):
        raise ValueError("a line of more or fewer columns")  # NumPy skips empty ones
    if any("-" in cell for column in columns[:2] for cell in column):
        raise ValueError("a negative record id or label")  # -1 below means none
    # Empty cells become nan for NumPy's parser, which is much faster than float().
    numbers = [
        "\t".join(cell or "nan" for cell in cells.split("\t"))
        if "\t\t" in cells or cells.strip("\t") != cells
        else cells
        for cells in columns[5]
    ]
    parsed = np.loadtxt(numbers, delimiter="\t", comments=None, ndmin=2) if numbers else []
    parsed = np.reshape(parsed, (len(lines), len(INDEX_COLUMNS) - 5))
    return IndexTable(
        *(np.array([int(cell or -1) for cell in column], np.int64) for column in columns[:2]),
        *(
            [_unescape(cell) if "\\" in cell else cell for cell in column]
            for column in columns[2:5]
        ),
        score=parsed[:, 0],
        box=parsed[:, 1:5],
        points=parsed[:, 5:].reshape(-1, 5, 2),
    )


def read_index(folder: str | Path, reader: Any = None) -> IndexTable:
    """Read a data set's index.tsv; with `reader`, check that it speaks of the same records.

    UserError naming the line, or the record on which the two disagree.
    """
    path = Path(folder) / "index.tsv"
    if not path.is_file():
        raise UserError(f"There is no {path}; it is written by pre_process.py.")
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    if lines[0] != INDEX_HEADER[:-1] or lines[-1]:
        raise UserError(f"{path} has no header line or is cut short; run pre_process.py again.")
    try:
        table = _read_lines(lines[1:-1])
    except (ValueError, OverflowError):  # the latter for a record id beyond 64 bits
        for number, line in enumerate(lines[1:-1], 2):
            try:
                parse_index_row(line + "\n")
            except ValueError as error:
                raise UserError(
                    f"Line {number} of {path} cannot be read ({error}); run pre_process.py again."
                ) from None
        raise UserError(f"{path} cannot be read; run pre_process.py again.") from None
    if reader is not None:
        _check_index(path, table, reader)
    return table


def check_index(folder: str | Path, reader: Any) -> None:
    """Check what `read_index` with a reader does, in memory that the number of rows has no say in.

    UserError as there.
    """
    begin = 0
    with (Path(folder) / "index.tsv").open(encoding="utf-8", newline="\n") as file:
        file.readline()
        while lines := list(itertools.islice(file, 1024)):
            table = _read_lines([line.removesuffix("\n") for line in lines])
            kept = table.record >= 0
            end = begin + int(kept.sum())
            same = np.array_equal(table.record[kept], reader.keys[begin:end])
            if not same or not np.array_equal(table.label[kept], reader.labels[begin:end]):
                break
            begin = end
        else:
            if begin == len(reader):
                return
    read_index(folder, reader)  # which says where


def _check_index(path: Path, table: IndexTable, reader: Any) -> None:
    kept = table.record >= 0
    records, labels = table.record[kept], table.label[kept]
    if len(records) != len(reader) or np.any(records != reader.keys):
        how = f"it lists {len(records)} records, there are {len(reader)}"
    elif np.any(labels != reader.labels):
        i = int(np.argmax(labels != reader.labels))
        how = f"record {records[i]} has label {reader.labels[i]}, there it has {labels[i]}"
    else:
        return
    raise UserError(f"{path} does not belong to {reader.path}: {how}; run pre_process.py again.")
