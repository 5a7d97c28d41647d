"""Time pre_process.py and its stages - decode, detect, warp, encode - beside other detectors.

    bash bench/peers.sh                 # once: mtcnn and facenet-pytorch in .venv-peers
    python -m bench.align --data data/lfw-deepfunneled.tgz

The peers (skipped if .venv-peers does not exist) detect faces in the same decoded images, in the
batch sizes that suit them, alternately with this project. The last row is all of pre_process.py: an
archive of the same images in, a finished data set out. The JSON goes to
bench/results/align-<device>.json.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pre_process
from bench.common import (
    Row,
    in_fresh_process,
    parse_arguments,
    peak_memory,
    print_and_save,
    speedup,
    time_runs,
)
from bench.compare_mtcnn import PEERS, read_images, run_peer
from bench.synthetic_inputs import archive_or_synthetic
from config import Config
from fileio.images import decode_image, encode_jpeg
from preprocessing.detector import FaceDetector, find_face
from preprocessing.pipeline import align_face
from preprocessing.summary import read_summary
from utils import core_count, exit_on_user_error

DETECTION_BATCH = 64
PEER_BATCHES = {"mtcnn": 16, "facenet-pytorch": 64}  # the fastest of 1, 16 and 64 for each


def detect_all(
    images: np.ndarray, device: torch.device, repeats: int, min_face: float
) -> tuple[list[float], int]:
    """Seconds of each run of find_face over all images, and peak bytes."""
    detector = FaceDetector(device, min_face)

    def work() -> None:
        for start in range(0, len(images), DETECTION_BATCH):
            find_face(detector, images[start : start + DETECTION_BATCH])

    return time_runs(work, device, repeats), peak_memory(device)


def run_pre_process(archive: Path, device: torch.device) -> tuple[float, int]:
    """Seconds of pre_process.py over an archive, without its start-up, and peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "records"
        cfg = Config(source=str(archive), output=str(output), images_dir=folder, device=device.type)
        pre_process.main(cfg)
        return read_summary(output)["seconds"], peak_memory(device)


def detection_flops(images: np.ndarray) -> float:
    """Floating-point operations of detection per image: convolutions and matrix products."""
    detector = FaceDetector("cpu")
    with FlopCounterMode(display=False) as counter:
        detector._detect(torch.from_numpy(images), 40.0, detector.thresholds)
    return counter.get_total_flops() / len(images)


def single_core_stages(images: np.ndarray, jpegs: list[bytes], args: Namespace) -> list[Row]:
    """Decoding, warping and encoding on one core."""
    cv2.setNumThreads(1)
    count, cpu = min(256, len(images)), torch.device("cpu")
    chosen = find_face(FaceDetector("cpu"), images[:count])
    pairs = [(i, f.points) for i, f in zip(images, chosen, strict=False) if f.points is not None]
    faces = [align_face(image, points) for image, points in pairs]
    stages = {
        "decode a 250x250 JPEG": (count, lambda: [decode_image(j) for j in jpegs[:count]]),
        "warp": (len(pairs), lambda: [align_face(*pair) for pair in pairs]),
        "encode at 112x112": (len(pairs), lambda: [encode_jpeg(face) for face in faces]),
    }
    return [
        Row(f"{name}, one core", n, time_runs(work, cpu, args.repeats), cores=1)
        for name, (n, work) in stages.items()
    ]


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the stages, the peers, and all of pre_process.py."""
    args = parse_arguments("align", __doc__, argv, images=500)
    with archive_or_synthetic(args.data, args.images) as source:
        images, jpegs = read_images(source, args.images)
    rows = single_core_stages(images, jpegs, args)
    flops = detection_flops(images[:64])
    # Faces from 40 pixels are this project's default, faces from 20 that of the peers.
    default, from_20_pixels, pipeline = [], [], []
    peers: dict[str, list[float]] = {name: [] for name in PEER_BATCHES if PEERS.is_file()}
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "CASIA-WebFace.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for i, jpeg in enumerate(jpegs):
                file.writestr(f"CASIA-WebFace/{i // 20:07d}/{i % 20:03d}.jpg", jpeg)
        for _ in range(args.repeats):
            seconds, detection_memory = in_fresh_process(detect_all, images, args.device, 1, 0)
            default += seconds
            from_20_pixels += in_fresh_process(detect_all, images, args.device, 1, 20)[0]
            for name, times in peers.items():
                _, took = run_peer(name, images, PEER_BATCHES[name])
                times.append(float(took[0]))
            seconds, pipeline_memory = in_fresh_process(run_pre_process, archive, args.device)
            pipeline.append(seconds)
    n = len(images)
    rows.append(Row("detect", n, default, flops=flops, memory=detection_memory))
    rows.append(Row("detect, faces from 20 pixels as the peers", n, from_20_pixels))
    for name, times in peers.items():
        rows.append(Row(f"detect, {name}, batches of {PEER_BATCHES[name]}", n, times))
    name = "pre_process.py, zip to records"
    rows.append(Row(name, n, pipeline, flops=flops, memory=pipeline_memory))
    extra = {f"detection, times {name}": speedup(times, default) for name, times in peers.items()}
    extra |= {
        f"pre_process.py, times {name}": speedup(times, pipeline) for name, times in peers.items()
    }
    extra |= {"GFLOP of detection per image": flops / 1e9, "cores": core_count()}
    print_and_save(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
