"""How well a model stands up to worse images: the same pairs, the second of each made worse.

    python lfw_eval.py --robustness

The first image of a pair stays as it is (the gallery), the second (the probe) is compressed,
blurred, shrunk and enlarged again, made grey, brighter or darker, covered at the eyes or the mouth,
or moved. Each of the ten `CORRUPTIONS` is a pure function of aligned faces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from evaluation import verification
from evaluation.embedders import Embed
from evaluation.significance import judged_rightly
from evaluation.verification import Pairs

Faces = np.ndarray  # (n, 112, 112, 3) uint8 RGB

# What covers a face, in pixels of the aligned image (x1, y1, x2, y2): the template's eyes are at
# (38, 52) and (74, 52), the corners of its mouth at (42, 92) and (71, 92).
EYES, MOUTH = (22, 41, 91, 62), (32, 80, 81, 105)
GREY = 128  # of the cover: next to zero in every model's input
SHIFT = 10  # pixels


# ------------------------------------------------------------------------------ the corruptions


def jpeg(faces: Faces, quality: int = 30) -> Faces:
    """Compress as JPEG of a quality from 0 to 100, and decode again."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]

    def compress(face: np.ndarray) -> np.ndarray:
        return cv2.imdecode(cv2.imencode(".jpg", face[..., ::-1], options)[1], 1)[..., ::-1]

    return _each(compress, faces)


def blur(faces: Faces, sigma: float = 2.0) -> Faces:
    """Gaussian blur of a deviation in pixels; the eyes are 35 apart."""
    return _each(lambda face: cv2.GaussianBlur(face, (0, 0), sigma), faces)


def shrink(faces: Faces, factor: int = 2) -> Faces:
    """Down to a fraction of the width and height by averaging, and up again bilinearly."""

    def shrunk(face: np.ndarray) -> np.ndarray:
        height, width = face.shape[:2]
        small = (width // factor, height // factor)
        return cv2.resize(cv2.resize(face, small, interpolation=cv2.INTER_AREA), (width, height))

    return _each(shrunk, faces)


def grey(faces: Faces) -> Faces:
    """Luma (ITU-R BT.601) in all three colours."""
    return _each(lambda face: cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)[..., None], faces)


def brightness(faces: Faces, factor: float = 1.4) -> Faces:
    """Every level times a factor, clipped at 255 as an overexposed image is."""
    levels = np.rint(np.arange(256) * factor).clip(0, 255).astype(np.uint8)
    return levels[faces]


def cover(faces: Faces, box: tuple[int, int, int, int] = EYES) -> Faces:
    """Paint a rectangle grey."""
    x1, y1, x2, y2 = box
    covered = faces.copy()
    covered[:, y1:y2, x1:x2] = GREY
    return covered


def shift(faces: Faces, pixels: int = SHIFT, seed: int = 0) -> Faces:
    """Move each face left, right, up or down, as chance (seeded) will have it.

    A crop does not know what lay beside it: its edge is repeated.
    """
    axes, signs = np.random.default_rng(seed).integers(0, 2, (2, len(faces)))
    moved = np.empty_like(faces)
    for face, out, axis, sign in zip(faces, moved, axes, signs, strict=True):
        places = np.arange(face.shape[axis]) + (pixels if sign else -pixels)
        out[:] = face.take(places, axis=axis, mode="clip")
    return moved


def _each(function: Callable[[np.ndarray], np.ndarray], faces: Faces) -> Faces:
    changed = np.empty_like(faces)
    for face, out in zip(faces, changed, strict=True):
        out[:] = function(face)
    return changed


CORRUPTIONS: dict[str, Callable[[Faces], Faces]] = {
    "JPEG quality 30": jpeg,
    "blur, 2 pixels": blur,
    "half resolution": shrink,
    "quarter resolution": lambda faces: shrink(faces, 4),
    "grey": grey,
    "brightness +40 %": brightness,
    "brightness -40 %": lambda faces: brightness(faces, 0.6),
    "eyes covered": cover,
    "mouth covered": lambda faces: cover(faces, MOUTH),
    "moved by 10 pixels": shift,
}


def showcase(face: np.ndarray) -> dict[str, np.ndarray]:
    """A face (112, 112, 3) as it is, "clean", and under every corruption, by name."""
    worse = {name: corrupt(face[None])[0] for name, corrupt in CORRUPTIONS.items()}
    return {"clean": face, **worse}


# ------------------------------------------------------------------------------ the measurement


def measure(
    embed: Embed, images: Tensor, pairs: Pairs, embeddings: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Verification results by corruption, "clean" first; they can go into JSON.

    images (n, 112, 112, 3) uint8 and their embeddings (n, d), which serve as the first images;
    the second ones are corrupted and embedded once for each corruption. accuracy has thresholds
    fitted to the corrupted pairs of the other folds, accuracy_as_set those fitted to clean ones: a
    system in use keeps the threshold that it was set to.
    """
    clean = verification.pair_scores(embeddings, pairs.first, pairs.second)
    numbers, thresholds = _of(clean, pairs, None)
    found = {"clean": numbers}
    faces, second = np.unique(pairs.second, return_inverse=True)
    probes = images.numpy()[faces]
    # The rows of the second images come after those of the first ones.
    second = second + len(embeddings)
    for name, corrupt in CORRUPTIONS.items():
        worse = embed(torch.from_numpy(corrupt(probes))).float().cpu().numpy()
        both = np.concatenate([embeddings, worse])
        scores = verification.pair_scores(both, pairs.first, second)
        found[name] = _of(scores, pairs, thresholds)[0]
    return found


def _of(
    scores: np.ndarray, pairs: Pairs, thresholds: np.ndarray | None
) -> tuple[dict[str, Any], np.ndarray]:
    """The numbers of one set of scores, and its thresholds by fold."""
    report = verification.verify(scores, pairs.same, pairs.folds)
    own = np.array(report["fold_thresholds"])
    kept = own if thresholds is None else thresholds
    right = judged_rightly(scores, pairs.same, pairs.folds, kept)
    numbers = {name: report[name] for name in ("accuracy", "standard_error", "eer", "auc")}
    numbers["accuracy_as_set"] = float(
        np.mean([right[pairs.folds == fold].mean() for fold in np.unique(pairs.folds)])
    )
    numbers["tar_at_far"] = report["tar_at_far"]
    numbers["matched_cosine"] = float(scores[pairs.same].mean())
    numbers["mismatched_cosine"] = float(scores[~pairs.same].mean())
    return numbers, own


def table(found: dict[str, dict[str, Any]]) -> str:
    """What measure found, one line a corruption."""
    lines = ["second image of a pair   accuracy       +-   threshold as set      EER   cosine"]
    lines += [
        f"{name:<24}{100 * row['accuracy']:9.3f} %  {100 * row['standard_error']:5.3f}"
        f"  {100 * row['accuracy_as_set']:15.3f} %{100 * row['eer']:8.3f} %"
        f"{row['matched_cosine']:8.3f}"
        for name, row in found.items()
    ]
    return "\n".join(lines)
