"""Robustness to image corruptions: the same pairs, with the second image of each corrupted.

    python lfw_eval.py --robustness

The first image of a pair stays as it is (the gallery image); the second one (the probe) is
compressed, blurred, reduced in resolution, turned grey, made brighter or darker, occluded at the
eyes or the mouth, or shifted. Each of the ten `CORRUPTIONS` is a pure function of aligned faces.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from evaluation import verification
from evaluation.embedders import Embed
from evaluation.metrics import RobustnessMetrics
from evaluation.significance import correct_predictions
from evaluation.verification import Pairs

AlignedFaces = np.ndarray  # (n, 112, 112, 3) uint8 RGB

# Occluding boxes (x1, y1, x2, y2) in pixels of the aligned image. The alignment template has the
# eyes at (38, 52) and (74, 52) and the corners of the mouth at (42, 92) and (71, 92).
EYES, MOUTH = (22, 41, 91, 62), (32, 80, 81, 105)
OCCLUDER_LEVEL = 128  # mid-grey: close to zero in every model's normalised input
SHIFT = 10  # pixels


# ------------------------------------------------------------------------------ the corruptions


def compress_jpeg(faces: AlignedFaces, quality: int = 30) -> AlignedFaces:
    """JPEG compression at a quality from 0 to 100."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]

    def compress(face: np.ndarray) -> np.ndarray:
        # OpenCV encodes and decodes BGR.
        return cv2.imdecode(cv2.imencode(".jpg", face[..., ::-1], options)[1], 1)[..., ::-1]

    return _apply_to_each(compress, faces)


def blur_faces(faces: AlignedFaces, sigma: float = 2.0) -> AlignedFaces:
    """Gaussian blur; sigma is in pixels, the eyes are 35 pixels apart."""
    return _apply_to_each(lambda face: cv2.GaussianBlur(face, (0, 0), sigma), faces)


