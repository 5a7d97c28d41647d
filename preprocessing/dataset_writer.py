"""A data set while it grows: a folder that can be killed at any moment and gone on with.

All is written in `<output>.part/`, and the folder renamed when it is complete.  index.tsv is the
journal: a block's rows are appended once its records are on the disk, so whatever it names is
there.  report.json says from the start what is being made, from what and with which settings.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fileio.archive_source import Entry, Tally
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row, parse_index_row
from fileio.locks import LOCK
from fileio.record_writer import RecordWriter
from fileio.recordio import record_offsets
from fileio.safe_files import atomic_write, open_to_write, sync, sync_folder, write_errors
from preprocessing.pipeline import Aligned
from utils import UserError

NO_FACE, CROP, FACE = range(3)  # what became of an entry, in a byte
# What is read of a report.json again, and its types.
READ = {"source": str, "source_bytes": int, "settings": dict, "kept": int, "identities": int}
ASIDE = ".aside"  # a folder inside, while its contents are being set aside


def read_report(folder: Path, finished: bool = True) -> dict[str, Any] | None:
    """The folder's report.json; None if it has none.

    Raises UserError if it is damaged or another program's; one that is not `finished` needs no
    counts yet.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    needed = ("source", "source_bytes", *("kept", "identities") * finished)
    try:
        report = json.loads(path.read_text("utf-8"))
        read = {name: kind for name, kind in READ.items() if name in needed or name in report}
        damaged = any(type(report[name]) is not kind for name, kind in read.items())
    except (ValueError, LookupError, TypeError, RecursionError):
        damaged = True
    if damaged:
        raise UserError(f"{path} is damaged; move {folder} away and prepare it again.")
    return report


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the folder's report.json, whole or not at all."""
    with atomic_write(folder / "report.json", "w") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)
        file.write("\n")


def begin(part: Path, begun: dict[str, Any]) -> None:
    """Note what is being made; what was begun differently is set aside with a notice, not lost."""
    before = read_report(part, finished=False)
    differs = [k for k in begun if k != "source" and before and before.get(k) != begun[k]]
    if differs or (part / ASIDE).is_dir() or (before is None and (part / "index.tsv").exists()):
        aside = set_aside(part)
        print(
            f"The unfinished output in {part} was begun with other "
            f"{' and '.join(differs) or 'code'}; it is now in {aside} (delete it if you like), "
            "and all begins anew."
        )
    write_report(part, begun)


def set_aside(part: Path) -> Path:
    """Move all that is in a folder, but its lock, to a new one beside it; returns that.

    It is gathered in a folder inside first: if a kill cuts that short, `begin` sees it and goes on.
    """
    number = 1
    while (aside := part.with_name(f"{part.stem}.{number}.part")).exists():
        number += 1
    with write_errors(aside):
        (part / ASIDE).mkdir(exist_ok=True)
        for file in part.iterdir():
            if file.name not in (ASIDE, LOCK):
                file.rename(part / ASIDE / file.name)
        (part / ASIDE).rename(aside)
    return aside


def complete(part: Path, output: Path) -> None:
    """Give the finished folder its name."""
    sync_folder(part)
    with write_errors(output):
        part.rename(output)
        # Not before: without it another process could get in.
        (output / LOCK).unlink(missing_ok=True)
    sync_folder(output)
    sync_folder(output.parent)


class Journal:
    """train.rec and index.tsv while they grow, block by block, in a folder of their own.

    Opening it cuts both at the last block that is whole in both; `done` is the number of blocks
    there, `images` the entries in them.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]]):
        self.path = folder / "index.tsv"
        self.done, self.images = 0, 0
        self.statuses = Tally()
        self.found = bytearray()  # of each entry NO_FACE, CROP or FACE
        self.counts = array("q")  # images of each label
        self.identity: str | None = None
        records = folder / "train.rec"
        offsets = record_offsets(records) if records.is_file() else np.zeros(1, np.int64)
        end = self._take_in(entries, blocks, len(offsets) - 2)  # record 0 is no image
        resume_at = int(offsets[sum(self.counts) + 1]) if self.done else None
        self.records = RecordWriter(records, resume_at)
        self.index = open_to_write(self.path, "r+b" if self.done else "wb")
        if self.done:
            with write_errors(self.path):
                self.index.truncate(end)
            self.index.seek(end)
        else:
            self.index.write(INDEX_HEADER.encode())
        sync_folder(folder)

    def _take_in(
        self, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]], images: int
    ) -> int:
        """Count the blocks that are whole in both files; returns the byte after their last row."""
        end = len(INDEX_HEADER)
        if not self.path.is_file():
            return end
        with self.path.open("rb") as file:
            if file.readline() != INDEX_HEADER.encode():
                return end
            for start, stop in blocks:
                lines = list(itertools.islice(file, stop - start))
                rows = whole_rows(lines, entries[start:stop])
                images -= sum(row.label is not None for row in rows)
                if len(rows) < stop - start or images < 0:
                    break
                for row, entry in zip(rows, entries[start:stop], strict=True):
                    self._count(entry, row.status, row.label is not None)
                self.done, self.images = self.done + 1, stop
                end += sum(map(len, lines))
        return end

    def _count(self, entry: Entry, status: str, kept: bool) -> int | None:
        """Take an entry into the counts; returns its label, None where it was passed over."""
        self.statuses.add(status, entry.name)
        self.found.append(NO_FACE if not kept else CROP if status == "central_crop" else FACE)
        if not kept:
            return None
        if entry.identity != self.identity:
            self.identity = entry.identity
            self.counts.append(0)
        self.counts[-1] += 1
        return len(self.counts) - 1

    def append(self, block: Sequence[Aligned]) -> None:
        """Write a block: its records to the disk first, then its rows."""
        lines = []
        for face in block:
            record = None
            label = self._count(face.entry, face.status, face.jpeg is not None)
            if face.jpeg is not None:
                record, _ = self.records.append(face.jpeg, label)
            row = IndexRow(
                *(record, label, face.entry.identity, face.entry.name),
                *(face.status, face.score, face.box, face.points),
            )
            lines.append(format_index_row(row))
        self.records.flush()
        self.index.write("".join(lines).encode())
        sync(self.index, self.path)

    def finish(self) -> None:
        """Complete the data set: identity records, train.idx, property."""
        sync(self.index, self.path)
        self.records.finish(self.counts)

    def close(self) -> None:
        """Let go of the files, finished or not."""
        try:
            self.index.close()
        finally:
            self.records.__exit__()


def whole_rows(lines: Sequence[bytes], entries: Sequence[Entry]) -> list[IndexRow]:
    """The rows of lines, as far as they are whole and belong to the entries."""
    rows: list[IndexRow] = []
    for line, entry in zip(lines, entries, strict=False):
        try:
            row = parse_index_row(line.decode())
        except ValueError:
            break
        if row.source != entry.name:
            break
        rows.append(row)
    return rows
