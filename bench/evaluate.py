"""Time lfw_eval.py's work - decode, embed, protocol - against the straightforward loop.

    python -m bench.evaluate                                      # synthetic faces, random weights
    python -m bench.evaluate --data data/faces_lfw_112x112        # real faces
    python -m bench.evaluate --network mobilefacenet --faces 7701 # all that LFW has

All embed faces and their mirror images in float32.  The straightforward loop takes them in batches
of 32, contiguous (NCHW) and with no_grad, decoding and normalising image by image; once as each
face stands there, once as verification scripts have it, both images of every pair (LFW: 12,000 of
7,701 faces).  It prints a table, how many times faster this project is, and how far the cosines of
pairs are apart at most; the JSON goes to bench/results/evaluate-<device>-<network>.json.
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
    arguments,
    finish,
    in_turn,
    network_flops,
    peak_memory,
    ratio,
    synchronise,
)
from bench.synthetic_inputs import drawn_records
from data_gen import load_images
from evaluation.embedders import torch_embedder
from evaluation.verification import contiguous_folds, pair_scores, verify
from fileio.recordio import RecordReader
from models import build_model
from utils import exit_on_user_error, keep_freed_memory

LFW_FACES, PAIRS = 7701, 6000


def make_model(network: str, device: torch.device) -> torch.nn.Module:
    """A network whose batch normalisations have seen some input, so that numbers stay sane."""
    torch.manual_seed(0)
    model = build_model(network)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 112, 112))
    return model.eval().to(device)


def make_pairs(faces: int) -> tuple[np.ndarray, ...]:
    """`PAIRS` pairs at random: first (n,), second (n,), same (n,) bool, folds (n,)."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, faces, (2, PAIRS))
    return first, second, np.arange(PAIRS) % 2 == 0, contiguous_folds(PAIRS)


def straightforward(
    network: str, folder: Path, faces: int, device: torch.device, in_pairs: bool
) -> dict[str, Any]:
    """Decode and normalise image by image, embed 32 at a time, NCHW; seconds by stage.

    `in_pairs`: as many images more as LFW's pairs have over its faces.
    """
    model, reader = make_model(network, device), RecordReader(folder)
    model(torch.zeros(32, 3, 112, 112, device=device))
    count = faces * 2 * PAIRS // LFW_FACES if in_pairs else faces
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
    return stages(embeddings, faces, began, decoded, device)


def ours(network: str, folder: Path, faces: int, device: torch.device) -> dict[str, Any]:
    """The same by the functions that lfw_eval.py uses."""
    keep_freed_memory()
    model, reader = make_model(network, device), RecordReader(folder)
    embed = torch_embedder(model.to(memory_format=torch.channels_last), device)
    embed(torch.zeros(64, 112, 112, 3, dtype=torch.uint8))
    began = time.perf_counter()
    images, _ = load_images(reader, np.arange(faces) % len(reader))
    decoded = time.perf_counter()
    return stages(embed(images).numpy(), faces, began, decoded, device)


def stages(
    embeddings: np.ndarray, faces: int, began: float, decoded: float, device: torch.device
) -> dict[str, Any]:
    """Score the pairs and report on them; the seconds of each stage so far and of this one."""
    synchronise(device)
    embedded = time.perf_counter()
    first, second, same, folds = make_pairs(faces)
    verify(pair_scores(embeddings, first, second), same, folds)
    done = time.perf_counter()
    # A network that was never trained takes all faces to nearly one place: what tells them apart
    # is what is left without their mean.
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
    """Time all in turn."""
    args = arguments("evaluate", __doc__, argv, network="r50", faces=512)
    with drawn_records(args.data, 512) as folder:
        work = (args.network, folder, args.faces, args.device)
        variants = {
            "the loop over pairs": (straightforward, *work, True),
            "the loop over faces": (straightforward, *work, False),
            "ours": (ours, *work),
        }
        found = in_turn(variants, args.repeats)
    flops = 2 * network_flops(args.network)  # a face and its mirror image
    rows = []
    for name, runs in found.items():
        for stage in ("decode", "embed", "protocol", "total"):
            row = Row(f"{name}: {stage}", args.faces, [run[stage] for run in runs])
            if stage in ("embed", "total"):
                row.flops = flops
            if stage == "total":
                row.memory = max(run["memory"] for run in runs)
            rows.append(row)
    totals = {name: [run["total"] for run in runs] for name, runs in found.items()}
    apart = np.abs(found["ours"][0]["scores"] - found["the loop over faces"][0]["scores"]).max()
    finish(
        args,
        rows,
        {
            "times faster than the loop over pairs": ratio(
                totals["the loop over pairs"], totals["ours"]
            ),
            "times faster than the loop over faces": ratio(
                totals["the loop over faces"], totals["ours"]
            ),
            "cosines (of centred embeddings) apart at most": float(apart),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1:])
