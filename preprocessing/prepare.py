"""Prepares one data set: from an archive to train.rec, index.tsv and report.json.

An image on its way from the archive to a record goes through four files, in this order:

    pre_process.py                    which archives, which processes, what is printed
    preprocessing/prepare.py          one data set: locks, resuming, the summary (here)
    preprocessing/pipeline.py         one image: decode, detect, warp, encode
    preprocessing/dataset_writer.py   one image: its label, its record, its row of index.tsv

`prepare_job` decides between the three ways to prepare a data set: all images in this process, one
part of them, or merging the parts that other processes have prepared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distributed.collectives import run_on_all
from distributed.process_group import is_main, world_size
from fileio.archive_source import ArchiveError, Limits, Source
from fileio.archives import open_source
from fileio.index_tsv import check_index
from fileio.locks import lock_folder
from fileio.recordio import RecordReader
from fileio.safe_files import fsync_folder, make_folder
from preprocessing.changes import check_finished
from preprocessing.dataset_writer import DatasetWriter, begin_output, publish_output
from preprocessing.detector import FaceDetector
from preprocessing.example_images import save_examples
from preprocessing.index_pack import prepare_pack
from preprocessing.merge_parts import find_parts, part_blocks, part_folder, read_parts
from preprocessing.pipeline import BLOCK_IMAGES, align_blocks, plan_blocks
from preprocessing.sources import Job, is_taken
from preprocessing.summary import (
    count_statuses,
    format_counts,
    library_versions,
    throughput,
    write_summary,
)
from utils import FACE_SIZE, UserError, get_device

LOCK_OWNER = "pre_process.py"  # what the message of a refused lock calls its owner
ALREADY_ALIGNED = (
    f"WARNING: {{}} holds images of {FACE_SIZE}x{FACE_SIZE}, as faces have that are aligned "
    "already. Aligned again they lose (cosine to themselves 0.969 on average, 0.461 at worst); "
    "--aligned packs them as they are."
)
# What to do about images that cannot be read, by the reason that their source gives.
SKIP_ADVICE = {
    "encrypted": "unpack it with its password",
    "packed_by": "unpack it (7-Zip can)",
    "link_outside": "copy what the links point to into the folder",
}


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What holds for every data set of a run; the flags of pre_process.py of these names."""

    device: str = "auto"
    min_face: int = 0  # pixels; 0: chosen from the image's size
    detect_batch: int = 64  # images
    workers: int = 0  # threads; 0: one per core
    limits: Limits = dataclasses.field(default_factory=Limits)
    images_dir: Path = Path("images")  # for the examples before and after alignment
    aligned: bool = False  # the images are aligned faces already: they are packed as they are
    identity_level: str = "auto"  # see fileio/identities.py

    def open_source(self, path: Path, spool_dir: Path) -> Source:
        """The source at `path`, read by these limits."""
        return open_source(path, spool_dir, self.limits, self.identity_level)


# ------------------------------------------------------------------------------ a data set


def prepare_job(
    job: Job,
    options: PrepareOptions,
    get_detector: Callable[[], FaceDetector],
    part: tuple[int, int],
    merge: bool,
) -> dict[str, Any] | None:
    """Prepare one data set, or this process's part of it, or merge the parts.

    Returns the summary in the process that has completed a data set, None in the others.
    """
    number, count = part
    if job.source.suffix == ".rec":
        return prepare_pack(job, options.workers) if is_main() else None
    if count == 1 and not merge:
        return prepare_dataset(job, options, get_detector)
    if not merge:
        run_on_all(lambda: prepare_part(job, options, get_detector, number, count))
    # Under torchrun all parts are finished now, and rank 0 merges them. With --shard the other
    # parts may not even have begun: that is left to --merge.
    if not is_main() or (world_size() == 1 and not merge):
        return None
    parts = []
    if not is_taken(job.output):
        parts = find_parts(job.output)
    summary = prepare_dataset(job, options, get_detector, parts)
    for folder in parts:
        shutil.rmtree(folder)
    return summary


