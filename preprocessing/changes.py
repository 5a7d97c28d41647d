"""What has changed in a source since a data set was prepared from it, without reading its images.

The fingerprint (all names and sizes) decides. Images of the same name and size are told apart by
the checksums that a .zip lists, elsewhere by the times at which they were written.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fileio.archive_source import Source
from fileio.index_tsv import read_index
from preprocessing.sources import Job
from preprocessing.summary import read_summary
from utils import UserError

# The files of a finished data set.
DATASET_FILES = ("train.rec", "train.idx", "property", "index.tsv", "report.json")


def check_finished(
    job: Job, settings: dict[str, Any], open_source: Callable[[Path, Path], Source]
) -> None:
    """Print that the output is finished; UserError unless it was made from this very source.

    `settings` are those that it must have been made with; `open_source` takes a path and a folder
    for temporary files.
    """
    summary = read_summary(job.output)
    missing = [name for name in DATASET_FILES if not (job.output / name).is_file()]
    if missing or summary is None:
        raise UserError(
            f"{job.output} exists but has no {missing[0]}, so it is not a finished output of this "
            "script; move it away or give another --output."
        )
    settings = {"aligned": False} | settings
    made_with = {key: summary.get("settings", {}).get(key, False) for key in settings}
    if made_with != settings:
        raise UserError(
            f"{job.output} was prepared with another --missed, --min-face or --aligned; move it "
            "away or give another --output."
        )
    # The archive may have been deleted since, to save space.
    if job.source.exists() and not is_same_file(summary, job.source):
        with open_source(job.source, job.output.parent) as source:
            change = describe_changes(job.output, summary, source)
        if change:
            raise UserError(
                f"{job.output} was prepared from {Path(summary['source']).name}, and {job.source} "
                f"differs: {change}. Move {job.output} away to prepare it anew, or give another "
                "--output."
            )
    print(
        f"{job.output} is finished: {summary['kept']:,} images of {summary['identities']:,} "
        "identities."
    )


def source_state(source: Source) -> dict[str, Any]:
    """What tells an exchanged image, for report.json; times are in seconds since 1970."""
    return {
        "stamps": source.stamps(),
        "begun": int(time.time()),
        "source_mtime": int(source.path.stat().st_mtime),
        "image_bytes": sum(entry.size for entry in source.entries()),
    }


def is_same_file(summary: dict[str, Any], path: Path) -> bool:
    """Whether an archive has the size and the time that it had: then nothing in it has changed."""
    status = path.stat()
    recorded = summary["source_bytes"], summary.get("source_mtime")
    return path.is_file() and recorded == (status.st_size, int(status.st_mtime))


def describe_changes(folder: Path, summary: dict[str, Any], source: Source) -> str:
    """What differs in the source from what the finished data set in `folder` was made of.

    Such as "3 images moved (a/1.jpg to b/1.jpg), 1 added, 2 gone"; empty if nothing does.
    """
    if "fingerprint" not in summary:  # prepared by an early version
        total = sum(entry.size for entry in source.entries())
        if source.path.is_file():
            total = source.path.stat().st_size
        return "" if total == summary["source_bytes"] else "its images are others"
    if summary["fingerprint"] == source.fingerprint():
        return exchanged_images(summary, source)
    table = read_index(folder)
    before = dict(zip(table.source, table.identity, strict=True))
    now = {entry.name: entry.identity for entry in source.entries()}
    gone, added = (sorted(a.keys() - b.keys()) for a, b in ((before, now), (now, before)))
    if gone or added:
        total = sum(entry.size for entry in source.entries())
        if total == summary.get("image_bytes") and _below_root(before) == _below_root(now):
            return ""  # an archive, and now what it unpacks to
        return _describe_names(len(before), gone, added)
    regrouped = sum(before[name] != now[name] for name in now)
    if regrouped:
        return (
            f"{regrouped:,} images belong to other identities: {len(set(now.values())):,} in place "
            f"of {len(set(before.values())):,} (--identity-level chooses)"
        )
    return "images of the same names have other sizes"


def exchanged_images(summary: dict[str, Any], source: Source) -> str:
    """Which images of the same names and sizes may be others; empty if none is."""
    stamps, begun = summary.get("stamps"), summary.get("begun", 0)
    if not isinstance(stamps, str) or not isinstance(begun, int) or stamps == source.stamps():
        return ""
    kind = stamps.split()[0]
    if kind != source.STAMP:
        return ""
    if kind == "crc32":
        return "images of the same names and sizes have other contents"
    entries = source.entries()
    newer = [entry for entry in entries if entry.stamp > begun]
    if len(newer) == len(entries):  # the whole folder was copied
        return ""
    if newer:
        noun = "image of the same size was" if len(newer) == 1 else "images of the same size were"
        return f"{len(newer):,} {noun} written since ({newer[0].name})"
    return "images of the same names and sizes have other times"


def _below_root(identities: dict[str, str]) -> set[tuple[str, str]]:
    """Names without the folders that all of them lie in, as archives may have, and identities."""
    root = posixpath.commonpath({name.rpartition("/")[0] for name in identities})
    return {(name.removeprefix(root).lstrip("/"), person) for name, person in identities.items()}


def _describe_names(total: int, gone: Sequence[str], added: Sequence[str]) -> str:
    """The difference between two lists of names, of which the first has `total`."""
    if len(gone) == total:
        return "its images are others"
    # An image that was moved has the same name in another folder.
    waiting: dict[str, list[str]] = {}
    for name in added:
        waiting.setdefault(posixpath.basename(name), []).append(name)
    places = [waiting.get(posixpath.basename(name)) for name in gone]
    moved = [(name, place.pop()) for name, place in zip(gone, places, strict=True) if place]
    numbers = {
        "moved": len(moved),
        "added": len(added) - len(moved),
        "gone": len(gone) - len(moved),
    }
    parts = [f"{number:,} {word}" for word, number in numbers.items() if number]
    noun = " images " if next(filter(None, numbers.values())) > 1 else " image "
    example = f" ({moved[0][0]} to {moved[0][1]})" if moved else ""
    return ", ".join(parts).replace(" ", noun, 1) + example
