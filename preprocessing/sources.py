"""What pre_process.py has to prepare: the archives in the data folder, and their output folders."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fileio.archive_source import Source
from fileio.archives import open_source
from preprocessing.summary import read_summary
from utils import UserError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Data sets by the name of their archive or folder, the preferred one first; case is ignored.
TRAINING_STEMS = ("casia-webface",)
LFW_STEMS = ("lfw-funneled", "lfw_funneled", "lfw-deepfunneled", "lfw_deepfunneled", "lfw")
# The files of a finished data set.
DATASET_FILES = ("train.rec", "train.idx", "property", "index.tsv", "report.json")


class Job(NamedTuple):
    """One data set to prepare."""

    source: Path  # an archive, a folder, or the train.rec of a ready pack
    output: Path
    crop_missed: bool  # keep images without a face, cropped centrally
    save_examples: bool  # write images before and after alignment


def find_jobs(
    data_dir: Path,
    source: str = "",
    output: str = "",
    missed: str = "auto",
    lfw: Path | None = None,
) -> list[Job]:
    """The data sets to prepare: `source` alone if it is given, else those in `data_dir`.

    `output` replaces the default output folder. `missed` says what becomes of an image without a
    face: "skip", "crop", or "auto", which crops in LFW (every pair needs both images) and skips in
    training sets. `lfw` is LFW's archive or folder if it is known. Raises UserError if there is
    nothing to prepare.
    """
    outputs = (data_dir / "faces_webface_112x112", data_dir / "faces_lfw_112x112")

    def crops(is_lfw: bool) -> bool:
        return is_lfw if missed == "auto" else missed == "crop"

    if source:
        path = Path(source)
        is_lfw = path.name.lower().startswith("lfw")
        default = outputs[1] if is_lfw else outputs[0]
        if (path / "train.rec").is_file():
            path = path / "train.rec"
        if path.suffix == ".rec":  # a ready pack is indexed where it is
            default = path.parent
        return [Job(path, Path(output or default), crops(is_lfw), save_examples=True)]

    jobs: list[Job] = []
    for is_lfw, default in zip((False, True), outputs, strict=True):
        candidates = _candidates(data_dir, default, is_lfw, lfw)
        if len(candidates) > 1:
            ignored = ", ".join(map(str, candidates[1:]))
            print(f"{candidates[0]} is used; {ignored} is ignored.")
        if candidates:
            # The examples show the training set, or LFW if it is the only one to be aligned: a
            # ready pack has no images from before the alignment.
            save_examples = all(job.source.suffix == ".rec" for job in jobs)
            jobs.append(Job(candidates[0], default, crops(is_lfw), save_examples))
    if not jobs:
        raise UserError(
            f"there is nothing to prepare in {data_dir}/: no training set (CASIA-WebFace.zip, "
            ".tar, .tar.gz, .tgz or folder, or a ready faces_webface_112x112/train.rec) and no LFW "
            "(lfw-funneled.tgz, lfw-deepfunneled.tgz or lfw.tgz). Run `make demo` to see it all on "
            "synthetic faces, or get the archives as README.md says and put them there."
        )
    if output and len(jobs) > 1:
        raise UserError(f"--output is one folder, but {data_dir}/ holds two sets; add --source.")
    return [job._replace(output=Path(output or job.output)) for job in jobs]


def _candidates(data_dir: Path, output: Path, is_lfw: bool, lfw: Path | None) -> list[Path]:
    """The possible sources of the training set or of LFW, the one to use first."""
    summary = read_summary(output)
    candidates = find_sources(data_dir, is_lfw)
    if (output / "train.rec").is_file() and (summary is None or "ready" in summary):
        return [output / "train.rec", *candidates]
    if is_lfw and lfw is not None:
        return [lfw, *(path for path in candidates if path != lfw)]
    if not candidates and summary:  # finished, and the archive was deleted afterwards
        return [Path(summary["source"])]
    return candidates


def find_sources(data_dir: Path, is_lfw: bool) -> list[Path]:
    """The archives and folders of training sets, or of LFW, in a folder; the preferred one first.

    For LFW that includes any archive whose name begins with "lfw", and the lfw_home folder of
    scikit-learn.
    """
    paths = {path.name.lower(): path for path in sorted(data_dir.glob("*"))}
    stems = LFW_STEMS if is_lfw else TRAINING_STEMS
    names = [stem + suffix for stem in stems for suffix in (*ARCHIVE_SUFFIXES, "")]
    if is_lfw:
        names += [n for n in paths if n.startswith("lfw") and n.endswith(ARCHIVE_SUFFIXES)]
    sources = [paths[name] for name in dict.fromkeys(names) if name in paths]
    if is_lfw:
        home = data_dir / "lfw_home"  # scikit-learn keeps LFW unpacked or packed
        sources += [p for p in (home / "lfw_funneled", home / "lfw-funneled.tgz") if p.exists()]
    return sources


def source_bytes(path: Path, source: Source | None = None) -> int:
    """Size of an archive, or of all images in a folder: enough to tell whether it has changed."""
    if path.is_file():
        return path.stat().st_size
    return sum(entry.size for entry in (source or open_source(path)).entries())


def is_taken(output: Path) -> bool:
    """Whether the output folder exists and is not empty."""
    return output.is_dir() and any(output.iterdir())


def check_finished(job: Job, min_face: int) -> None:
    """Print that the output is finished; UserError unless it was made from this very source."""
    summary = read_summary(job.output)
    missing = [name for name in DATASET_FILES if not (job.output / name).is_file()]
    if missing or summary is None:
        raise UserError(
            f"{job.output} exists but has no {missing[0]}, so it is not a finished output of this "
            "script; move it away or give another --output."
        )
    # The archive may have been deleted since, to save space.
    if job.source.exists() and summary["source_bytes"] != source_bytes(job.source):
        raise UserError(
            f"{job.output} was prepared from another {Path(summary['source']).name}; move it away "
            f"or give another --output to prepare {job.source}."
        )
    settings = {"crop_missed": job.crop_missed, "min_face": min_face}
    if not settings.items() <= summary.get("settings", {}).items():
        raise UserError(
            f"{job.output} was prepared with another --missed or --min-face; move it away or give "
            "another --output."
        )
    print(
        f"{job.output} is finished: {summary['kept']:,} images of {summary['identities']:,} "
        "identities."
    )