def prepare_dataset(
    job: Job,
    options: PrepareOptions,
    get_detector: Callable[[], FaceDetector],
    parts: Sequence[Path] = (),
) -> dict[str, Any] | None:
    """Prepare one data set; returns its summary, or None if it was finished before.

    `get_detector` is called only if there are images to align. With `parts`, other processes have
    aligned the images and the results are merged from those folders. Raises UserError if the output
    folder holds something else or another process is writing to it.
    """
    if is_taken(job.output):
        check_finished(job, _settings(job, options), options.open_source)
        return None
    unfinished = job.output.with_name(job.output.name + ".part")
    make_folder(unfinished.parent)
    with options.open_source(job.source, unfinished.parent) as source:
        _check_has_images(job.source, source)
        make_folder(unfinished)
        with lock_folder(unfinished, LOCK_OWNER):
            fsync_folder(unfinished.parent)
            if is_taken(job.output):  # another process has finished it in the meantime
                unfinished.rmdir()
                check_finished(job, _settings(job, options), options.open_source)
                return None
            inputs = describe_inputs(job, source, options)
            begun = begin_output(unfinished, inputs, source)
            summary = _write_dataset(unfinished, job, source, inputs, options, get_detector, parts)
            write_summary(unfinished, begun | summary)
            publish_output(unfinished, job.output)
    return summary


def prepare_part(
    job: Job,
    options: PrepareOptions,
    get_detector: Callable[[], FaceDetector],
    number: int,
    count: int,
) -> None:
    """Align part `number` (from 1) of `count` of a data set's images, to be merged later."""
    output = part_folder(job.output, number, count)
    if is_taken(job.output):
        check_finished(job, _settings(job, options), options.open_source)
        return
    if is_taken(output):
        print(f"{output} is finished.")
        return
    started = time.perf_counter()
    unfinished = output.with_name(output.name + ".part")
    make_folder(unfinished)
    with (
        lock_folder(unfinished, LOCK_OWNER),
        options.open_source(job.source, unfinished.parent) as source,
    ):
        inputs = describe_inputs(job, source, options) | {"shard": f"{number}/{count}"}
        begin_output(unfinished, inputs, source)
        source_stat = job.source.stat()
        blocks = part_blocks(plan_source(source, options), number, count)
        with contextlib.closing(DatasetWriter(unfinished, source.entries(), blocks)) as writer:
            align_into(writer, job, source, source_stat, blocks, options, get_detector)
        images = sum(stop - start for start, stop in blocks)
        write_summary(unfinished, inputs | {"images": images} | throughput(images, started))
        publish_output(unfinished, output)
    print(f"{output}: {images:,} images.")


def plan_source(source: Source, options: PrepareOptions) -> list[tuple[int, int]]:
    """The blocks of a source's images: the same in every process and after every restart."""
    return plan_blocks(source.entries(), max(BLOCK_IMAGES, options.detect_batch))


def describe_inputs(job: Job, source: Source, options: PrepareOptions) -> dict[str, Any]:
    """What the output depends on: an unfinished one is resumed only if all of it is the same."""
    return {
        "source": str(job.source.resolve()),
        "source_bytes": job.source.stat().st_size
        if job.source.is_file()
        else sum(entry.size for entry in source.entries()),
        "fingerprint": source.fingerprint(),
        "settings": {
            **_settings(job, options),
            "detect_batch": options.detect_batch,
            # Detections differ in their last bits between a CPU and a GPU.
            "device": get_device(options.device).type,
        },
        "versions": library_versions(),
    }


def _settings(job: Job, options: PrepareOptions) -> dict[str, Any]:
    """The settings that a finished data set must have been made with."""
    settings = {"crop_missed": job.crop_missed, "min_face": options.min_face}
    return settings | ({"aligned": True} if options.aligned else {})


