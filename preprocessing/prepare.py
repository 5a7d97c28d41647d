"""One data set from its archive to records: align_source; parts of it, and ready packs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from config import Config
from distributed.process_group import (
    is_main,
    local_world_size,
)
from fileio.archive_source import ArchiveError, Limits, Source
from fileio.archives import open_source
from fileio.index_tsv import check_index
from fileio.locks import LOCK, locked
from fileio.recordio import RecordReader
from fileio.safe_files import make_folder, sync_folder
from preprocessing.dataset_writer import Journal, begin, complete, read_report, write_report
from preprocessing.detector import FaceDetector
from preprocessing.index_pack import index_pack
from preprocessing.merge_parts import merged_blocks, shard_blocks, shard_folder
from preprocessing.pipeline import BLOCK_IMAGES, align_blocks, plan_blocks
from preprocessing.sources import Job
from preprocessing.summary import (
    check_finished,
    count,
    is_taken,
    listed,
    source_bytes,
    timing,
    write_pairs,
)
from utils import UserError, core_count, get_device


def prepare(
    job: Job, cfg: Config, get_detector: Callable[[], FaceDetector], shards: list[Path] = ()
) -> dict[str, Any] | None:
    """Prepare one data set; returns its report, or None if it was finished before.

    With `shards`, other processes have aligned the images and only putting together is left.
    Raises UserError if the output is taken by another source or another process.
    """
    if job.source.suffix == ".rec":
        return prepare_pack(job, cfg)
    if is_taken(job.output):
        check_finished(job, cfg)
        return None
    part = job.output.with_name(job.output.name + ".part")
    make_folder(part.parent)
    limits = Limits(cfg.max_file_mb << 20, cfg.max_ratio)
    with open_source(job.source, part.parent, limits) as source:
        entries = source.entries()
        if source.corruption:
            print(f"WARNING: {source.corruption} What can be read of it is used.", file=sys.stderr)
        if not entries:
            raise ArchiveError(
                f"{job.source} holds no images in folders of identities "
                f"(passed over: {listed(source.skipped.counts) or 'nothing'})."
            )
        with contextlib.ExitStack() as stack:
            make_folder(part)
            stack.enter_context(locked(part, "pre_process.py"))
            sync_folder(part.parent)
            if is_taken(job.output):  # another process has finished it since we looked
                (part / LOCK).unlink()
                part.rmdir()
                check_finished(job, cfg)
                return None
            begun = describe(job, source, cfg)
            begin(part, begun)
            report = align_source(job, part, source, begun, cfg, get_detector, shards)
            complete(part, job.output)
    return report


def prepare_shard(
    job: Job, cfg: Config, get_detector: Callable[[], FaceDetector], number: int, count: int
) -> None:
    """Align part `number` (from 1) of `count` of a data set's images, for others to merge."""
    shard = shard_folder(job.output, number, count)
    if is_taken(job.output):
        check_finished(job, cfg)
        return
    if is_taken(shard):
        print(f"{shard} is finished.")
        return
    started = time.perf_counter()
    part = shard.with_name(shard.name + ".part")
    make_folder(part)
    limits = Limits(cfg.max_file_mb << 20, cfg.max_ratio)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(part, "pre_process.py"))
        source = stack.enter_context(open_source(job.source, part.parent, limits))
        begun = describe(job, source, cfg) | {"shard": f"{number}/{count}"}
        begin(part, begun)
        there = job.source.stat()
        blocks = shard_blocks(plan(source, cfg), number, count)
        journal = stack.enter_context(contextlib.closing(Journal(part, source.entries(), blocks)))
        align_into(journal, job, source, blocks, cfg, get_detector(), there)
        images = sum(stop - start for start, stop in blocks)
        write_report(part, begun | {"images": images} | timing(images, started))
        complete(part, shard)
    print(f"{shard}: {images:,} images.")


def plan(source: Source, cfg: Config) -> list[tuple[int, int]]:
    """The blocks of a source's images, the same for every process."""
    return plan_blocks(source.entries(), max(BLOCK_IMAGES, cfg.detect_batch))