def reduce_resolution(faces: AlignedFaces, factor: int = 2) -> AlignedFaces:
    """Downsample width and height by a factor (area average), and upsample again (bilinear)."""

    def reduce(face: np.ndarray) -> np.ndarray:
        height, width = face.shape[:2]
        small = (width // factor, height // factor)
        return cv2.resize(cv2.resize(face, small, interpolation=cv2.INTER_AREA), (width, height))

    return _apply_to_each(reduce, faces)


def to_grayscale(faces: AlignedFaces) -> AlignedFaces:
    """Luma (ITU-R BT.601) in all three channels."""
    return _apply_to_each(lambda face: cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[..., None], faces)


def scale_brightness(faces: AlignedFaces, factor: float = 1.4) -> AlignedFaces:
    """Multiply all levels by a factor; those above 255 are clipped, as in an overexposed image."""
    levels = np.rint(np.arange(256) * factor).clip(0, 255).astype(np.uint8)
    return levels[faces]


def occlude(faces: AlignedFaces, box: tuple[int, int, int, int] = EYES) -> AlignedFaces:
    """Cover a box (x1, y1, x2, y2) with grey."""
    x1, y1, x2, y2 = box
    occluded = faces.copy()
    occluded[:, y1:y2, x1:x2] = OCCLUDER_LEVEL
    return occluded


def shift_randomly(faces: AlignedFaces, pixels: int = SHIFT, seed: int = 0) -> AlignedFaces:
    """Shift each face left, right, up or down at random (seeded).

    The aligned crop has nothing beyond its edge, so edge pixels are repeated.
    """
    axes, signs = np.random.default_rng(seed).integers(0, 2, (2, len(faces)))
    shifted = np.empty_like(faces)
    for face, out, axis, sign in zip(faces, shifted, axes, signs, strict=True):
        source = np.arange(face.shape[axis]) + (pixels if sign else -pixels)
        out[:] = face.take(source, axis=axis, mode="clip")
    return shifted


def _apply_to_each(
    function: Callable[[np.ndarray], np.ndarray], faces: AlignedFaces
) -> AlignedFaces:
    """A function of one face (112, 112, 3), applied to all; it may return one channel."""
    changed = np.empty_like(faces)
    for face, out in zip(faces, changed, strict=True):
        out[:] = function(face)
    return changed


# The names are keys of lfw.json.
CORRUPTIONS: dict[str, Callable[[AlignedFaces], AlignedFaces]] = {
    "JPEG quality 30": compress_jpeg,
    "blur, 2 pixels": blur_faces,
    "half resolution": reduce_resolution,
    "quarter resolution": lambda faces: reduce_resolution(faces, 4),
    "grey": to_grayscale,
    "brightness +40 %": scale_brightness,
    "brightness -40 %": lambda faces: scale_brightness(faces, 0.6),
    "eyes covered": occlude,
    "mouth covered": lambda faces: occlude(faces, MOUTH),
    "moved by 10 pixels": shift_randomly,
}


def corruption_examples(face: np.ndarray) -> dict[str, np.ndarray]:
    """A face (112, 112, 3) as it is, "clean", and under every corruption, by name."""
    corrupted = {name: corrupt(face[None])[0] for name, corrupt in CORRUPTIONS.items()}
    return {"clean": face, **corrupted}


# ------------------------------------------------------------------------------ the measurement


def evaluate_corruptions(
    embed: Embed, images: Tensor, pairs: Pairs, embeddings: np.ndarray
) -> dict[str, RobustnessMetrics]:
    """Verification results by corruption, "clean" first; JSON can hold them.

    images (n, 112, 112, 3) uint8 and their embeddings (n, d), which are those of the first images
    of all pairs. The second images are corrupted and embedded once for each corruption. accuracy is
    at thresholds fitted to corrupted pairs of the other folds; accuracy_as_set is at those fitted
    to clean pairs, since a deployed system keeps its threshold when images get worse.
    """
    clean = verification.pair_scores(embeddings, pairs.first, pairs.second)
    metrics, clean_thresholds = _evaluate_scores(clean, pairs)
    results = {"clean": metrics}
    # Only faces that are some pair's second image need to be corrupted: index is where each pair's
    # second image is among them.
    probe_faces, index = np.unique(pairs.second, return_inverse=True)
    probes = images.numpy()[probe_faces]
    for name, corrupt in CORRUPTIONS.items():
        corrupted = embed(torch.from_numpy(corrupt(probes))).float().cpu().numpy()
        # One array for pair_scores: the clean embeddings, and after them the corrupted ones.
        both = np.concatenate([embeddings, corrupted])
        scores = verification.pair_scores(both, pairs.first, len(embeddings) + index)
        results[name], _ = _evaluate_scores(scores, pairs, clean_thresholds)
    return results


def _evaluate_scores(
    scores: np.ndarray, pairs: Pairs, clean_thresholds: np.ndarray | None = None
) -> tuple[RobustnessMetrics, np.ndarray]:
    """The metrics of one set of scores, and its thresholds by fold.

    clean_thresholds (folds,) are those of accuracy_as_set; without them, the scores' own.
    """
    full = verification.verify(scores, pairs.same, pairs.folds)
    thresholds = np.array(full["fold_thresholds"])
    if clean_thresholds is None:
        clean_thresholds = thresholds
    correct = correct_predictions(scores, pairs.same, pairs.folds, clean_thresholds)
    by_fold = [correct[pairs.folds == fold].mean() for fold in np.unique(pairs.folds)]
    metrics: RobustnessMetrics = {
        "accuracy": full["accuracy"],
        "standard_error": full["standard_error"],
        "eer": full["eer"],
        "auc": full["auc"],
        "accuracy_as_set": float(np.mean(by_fold)),
        "tar_at_far": full["tar_at_far"],
        "matched_cosine": float(scores[pairs.same].mean()),
        "mismatched_cosine": float(scores[~pairs.same].mean()),
    }
    return metrics, thresholds


def robustness_table(results: dict[str, RobustnessMetrics]) -> str:
    """The results of evaluate_corruptions as text, one line per corruption."""
    lines = [
        "second image of a pair   accuracy       +-   clean threshold      EER   genuine cosine"
    ]
    lines += [
        f"{name:<24}{100 * row['accuracy']:9.3f} %  {100 * row['standard_error']:5.3f}"
        f"  {100 * row['accuracy_as_set']:15.3f} %{100 * row['eer']:8.3f} %"
        f"{row['matched_cosine']:16.3f}"
        for name, row in results.items()
    ]
    return "\n".join(lines)