def _check_has_images(path: Path, source: Source) -> None:
    """Warn of a corrupt archive; ArchiveError if it holds no images at all."""
    entries = source.entries()
    if source.corruption:
        print(f"WARNING: {source.corruption} What can be read of it is used.", file=sys.stderr)
    if source.identity_notice:
        print(f"{path.name}: {source.identity_notice}")
    skipped = source.skipped.counts
    reasons = " ".join(skipped)
    advice = " or ".join(text for reason, text in SKIP_ADVICE.items() if reason in reasons)
    if not entries:
        raise ArchiveError(
            f"{path} holds no images in folders of identities "
            f"(skipped: {format_counts(skipped) or 'nothing'}){advice and f': {advice}'}."
        )


# ------------------------------------------------------------------------------ its images


def _write_dataset(
    folder: Path,
    job: Job,
    source: Source,
    inputs: dict[str, Any],
    options: PrepareOptions,
    get_detector: Callable[[], FaceDetector],
    parts: Sequence[Path],
) -> dict[str, Any]:
    """Write what is missing in `folder`; returns the summary."""
    started = time.perf_counter()
    entries = source.entries()
    source_stat = job.source.stat()
    blocks = plan_source(source, options)
    with contextlib.closing(DatasetWriter(folder, entries, blocks)) as writer:
        resumed_at = writer.images_done
        if resumed_at:
            print(f"{job.source.name}: resuming after {resumed_at:,} of {len(entries):,} images.")
        if parts:
            results = read_parts(parts, entries, blocks, inputs)
            for block in itertools.islice(results, writer.blocks_done, None):
                writer.append(block)
        else:
            align_into(writer, job, source, source_stat, blocks, options, get_detector)
        if not writer.images_per_label:
            raise UserError(
                f"no face was found in any of the {len(entries):,} images in {job.source} "
                f"({format_counts(writer.statuses.counts)}; {folder / 'index.tsv'} lists them)."
            )
        writer.finish()
    reader = RecordReader(folder)
    check_index(folder, reader)
    if job.save_examples:
        save_examples(source, writer.face_kinds, reader, options.images_dir)
    summary = inputs | count_statuses(writer.statuses)
    summary |= {
        "identities": len(writer.images_per_label),
        "identities_in_source": len({entry.identity for entry in entries}),
        "not_pictures": source.skipped.as_dict(),
        "damage": source.corruption,
        "resumed_at": resumed_at,
        "parts": len(parts),
    }
    return summary | throughput(len(entries) - resumed_at, started)


def align_into(
    writer: DatasetWriter,
    job: Job,
    source: Source,
    source_stat: os.stat_result,
    blocks: Sequence[tuple[int, int]],
    options: PrepareOptions,
    get_detector: Callable[[], FaceDetector],
) -> None:
    """Align the blocks that the writer does not have yet, with a progress bar.

    `source_stat` is that of the archive or folder before it was read: UserError if it disappears.
    """
    results = align_blocks(
        source,
        blocks[writer.blocks_done :],
        None if options.aligned else get_detector(),
        crop_missed=job.crop_missed,
        detect_batch=options.detect_batch,
        workers=options.workers,
    )
    bar = tqdm(
        total=sum(stop - start for start, stop in blocks),
        initial=sum(stop - start for start, stop in blocks[: writer.blocks_done]),
        unit=" images",
        desc=job.source.name,
        disable=not is_main(),
    )
    # Closed here, whatever fails below, so that its threads have ended when this function has.
    with contextlib.closing(results), bar:
        for i, block in enumerate(results):
            if i == 0 and not options.aligned and all(r.was_face_size for r in block if r.jpeg):
                print(ALREADY_ALIGNED.format(job.source), file=sys.stderr)
            # One image may be unreadable; an archive that has vanished makes all of them so, and
            # these must not be recorded as skipped.
            if any(result.status == "unreadable" for result in block):
                _check_unmoved(job.source, source_stat)
            writer.append(block)
            bar.update(len(block))


def _check_unmoved(path: Path, before: os.stat_result) -> None:
    """UserError unless the file or folder at `path` is still the one that it was."""
    try:
        now = path.stat()
        same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{path} disappeared while it was being read: mount its disk again, or put it back, "
            "and start again; what is done is kept."
        )
