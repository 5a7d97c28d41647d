"""Compare preprocessing/detector.py with the mtcnn package itself, on the same decoded images.

    bash bench/peers.sh                 # once: TensorFlow and mtcnn in .venv-peers
    python -m bench.compare_mtcnn --data data/lfw-deepfunneled.tgz --images 500

takes images of one size spread evenly over an archive (or folder), detects on them with both, in
turn, and prints a table and a line of JSON: of how many images both take the same face (boxes
that overlap by half), how far the five points are apart, and images a second. The package runs
with its own defaults, in a process of its own, once image by image, as it is used, and once
in batches of 16, the largest that pays there.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from fileio.archive_source import ArchiveError
from fileio.archives import open_source
from preprocessing.detector import Detections, FaceDetector, choose_face
from utils import UserError, exit_on_user_error

PEER_SCRIPT = Path(__file__).with_name("peer_detect.py")
PEERS = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"


def read_images(path: Path, count: int) -> tuple[np.ndarray, list[bytes]]:
    """(count, H, W, 3) RGB images of the first one's size, evenly from a source, and their files.

    Raises UserError if none can be read.
    """
    images: list[np.ndarray] = []
    files: list[bytes] = []
    with open_source(path) as source:
        entries = source.entries()
        count = min(count, len(entries))
        chosen = [entries[i] for i in np.linspace(0, len(entries) - 1, count).round().astype(int)]
        for _, data in source.read(chosen):
            if isinstance(data, ArchiveError):
                continue
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None and (not images or image.shape == images[0].shape):
                images.append(image)
                files.append(data)
    if not images:
        raise UserError(f"No image in {path} can be read; give another --data.")
    return np.stack(images), files


def run_peer(name: str, images: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(k, 16) faces that a peer finds (see peer_detect.py); its seconds and CPU seconds.

    The latter mean more on a machine that is busy. Raises UserError if its environment is missing
    or it fails.
    """
    if not PEERS.is_file():
        raise UserError(f"The environment that {name} runs in is missing; run bash bench/peers.sh.")
    with tempfile.TemporaryDirectory() as folder:
        images_file, result = Path(folder) / "images.npy", Path(folder) / "faces.npz"
        np.save(images_file, images)
        command = [str(PEERS), str(PEER_SCRIPT), name, str(images_file), str(result), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise UserError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
        with np.load(result) as found:
            return found["rows"], found["took"]


def run_reference(images: np.ndarray) -> tuple[list[Detections], np.ndarray, np.ndarray]:
    """The mtcnn package's faces of each image; its clocks one by one and batched."""
    rows, one_by_one = run_peer("mtcnn", images, 1)
    _, batched = run_peer("mtcnn", images, 16)
    faces = []
    for i in range(len(images)):
        mine = rows[rows[:, 0] == i].astype(np.float32)
        points = mine[:, 6:].reshape(-1, 2, 5).transpose(0, 2, 1)
        faces.append(Detections(mine[:, 1:5], mine[:, 5], points))
    return faces, one_by_one, batched


def run_ours(images: np.ndarray, batch: int, device: str) -> tuple[list[Detections], np.ndarray]:
    """This project's faces of each image; its seconds and CPU seconds."""
    detector = FaceDetector(device)
    detector.detect(images[:batch])
    begin = np.array([time.perf_counter(), time.process_time()])
    faces = []
    for i in range(0, len(images), batch):
        faces += detector.detect(images[i : i + batch])
    return faces, np.array([time.perf_counter(), time.process_time()]) - begin


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    size = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    both = size.prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def compare(
    ours: Sequence[Detections], theirs: Sequence[Detections], size: tuple[int, int]
) -> dict[str, Any]:
    """How far two detectors agree on the face chosen in each image of (height, width) pixels."""
    same, apart = 0, []
    for mine, other in zip(ours, theirs, strict=True):
        i, j = choose_face(mine, *size), choose_face(other, *size)
        if i is None or j is None:
            same += i is None and j is None
        elif overlap(mine.boxes[i], other.boxes[j]) >= 0.5:
            same += 1
            apart.append(np.linalg.norm(mine.points[i] - other.points[j], axis=1))
    distance = np.array(apart if apart else [[np.nan]])
    return {
        "images": len(ours),
        "same_face": same / len(ours),
        "points_median": float(np.median(distance)),
        "points_99": float(np.quantile(distance, 0.99)),
        "points_max": float(distance.max()),
        "images_over_half_a_pixel": int((distance.max(1) > 0.5).sum()),
        "faces_ours": sum(len(f.boxes) for f in ours),
        "faces_theirs": sum(len(f.boxes) for f in theirs),
        "without_face_ours": sum(len(f.boxes) == 0 for f in ours),
        "without_face_theirs": sum(len(f.boxes) == 0 for f in theirs),
    }


def print_table(report: dict[str, Any]) -> None:
    """The report as a person reads it."""
    print(f"{report['images']} images of {report['height']}x{report['width']}")
    print(f"same face            {report['same_face']:.2%}")
    print(
        f"points apart         median {report['points_median']:.4f}, "
        f"99 % {report['points_99']:.3f}, most {report['points_max']:.2f} pixels; "
        f"{report['images_over_half_a_pixel']} images over 0.5"
    )
    print(f"{'':20} {'ours':>8} {'mtcnn':>8}")
    print(f"{'faces':20} {report['faces_ours']:8} {report['faces_theirs']:8}")
    print(f"{'no face':20} {report['without_face_ours']:8} {report['without_face_theirs']:8}")
    for name, key in (("images/s", "images_per_s"), ("CPU ms an image", "cpu_ms_per_image")):
        ours, batched, single = (
            report[key][who] for who in ("ours", "mtcnn_batched", "mtcnn_one_by_one")
        )
        print(f"{name:20} {ours:8.1f} {batched:8.1f} batched, {single:.1f} one by one")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Detect with both and print how far they agree."""
    parser = argparse.ArgumentParser(prog="compare_mtcnn", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="archive or folder of images")
    parser.add_argument("--images", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="our batch (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="our device (default: %(default)s)")
    args = parser.parse_args(argv)

    images, _ = read_images(args.data, args.images)
    ours, seconds = run_ours(images, args.batch, args.device)
    theirs, one_by_one, batched = run_reference(images)
    height, width = images.shape[1:3]
    report = compare(ours, theirs, (height, width))
    report |= {"height": height, "width": width, "batch": args.batch, "device": args.device}
    took = {"ours": seconds, "mtcnn_batched": batched, "mtcnn_one_by_one": one_by_one}
    n = len(images)
    report["images_per_s"] = {who: n / wall for who, (wall, _) in took.items()}
    report["cpu_ms_per_image"] = {who: cpu / n * 1000 for who, (_, cpu) in took.items()}
    report |= {"torch": torch.__version__, "python": platform.python_version()}
    print_table(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
