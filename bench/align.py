"""Time pre_process.py's stages - decode, detect, warp and encode - and all of it, with the peers.

    bash bench/peers.sh                 # once: mtcnn and facenet-pytorch in .venv-peers
    python -m bench.align --data data/lfw-deepfunneled.tgz

Peers (left out without their environment) detect on the same decoded images, in turn with ours,
in the batches that suit them.  The last row is the whole of pre_process.py: an archive of the same
images in, finished records out.  The JSON goes to bench/results/align-<device>.json.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pre_process
from bench.common import Row, alone, arguments, clock, finish, peak_memory, ratio
from bench.compare_mtcnn import PEERS, read_images, run_peer
from bench.synthetic_inputs import drawn_archive
from config import Config
from fileio.images import decode_image, encode_jpeg
from preprocessing.detector import FaceDetector, find_face
from preprocessing.pipeline import align_face
from preprocessing.summary import read_summary
from utils import core_count, exit_on_user_error

BATCH = 64
PEER_BATCHES = {"mtcnn": 16, "facenet-pytorch": 64}  # the fastest of 1, 16, 64 each


def detect_all(images: np.ndarray, device: torch.device, repeats: int, min_face: float) -> tuple:
    """Seconds of each run of find_face on all images, and peak bytes."""
    detector = FaceDetector(device, min_face)

    def work() -> None:
        for start in range(0, len(images), BATCH):
            find_face(detector, images[start : start + BATCH])

    return clock(work, device, repeats), peak_memory(device)


def whole(archive: Path, device: torch.device) -> tuple[float, int]:
    """Seconds of one pre_process.py over an archive (start-up aside), and peak bytes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "records"
        cfg = Config(source=str(archive), output=str(output), images_dir=folder, device=device.type)
        pre_process.main(cfg)
        return read_summary(output)["seconds"], peak_memory(device)


def flops_of(images: np.ndarray) -> float:
    """Arithmetic of detection, an image; the networks' convolutions and products."""
    detector = FaceDetector("cpu")
    with FlopCounterMode(display=False) as counter:
        detector._detect(torch.from_numpy(images), 40.0, detector.thresholds)
    return counter.get_total_flops() / len(images)


def small_stages(images: np.ndarray, jpegs: list[bytes], args) -> list[Row]:
    """Decoding, warping and encoding on one core."""
    cv2.setNumThreads(1)
    count, cpu = min(256, len(images)), torch.device("cpu")
    found = find_face(FaceDetector("cpu"), images[:count])
    pairs = [(i, f.points) for i, f in zip(images, found, strict=False) if f.points is not None]
    faces = [align_face(image, points) for image, points in pairs]
    stages = {
        "decode a 250x250 JPEG": (count, lambda: [decode_image(j) for j in jpegs[:count]]),
        "warp": (len(pairs), lambda: [align_face(*pair) for pair in pairs]),
        "encode at 112x112": (len(pairs), lambda: [encode_jpeg(face) for face in faces]),
    }
    return [
        Row(f"{name}, one core", n, clock(work, cpu, args.repeats), cores=1)
        for name, (n, work) in stages.items()
    ]


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time the stages, the peers and the whole."""
    args = arguments("align", __doc__, argv, images=500)
    with drawn_archive(args.data, args.images) as source:
        images, jpegs = read_images(source, args.images)
    rows = small_stages(images, jpegs, args)
    flops = flops_of(images[:64])
    ours, wide, total = [], [], []
    peers: dict[str, list[float]] = {name: [] for name in PEER_BATCHES if PEERS.is_file()}
    memory = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "CASIA-WebFace.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for i, jpeg in enumerate(jpegs):
                file.writestr(f"CASIA-WebFace/{i // 20:07d}/{i % 20:03d}.jpg", jpeg)
        for _ in range(args.repeats):
            seconds, memory[0] = alone(detect_all, images, args.device, 1, 0)
            ours += seconds
            wide += alone(detect_all, images, args.device, 1, 20)[0]
            for name, times in peers.items():
                times.append(float(run_peer(name, images, PEER_BATCHES[name])[1][0]))
            seconds, memory[1] = alone(whole, archive, args.device)
            total.append(seconds)
    n = len(images)
    rows.append(Row("detect", n, ours, flops=flops, memory=memory[0]))
    rows.append(Row("detect, faces from 20 pixels as the peers", n, wide))
    for name, times in peers.items():
        rows.append(Row(f"detect, {name}, batches of {PEER_BATCHES[name]}", n, times))
    rows.append(Row("pre_process.py, zip to records", n, total, flops=flops, memory=memory[1]))
    extra = {f"detection, times {name}": ratio(times, ours) for name, times in peers.items()}
    extra |= {f"the whole, times {name}": ratio(times, total) for name, times in peers.items()}
    extra |= {"GFLOP of detection, an image": flops / 1e9, "cores": core_count()}
    finish(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
