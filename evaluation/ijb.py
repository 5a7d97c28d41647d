"""The protocols of IJB-B and IJB-C: embed every image, compare templates (1:1), search (1:N).

    from evaluation.ijb import embed_images, report_on
    features = embed_images(ijb, embed, workers=0)
    report, far, tar = report_on(ijb, features, detector_score=True, norm_weight=True)

The files are read by ijb_files.py; the maths is in templates.py.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.embedders import Embed
from evaluation.ijb_files import Ijb, read_pairs, read_subjects
from evaluation.templates import (
    Identification,
    build_templates,
    identify,
    roc_points,
    score_pairs,
    tar_at_fars,
    tar_line,
)
from fileio.images import ImageError, decode_image
from utils import UserError, core_count, similarity_transform, warp_face

BLOCK = 1024  # images aligned while the block before is embedded


# ------------------------------------------------------------------------------ features


def align(ijb: Ijb, number: int) -> np.ndarray:
    """The face of an image, (112, 112, 3) uint8 RGB, by the points given for it."""
    path = ijb.images / ijb.files[number]
    try:
        image = decode_image(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no {path}, which the metadata in {ijb.meta} names.") from None
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None
    return warp_face(image, similarity_transform(ijb.points[number]))


def embed_images(ijb: Ijb, embed: Embed, workers: int) -> np.ndarray:
    """Features of all images, (n, d) float32, in the length that the network gives them."""
    count, features = len(ijb.files), np.empty((0, 0), np.float32)
    with (
        ThreadPoolExecutor(workers or core_count()) as pool,
        tqdm(total=count, desc=f"embedding {ijb.name}", unit="img") as bar,
    ):

        def submit(start: int) -> list[Future]:
            return [pool.submit(align, ijb, i) for i in range(start, min(start + BLOCK, count))]

        waiting = submit(0)
        for start in range(0, count, BLOCK):
            faces = np.stack([future.result() for future in waiting])
            waiting = submit(start + BLOCK)
            found = embed(torch.from_numpy(faces)).float().cpu().numpy()
            if not start:
                features = np.empty((count, found.shape[1]), np.float32)
            features[start : start + len(found)] = found
            bar.update(len(faces))
    return features


def images_checksum(ijb: Ijb) -> str:
    """SHA-256 of the names, points and sizes in bytes of all images: reading them takes hours."""
    digest = hashlib.sha256("\n".join(ijb.files).encode())
    digest.update(np.ascontiguousarray(ijb.points))
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(ijb.images)}
    digest.update(repr([sizes.get(name) for name in ijb.files]).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ the numbers


def verify_templates(
    ijb: Ijb, ids: np.ndarray, embeddings: np.ndarray
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The 1:1 protocol: a report, and FAR and TAR of the ROC, (points,) each."""
    first, second, same = read_pairs(ijb, ids)
    scores = score_pairs(embeddings, first, second)
    try:
        points = tar_at_fars(scores, same)
    except ValueError as error:
        raise UserError(f"{ijb.meta}/{ijb.name}_template_pair_label.txt: {error}.") from None
    far, tar = roc_points(scores, same)
    report = {"pairs": len(same), "matched_pairs": int(same.sum()), "tar_at_far": points}
    return report, far, tar


def identify_templates(
    ijb: Ijb, ids: np.ndarray, embeddings: np.ndarray
) -> dict[str, Identification]:
    """The 1:N protocol by gallery, and with both together; empty where the lists are not there."""
    names = ("G1", "G2") if ijb.name == "ijbc" else ("S1", "S2")
    paths = [ijb.meta / f"{ijb.name}_1N_gallery_{name}.csv" for name in names]
    probe_path = ijb.meta / f"{ijb.name}_1N_probe_mixed.csv"
    if not any(path.exists() for path in (*paths, probe_path)):
        return {}
    probes, probe_subjects = read_subjects(probe_path, ids)
    galleries = dict(zip(names, (read_subjects(path, ids) for path in paths), strict=True))
    both = [np.concatenate(columns) for columns in zip(*galleries.values(), strict=True)]
    found = {}
    for name, (gallery, subjects) in (galleries | {"+".join(names): tuple(both)}).items():
        try:
            found[name] = identify(
                embeddings[probes], probe_subjects, embeddings[gallery], subjects
            )
        except ValueError as error:
            raise UserError(f"The 1:N lists in {ijb.meta}, gallery {name}: {error}.") from None
    return found


def table(report: dict[str, Any]) -> str:
    """What the script prints of a report."""
    lines = [tar_line(far, point) for far, point in report["tar_at_far"].items()]
    for name, found in report["identification"].items():
        others = "mated probes without their mate" if found["best_non_mates"] else "other probes"
        tpir = ", ".join(f"{100 * rate:.2f} % at {fpir}" for fpir, rate in found["tpir"].items())
        lines.append(
            f"gallery {name:<7}rank-1 {100 * found['rank1']:.2f} %, rank-5 "
            f"{100 * found['rank5']:.2f} %, TPIR at FPIR {tpir} ({found['mated']:,} mated probes, "
            f"{found['others']:,} {others})"
        )
    return "\n".join(lines)


def report_on(
    ijb: Ijb, features: np.ndarray, detector_score: bool, norm_weight: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Both protocols from features (n, d): a report, and FAR and TAR of the ROC."""
    weights = ijb.detector_scores if detector_score else None
    try:
        ids, embeddings = build_templates(
            features, ijb.template_of, ijb.media_of, weights, unit_length=not norm_weight
        )
    except ValueError as error:
        raise UserError(f"The templates of {ijb.name}: {error}.") from None
    report, far, tar = verify_templates(ijb, ids, embeddings)
    found = identify_templates(ijb, ids, embeddings)
    identification = {name: result.report() for name, result in found.items()}
    report |= {"pictures": len(features), "templates": len(ids), "identification": identification}
    return report, far, tar
