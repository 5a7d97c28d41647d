"""What makes pairs hard: light, sharpness, pose and size of their faces, and accuracy by each.

    values = pair_values(face_qualities(images, points), pairs)
    by_quality(values["sharpness"], wrong, same)

Every pair is measured by the worse of its two faces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import Tensor

from evaluation.verification import Pairs

BINS = 5


class Quality(NamedTuple):
    """A property of a face: its name, its unit, and which of two values is the worse one."""

    title: str
    unit: str
    worse: Callable[[np.ndarray, np.ndarray], np.ndarray]


QUALITIES = {
    "brightness": Quality("Brightness of the darker face", "mean luma, 0 to 255", np.fmin),
    "sharpness": Quality("Sharpness of the blurrier face", "variance of the Laplacian", np.fmin),
    "yaw": Quality("Yaw of the face turned further aside", "degrees", np.fmax),
    "roll": Quality("Roll of the face tilted further", "degrees", np.fmax),
    "eye_distance": Quality("Resolution of the smaller face", "eye distance, pixels", np.fmin),
}


def face_qualities(images: Tensor, points: np.ndarray | None) -> dict[str, np.ndarray]:
    """Properties by name, each (n,) float64, of aligned faces (n, 112, 112, 3) uint8 RGB.

    points (n, 5, 2) are those of the detector in the original images, nan where it found none;
    without them there is no pose and no resolution.
    """
    luma = [cv2.cvtColor(face, cv2.COLOR_RGB2GRAY) for face in images.numpy()]
    found = {
        "brightness": np.array([face.mean() for face in luma]),
        "sharpness": np.array([cv2.Laplacian(face, cv2.CV_64F).var() for face in luma]),
    }
    if points is not None:
        yaw, roll, distance = pose(points)
        found |= {"yaw": np.abs(yaw), "roll": np.abs(roll), "eye_distance": distance}
    return found


def pose(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Yaw and roll in degrees and eye distance in pixels, (n,) each, from points (n, 5, 2).

    Roll is the slope of the line through the eyes. A nose that stands d before that line moves by
    d sin(yaw) along it while half the eye distance e shrinks to e cos(yaw): hence tan(yaw) =
    nose's offset / half eye distance * e / d. A face's d is about its e (so it is in the mean
    three-dimensional faces in use), so that this is an estimate, good for an order of pairs.
    """
    left, right, nose = np.moveaxis(points[:, :3].astype(np.float64), 1, 0)
    eyes = right - left
    distance = np.hypot(*eyes.T)
    with np.errstate(invalid="ignore", divide="ignore"):
        along = ((nose - (left + right) / 2) * eyes).sum(1) / distance
    yaw = np.degrees(np.arctan2(along, distance / 2))
    return yaw, np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0])), distance


def pair_values(faces: dict[str, np.ndarray], pairs: Pairs) -> dict[str, np.ndarray]:
    """The worse value of the two faces of each pair, (pairs,); nan where neither has one."""
    return {
        name: QUALITIES[name].worse(values[pairs.first], values[pairs.second])
        for name, values in faces.items()
    }


def by_quality(
    values: np.ndarray, wrong: np.ndarray, same: np.ndarray, bins: int = BINS
) -> list[dict[str, Any]]:
    """Accuracy in quantile bins of a property, in rising order, each with as many pairs.

    values (pairs,), of which nan are left out; wrong and same (pairs,) bool. standard_error is the
    binomial one, sqrt(p (1 - p) / n), of 0 where a bin has no error. Equal values stay together, so
    that there may be fewer bins.
    """
    known = np.isfinite(values)
    values, wrong, same = values[known], wrong[known], same[known]
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, values, side="right")
    found = []
    for number in np.unique(place):
        inside = place == number
        n, errors = int(inside.sum()), wrong[inside]
        accuracy = 1 - float(errors.mean())
        found.append(
            {
                "low": float(values[inside].min()),
                "high": float(values[inside].max()),
                "pairs": n,
                "accuracy": accuracy,
                "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / n)),
                "false_positives": int((errors & ~same[inside]).sum()),
                "false_negatives": int((errors & same[inside]).sum()),
            }
        )
    return found


# ------------------------------------------------------------------------------ identities


class Confusion(NamedTuple):
    """Two identities, a face of each, and the cosine of their mean embeddings."""

    first: str
    second: str
    faces: tuple[int, int]  # the two most alike
    cosine: float


def nearest_identities(
    embeddings: np.ndarray, identities: list[str], count: int = 10, chunk: int = 1024
) -> list[Confusion]:
    """The identities whose mean embeddings are closest, closest first.

    embeddings (n, d) of length 1 each, identities one a face. Works on chunk identities at a time.
    """
    names, label = np.unique(identities, return_inverse=True)
    means = np.zeros((len(names), embeddings.shape[1]), np.float32)
    np.add.at(means, label, embeddings.astype(np.float32))
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(means), chunk):
        cosines = means[start : start + chunk] @ means.T
        rows = np.arange(start, start + len(cosines))
        cosines[np.arange(len(names)) <= rows[:, None]] = -2  # each two once
        # The count-th best of the rows' maxima is no better than the count-th best of all.
        floor = np.sort(cosines.max(1))[-min(count, len(cosines))]
        found = np.argwhere(cosines >= max(floor, -1.5))
        best += [(float(cosines[i, j]), start + int(i), int(j)) for i, j in found]
        best = sorted(best, reverse=True)[:count]
    confusions = []
    for cosine, a, b in best:
        left, right = np.flatnonzero(label == a), np.flatnonzero(label == b)
        alike = embeddings[left] @ embeddings[right].T
        i, j = np.unravel_index(alike.argmax(), alike.shape)
        faces = (int(left[i]), int(right[j]))
        confusions.append(Confusion(str(names[a]), str(names[b]), faces, cosine))
    return confusions
