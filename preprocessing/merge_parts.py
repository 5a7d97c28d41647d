"""Data sets that several processes prepare in parts, merged into what one process would write.

Part 2 of 4 is the second quarter of the blocks of images, aligned into a folder of its own,
`<output>.shard-00002-of-00004` (the name that these folders have always had). All processes form
the same blocks, and detection batches never cross a block, so the parts hold the very images of a
single run. Each part numbers its records from 1 and its labels from 0; merging numbers them anew.
"""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distributed.collectives import even_slice
from fileio.archive_source import Entry
from fileio.index_tsv import INDEX_HEADER
from fileio.recordio import HEADER, map_file, payload_at, record_offsets
from preprocessing.dataset_writer import parse_rows
from preprocessing.pipeline import AlignResult
from preprocessing.summary import read_summary
from utils import UserError


def part_folder(output: Path, number: int, count: int) -> Path:
    """The folder of part `number` (from 1) of `count`."""
    return output.with_name(f"{output.name}.shard-{number:05d}-of-{count:05d}")


def part_blocks(
    blocks: Sequence[tuple[int, int]], number: int, count: int
) -> list[tuple[int, int]]:
    """The blocks of part `number` (from 1) of `count`."""
    return list(blocks[even_slice(len(blocks), number - 1, count)])


def find_parts(output: Path) -> list[Path]:
    """The folders of the finished parts of a data set, in order.

    Raises UserError unless every part exists once.
    """
    pattern = re.compile(r"\.shard-(\d{5})-of-(\d{5})$")
    folders: dict[tuple[int, int], Path] = {}  # by (count, number)
    for path in output.parent.glob(f"{glob.escape(output.name)}.shard-*"):
        match = pattern.search(path.name)
        if match:  # not the .part folder of an unfinished one
            folders[int(match[2]), int(match[1])] = path
    counts = sorted({count for count, _ in folders})
    if not counts:
        raise UserError(
            f"There is no finished part of {output} to merge; prepare the parts with "
            "pre_process.py --shard 1/4, --shard 2/4 and so on."
        )
    if len(counts) > 1:
        raise UserError(
            f"{output} has parts out of {counts[0]} and parts out of {counts[1]}; delete the "
            "folders of one kind."
        )
    (count,) = counts
    missing = [number for number in range(1, count + 1) if (count, number) not in folders]
    if missing:
        begun = [n for n in missing if Path(f"{part_folder(output, n, count)}.part").is_dir()]
        unfinished = f" ({', '.join(map(str, begun))} unfinished)" if begun else ""
        raise UserError(
            f"Parts {', '.join(map(str, missing))} of {count} of {output} are missing{unfinished}; "
            f"run pre_process.py --shard {missing[0]}/{count}."
        )
    return [folders[count, number] for number in range(1, count + 1)]


def read_parts(
    parts: Sequence[Path],
    entries: Sequence[Entry],
    blocks: Sequence[tuple[int, int]],
    inputs: dict[str, Any],
) -> Iterator[list[AlignResult]]:
    """The results of each block, in order, from the folders of all parts.

    `inputs` is what a single run would depend on. Raises UserError if a part was made from
    something else, lacks an image or has one too many.
    """
    for number, part in enumerate(parts, 1):
        summary = read_summary(part, finished=False) or {}
        differing = [k for k in inputs if k != "source" and summary.get(k) != inputs[k]]
        if differing:
            raise UserError(
                f"{part} differs from this run in {' and '.join(differing)}; delete it and prepare "
                "it again, with the same archive, settings and versions."
            )
        yield from _read_part(part, entries, part_blocks(blocks, number, len(parts)))


def _read_part(
    part: Path, entries: Sequence[Entry], blocks: Sequence[tuple[int, int]]
) -> Iterator[list[AlignResult]]:
    wrong = UserError(
        f"{part} does not hold each of its images once; delete it and prepare it again."
    )
    data, offsets = map_file(part / "train.rec"), record_offsets(part / "train.rec")
    image_offsets = iter(offsets[1:-1].tolist())  # record 0 is no image, the last one is the end
    with (part / "index.tsv").open("rb") as file:
        if file.readline() != INDEX_HEADER.encode():
            raise wrong
        for start, stop in blocks:
            lines = list(itertools.islice(file, stop - start))
            rows = parse_rows(lines, entries[start:stop])
            if len(rows) < stop - start:
                raise wrong
            results = []
            for entry, row in zip(entries[start:stop], rows, strict=True):
                jpeg = None
                if row.label is not None:
                    offset = next(image_offsets, None)
                    if offset is None:
                        raise wrong
                    jpeg = payload_at(data, offset)[HEADER.size :]
                results.append(AlignResult(entry, row.status, jpeg, row.score, row.box, row.points))
            yield results
        if file.read(1) or next(image_offsets, None) is not None:
            raise wrong
