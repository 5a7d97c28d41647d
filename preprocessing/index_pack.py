"""Ready packs, a train.rec that other tools made: every record checked and listed in index.tsv."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fileio.archive_source import Tally
from fileio.images import ImageError, decode_image
from fileio.index_tsv import INDEX_HEADER, IndexRow, format_index_row
from fileio.locks import lock_folder
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder
from preprocessing.sources import Job
from preprocessing.summary import (
    count_statuses,
    library_versions,
    read_summary,
    throughput,
    write_summary,
)
from utils import FACE_SIZE, UserError, core_count

CHECK_CHUNK = 4096  # records that are checked between two updates of the progress bar
CHECK_THREADS = "check"  # what the names of the threads begin with


def prepare_pack(job: Job, workers: int = 0) -> dict[str, Any] | None:
    """Check and index a ready train.rec; returns its summary, None if that was done before.

    Raises UserError if the folder has an index.tsv that lists more than a ready pack's can.
    """
    size = job.source.stat().st_size if job.source.is_file() else 0
    summary = read_summary(job.output)
    index_path = job.output / "index.tsv"
    if summary and summary["source_bytes"] == size and index_path.is_file():
        print(f"{job.source} is checked and indexed: {summary['kept']:,} images.")
        return None
    # The rows of a ready pack name the pack as their source. Rows that name original images come
    # from an alignment, and must not be lost.
    if (
        summary is None
        and index_path.is_file()
        and f"\t{job.source.name}\t" not in index_path.read_text("utf-8", "replace")
    ):
        raise UserError(
            f"{index_path} lists more than a ready pack's index, but there is no report.json "
            "beside it; move it away to have the pack indexed."
        )
    started = time.perf_counter()
    make_folder(job.output)
    with lock_folder(job.output, "pre_process.py"):
        statuses, labels = index_pack(job.source, job.output, workers)
        summary = {"ready": True, "source": str(job.source.resolve()), "source_bytes": size}
        summary |= {"versions": library_versions()} | count_statuses(statuses) | labels
        summary |= throughput(summary["images"], started)
        write_summary(job.output, summary)
    return summary


def index_pack(rec_path: Path, output: Path, workers: int = 0) -> tuple[Tally, dict[str, Any]]:
    """Decode every image of a pack and write `output`/index.tsv; returns statuses and label counts.

    A row's status is "ok", "unreadable" or "wrong_size"; its identity is the label, as packs carry
    no names. Raises RecordError if the pack cannot be read at all, UserError if its images are not
    112x112.
    """
    reader = RecordReader(rec_path)
    size = reader.size or (FACE_SIZE, FACE_SIZE)
    if size != (FACE_SIZE, FACE_SIZE):
        raise UserError(
            f"{reader.path} holds images of {size[1]}x{size[0]} pixels, not "
            f"{FACE_SIZE}x{FACE_SIZE}; training needs an aligned pack of that size."
        )
    statuses = Tally()
    # The check has threads, which end when it is closed; writing may fail before the last record.
    with (
        contextlib.closing(check_records(reader, workers)) as checked,
        atomic_write(output / "index.tsv") as file,
    ):
        file.write(INDEX_HEADER.encode())
        for i, status in enumerate(checked):
            label = int(reader.labels[i])
            row = IndexRow(int(reader.keys[i]), label, str(label), reader.path.name, status)
            file.write(format_index_row(row).encode())
            statuses.add(status, reader.path.name)
    labels_in_use = len(np.unique(reader.labels))
    return statuses, {
        "identities": labels_in_use,
        "identities_in_source": labels_in_use,
        "classes": reader.num_classes,
        "classes_without_image": reader.num_classes - labels_in_use,
    }


def check_records(reader: RecordReader, workers: int = 0) -> Iterator[str]:
    """Yield "ok", "unreadable" or "wrong_size" for each image, in order.

    It holds a pool of threads: close it (`contextlib.closing`) unless it is read to its end.
    """

    def check(i: int) -> str:
        try:
            image = decode_image(reader.encoded(i))
        except ImageError:
            return "unreadable"
        return "ok" if image.shape[:2] == (FACE_SIZE, FACE_SIZE) else "wrong_size"

    bar = tqdm(total=len(reader), unit=" images", desc=f"checking {reader.path.name}")
    with bar, ThreadPoolExecutor(workers or core_count(), CHECK_THREADS) as pool:
        # In chunks, as Executor.map would queue a task for each of several million records at once.
        for start in range(0, len(reader), CHECK_CHUNK):
            stop = min(start + CHECK_CHUNK, len(reader))
            statuses = list(pool.map(check, range(start, stop)))
            bar.update(len(statuses))
            yield from statuses
