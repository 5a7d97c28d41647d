"""Compare preprocessing/detector.py with the mtcnn package itself, on the same decoded images.

    bash bench/peers.sh                 # once: TensorFlow and mtcnn in .venv-peers
    python -m bench.compare_mtcnn --data data/lfw-deepfunneled.tgz --images 500

Takes images of one size, evenly spread over an archive or folder, and detects faces in them with
both. Prints a table and a line of JSON: in how many images both choose the same face (boxes of an
IoU of at least 0.5), the distance of the five landmarks, and images per second. The package runs
with its own defaults in its own process, once image by image, as it is usually called, and once in
batches of 16, beyond which it gets no faster.
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
    """Images of the first one's size, evenly spread over a source: (n, H, W, 3) RGB, and files.

    There are at most `count`; unreadable images and those of another size are skipped. Raises
    UserError if none is left.
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
    """The faces that a peer detects, (k, 16) rows of peer_detect.py; its seconds and CPU seconds.

    CPU seconds are the better measure on a busy machine. Raises UserError if the peers'
    environment is missing or the peer fails.
    """
    if not PEERS.is_file():
        raise UserError(f"The environment that {name} runs in is missing; run bash bench/peers.sh.")
    with tempfile.TemporaryDirectory() as folder:
        images_file, result = Path(folder) / "images.npy", Path(folder) / "faces.npz"
        np.save(images_file, images)
        command = [str(PEERS), str(PEER_SCRIPT), name, str(images_file), str(result), str(batch)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            raise UserError(f"{name} failed: {process.stderr.strip().splitlines()[-1]}")
        with np.load(result) as arrays:
            return arrays["rows"], arrays["took"]


def run_reference(images: np.ndarray) -> tuple[list[Detections], np.ndarray, np.ndarray]:
    """The mtcnn package's faces in each image; (seconds, CPU seconds) one by one and batched."""
    rows, one_by_one = run_peer("mtcnn", images, 1)
    _, batched = run_peer("mtcnn", images, 16)
    faces = []
    for i in range(len(images)):
        detected = rows[rows[:, 0] == i].astype(np.float32)
        points = detected[:, 6:].reshape(-1, 2, 5).transpose(0, 2, 1)  # five x, five y to pairs
        faces.append(Detections(detected[:, 1:5], detected[:, 5], points))
    return faces, one_by_one, batched


def run_project(images: np.ndarray, batch: int, device: str) -> tuple[list[Detections], np.ndarray]:
    """This project's faces in each image; its seconds and CPU seconds."""
    detector = FaceDetector(device)
    detector.detect(images[:batch])
    begin = np.array([time.perf_counter(), time.process_time()])
    faces = []
    for i in range(0, len(images), batch):
        faces += detector.detect(images[i : i + batch])
    return faces, np.array([time.perf_counter(), time.process_time()]) - begin


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    size = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    intersection = size.prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - intersection
    return float(intersection / union)


def compare_detections(
    project: Sequence[Detections], package: Sequence[Detections], size: tuple[int, int]
) -> dict[str, Any]:
    """How well two detectors agree on the face to choose in each image; size is (height, width)."""
    same, distances = 0, []
    for a, b in zip(project, package, strict=True):
        i, j = choose_face(a, *size), choose_face(b, *size)
        if i is None or j is None:
            same += i is None and j is None
        elif box_iou(a.boxes[i], b.boxes[j]) >= 0.5:
            same += 1
            distances.append(np.linalg.norm(a.points[i] - b.points[j], axis=1))
    distance = np.array(distances if distances else [[np.nan]])
    return {
        "images": len(project),
        "same_face": same / len(project),
        "points_median": float(np.median(distance)),
        "points_99": float(np.quantile(distance, 0.99)),
        "points_max": float(distance.max()),
        "images_over_half_a_pixel": int((distance.max(1) > 0.5).sum()),
        "faces_project": sum(len(f.boxes) for f in project),
        "faces_mtcnn": sum(len(f.boxes) for f in package),
        "without_face_project": sum(len(f.boxes) == 0 for f in project),
        "without_face_mtcnn": sum(len(f.boxes) == 0 for f in package),
    }


def print_agreement(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(f"{results['images']} images of {results['height']}x{results['width']}")
    print(f"same face            {results['same_face']:.2%}")
    print(
        f"landmarks' distance  median {results['points_median']:.4f}, "
        f"99 % {results['points_99']:.3f}, largest {results['points_max']:.2f} pixels; "
        f"{results['images_over_half_a_pixel']} images over 0.5"
    )
    print(f"{'':20} {'project':>8} {'mtcnn':>8}")
    print(f"{'faces':20} {results['faces_project']:8} {results['faces_mtcnn']:8}")
    print(f"{'no face':20} {results['without_face_project']:8} {results['without_face_mtcnn']:8}")
    for title, key in (("images/s", "images_per_s"), ("CPU ms per image", "cpu_ms_per_image")):
        project, batched, single = (
            results[key][name] for name in ("project", "mtcnn_batched", "mtcnn_one_by_one")
        )
        print(f"{title:20} {project:8.1f} {batched:8.1f} batched, {single:.1f} one by one")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Detect with both and print how well they agree."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare_mtcnn", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="archive or folder of images")
    parser.add_argument("--images", type=int, default=500, help="at most (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=64, help="of this project (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="of this project (default: %(default)s)")
    args = parser.parse_args(argv)

    images, _ = read_images(args.data, args.images)
    project, seconds = run_project(images, args.batch, args.device)
    package, one_by_one, batched = run_reference(images)
    height, width = images.shape[1:3]
    results = compare_detections(project, package, (height, width))
    results |= {"height": height, "width": width, "batch": args.batch, "device": args.device}
    took = {"project": seconds, "mtcnn_batched": batched, "mtcnn_one_by_one": one_by_one}
    n = len(images)
    results["images_per_s"] = {name: n / wall for name, (wall, _) in took.items()}
    results["cpu_ms_per_image"] = {name: cpu / n * 1000 for name, (_, cpu) in took.items()}
    results |= {"torch": torch.__version__, "python": platform.python_version()}
    print_agreement(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
