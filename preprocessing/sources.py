"""What pre_process.py has to prepare: the archives in the data folder, and their output folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fileio.archive_source import decode_name
from preprocessing.summary import read_summary
from utils import UserError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Data sets by the name of their archive or folder, the preferred one first; case is ignored.
TRAINING_STEMS = ("casia-webface",)
LFW_STEMS = ("lfw-funneled", "lfw_funneled", "lfw-deepfunneled", "lfw_deepfunneled", "lfw")


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

    `output` replaces the default output folder, which is named after the source. `missed` says what
    becomes of an image without a face: "skip", "crop", or "auto", which crops in LFW (every pair
    needs both images) and skips in training sets. `lfw` is LFW's archive or folder if it is known.
    Raises UserError if there is nothing to prepare.
    """
    outputs = [default_output(Path(name), data_dir) for name in (*TRAINING_STEMS, "lfw")]

    def crops(is_lfw: bool) -> bool:
        return is_lfw if missed == "auto" else missed == "crop"

    if source:
        path = _as_pack(Path(source))
        if not path.exists():
            raise UserError(f"There is no {path}; --source names an archive, a folder or a .rec.")
        default = default_output(path, data_dir)
        return [Job(path, Path(output or default), crops(default == outputs[1]), True)]

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
            chosen = _as_pack(candidates[0])
            place = chosen.parent if chosen.suffix == ".rec" else default
            jobs.append(Job(chosen, place, crops(is_lfw), save_examples))
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


def default_output(source: Path, data_dir: Path) -> Path:
    """Where the faces of a source go if no --output is given: a ready pack stays where it is."""
    if source.suffix == ".rec":
        return source.parent
    stem = decode_name(os.fsencode(source.resolve().name))
    for suffix in ARCHIVE_SUFFIXES:
        stem = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
    if stem.lower() in TRAINING_STEMS:
        stem = "webface"
    elif stem.lower().startswith("lfw"):
        stem = "lfw"
    stem = re.sub(r"[^\w.-]+", "_", stem)
    return data_dir / f"faces_{stem}_112x112"


def _as_pack(path: Path) -> Path:
    """The train.rec in a folder that has one, else the path itself."""
    return path / "train.rec" if (path / "train.rec").is_file() else path


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
    if not candidates and not is_lfw:
        # A pack in a folder of any name, as Kaggle has them; not what this script has prepared.
        packs = [path.parent for path in sorted(data_dir.glob("*/train.rec"))]
        return [pack for pack in packs if "ready" in (read_summary(pack) or {"ready": True})]
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


def is_taken(output: Path) -> bool:
    """Whether the output folder exists and is not empty."""
    return output.is_dir() and any(output.iterdir())
