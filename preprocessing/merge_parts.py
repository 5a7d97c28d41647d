"""Data sets that several processes prepared part by part, put together as if one had done it all.

Every process forms the same blocks of the archive's images and aligns a run of them into a folder
of its own, `<output>.shard-00001-of-00004`. Detection batches never cross a block, so the parts
hold what a single run would have written; putting them together numbers records and labels anew.
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
from preprocessing.dataset_writer import read_report, whole_rows
from preprocessing.pipeline import Aligned
from utils import UserError

Block = tuple[int, int]


def shard_folder(output: Path, number: int, count: int) -> Path:
    """Where part `number` (from 1) of `count` goes."""
    return output.with_name(f"{output.name}.shard-{number:05d}-of-{count:05d}")


def shard_blocks(blocks: Sequence[Block], number: int, count: int) -> list[Block]:
    """The blocks of part `number` (from 1) of `count`."""
    return list(blocks[even_slice(len(blocks), number - 1, count)])


def find_shards(output: Path) -> list[Path]:
    """The finished parts of a data set, in order; UserError unless all are there, once."""
    pattern = re.compile(r"\.shard-(\d{5})-of-(\d{5})$")
    names = output.parent.glob(f"{glob.escape(output.name)}.shard-*")
    found = {path: pattern.search(path.name) for path in names}
    numbers = {(int(m[2]), int(m[1])): path for path, m in found.items() if m}
    counts = sorted({count for count, _ in numbers})
    if not counts:
        raise UserError(
            f"There is no finished part of {output} to merge; make them with pre_process.py "
            "--shard 1/4, --shard 2/4 and so on."
        )
    if len(counts) > 1:
        raise UserError(
            f"{output} has parts by {counts[0]} and by {counts[1]}; delete the folders of one."
        )
    (count,) = counts
    missing = [n for n in range(1, count + 1) if (count, n) not in numbers]
    if missing:
        begun = [n for n in missing if Path(f"{shard_folder(output, n, count)}.part").is_dir()]
        raise UserError(
            f"Parts {', '.join(map(str, missing))} of {count} of {output} are missing"
            + (f" ({', '.join(map(str, begun))} begun)" if begun else "")
            + f"; run pre_process.py --shard {missing[0]}/{count}."
        )
    return [numbers[count, n] for n in range(1, count + 1)]


def merged_blocks(
    shards: Sequence[Path], entries: Sequence[Entry], blocks: Sequence[Block], begun: dict[str, Any]
) -> Iterator[list[Aligned]]:
    """What became of the entries of each block, from the parts.

    `begun` is what a single run would depend on. Raises UserError where a part was made from
    something else, lacks an image or has one too many.
    """
    for number, shard in enumerate(shards, 1):
        report = read_report(shard, finished=False) or {}
        differs = [k for k in begun if k != "source" and report.get(k) != begun[k]]
        if differs:
            raise UserError(
                f"{shard} was made with other {' and '.join(differs)} than this process sees; "
                "delete it and make it again, with the same archive, settings and versions."
            )
        yield from _blocks_of(shard, entries, shard_blocks(blocks, number, len(shards)))


def _blocks_of(
    shard: Path, entries: Sequence[Entry], blocks: Sequence[Block]
) -> Iterator[list[Aligned]]:
    wrong = UserError(
        f"{shard} does not hold each of its images once; delete it and make it again."
    )
    data, offsets = map_file(shard / "train.rec"), record_offsets(shard / "train.rec")
    images = iter(offsets[1:-1].tolist())  # record 0 is no image
    with (shard / "index.tsv").open("rb") as file:
        if file.readline() != INDEX_HEADER.encode():
            raise wrong
        for start, stop in blocks:
            lines = list(itertools.islice(file, stop - start))
            rows = whole_rows(lines, entries[start:stop])
            if len(rows) < stop - start:
                raise wrong
            block = []
            for entry, row in zip(entries[start:stop], rows, strict=True):
                jpeg, offset = None, -1
                if row.label is not None:
                    offset = next(images, -1)
                    if offset < 0:
                        raise wrong
                    jpeg = payload_at(data, offset)[HEADER.size :]
                block.append(Aligned(entry, row.status, jpeg, row.score, row.box, row.points))
            yield block
        if file.read(1) or next(images, None) is not None:
            raise wrong
