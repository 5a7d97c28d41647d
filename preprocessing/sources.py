"""What pre_process.py has to do: which archives lie in the data folder, where their faces go."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from config import Config
from preprocessing.dataset_writer import read_report
from utils import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# Sets by the name of their archive or folder, the preferred one first; upper case does not matter.
TRAINING_STEMS = ("casia-webface",)
LFW_STEMS = ("lfw-funneled", "lfw_funneled", "lfw-deepfunneled", "lfw_deepfunneled", "lfw")


class Job(NamedTuple):
    """One data set to prepare: crop_missed keeps images without a face, cropped centrally."""

    source: Path
    output: Path
    crop_missed: bool
    show: bool  # write images before and after


def find_jobs(cfg: Config, lfw: Path | None = None) -> list[Job]:
    """What there is to do: --source, or what lies in data_dir (or `lfw`, for LFW).

    Raises UserError if there is nothing, naming what was looked for.
    """
    data = Path(cfg.data_dir)
    outputs = (data / "faces_webface_112x112", data / "faces_lfw_112x112")
    if cfg.source:
        path = Path(cfg.source)
        source = path / "train.rec" if (path / "train.rec").is_file() else path
        is_lfw = path.name.lower().startswith("lfw")
        output = source.parent if source.suffix == ".rec" else outputs[is_lfw]
        return [Job(source, Path(cfg.output or output), _crops(cfg, is_lfw), True)]
    jobs = []
    for is_lfw, output in enumerate(outputs):
        report = read_report(output)
        found = find_sources(data, bool(is_lfw))
        if (output / "train.rec").is_file() and (report is None or "ready" in report):
            found.insert(0, output / "train.rec")
        elif is_lfw and lfw is not None:
            found = [lfw, *(path for path in found if path != lfw)]
        elif not found and report:  # finished, and the archive deleted since
            found = [Path(report["source"])]
        if len(found) > 1:
            print(f"{found[0]} is taken; {', '.join(map(str, found[1:]))} is left aside.")
        if found:
            # a ready pack has no images from before the alignment
            show = all(job.source.suffix == ".rec" for job in jobs)
            jobs.append(Job(found[0], output, _crops(cfg, bool(is_lfw)), show))
    if not jobs:
        raise UserError(
            f"there is nothing to prepare in {data}/: no training set (CASIA-WebFace.zip, .tar, "
            ".tar.gz, .tgz or folder, or a ready faces_webface_112x112/train.rec) and no LFW "
            "(lfw-funneled.tgz, lfw-deepfunneled.tgz or lfw.tgz). Run `make demo` to see it all on "
            "synthetic faces, or get the archives as README.md says and put them there."
        )
    if cfg.output and len(jobs) > 1:
        raise UserError(f"--output is one folder, but {data}/ holds two sets; add --source.")
    return [job._replace(output=Path(cfg.output or job.output)) for job in jobs]


def find_sources(data: Path, is_lfw: bool) -> list[Path]:
    """The training sets, or the LFWs, that lie in a folder; the one to take first."""
    there = {path.name.lower(): path for path in sorted(data.glob("*"))}
    stems = LFW_STEMS if is_lfw else TRAINING_STEMS
    names = [stem + suffix for stem in stems for suffix in (*SUFFIXES, "")]
    if is_lfw:
        names += [n for n in there if n.startswith("lfw") and n.endswith(SUFFIXES)]
    found = [there[name] for name in dict.fromkeys(names) if name in there]
    if is_lfw:  # scikit-learn's folder, packed and unpacked
        home = data / "lfw_home"
        found += [p for p in (home / "lfw_funneled", home / "lfw-funneled.tgz") if p.exists()]
    return found


def _crops(cfg: Config, is_lfw: bool) -> bool:
    return is_lfw if cfg.missed == "auto" else cfg.missed == "crop"
