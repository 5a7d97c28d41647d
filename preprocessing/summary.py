"""The summary of a prepared data set, report.json: read, written, filled in and printed.

    {"source": "/data/CASIA-WebFace.zip", "images": 638, "kept": 637,
     "status": {"no_face": 1, "ok": 637}, "missed": {"no_face": {"count": 1, "names": [...]}}, ...}

The file's keys are part of the data set's format, so they keep the names they have always had.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import cv2
import torch

from fileio.archive_source import Tally
from fileio.safe_files import atomic_write
from utils import UserError

KEPT = ("ok", "retried", "central_crop")  # the statuses of images that have a record
# The keys that are read back from a report.json, and their types.
KEY_TYPES = {"source": str, "source_bytes": int, "settings": dict, "kept": int, "identities": int}


def read_summary(folder: Path, finished: bool = True) -> dict[str, Any] | None:
    """The folder's report.json; None if there is none.

    The summary of a data set that is not `finished` has no counts yet. Raises UserError if the
    file is corrupt or was written by another program.
    """
    path = folder / "report.json"
    if not path.exists():
        return None
    required = ["source", "source_bytes"]
    if finished:
        required += ["kept", "identities"]
    try:
        summary = json.loads(path.read_text("utf-8"))
        corrupt = any(
            type(summary[key]) is not expected  # isinstance would take True for an int
            for key, expected in KEY_TYPES.items()
            if key in required or key in summary
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        corrupt = True
    if corrupt:
        raise UserError(f"{path} is corrupt; move {folder} away and prepare it again.")
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write the folder's report.json atomically."""
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    with atomic_write(folder / "report.json") as file:
        # In a path that is not UTF-8, "backslashreplace" writes the very escapes of JSON.
        file.write(text.encode("utf-8", "backslashreplace"))


def count_statuses(statuses: Tally) -> dict[str, Any]:
    """The number of images by status, with the names of those that were skipped or cropped."""
    counts = dict(sorted(statuses.counts.items()))
    return {
        "images": sum(counts.values()),
        "kept": sum(number for status, number in counts.items() if status in KEPT),
        "status": counts,
        "missed": {s: m for s, m in statuses.as_dict().items() if s not in ("ok", "retried")},
    }


def throughput(images: int, started: float) -> dict[str, float]:
    """Seconds since `started` (of time.perf_counter) and images per second."""
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 2), "images_per_s": round(images / seconds, 1)}


def library_versions() -> dict[str, str]:
    """The versions of the libraries that pixels and detections depend on."""
    mtcnn = importlib.metadata.version("mtcnn")  # never imported: that would import TensorFlow
    return {"torch": torch.__version__, "cv2": cv2.__version__, "mtcnn": mtcnn}


def format_counts(counts: dict[str, int]) -> str:
    """`ok 630, retried 8`."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Print the numbers of the data set in the folder `output`."""
    kept = {s: n for s, n in summary["status"].items() if s in KEPT}
    skipped = {s: n for s, n in summary["status"].items() if s not in KEPT}
    not_images = {s: n["count"] for s, n in summary.get("not_pictures", {}).items()}
    device = summary.get("settings", {}).get("device", "cpu")
    resumed_at = summary.get("resumed_at", 0)

    line = (
        f"{Path(summary['source']).name}: {summary['images'] - resumed_at:,} images in "
        f"{summary['seconds']:.1f} s, {summary['images_per_s']:.0f} images/s on {device}"
    )
    if resumed_at:
        line += f", {resumed_at:,} done in earlier runs"
    if summary.get("parts"):
        line += f"; merged from {summary['parts']} parts"
    print(line)
    print(
        f"  kept {summary['kept']:,} of {summary['identities']:,} identities in {output} "
        f"({format_counts(kept)})"
    )
    line = f"  skipped {sum(skipped.values()):,}"
    if skipped:
        line += f" ({format_counts(skipped)})"
    print(line)
    if not_images:
        print(f"  not images: {format_counts(not_images)}")
    if skipped or not_images:
        print(f"  {output / 'report.json'} names them")
    if summary.get("damage"):
        print(f"  WARNING: {summary['damage']} Download it again to get the rest.")
