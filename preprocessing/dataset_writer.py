"""Writes a data set block by block, resumable after a kill at any point.

Everything is written in `<output>.part/`, which gets its final name when it is complete. index.tsv
is the journal: the rows of a block are appended only once its records are on disk, so every row
that names a record can rely on it. Say a kill struck while the rows of block 2 were written, in
blocks of four images, one of which has no face:

    train.rec    block 0: 4 records   block 1: 3 records   block 2: 4 records
    index.tsv    block 0: 4 rows      block 1: 4 rows      block 2: 1 row and a half

Blocks 0 and 1 are complete in both files. On resume train.rec is cut after 7 records and index.tsv
after 8 rows, and block 2 is aligned again. Blocks and detection batches follow from the list of
images alone, so the files end up with the same bytes as those of an uninterrupted run.

report.json says from the start what is being made, from what and with which settings: another
source or other settings must not continue what these began.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fileio.archive_source import Entry, Source, Tally
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row, parse_index_row
from fileio.record_writer import RecordWriter
from fileio.recordio import record_offsets
from fileio.safe_files import describe_write_errors, fsync_file, fsync_folder, open_for_writing
from preprocessing.changes import exchanged_images, source_state
from preprocessing.pipeline import AlignResult
from preprocessing.summary import read_summary, write_summary

NO_FACE, CROP, FACE = range(3)  # of an entry: no record, a central crop, an aligned face
ASIDE = ".aside"  # inside a folder whose files are being moved aside


# ------------------------------------------------------------------------------ the folder


def begin_output(
    folder: Path, inputs: dict[str, Any], source: Source | None = None
) -> dict[str, Any]:
    """Note in report.json what is being made, in a new folder or in one to be resumed.

    `inputs` is everything that the bytes depend on; of `source`, its state is noted as well, as it
    was when the output was begun. Files that were made from other inputs are moved aside with a
    notice, never overwritten. Returns what was noted.
    """
    before = read_summary(folder, finished=False)
    # The source's path may differ: the archive may have been moved, its fingerprint stays.
    differing = [k for k in inputs if k != "source" and before and before.get(k) != inputs[k]]
    if before and source and not differing and (change := exchanged_images(before, source)):
        differing = [f"its images: {change}"]
    state = source_state(source) if source else {}
    if before and not differing:
        state = {key: before.get(key, value) for key, value in state.items()}
    interrupted = (folder / ASIDE).is_dir()  # a kill during set_aside
    unexplained = before is None and (folder / "index.tsv").exists()
    if differing or interrupted or unexplained:
        aside = set_aside(folder)
        print(
            f"The unfinished output in {folder} differs from this run in "
            f"{' and '.join(differing) or 'its code'}; it is now in {aside} (you may delete it), "
            "and preparing starts from the first image."
        )
    write_summary(folder, inputs | state)
    return inputs | state


def set_aside(folder: Path) -> Path:
    """Move all files of a folder to a new folder beside it; returns that.

    They are gathered in a folder inside first, which then gets its name in one step: after a kill
    on the way `begin_output` finds that folder and finishes the move.
    """
    number = 1
    while (aside := folder.with_name(f"{folder.stem}.{number}.part")).exists():
        number += 1
    with describe_write_errors(aside):
        (folder / ASIDE).mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.name != ASIDE:
                file.rename(folder / ASIDE / file.name)
        (folder / ASIDE).rename(aside)
    return aside


def publish_output(folder: Path, output: Path) -> None:
    """Give a complete folder its final name."""
    fsync_folder(folder)
    with describe_write_errors(output):
        folder.rename(output)
    fsync_folder(output)
    fsync_folder(output.parent)


# ------------------------------------------------------------------------------ its files


class DatasetWriter:
    """train.rec and index.tsv in a folder, extended block by block.

    Opening it cuts both files after the last block that is complete in both: `blocks_done` is the
    number of those blocks, `images_done` the number of their entries. `entries` are the images of
    the source, `blocks` the (start, stop) of the runs of them that will be appended, in order.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]]):
        self.path = folder / "index.tsv"
        self.blocks_done = 0
        self.images_done = 0
        self.statuses = Tally()
        self.face_kinds = bytearray()  # of each entry NO_FACE, CROP or FACE
        self.images_per_label = array("q")
        self.last_identity: str | None = None  # whose label is the last one

        records_path = folder / "train.rec"
        offsets = record_offsets(records_path) if records_path.is_file() else np.zeros(1, np.int64)
        # n images have n + 2 offsets: record 0 is no image, the last offset is the file's end.
        index_end = self._read_back(entries, blocks, images_on_disk=len(offsets) - 2)
        resume_at = None
        if self.blocks_done:
            resume_at = int(offsets[sum(self.images_per_label) + 1])
        self.records = RecordWriter(records_path, resume_at)
        self.index = open_for_writing(self.path, "r+b" if self.blocks_done else "wb")
        if self.blocks_done:
            with describe_write_errors(self.path):
                self.index.truncate(index_end)
            self.index.seek(index_end)
        else:
            self.index.write(INDEX_HEADER.encode())
        fsync_folder(folder)

    def _read_back(
        self, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]], images_on_disk: int
    ) -> int:
        """Count the blocks that are complete in both files; returns the byte where their rows end.

        `images_on_disk` is the number of complete image records in train.rec.
        """
        end = len(INDEX_HEADER)
        if not self.path.is_file():
            return end
        with self.path.open("rb") as file:
            if file.readline() != INDEX_HEADER.encode():
                return end
            for start, stop in blocks:
                block = entries[start:stop]
                lines = list(itertools.islice(file, stop - start))
                rows = parse_rows(lines, block)
                labels = [row.label for row in rows]
                images_on_disk -= sum(label is not None for label in labels)
                # Rows without their records: not after a kill, but if train.rec was cut otherwise.
                if len(rows) < len(block) or images_on_disk < 0:
                    break
                if labels != self._assign_labels(block, [label is not None for label in labels]):
                    break
                for row, entry in zip(rows, block, strict=True):
                    self._count(entry, row.status, row.label)
                self.blocks_done += 1
                self.images_done = stop
                end += sum(map(len, lines))
        return end

    def _assign_labels(self, entries: Sequence[Entry], kept: Sequence[bool]) -> list[int | None]:
        """The labels of the next entries."""
        last_label = len(self.images_per_label) - 1
        return assign_labels(entries, kept, last_label, self.last_identity)

    def _count(self, entry: Entry, status: str, label: int | None) -> None:
        """Add an entry to the counts; `label` is None if no image of it is kept."""
        self.statuses.add(status, entry.name)
        if label is None:
            self.face_kinds.append(NO_FACE)
            return
        self.face_kinds.append(CROP if status == "central_crop" else FACE)
        if label == len(self.images_per_label):
            self.images_per_label.append(0)
        self.images_per_label[label] += 1
        self.last_identity = entry.identity

    def append(self, block: Sequence[AlignResult]) -> None:
        """Write a block: first its records, then, once those are on disk, its rows."""
        entries = [result.entry for result in block]
        labels = self._assign_labels(entries, [result.jpeg is not None for result in block])
        lines = []
        for result, label in zip(block, labels, strict=True):
            record_id = None
            if label is not None:
                record_id, _ = self.records.append(result.jpeg, label)
            self._count(result.entry, result.status, label)
            row = IndexRow(
                record_id,
                label,
                result.entry.identity,
                result.entry.name,
                result.status,
                result.score,
                result.box,
                result.points,
            )
            lines.append(format_index_row(row))
        # The order is what makes a kill harmless: a record without a row is cut off on resume, a
        # row without a record would name what does not exist.
        self.records.flush()
        self.index.write("".join(lines).encode())
        fsync_file(self.index, self.path)

    def finish(self) -> None:
        """Complete the data set: identity records, train.idx, property."""
        fsync_file(self.index, self.path)
        self.records.finish(self.images_per_label)

    def close(self) -> None:
        """Close the files, complete or not."""
        try:
            self.index.close()
        finally:
            self.records.__exit__()


def assign_labels(
    entries: Sequence[Entry], kept: Sequence[bool], last_label: int, last_identity: str | None
) -> list[int | None]:
    """The class label of each entry, None for those that are not `kept`.

    Labels number the identities that have at least one image, without gaps, as a classifier's
    rows need it. Entries come sorted by identity, so a new label begins where the identity of a
    kept image differs from that of the kept image before. `last_label` (-1 at the beginning) and
    `last_identity` are those of the last kept image before these entries.

    Example: of identities a a b b c, with no face in either image of b, the labels are
    0 0 None None 1.
    """
    labels: list[int | None] = []
    for entry, is_kept in zip(entries, kept, strict=True):
        if is_kept and entry.identity != last_identity:
            last_label += 1
            last_identity = entry.identity
        labels.append(last_label if is_kept else None)
    return labels


def parse_rows(lines: Sequence[bytes], entries: Sequence[Entry]) -> list[IndexRow]:
    """The rows of lines of index.tsv, up to the first that is cut short or not its entry's."""
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
