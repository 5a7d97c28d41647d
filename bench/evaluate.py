"""Time lfw_eval.py's work - decode, embed, score - against a usual loop.

    python -m bench.evaluate                                      # synthetic faces, random weights
    python -m bench.evaluate --data data/faces_lfw_112x112        # real faces
    python -m bench.evaluate --network mobilefacenet --faces 7701 # as many as LFW has

All embed faces and their mirror images in float32. The usual loop decodes and normalises one image
at a time and embeds batches of 32, contiguous (NCHW), under no_grad. It runs once over the faces,
and once over the images of all pairs as verification scripts do (LFW: 12,000 images of 7,701
faces). Prints a table, the speedup, and the largest difference of a pair's cosine; the JSON goes to
bench/results/evaluate-<device>-<network>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from bench.common import (
    Row,
    alternate,
    network_flops,
    parse_arguments,
    peak_memory,
    print_and_save,
    speedup,
    synchronise,
)
from bench.synthetic_inputs import records_or_synthetic
from evaluation.embedders import torch_embedder
from evaluation.verification import contiguous_folds, pair_scores, verify
from fileio.image_loader import load_images
from fileio.recordio import RecordReader
from models import build_model
from utils import exit_on_user_error, keep_freed_memory

LFW_FACES, LFW_PAIRS = 7701, 6000
OVER_PAIRS, OVER_FACES, PROJECT = "usual loop over pairs", "usual loop over faces", "this project"


def make_model(network: str, device: torch.device) -> torch.nn.Module:
    """A network with random weights, and batch statistics from noise so that outputs are finite."""
    torch.manual_seed(0)
    model = build_model(network)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 112, 112))
    return model.eval().to(device)


def random_pairs(faces: int) -> tuple[np.ndarray, ...]:
    """`LFW_PAIRS` random pairs: first (n,), second (n,), same (n,) bool, folds (n,)."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, faces, (2, LFW_PAIRS))
    return first, second, np.arange(LFW_PAIRS) % 2 == 0, contiguous_folds(LFW_PAIRS)


def usual_evaluation(
    network: str, folder: Path, faces: int, device: torch.device, over_pairs: bool
) -> dict[str, Any]:
    """Decode and normalise image by image, embed 32 at a time, NCHW; see time_stages.

    With over_pairs there are more images, in the ratio of LFW's 12,000 to 7,701.
    """
    model, reader = make_model(network, device), RecordReader(folder)
    model(torch.zeros(32, 3, 112, 112, device=device))
    count = faces * 2 * LFW_PAIRS // LFW_FACES if over_pairs else faces
    began = time.perf_counter()
    images = []
    for i in range(count):
        jpeg = reader.encoded(i % faces % len(reader))
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1)[:, :, ::-1]
        images.append((image.transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5)
    decoded = time.perf_counter()
    embeddings = np.empty((count, 512), np.float32)
    with torch.no_grad():
        for start in range(0, count, 32):
            batch = torch.from_numpy(np.stack(images[start : start + 32])).to(device)
            both = model(batch) + model(torch.flip(batch, [3]))
            embeddings[start : start + 32] = both.cpu().numpy()
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return time_stages(embeddings, faces, began, decoded, device)


def project_evaluation(
    network: str, folder: Path, faces: int, device: torch.device
) -> dict[str, Any]:
    """The same with the functions that lfw_eval.py calls; see time_stages."""
    keep_freed_memory()
    model, reader = make_model(network, device), RecordReader(folder)
    embed = torch_embedder(model.to(memory_format=torch.channels_last), device)
    embed(torch.zeros(64, 112, 112, 3, dtype=torch.uint8))
    began = time.perf_counter()
    images, _ = load_images(reader, np.arange(faces) % len(reader))
    decoded = time.perf_counter()
    return time_stages(embed(images).numpy(), faces, began, decoded, device)


def time_stages(
    embeddings: np.ndarray, faces: int, began: float, decoded: float, device: torch.device
) -> dict[str, Any]:
    """Score the pairs and verify; returns the seconds of each stage, scores and peak bytes."""
    synchronise(device)
    embedded = time.perf_counter()
    first, second, same, folds = random_pairs(faces)
    verify(pair_scores(embeddings, first, second), same, folds)
    done = time.perf_counter()
    # An untrained network maps all faces to nearly the same embedding. Without their mean, what
    # remains is what distinguishes them, so that cosines can be compared.
    centred = embeddings[:faces] - embeddings[:faces].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return {
        "decode": decoded - began,
        "embed": embedded - decoded,
        "protocol": done - embedded,
        "total": done - began,
        "scores": pair_scores(centred, first, second),
        "memory": peak_memory(device),
    }


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Time all three alternately."""
    args = parse_arguments("evaluate", __doc__, argv, network="r50", faces=512)
    with records_or_synthetic(args.data, 512) as folder:
        work = (args.network, folder, args.faces, args.device)
        variants = {
            OVER_PAIRS: (usual_evaluation, *work, True),
            OVER_FACES: (usual_evaluation, *work, False),
            PROJECT: (project_evaluation, *work),
        }
        results = alternate(variants, args.repeats)
    flops = 2 * network_flops(args.network)  # a face and its mirror image
    rows = []
    for name, runs in results.items():
        for stage in ("decode", "embed", "protocol", "total"):
            row = Row(f"{name}: {stage}", args.faces, [run[stage] for run in runs])
            if stage in ("embed", "total"):
                row.flops = flops
            if stage == "total":
                row.memory = max(run["memory"] for run in runs)
            rows.append(row)
    totals = {name: [run["total"] for run in runs] for name, runs in results.items()}
    difference = np.abs(results[PROJECT][0]["scores"] - results[OVER_FACES][0]["scores"]).max()
    extra = {
        f"times faster than the {OVER_PAIRS}": speedup(totals[OVER_PAIRS], totals[PROJECT]),
        f"times faster than the {OVER_FACES}": speedup(totals[OVER_FACES], totals[PROJECT]),
        "largest difference of cosines (of centred embeddings)": float(difference),
    }
    print_and_save(args, rows, extra)


if __name__ == "__main__":
    main(sys.argv[1:])
