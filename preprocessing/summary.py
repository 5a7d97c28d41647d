"""Whether a data set is prepared, and what came of it: its numbers, and ten pairs to look at."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from fileio.archive_source import Source, Tally
from fileio.archives import open_source
from fileio.images import decode_image, encode_jpeg
from fileio.locks import LOCK
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder, write_errors
from preprocessing.dataset_writer import FACE, read_report
from preprocessing.sources import Job
from utils import UserError

FINISHED = ("train.rec", "train.idx", "property", "index.tsv", "report.json")
KEPT = ("ok", "retried", "central_crop")
PAIRS = 10  # images shown before and after


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
    """Size of an archive, or of all images in a folder: enough to tell whether it changed."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.size for entry in (source or open_source(path)).entries())


def count(statuses: Tally) -> dict[str, Any]:
    """Images by status; those not found or passed over by name too."""
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
        f"{Path(report['source']).name}: {done:,} images in {report['seconds']:.1f} s, "
        f"{report['images_per_s']:.0f} images/s on {device}"
        + (f", {before:,} done before" if before else "")
        + (f"; put together from {report['parts']} parts" if report.get("parts") else "")
        + f"\n  kept {report['kept']:,} of {report['identities']:,} identities in {output} "
        f"({listed(kept)})\n"
        f"  passed over {sum(passed.values()):,}" + (f" ({listed(passed)})" if passed else "")
    )
    if others:
        print(f"  no images: {listed(others)}")
    if passed or others:
        print(f"  {output / 'report.json'} names them")
    if report.get("damage"):
        print(f"  WARNING: {report['damage']} Fetch it again to have the rest.")


def write_pairs(source: Source, found: bytes, reader: RecordReader, images_dir: Path) -> None:
    """Ten images as they were and aligned, evenly spread over those with a face.

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
            if i >= len(rows):  # fewer images than last time
                raw.unlink(missing_ok=True)
                img.unlink(missing_ok=True)
                continue
            data = originals[source.entries()[rows[i]]]
            if not data.startswith(b"\xff\xd8"):
                data = encode_jpeg(decode_image(data))
            aligned = reader.encoded(int(np.count_nonzero(kept[: rows[i]])))
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
