"""Prepare the training set and LFW: each picture's face found, aligned to 112x112, and packed.

    python pre_process.py                      # whatever of the two lies in data/
    python pre_process.py --download-lfw       # fetch LFW first
    python pre_process.py --source my.zip --output data/my_faces

takes data/CASIA-WebFace.zip (.tar, .tar.gz, .tgz, or a folder) to data/faces_webface_112x112/, and
data/lfw-funneled.tgz (or lfw-deepfunneled, or lfw; the same kinds) to data/faces_lfw_112x112/:
train.rec, train.idx, property, index.tsv and report.json in each.  A ready train.rec is checked and
indexed, not aligned again.  Ten pictures before and after alignment go to images/0_raw.jpg,
images/0_img.jpg and so on.  A bar shows images/s; at the end it prints, for each set,

    CASIA-WebFace.zip: 638 pictures in 4.1 s, 155 images/s on cpu
      kept 637 of 32 identities in data/faces_webface_112x112 (ok 637)
      passed over 1 (no_face 1)
      data/faces_webface_112x112/report.json names them

Killed at any moment and started again, it goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from align import BLOCK_IMAGES, align_blocks, plan_blocks
from archives import ArchiveError, Limits, Source, Tally, open_source
from config import Config, parse_args
from face_detect import FaceDetector
from index_tsv import check_index
from jobs import Job, find_jobs
from journal import FACE, Journal, begin, complete, read_report, write_report
from lfw_download import download_lfw
from locks import LOCK, locked
from pictures import decode_picture
from ready_pack import index_pack
from recordio import RecordReader, encode_jpeg
from utils import (
    UserError,
    atomic_write,
    exit_with_sentence,
    get_device,
    make_folder,
    sync_folder,
    what_failed,
    write_errors,
)

FINISHED = ("train.rec", "train.idx", "property", "index.tsv", "report.json")
KEPT = ("ok", "retried", "central_crop")
PAIRS = 10  # pictures shown before and after


# ------------------------------------------------------------------------------ one data set


def prepare(
    job: Job, cfg: Config, get_detector: Callable[[], FaceDetector]
) -> dict[str, Any] | None:
    """Prepare one data set; returns its report, or None if it was finished before.

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
        if source.damage:
            print(f"WARNING: {source.damage} What can be read of it is used.", file=sys.stderr)
        if not entries:
            raise ArchiveError(
                f"{job.source} holds no pictures in folders of identities "
                f"(passed over: {listed(source.passed.counts) or 'nothing'})."
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
            report = align_source(job, part, source, begun, cfg, get_detector())
            complete(part, job.output)
    return report


def is_taken(output: Path) -> bool:
    """Whether something lies where the output should be."""
    return output.is_dir() and any(output.iterdir())


def check_finished(job: Job, cfg: Config) -> None:
    """Say that the output is finished; UserError unless it was made from this very source."""
    report = read_report(job.output)
    missing = [name for name in FINISHED if not (job.output / name).is_file()]
    if missing or report is None:
        raise UserError(
            f"{job.output} is there but has no {missing[0]}, so it is no finished output of this "
            "script; move it away or give another --output."
        )
    settings = {"crop_missed": job.crop_missed, "min_face": cfg.min_face}
    same_settings = settings.items() <= report.get("settings", {}).items()
    gone = not job.source.exists()  # whoever deletes the archive afterwards saves space
    if not gone and report["source_bytes"] != source_bytes(job.source):
        raise UserError(
            f"{job.output} was prepared from another {Path(report['source']).name}; move it away "
            f"or give another --output to prepare {job.source}."
        )
    if not same_settings:
        raise UserError(
            f"{job.output} was prepared with another --missed or --min-face; move it away or give "
            "another --output."
        )
    (job.output / LOCK).unlink(missing_ok=True)  # of a process killed right after the rename
    print(f"{job.output} is finished: {report['kept']:,} faces of {report['identities']:,} people.")


def source_bytes(path: Path, source: Source | None = None) -> int:
    """Size of an archive, or of all pictures in a folder: enough to tell whether it changed."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.size for entry in (source or open_source(path)).entries())


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
    """UserError unless the source is still what it was: a disk that has gone is no bad picture."""
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
    detector: FaceDetector,
) -> dict[str, Any]:
    """Do in `part` what is left to do, down to the report, which it returns."""
    started = time.perf_counter()
    entries, there = source.entries(), job.source.stat()
    blocks = plan_blocks(entries, max(BLOCK_IMAGES, cfg.detect_batch))
    with contextlib.closing(Journal(part, entries, blocks)) as journal:
        resumed_at = journal.images
        if resumed_at:
            print(f"{job.source.name}: going on after {resumed_at:,} of {len(entries):,} pictures.")
        results = align_blocks(
            *(source, blocks[journal.done :], detector),
            *(job.crop_missed, cfg.detect_batch, cfg.workers),
        )
        bar = tqdm(total=len(entries), initial=resumed_at, unit=" images", desc=job.source.name)
        with bar:
            for block in results:
                if any(face.status == "unreadable" for face in block):
                    check_there(job.source, there)
                journal.append(block)
                bar.update(len(block))
        if not journal.counts:
            raise UserError(
                f"not one of the {len(entries):,} pictures in {job.source} gave a face "
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
    report |= {"not_pictures": source.passed.as_dict()}
    report |= {"damage": source.damage, "resumed_at": resumed_at}
    report |= timing(len(entries) - resumed_at, started)
    write_report(part, report)
    return report


# ------------------------------------------------------------------------------ what came of it


def count(statuses: Tally) -> dict[str, Any]:
    """Pictures by status; those not found or passed over by name too."""
    found = {s: n for s, n in sorted(statuses.counts.items()) if s in KEPT}
    return {
        "images": sum(statuses.counts.values()),
        "kept": sum(found.values()),
        "status": dict(sorted(statuses.counts.items())),
        "missed": {s: m for s, m in statuses.as_dict().items() if s not in ("ok", "retried")},
    }


def timing(images: int, started: float) -> dict[str, float]:
    """Seconds since `started`, and images/s."""
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "images_per_s": round(images / seconds, 1)}


def listed(counts: dict[str, int]) -> str:
    """`ok 630, retried 8`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def summarise(report: dict[str, Any], output: Path) -> None:
    """Print a report's numbers."""
    kept = {s: n for s, n in report["status"].items() if s in KEPT}
    passed = {s: n for s, n in report["status"].items() if s not in KEPT}
    others = {s: n["count"] for s, n in report.get("not_pictures", {}).items()}
    device = report.get("settings", {}).get("device", "cpu")
    before = report.get("resumed_at", 0)
    done = report["images"] - before
    print(
        f"{Path(report['source']).name}: {done:,} pictures in {report['seconds']:.1f} s, "
        f"{report['images_per_s']:.0f} images/s on {device}"
        + (f", {before:,} done before" if before else "")
        + f"\n  kept {report['kept']:,} of {report['identities']:,} identities in {output} "
        f"({listed(kept)})\n"
        f"  passed over {sum(passed.values()):,}" + (f" ({listed(passed)})" if passed else "")
    )
    if others:
        print(f"  no pictures: {listed(others)}")
    if passed or others:
        print(f"  {output / 'report.json'} names them")
    if report.get("damage"):
        print(f"  WARNING: {report['damage']} Fetch it again to have the rest.")


def write_pairs(source: Source, found: bytes, reader: RecordReader, images_dir: Path) -> None:
    """Ten pictures as they were and aligned, evenly spread over those with a face.

    found: of each entry NO_FACE, CROP or FACE.
    """
    kept = np.frombuffer(found, np.uint8)
    faces = np.flatnonzero(kept == FACE)
    faces = faces if len(faces) else np.flatnonzero(kept)
    rows = faces[np.unique(np.linspace(0, len(faces) - 1, PAIRS).round().astype(int))]
    originals = dict(source.read(source.entries()[row] for row in rows))
    with write_errors(images_dir), one_at_a_time(images_dir):
        for i in range(PAIRS):
            raw, img = images_dir / f"{i}_raw.jpg", images_dir / f"{i}_img.jpg"
            if i >= len(rows):  # fewer pictures than last time
                raw.unlink(missing_ok=True)
                img.unlink(missing_ok=True)
                continue
            data = originals[source.entries()[rows[i]]]
            if not data.startswith(b"\xff\xd8"):
                data = encode_jpeg(decode_picture(data))
            aligned = reader.jpeg(int(np.count_nonzero(kept[: rows[i]])))
            for path, content in ((raw, data), (img, aligned)):
                with atomic_write(path) as file:
                    file.write(content)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, after whoever holds it: so that all pairs are of one set."""
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@exit_with_sentence
def main(cfg: Config) -> None:
    """Prepare what there is, one set after the other; a set that fails does not stop the other."""
    # every picture is one task of a pool: threads inside OpenCV would only compete
    cv2.setNumThreads(1)
    # what it cannot decode is counted by name: no need to print it
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    lfw = download_lfw(cfg.data_dir) if cfg.download_lfw else None
    get_detector = functools.cache(
        lambda: FaceDetector(get_device(cfg.device), cfg.min_face, threads=cfg.workers)
    )
    problems = []
    for job in find_jobs(cfg, lfw):
        try:
            report = prepare(job, cfg, get_detector)
        except UserError as error:
            problems.append(str(error))
            continue
        except OSError as error:
            problems.append(what_failed(error))
            continue
        if report:
            summarise(report, job.output)
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "pre_process"))
