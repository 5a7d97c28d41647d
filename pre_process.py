"""Prepare the training set and LFW: each image's face found, aligned to 112x112, and packed.

    python pre_process.py                      # whatever of the two lies in data/
    python pre_process.py --download-lfw       # fetch LFW first
    python pre_process.py --source my.zip --output data/my_faces
    torchrun --nproc-per-node=4 pre_process.py        # by four processes, on four GPUs if there are
    python pre_process.py --shard 1/4                  # a quarter; the others anywhere, anytime
    python pre_process.py --merge                      # and the quarters put together

takes data/CASIA-WebFace.zip (.tar, .tar.gz, .tgz, or a folder) to data/faces_webface_112x112/, and
data/lfw-funneled.tgz (or lfw-deepfunneled, or lfw; the same kinds) to data/faces_lfw_112x112/:
train.rec, train.idx, property, index.tsv and report.json in each.  A ready train.rec is checked and
indexed, not aligned again.  Ten images before and after alignment go to images/0_raw.jpg,
images/0_img.jpg and so on.  A bar shows images/s; at the end it prints, for each set,

    CASIA-WebFace.zip: 638 images in 4.1 s, 155 images/s on cpu
      kept 637 of 32 identities in data/faces_webface_112x112 (ok 637)
      passed over 1 (no_face 1)
      data/faces_webface_112x112/report.json names them

Killed at any moment and started again, it goes on where it was and ends with the same bytes.
"""

from __future__ import annotations

import datetime
import functools
import re
import shutil
import sys
from collections.abc import Callable
from typing import Any

import cv2

from config import Config, parse_args
from distributed.collectives import run_on_all
from distributed.process_group import (
    is_main,
    local_device,
    local_world_size,
    process_group,
    rank,
    world_size,
)
from preprocessing.detector import FaceDetector
from preprocessing.lfw_download import download_lfw
from preprocessing.merge_parts import find_shards
from preprocessing.prepare import prepare, prepare_shard
from preprocessing.sources import Job, find_jobs
from preprocessing.summary import (
    is_taken,
    summarise,
)
from utils import UserError, core_count, describe_os_error, exit_on_user_error

PATIENCE = datetime.timedelta(days=7)  # that one process waits for the slowest


@exit_on_user_error
def main(cfg: Config) -> None:
    """Prepare what there is, one set after the other; a set that fails does not stop the other."""
    # every image is one task of a pool: threads inside OpenCV would only compete
    cv2.setNumThreads(1)
    # what it cannot decode is counted by name: no need to print it
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    with process_group("cpu", PATIENCE):  # what they do together, they do by files
        prepare_all(cfg)


def prepare_all(cfg: Config) -> None:
    """Prepare every set there is."""
    lfw = run_on_all(lambda: download_lfw(cfg.data_dir)) if cfg.download_lfw else None
    threads = cfg.workers or max(1, core_count() // local_world_size())
    get_detector = functools.cache(
        lambda: FaceDetector(local_device(cfg.device), cfg.min_face, threads=threads)
    )
    problems = []
    for job in find_jobs(cfg, lfw):
        try:
            report = prepare_together(job, cfg, get_detector)
        except (UserError, OSError) as error:
            if world_size() > 1:  # the others are not waiting for the next set
                raise
            problems.append(describe_os_error(error) if isinstance(error, OSError) else str(error))
            continue
        if report:
            summarise(report, job.output)
    if problems:
        raise UserError("\n".join(problems))


def prepare_together(
    job: Job, cfg: Config, get_detector: Callable[[], FaceDetector]
) -> dict[str, Any] | None:
    """Prepare one data set by this process alone, or its part of it, or put the parts together."""
    number, count = shard_of(cfg)
    if job.source.suffix == ".rec" or (count == 1 and not cfg.merge):
        return prepare(job, cfg, get_detector) if is_main() else None
    if not cfg.merge:
        run_on_all(lambda: prepare_shard(job, cfg, get_detector, number, count))
    if not is_main() or (world_size() == 1 and not cfg.merge):
        return None
    shards = [] if is_taken(job.output) else find_shards(job.output)
    report = prepare(job, cfg, get_detector, shards)
    for shard in shards:
        shutil.rmtree(shard)
    return report


def shard_of(cfg: Config) -> tuple[int, int]:
    """Which part of the images is this process's, from 1, and of how many."""
    if not cfg.shard:
        return rank() + 1, world_size()
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", cfg.shard)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard {cfg.shard} should be like 1/4, 2/4, 3/4 or 4/4.")
    if world_size() > 1 or cfg.merge:
        raise UserError("--shard is for one process alone: leave out torchrun and --merge.")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "pre_process", doc=__doc__))
