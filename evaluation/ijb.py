"""Evaluate on IJB-B or IJB-C: align and embed every image, compare templates (1:1), search (1:N).

    from evaluation.ijb import evaluate_ijb, load_or_embed
    ijb = read_ijb("data/IJBC")
    features = load_or_embed(ijb, model, flip=True)
    metrics, far, tar = evaluate_ijb(ijb, features)

Files are read by ijb_files.py, embeddings of templates are aggregated by templates.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from evaluation.embedders import Embed
from evaluation.embedding_cache import open_features, save_features
from evaluation.evaluated_model import EvaluatedModel
from evaluation.ijb_files import Ijb, read_template_pairs, read_template_subjects
from evaluation.metrics import IdentificationMetrics, IjbMetrics
from evaluation.templates import (
    build_templates,
    format_tar,
    identify,
    roc_points,
    score_templates,
    tar_at_fars,
)
from fileio.images import ImageError, decode_image
from utils import UserError, core_count, similarity_transform, warp_face

ALIGNED_AHEAD = 1024  # images aligned by the CPU while the block before is embedded


# ------------------------------------------------------------------------------ features


def load_or_embed(ijb: Ijb, model: EvaluatedModel, flip: bool, workers: int = 0) -> np.ndarray:
    """Features of all images, (n, d) float32 as a memory map, embedded if not in the cache.

    The model must give unnormalised embeddings, with the mirror image as flip says.
    """
    key = f"{model.checksum} {flip} {images_checksum(ijb)}"
    path = model.folder / "embeddings" / f"{ijb.name}-{model.checkpoint.stem}.npy"
    count = len(ijb.files)
    features = open_features(path, key, count)
    if features is None:
        save_features(path, key, count, lambda start: embed_ijb(ijb, model.embed, workers, start))
        # Opened from the file, so that 1 GB of IJB-C's features need not stay in memory.
        features = open_features(path, key, count)
    return features


def images_checksum(ijb: Ijb) -> str:
    """SHA-256 of the images' names, points, sizes and times; reading them would take hours.

    Raises UserError if images are missing.
    """
    digest = hashlib.sha256(np.ascontiguousarray(ijb.points))
    missing = []
    for name in ijb.files:
        try:
            status = (ijb.images / name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except (FileNotFoundError, NotADirectoryError):
            missing.append(name)
    if missing:
        raise UserError(
            f"There is no {ijb.images / missing[0]}, which the metadata in {ijb.meta} names; "
            f"{len(missing):,} of {len(ijb.files):,} images are missing: unpack loose_crop/ again."
        )
    return digest.hexdigest()


def embed_ijb(ijb: Ijb, embed: Embed, workers: int, begin: int = 0) -> Iterator[np.ndarray]:
    """Yield the features of the images from `begin` on, (n, d) float32, in blocks, as embed does.

    The blocks of ALIGNED_AHEAD images are the same wherever it begins.
    """
    count = len(ijb.files)
    with (
        ThreadPoolExecutor(workers or core_count()) as pool,
        tqdm(total=count, initial=begin, desc=f"embedding {ijb.name}", unit="img") as bar,
    ):

        def submit(start: int) -> list[Future]:
            stop = min(start + ALIGNED_AHEAD, count)
            return [pool.submit(align_by_points, ijb, i) for i in range(start, stop)]

        pending = submit(begin)
        for start in range(begin, count, ALIGNED_AHEAD):
            faces = np.stack([future.result() for future in pending])
            # The threads align the next block while this one is embedded.
            pending = submit(start + ALIGNED_AHEAD)
            yield embed(torch.from_numpy(faces)).float().cpu().numpy()
            bar.update(len(faces))


def align_by_points(ijb: Ijb, index: int) -> np.ndarray:
    """An image's face, (112, 112, 3) uint8 RGB, aligned by the five points of the metadata."""
    path = ijb.images / ijb.files[index]
    try:
        image = decode_image(path.read_bytes())
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None
    return warp_face(image, similarity_transform(ijb.points[index]))


# ------------------------------------------------------------------------------ metrics


def evaluate_ijb(
    ijb: Ijb, features: np.ndarray, *, detector_score: bool = True, norm_weight: bool = True
) -> tuple[IjbMetrics, np.ndarray, np.ndarray]:
    """Both protocols from features (n, d): the metrics, and FAR and TAR of the ROC, (points,) each.

    detector_score weights each image by the detector's score, norm_weight by the norm of its
    feature, both as InsightFace does. Raises UserError where files are missing or corrupt.
    """
    weights = ijb.detector_scores if detector_score else None
    try:
        ids, embeddings = build_templates(
            features, ijb.template_of, ijb.media_of, weights, unit_length=not norm_weight
        )
    except ValueError as error:
        raise UserError(f"The templates of {ijb.name}: {error}.") from None
    first, second, same = read_template_pairs(ijb, ids)
    scores = score_templates(embeddings, first, second)
    try:
        points = tar_at_fars(scores, same)
    except ValueError as error:
        raise UserError(f"{ijb.meta}/{ijb.name}_template_pair_label.txt: {error}.") from None
    far, tar = roc_points(scores, same)
    metrics: IjbMetrics = {
        "pairs": len(same),
        "matched_pairs": int(same.sum()),
        "tar_at_far": points,
        "pictures": len(features),
        "templates": len(ids),
        "identification": identify_templates(ijb, ids, embeddings),
    }
    return metrics, far, tar


def identify_templates(
    ijb: Ijb, ids: np.ndarray, embeddings: np.ndarray
) -> dict[str, IdentificationMetrics]:
    """The 1:N protocol: a search in each gallery and in both together; empty without its lists."""
    names = ("G1", "G2") if ijb.name == "ijbc" else ("S1", "S2")
    paths = [ijb.meta / f"{ijb.name}_1N_gallery_{name}.csv" for name in names]
    probe_path = ijb.meta / f"{ijb.name}_1N_probe_mixed.csv"
    if not any(path.exists() for path in (*paths, probe_path)):
        return {}
    probes, probe_subjects = read_template_subjects(probe_path, ids)
    galleries = dict(zip(names, (read_template_subjects(path, ids) for path in paths), strict=True))
    templates, subjects = zip(*galleries.values(), strict=True)
    galleries["+".join(names)] = np.concatenate(templates), np.concatenate(subjects)
    metrics = {}
    for name, (gallery, gallery_subjects) in galleries.items():
        try:
            metrics[name] = identify(
                embeddings[probes], probe_subjects, embeddings[gallery], gallery_subjects
            )
        except ValueError as error:
            raise UserError(f"The 1:N lists in {ijb.meta}, gallery {name}: {error}.") from None
    return metrics


def ijb_table(metrics: IjbMetrics) -> str:
    """The metrics as text: one FAR, then one gallery, per line."""
    lines = [format_tar(far, point) for far, point in metrics["tar_at_far"].items()]
    for name, gallery in metrics["identification"].items():
        kind = "mated probes without their mate" if gallery["best_non_mates"] else "other probes"
        tpir = ", ".join(f"{100 * rate:.2f} % at {fpir}" for fpir, rate in gallery["tpir"].items())
        lines.append(
            f"gallery {name:<7}rank-1 {100 * gallery['rank1']:.2f} %, rank-5 "
            f"{100 * gallery['rank5']:.2f} %, TPIR at FPIR {tpir} ({gallery['mated']:,} mated "
            f"probes, {gallery['others']:,} {kind})"
        )
    return "\n".join(lines)
