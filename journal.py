"""A data set while it grows: a folder that can be killed at any moment and gone on with.

All is written in `<output>.part/`, and the folder renamed when it is complete.  index.tsv is the
journal: a block's rows are appended once its records are on the disk, so whatever it names is
there.  report.json says from the start what is being made, from what and with which settings.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import Aligned
from archives import Entry
from index_tsv import INDEX_HEADER, IndexRow, format_index_row, parse_index_row
from recordio import RecordWriter, record_offsets
from utils import UserError, atomic_write


def read_report(folder: Path) -> dict[str, Any] | None:
    """The folder's report.json; None if it has none.  Raises UserError if it is damaged."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path} is damaged; move {folder} away and prepare it again.") from None


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the folder's report.json, whole or not at all."""
    with atomic_write(folder / "report.json", "w") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it; UserError if another process does.  A kill releases it."""
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another pre_process.py is at work in {folder}; let it finish."
            ) from None
        except OSError as error:  # some network file systems have no such locks
            print(f"{folder} cannot be locked ({error.strerror}): run one script at a time on it.")
        yield
    finally:
        os.close(handle)


def begin(part: Path, begun: dict[str, Any]) -> None:
    """Note what is being made; what was begun differently is set aside with a notice, not lost."""
    for leftover in part.glob(".*.tmp"):  # of atomic writes that were killed
        leftover.unlink()
    before = read_report(part)
    differs = [k for k in begun if k != "source" and before and before.get(k) != begun[k]]
    if differs or (before is None and (part / "index.tsv").exists()):
        number = 1
        while (aside := part.with_name(f"{part.stem}.{number}.part")).exists():
            number += 1
        aside.mkdir()
        for file in part.iterdir():
            file.rename(aside / file.name)
        print(
            f"The unfinished output in {part} was begun with other "
            f"{' and '.join(differs) or 'code'}; it is now in {aside} (delete it if you like), "
            "and all begins anew."
        )
    write_report(part, begun)


def complete(part: Path, output: Path) -> None:
    """Give the finished folder its name."""
    handle = os.open(part, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    part.rename(output)


class Journal:
    """train.rec and index.tsv while they grow, block by block, in a folder of their own.

    Opening it cuts both at the last block that is whole in both; `done` is the number of blocks
    there, `images` the entries in them.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]]):
        self.path = folder / "index.tsv"
        rows, ends = self._whole_rows(entries)
        records = folder / "train.rec"
        offsets = record_offsets(records) if records.is_file() else np.zeros(1, np.int64)
        self.done, self.images, kept = 0, 0, 0
        for start, stop in blocks:
            if stop > len(rows):
                break
            kept += sum(label is not None for label, _, _ in rows[start:stop])
            if kept + 2 > len(offsets):  # with record 0, and the end of the last
                break
            self.done, self.images = self.done + 1, stop
        rows = rows[: self.images]
        self.statuses = Counter(status for _, _, status in rows)
        kept = [(label, identity) for label, identity, _ in rows if label is not None]
        self.counts = list(Counter(label for label, _ in kept).values())  # labels ascend from 0
        self.identity = kept[-1][1] if kept else None
        resume_at = int(offsets[len(kept) + 1]) if self.done else None
        self.records = RecordWriter(records, resume_at)
        self.index = self.path.open("r+b" if self.done else "wb")
        if self.done:
            self.index.truncate(ends[self.images - 1])
            self.index.seek(0, os.SEEK_END)
        else:
            self.index.write(INDEX_HEADER.encode())

    def _whole_rows(self, entries: Sequence[Entry]) -> tuple[list[tuple], list[int]]:
        """(label, identity, status) of the rows that belong to the entries; the byte after each."""
        rows: list[tuple] = []
        ends: list[int] = []
        if not self.path.is_file():
            return rows, ends
        with self.path.open("rb") as file:
            if file.readline() != INDEX_HEADER.encode():
                return rows, ends
            for line, entry in zip(file, entries, strict=False):
                try:
                    row = parse_index_row(line.decode())
                except ValueError:
                    break
                if row.source != entry.name:
                    break
                rows.append((row.label, entry.identity, sys.intern(row.status)))
                ends.append((ends[-1] if ends else len(INDEX_HEADER)) + len(line))
        return rows, ends

    def append(self, block: Sequence[Aligned]) -> None:
        """Write a block: its records to the disk first, then its rows."""
        lines = []
        self.statuses.update(face.status for face in block)
        for face in block:
            record = label = None
            if face.jpeg is not None:
                if face.entry.identity != self.identity:
                    self.identity = face.entry.identity
                    self.counts.append(0)
                label = len(self.counts) - 1
                self.counts[label] += 1
                record, _ = self.records.append(face.jpeg, label)
            row = IndexRow(
                *(record, label, face.entry.identity, face.entry.name),
                *(face.status, face.score, face.box, face.points),
            )
            lines.append(format_index_row(row))
        self.records.flush()
        self.index.write("".join(lines).encode())
        self._sync_index()

    def _sync_index(self) -> None:
        self.index.flush()
        os.fsync(self.index.fileno())

    def finish(self) -> None:
        """Complete the data set: identity records, train.idx, property."""
        self._sync_index()
        self.records.finish(self.counts)

    def close(self) -> None:
        """Let go of the files, finished or not."""
        self.index.close()
        self.records.__exit__()
