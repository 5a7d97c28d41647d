"""Time the 1:1 and 1:N protocols of IJB-C at full size, on generated features of its layout.

    python -m bench.ijb

The published size: 469,375 images in 23,124 templates, 15,658,489 pairs of which 19,557 match,
1,772 + 1,759 people in the galleries and 19,593 probes. The clock covers what ijb_eval.py does once
the images are embedded, from files to numbers; features are 512-d float32, memory-mapped.
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

from bench.common import RESULTS, alone, describe_machine, peak_memory
from evaluation.embedding_cache import open_features, save_features
from evaluation.ijb import identify_templates
from evaluation.ijb_files import read_ijb, read_pairs
from evaluation.templates import build_templates, roc_points, score_pairs, tar_at_fars

SIZE = {"images": 469_375, "templates": 23_124, "pairs": 15_658_489, "people": 3_531}
MATCHED = 19_557 / 15_658_489
FIRST_ID = 10_000  # ids of five digits make lines of one length, which are quick to write


def digits(numbers: np.ndarray) -> np.ndarray:
    """Five-digit numbers (n,) as their characters (n, 5) uint8."""
    return (numbers[:, None] // 10 ** np.arange(4, -1, -1) % 10 + ord("0")).astype(np.uint8)


def write_ijb(folder: Path, size: dict[str, int], seed: int = 0) -> None:
    """Metadata in the layout of IJB-C, and features of images in features.npy."""
    rng = np.random.default_rng(seed)
    images, templates, pairs, people = size.values()
    (folder / "meta").mkdir(parents=True)
    person_of = np.append(np.arange(people), rng.integers(0, people, templates - people))
    more = rng.integers(0, templates, images - templates)
    template_of = np.sort(np.append(np.arange(templates), more))
    media_of = 5 * template_of + rng.integers(0, 5, images)
    write_images(folder / "meta", template_of + FIRST_ID, media_of)
    first, second = rng.integers(0, templates, (2, pairs))
    matched = rng.random(pairs) < MATCHED
    of_person = np.argsort(person_of, kind="stable")
    at = np.searchsorted(person_of[of_person], person_of[first[matched]])
    second[matched] = of_person[at]
    same = person_of[first] == person_of[second]
    write_pairs(folder / "meta", first + FIRST_ID, second + FIRST_ID, same)
    write_lists(folder / "meta", person_of, people)
    centres = rng.standard_normal((people, 512), np.float32)
    features = rng.standard_normal((images, 512), np.float32)
    features *= 3
    features += centres[person_of[template_of]]
    save_features(folder / "features.npy", "generated", features)


def write_images(meta: Path, template_of: np.ndarray, media_of: np.ndarray) -> None:
    """ijbc_face_tid_mid.txt and ijbc_name_5pts_score.txt."""
    points = "38.2 51.6 73.5 51.5 56.0 71.7 41.5 92.3 70.7 92.2"
    lines = enumerate(zip(template_of, media_of, strict=True), 1)
    text = "".join(f"{i}.jpg {template} {media}\n" for i, (template, media) in lines)
    (meta / "ijbc_face_tid_mid.txt").write_text(text)
    numbers = range(1, len(template_of) + 1)
    text = "".join(f"{i}.jpg {points} 0.{i % 90 + 10}\n" for i in numbers)
    (meta / "ijbc_name_5pts_score.txt").write_text(text)


def write_pairs(meta: Path, first: np.ndarray, second: np.ndarray, same: np.ndarray) -> None:
    """ijbc_template_pair_label.txt."""
    with (meta / "ijbc_template_pair_label.txt").open("wb") as file:
        for start in range(0, len(first), 1 << 20):
            part = slice(start, start + (1 << 20))
            rows = np.full((len(first[part]), 14), ord(" "), np.uint8)
            rows[:, :5], rows[:, 6:11] = digits(first[part]), digits(second[part])
            rows[:, 12], rows[:, 13] = same[part] + ord("0"), ord("\n")
            file.write(rows.tobytes())


def write_lists(meta: Path, person_of: np.ndarray, people: int) -> None:
    """The lists of the 1:N protocol: in the galleries stands the first template of each person."""
    half = people // 2 + 6
    lists = {"gallery_G1": range(half), "gallery_G2": range(half, people)}
    for name, which in (lists | {"probe_mixed": range(people, len(person_of))}).items():
        rows = ["TEMPLATE_ID,SUBJECT_ID,FILENAME\n"]
        rows += [f"{t + FIRST_ID},{person_of[t]},img/{t}.jpg\n" for t in which]
        (meta / f"ijbc_1N_{name}.csv").write_text("".join(rows))


def evaluate(folder: Path) -> dict[str, Any]:
    """Seconds of each stage, the process's peak memory, and some numbers."""
    seconds, numbers = {}, {}
    began = time.perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = time.perf_counter() - began - sum(seconds.values())

    ijb = read_ijb(folder)
    lap("read the images' metadata")
    features = open_features(folder / "features.npy", "generated", len(ijb.files))
    lap("check the features' checksum")
    ids, embeddings = build_templates(
        features, ijb.template_of, ijb.media_of, ijb.detector_scores, unit_length=False
    )
    lap("build templates")
    first, second, same = read_pairs(ijb, ids)
    lap("read pairs")
    scores = score_pairs(embeddings, first, second)
    lap("score pairs")
    numbers["tar_at_far"] = tar_at_fars(scores, same)
    roc_points(scores, same)
    lap("TAR at FAR, ROC")
    found = identify_templates(ijb, ids, embeddings)
    numbers["identification"] = {name: result.report() for name, result in found.items()}
    lap("identify")
    total = sum(seconds.values())
    memory = peak_memory(torch.device("cpu"))
    return {"seconds": seconds, "total": total, "memory": memory, "numbers": numbers}


def main(argv: Sequence[str]) -> None:
    """Generate, evaluate in a fresh process, print the stages and write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ijb", description=__doc__.splitlines()[0]
    )
    for name, default in SIZE.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULTS / "ijb-cpu.json")
    args = parser.parse_args(argv)
    size = {name: getattr(args, name) for name in SIZE}
    with tempfile.TemporaryDirectory() as folder:
        alone(write_ijb, Path(folder) / "IJBC", size)
        found = alone(evaluate, Path(folder) / "IJBC")
    machine = describe_machine(torch.device("cpu"))
    print(", ".join(f"{name} {value}" for name, value in (machine | size).items()))
    for stage, seconds in found["seconds"].items():
        print(f"{stage:<30}{seconds:8.2f} s")
    print(f"{'total':<30}{found['total']:8.2f} s, peak memory {found['memory'] / 2**20:,.0f} MB")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, "size": size} | found, indent=1) + "\n")
    print(f"Wrote {args.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
