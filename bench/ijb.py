"""Time the 1:1 and 1:N protocols of IJB-C at full size, on generated features in its layout.

    python -m bench.ijb

The published size: 469,375 images in 23,124 templates, 15,658,489 pairs of which 19,557 are
genuine, 1,772 + 1,759 identities in the galleries and 19,593 probes. Timed is what tools.ijb_eval
does after the images are embedded, from files to metrics; features are 512-d float32,
memory-mapped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import RESULTS, describe_machine, in_fresh_process, peak_memory
from evaluation.embedding_cache import open_features, save_features
from evaluation.ijb import identify_templates
from evaluation.ijb_files import read_ijb, read_template_pairs
from evaluation.templates import build_templates, roc_points, score_templates, tar_at_fars

IJB_C_SIZE = {
    "images": 469_375,
    "templates": 23_124,
    "pairs": 15_658_489,
    "identities": 3_531,
}
GENUINE_FRACTION = 19_557 / 15_658_489
FIRST_ID = 10_000  # ids of five digits: lines of equal length are fast to write


def digits(numbers: np.ndarray) -> np.ndarray:
    """Five-digit numbers (n,) as their characters (n, 5) uint8."""
    return (numbers[:, None] // 10 ** np.arange(4, -1, -1) % 10 + ord("0")).astype(np.uint8)


def write_ijb(folder: Path, size: dict[str, int], seed: int = 0) -> None:
    """Write metadata in the layout of IJB-C, and the features of all images to features.npy."""
    rng = np.random.default_rng(seed)
    images, templates, pairs, identities = size.values()
    (folder / "meta").mkdir(parents=True)
    # Every identity has a template and every template an image; the rest are spread at random.
    more = rng.integers(0, identities, templates - identities)
    identity_of = np.append(np.arange(identities), more)
    more = rng.integers(0, templates, images - templates)
    template_of = np.sort(np.append(np.arange(templates), more))
    media_of = 5 * template_of + rng.integers(0, 5, images)
    write_image_lists(folder / "meta", template_of + FIRST_ID, media_of)
    first, second = rng.integers(0, templates, (2, pairs))
    # The second template of a genuine pair is the first one of the same identity.
    genuine = rng.random(pairs) < GENUINE_FRACTION
    by_identity = np.argsort(identity_of, kind="stable")
    begin = np.searchsorted(identity_of[by_identity], identity_of[first[genuine]])
    second[genuine] = by_identity[begin]
    same = identity_of[first] == identity_of[second]
    write_template_pairs(folder / "meta", first + FIRST_ID, second + FIRST_ID, same)
    write_search_lists(folder / "meta", identity_of, identities)
    centres = rng.standard_normal((identities, 512), np.float32)
    features = rng.standard_normal((images, 512), np.float32)
    features *= 3
    features += centres[identity_of[template_of]]
    save_features(folder / "features.npy", "generated", images, lambda _: iter([features]))


def write_image_lists(meta: Path, template_of: np.ndarray, media_of: np.ndarray) -> None:
    """Write ijbc_face_tid_mid.txt and ijbc_name_5pts_score.txt."""
    points = "38.2 51.6 73.5 51.5 56.0 71.7 41.5 92.3 70.7 92.2"
    lines = enumerate(zip(template_of, media_of, strict=True), 1)
    text = "".join(f"{i}.jpg {template} {media}\n" for i, (template, media) in lines)
    (meta / "ijbc_face_tid_mid.txt").write_text(text)
    numbers = range(1, len(template_of) + 1)
    text = "".join(f"{i}.jpg {points} 0.{i % 90 + 10}\n" for i in numbers)
    (meta / "ijbc_name_5pts_score.txt").write_text(text)


def write_template_pairs(
    meta: Path, first: np.ndarray, second: np.ndarray, same: np.ndarray
) -> None:
    """Write ijbc_template_pair_label.txt: lines of "10000 10001 1"."""
    with (meta / "ijbc_template_pair_label.txt").open("wb") as file:
        for start in range(0, len(first), 1 << 20):
            part = slice(start, start + (1 << 20))
            rows = np.full((len(first[part]), 14), ord(" "), np.uint8)
            rows[:, :5], rows[:, 6:11] = digits(first[part]), digits(second[part])
            rows[:, 12], rows[:, 13] = same[part] + ord("0"), ord("\n")
            file.write(rows.tobytes())


def write_search_lists(meta: Path, identity_of: np.ndarray, identities: int) -> None:
    """Write the lists of the 1:N protocol: two galleries of each identity's first template."""
    half = identities // 2 + 6
    lists = {
        "gallery_G1": range(half),
        "gallery_G2": range(half, identities),
        "probe_mixed": range(identities, len(identity_of)),
    }
    for name, templates in lists.items():
        rows = ["TEMPLATE_ID,SUBJECT_ID,FILENAME\n"]
        rows += [f"{t + FIRST_ID},{identity_of[t]},img/{t}.jpg\n" for t in templates]
        (meta / f"ijbc_1N_{name}.csv").write_text("".join(rows))


def time_protocols(folder: Path) -> dict[str, Any]:
    """Seconds of each stage, the process's peak memory, and the metrics."""
    seconds, metrics = {}, {}
    began = time.perf_counter()

    def end_stage(stage: str) -> None:
        seconds[stage] = time.perf_counter() - began - sum(seconds.values())

    ijb = read_ijb(folder)
    end_stage("read the images' metadata")
    features = open_features(folder / "features.npy", "generated", len(ijb.files))
    end_stage("check the features' checksum")
    ids, embeddings = build_templates(
        features, ijb.template_of, ijb.media_of, ijb.detector_scores, unit_length=False
    )
    end_stage("build templates")
    first, second, same = read_template_pairs(ijb, ids)
    end_stage("read pairs")
    scores = score_templates(embeddings, first, second)
    end_stage("score pairs")
    metrics["tar_at_far"] = tar_at_fars(scores, same)
    roc_points(scores, same)
    end_stage("TAR at FAR, ROC")
    metrics["identification"] = identify_templates(ijb, ids, embeddings)
    end_stage("identify")
    total = sum(seconds.values())
    memory = peak_memory(torch.device("cpu"))
    return {"seconds": seconds, "total": total, "memory": memory, "numbers": metrics}


def main(argv: Sequence[str]) -> None:
    """Generate, evaluate in a fresh process, print the stages and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ijb", description=__doc__.splitlines()[0]
    )
    for name, default in IJB_C_SIZE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULTS / "ijb-cpu.json")
    args = parser.parse_args(argv)
    size = {name: getattr(args, name) for name in IJB_C_SIZE}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(write_ijb, Path(folder) / "IJBC", size)
        results = in_fresh_process(time_protocols, Path(folder) / "IJBC")
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{name} {value}" for name, value in (machine | size).items()))
    for stage, seconds in results["seconds"].items():
        print(f"{stage:<30}{seconds:8.2f} s")
    print(
        f"{'total':<30}{results['total']:8.2f} s, peak memory {results['memory'] / 2**20:,.0f} MB"
    )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, "size": size} | results, indent=1) + "\n")
    print(f"Wrote {args.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
