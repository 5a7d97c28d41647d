"""Prepare the training set and LFW: detect the face in each image, align it to 112x112, pack it.

    python pre_process.py                      # the training set and LFW, if they are in data/
    python pre_process.py --download-lfw       # download LFW first
    python pre_process.py --source photos      # a folder or archive: data/faces_photos_112x112
    python pre_process.py --source faces --aligned     # of faces that are 112x112 already
    torchrun --nproc-per-node=4 pre_process.py         # four processes, each on a GPU if there are
    python pre_process.py --shard 1/4                  # part 1 of 4; the others on any machine
    python pre_process.py --merge                      # merge the four parts

reads data/CASIA-WebFace.zip (.tar, .tar.gz, .tgz, or a folder) and writes
data/faces_webface_112x112/; reads data/lfw-funneled.tgz (or lfw-deepfunneled, or lfw; the same
formats) and writes data/faces_lfw_112x112/: train.rec, train.idx, property, index.tsv and
report.json in each. A ready train.rec is checked and indexed, not aligned again. The folder of an
image is its identity (--identity-level where folders are nested). Ten images before
and after alignment go to images/0_raw.jpg, images/0_img.jpg and so on. A bar shows images/s; at the
end it prints, for each data set,

    CASIA-WebFace.zip: 638 images in 4.1 s, 155 images/s on cpu
      kept 637 of 32 identities in data/faces_webface_112x112 (ok 637)
      skipped 1 (no_face 1)
      data/faces_webface_112x112/report.json names them

After a kill at any point the same command resumes, and ends with the same bytes.
"""

from __future__ import annotations

import datetime
import functools
import os
import re
import sys
from pathlib import Path

from config import Config, parse_args
from utils import UserError, describe_os_error, exit_on_user_error

GROUP_TIMEOUT = datetime.timedelta(days=7)  # a process waits as long for the slowest part


@exit_on_user_error
def main(cfg: Config) -> None:
    """Prepare the data sets one after the other; one that fails does not stop the next."""
    # Images that OpenCV cannot decode are counted by name; its own warnings say less. It reads this
    # when it is imported: cv2.utils.logging is missing in 4.9 to 4.12.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    # Imported here, so that --help answers at once.
    import cv2

    from distributed.process_group import process_group

    # Every image is one task of a thread pool: threads inside OpenCV would only compete with it.
    cv2.setNumThreads(1)
    # On CPU tensors: the processes exchange results by files, and only wait for each other here.
    with process_group("cpu", GROUP_TIMEOUT):
        prepare_all(cfg)


def prepare_all(cfg: Config) -> None:
    """Prepare every data set that cfg asks for, and print a summary of each."""
    from distributed.collectives import run_on_main
    from distributed.process_group import local_device, local_world_size, rank, world_size
    from fileio.archive_source import Limits
    from preprocessing.detector import FaceDetector
    from preprocessing.lfw_download import download_lfw
    from preprocessing.prepare import PrepareOptions, prepare_job
    from preprocessing.sources import find_jobs
    from preprocessing.summary import print_summary
    from utils import core_count

    part = rank() + 1, world_size()
    if cfg.shard:
        part = parse_part(cfg.shard)
        if world_size() > 1 or cfg.merge:
            raise UserError("--shard is for a single process: leave out torchrun and --merge.")
    lfw = None
    if cfg.download_lfw:
        lfw = run_on_main(lambda: download_lfw(cfg.data_dir))
    jobs = find_jobs(Path(cfg.data_dir), cfg.source, cfg.output, cfg.missed, lfw)
    threads = cfg.workers or max(1, core_count() // local_world_size())
    options = PrepareOptions(
        device=cfg.device,
        min_face=cfg.min_face,
        detect_batch=cfg.detect_batch,
        workers=threads,
        limits=Limits(cfg.max_file_mb << 20, cfg.max_ratio),
        images_dir=Path(cfg.images_dir),
        aligned=cfg.aligned,
        identity_level=cfg.identity_level,
    )
    # Built for the first image that is aligned: a finished data set needs no detector.
    get_detector = functools.cache(
        lambda: FaceDetector(local_device(cfg.device), cfg.min_face, threads=threads)
    )
    errors = []
    for job in jobs:
        try:
            summary = prepare_job(job, options, get_detector, part, cfg.merge)
        except (UserError, OSError) as error:
            if world_size() > 1:  # the other processes are not on their way to the next data set
                raise
            errors.append(describe_os_error(error) if isinstance(error, OSError) else str(error))
            continue
        if summary:
            print_summary(summary, job.output)
            if not job.crop_missed and job.output != Path(cfg.data_dir, "faces_webface_112x112"):
                print(f"  train on it: python train.py --train-set {job.output}")
    if errors:
        raise UserError("\n".join(errors))


def parse_part(shard: str) -> tuple[int, int]:
    """Number (from 1) and count of --shard: "2/4" is part 2 of 4."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {shard} should be like 1/4, 2/4, 3/4 or 4/4.")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "pre_process", doc=__doc__))