def align_into(
    journal: Journal,
    job: Job,
    source: Source,
    blocks: list[tuple[int, int]],
    cfg: Config,
    detector: FaceDetector,
    there: os.stat_result,
) -> None:
    """Align the blocks that a journal does not have yet; `there` is what the source was before."""
    workers = cfg.workers or max(1, core_count() // local_world_size())
    results = align_blocks(
        *(source, blocks[journal.done :], detector),
        *(job.crop_missed, cfg.detect_batch, workers),
    )
    total, done = (sum(b - a for a, b in some) for some in (blocks, blocks[: journal.done]))
    shown = {"unit": " images", "desc": job.source.name, "disable": not is_main()}
    # Closed here, whatever fails below, so that its threads have ended when this function has.
    with contextlib.closing(results), tqdm(total=total, initial=done, **shown) as bar:
        for block in results:
            if any(face.status == "unreadable" for face in block):
                check_there(job.source, there)
            journal.append(block)
            bar.update(len(block))


def prepare_pack(job: Job, cfg: Config) -> dict[str, Any] | None:
    """Check and index a ready train.rec; None if that was done before."""
    size = job.source.stat().st_size if job.source.is_file() else 0
    report = read_report(job.output)
    if report and report["source_bytes"] == size and (job.output / "index.tsv").is_file():
        print(f"{job.source} is checked and indexed: {report['kept']:,} images.")
        return None
    index = job.output / "index.tsv"
    listed_before = index.read_text("utf-8", "replace") if index.is_file() else None
    if (
        report is None
        and listed_before is not None
        and f"\t{job.source.name}\t" not in listed_before
    ):
        raise UserError(
            f"{index} says more than a ready pack's, but there is no report.json beside it; move "
            "it away to have the pack indexed."
        )
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        make_folder(job.output)
        stack.enter_context(locked(job.output, "pre_process.py"))
        stack.callback((job.output / LOCK).unlink)
        statuses, facts = index_pack(job.source, job.output, cfg.workers)
        report = {"ready": True, "source": str(job.source.resolve()), "source_bytes": size}
        report |= {"versions": versions()} | count(statuses) | facts
        report |= timing(report["images"], started)
        write_report(job.output, report)
    return report


def describe(job: Job, source: Source, cfg: Config) -> dict[str, Any]:
    """What the outcome depends on: an unfinished output is gone on with only if all agrees."""
    return {
        "source": str(job.source.resolve()),
        "source_bytes": source_bytes(job.source, source),
        "fingerprint": source.fingerprint(),
        "settings": {
            "crop_missed": job.crop_missed,
            "min_face": cfg.min_face,
            "detect_batch": cfg.detect_batch,
            "device": get_device(cfg.device).type,
        },
        "versions": versions(),
    }


def check_there(source: Path, before: os.stat_result) -> None:
    """UserError unless the source is still what it was: a disk that has gone is no bad image."""
    try:
        now = source.stat()
        same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{source} has gone while it was being read: mount its disk again, or put it back, and "
            "start again; what was there before is kept."
        )


def versions() -> dict[str, str]:
    """Versions that pixels and detections depend on."""
    mtcnn = importlib.metadata.version("mtcnn")
    return {"torch": torch.__version__, "cv2": cv2.__version__, "mtcnn": mtcnn}


def align_source(
    job: Job,
    part: Path,
    source: Source,
    begun: dict[str, Any],
    cfg: Config,
    get_detector: Callable[[], FaceDetector],
    shards: list[Path],
) -> dict[str, Any]:
    """Do in `part` what is left to do, down to the report, which it returns."""
    started = time.perf_counter()
    entries, there = source.entries(), job.source.stat()
    blocks = plan(source, cfg)
    with contextlib.closing(Journal(part, entries, blocks)) as journal:
        resumed_at = journal.images
        if resumed_at:
            print(f"{job.source.name}: going on after {resumed_at:,} of {len(entries):,} images.")
        if shards:
            merged = merged_blocks(shards, entries, blocks, begun)
            for block in itertools.islice(merged, journal.done, None):
                journal.append(block)
        else:
            align_into(journal, job, source, blocks, cfg, get_detector(), there)
        if not journal.counts:
            raise UserError(
                f"not one of the {len(entries):,} images in {job.source} gave a face "
                f"({listed(journal.statuses.counts)}; {part / 'index.tsv'} names each)."
            )
        journal.finish()
    reader = RecordReader(part)
    check_index(part, reader)
    if job.show:
        write_pairs(source, journal.found, reader, Path(cfg.images_dir))
    identities = {
        "identities": len(journal.counts),
        "identities_in_source": len({entry.identity for entry in entries}),
    }
    report = begun | count(journal.statuses) | identities
    report |= {"not_pictures": source.skipped.as_dict()}
    report |= {"damage": source.corruption, "resumed_at": resumed_at, "parts": len(shards)}
    report |= timing(len(entries) - resumed_at, started)
    write_report(part, report)
    return report
