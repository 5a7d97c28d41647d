"""Face quality and accuracy: brightness, sharpness, pose and resolution of the faces of pairs.

    values = worse_values(face_qualities(images, points), pairs)
    accuracy_by_quality(values["sharpness"], wrong, same)

The quality of a pair is that of the worse of its two faces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import cv2
import numpy as np
from torch import Tensor

from evaluation.verification import Pairs

QUALITY_BINS = 5


class Quality(NamedTuple):
    """A property of a face: its title, its unit, and which of two values is the worse one."""

    title: str
    unit: str
    worse: Callable[[np.ndarray, np.ndarray], np.ndarray]


# fmin and fmax ignore a nan: a face without landmarks leaves the pair to the other face.
QUALITIES = {
    "brightness": Quality("Brightness of the darker face", "mean luma, 0 to 255", np.fmin),
    "sharpness": Quality("Sharpness of the blurrier face", "variance of the Laplacian", np.fmin),
    "yaw": Quality("Yaw of the face turned further aside", "degrees", np.fmax),
    "roll": Quality("Roll of the face tilted further", "degrees", np.fmax),
    "eye_distance": Quality("Resolution of the smaller face", "eye distance, pixels", np.fmin),
}


class QualityBin(TypedDict):
    """The pairs between two values of a quality measure, and how well they are predicted."""

    low: float
    high: float
    pairs: int
    accuracy: float
    standard_error: float
    false_positives: int
    false_negatives: int


def face_qualities(images: Tensor, points: np.ndarray | None) -> dict[str, np.ndarray]:
    """Quality measures by name, (n,) float64 each, of aligned faces (n, 112, 112, 3) uint8 RGB.

    points (n, 5, 2) are the detector's landmarks in the original images, nan where no face was
    detected. Without them there is no pose and no eye distance.
    """
    luma = [cv2.cvtColor(face, cv2.COLOR_RGB2GRAY) for face in images.numpy()]
    qualities = {
        "brightness": np.array([face.mean() for face in luma]),
        "sharpness": np.array([cv2.Laplacian(face, cv2.CV_64F).var() for face in luma]),
    }
    if points is not None:
        yaw, roll, distance = estimate_pose(points)
        qualities |= {"yaw": np.abs(yaw), "roll": np.abs(roll), "eye_distance": distance}
    return qualities


def estimate_pose(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Yaw and roll in degrees and eye distance in pixels, (n,) each, from points (n, 5, 2).

    Roll is the slope of the line through the eyes. For yaw, let e be half the eye distance and d
    how far the tip of the nose stands out in front of the eyes. A head turned by yaw shows a half
    eye distance of e cos(yaw) and a nose displaced by d sin(yaw) along the line of the eyes, hence
    tan(yaw) = displacement / half eye distance * e / d. In the usual three-dimensional mean faces
    d is about e, so e / d is taken as 1: an estimate, good enough to order pairs.

    Example: eyes at (-20, 0) and (20, 0) and a nose at (10, 20) give atan(10 / 20) = 27 degrees.
    """
    left, right, nose = np.moveaxis(points[:, :3].astype(np.float64), 1, 0)  # (n, 2) each
    eyes = right - left
    distance = np.hypot(*eyes.T)
    # The nose's displacement from the middle of the eyes, projected on the line of the eyes. It is
    # 0 / 0 = nan where both eyes are at one point.
    with np.errstate(invalid="ignore", divide="ignore"):
        displacement = ((nose - (left + right) / 2) * eyes).sum(1) / distance
    yaw = np.degrees(np.arctan2(displacement, distance / 2))
    roll = np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0]))
    return yaw, roll, distance


def worse_values(qualities: dict[str, np.ndarray], pairs: Pairs) -> dict[str, np.ndarray]:
    """The worse value of the two faces of each pair, (pairs,) by name; nan if neither has one."""
    return {
        name: QUALITIES[name].worse(values[pairs.first], values[pairs.second])
        for name, values in qualities.items()
    }


def accuracy_by_quality(
    values: np.ndarray, wrong: np.ndarray, same: np.ndarray, bins: int = QUALITY_BINS
) -> list[QualityBin]:
    """Accuracy in quantile bins of a quality measure, lowest values first.

    values (pairs,), nan left out; wrong and same (pairs,) bool. standard_error is the binomial one,
    sqrt(p (1 - p) / n); it is 0 in a bin without errors. Equal values share a bin, so bins may be
    fewer or of unequal size: of 30 ones and 30 twos there are two bins, of 60 ones only one.
    """
    known = np.isfinite(values)
    values, wrong, same = values[known], wrong[known], same[known]
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    bin_index = np.searchsorted(edges, values, side="right")
    rows: list[QualityBin] = []
    for number in np.unique(bin_index):
        in_bin = bin_index == number
        n, errors = int(in_bin.sum()), wrong[in_bin]
        accuracy = 1 - float(errors.mean())
        rows.append(
            {
                "low": float(values[in_bin].min()),
                "high": float(values[in_bin].max()),
                "pairs": n,
                "accuracy": accuracy,
                "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / n)),
                "false_positives": int((errors & ~same[in_bin]).sum()),
                "false_negatives": int((errors & same[in_bin]).sum()),
            }
        )
    return rows


# ------------------------------------------------------------------------------ identities


class Confusion(NamedTuple):
    """Two identities that the model confuses, and the cosine of their mean embeddings."""

    first: str
    second: str
    faces: tuple[int, int]  # the two most similar ones, a face of each
    cosine: float


def nearest_identities(
    embeddings: np.ndarray, identities: list[str], count: int = 10, chunk: int = 1024
) -> list[Confusion]:
    """The `count` pairs of identities whose mean embeddings are most similar, most similar first.

    embeddings (n, d) L2-normalised, identities (n,) names. Compares `chunk` identities at a time
    with all others, so that memory does not grow with the square of their number.
    """
    names, label = np.unique(identities, return_inverse=True)
    means = np.zeros((len(names), embeddings.shape[1]), np.float32)
    np.add.at(means, label, embeddings.astype(np.float32))
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(means), chunk):
        cosines = means[start : start + chunk] @ means.T
        rows = np.arange(start, start + len(cosines))
        # Above the diagonal only, so that each pair of identities appears once; -2 is no cosine.
        cosines[np.arange(len(names)) <= rows[:, None]] = -2
        # The count-th highest row maximum is a lower bound of the count-th highest cosine, so that
        # few candidates have to be sorted.
        floor = np.sort(cosines.max(1))[-min(count, len(cosines))]
        candidates = np.argwhere(cosines >= max(floor, -1.5))
        best += [(float(cosines[i, j]), start + int(i), int(j)) for i, j in candidates]
        best = sorted(best, reverse=True)[:count]
    confusions = []
    for cosine, a, b in best:
        left, right = np.flatnonzero(label == a), np.flatnonzero(label == b)
        similarity = embeddings[left] @ embeddings[right].T
        i, j = np.unravel_index(similarity.argmax(), similarity.shape)
        faces = (int(left[i]), int(right[j]))
        confusions.append(Confusion(str(names[a]), str(names[b]), faces, cosine))
    return confusions
