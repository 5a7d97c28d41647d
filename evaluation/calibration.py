"""From a score to a probability and to an operating point: pure maths, no files.

    from evaluation.calibration import calibrate, operating_points
    calibrate(scores, pairs.same, pairs.folds)["ece"]
    points, refused = operating_points(scores, pairs.same)

Scores are cosines; a probability is of both images showing one person.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from evaluation import verification

BINS = 15  # of equal width, as in Guo et al., "On calibration of modern neural networks" (2017)
OPERATING_FARS = ("1e-1", "1e-2", "1e-3", "1e-4")
# The rule of 30 (Doddington et al., "The NIST speaker recognition evaluation", 2000; ISO/IEC
# 19795-1): with 30 errors the true rate is within 30 % of the one seen, with 90 % confidence.
ERRORS_NEEDED = 30


def fit_logistic(scores: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of P(same person) = 1 / (1 + exp(-(slope * score + intercept))).

    Platt scaling ("Probabilistic outputs for support vector machines", 1999): targets a little
    within 0 and 1, so that a set which one threshold separates has a finite slope, too.
    """
    matched, mismatched = int(same.sum()), int((~same).sum())
    target = np.where(same, (matched + 1) / (matched + 2), 1 / (mismatched + 2))
    model = LogisticRegression(C=1e6, solver="newton-cholesky")
    both = np.tile(scores, 2)[:, None]
    labels = np.repeat([1, 0], len(scores))
    model.fit(both, labels, sample_weight=np.concatenate([target, 1 - target]))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def probability(scores: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """P(same person) of each score."""
    return 1 / (1 + np.exp(-(slope * scores + intercept)))


def reliability(probabilities: np.ndarray, same: np.ndarray) -> list[dict[str, Any]]:
    """Bins of equal width that are not empty: range, pairs, mean probability, share matched."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return [
        {
            "from": number / BINS,
            "to": (number + 1) / BINS,
            "pairs": int(np.sum(place == number)),
            "probability": float(probabilities[place == number].mean()),
            "matched": float(same[place == number].mean()),
        }
        for number in np.unique(place).tolist()
    ]


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean distance of probability and share matched over bins, weighted by their pairs."""
    pairs = sum(row["pairs"] for row in bins)
    return sum(row["pairs"] * abs(row["probability"] - row["matched"]) for row in bins) / pairs


def calibrate(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> dict[str, Any]:
    """slope and intercept fitted on all pairs, and how good such a fit is on pairs not seen.

    bins, ece and brier (mean squared error) are of probabilities that the other folds gave. They
    hold where matched pairs are as frequent as in the set (share_matched). Raises ValueError where
    the folds but one hold a single kind of pair.
    """
    held_out = np.empty(len(scores))
    for fold in np.unique(folds):
        held = folds == fold
        fitted = fit_logistic(scores[~held], same[~held])
        held_out[held] = probability(scores[held], *fitted)
    slope, intercept = fit_logistic(scores, same)
    bins = reliability(held_out, same)
    return {
        "slope": slope,
        "intercept": intercept,
        "share_matched": float(same.mean()),
        "ece": expected_calibration_error(bins),
        "brier": float(np.mean((held_out - same) ** 2)),
        "bins": bins,
    }


def refusal(far: str, mismatched: int) -> str:
    """Why a FAR is not shown of so many mismatched pairs, a sentence; empty where it is."""
    errors = float(far) * mismatched
    if errors >= ERRORS_NEEDED - 1e-9:
        return ""
    return (
        f"FAR {far} is not shown: {errors:.3g} of {mismatched:,} mismatched pairs would decide it; "
        f"{ERRORS_NEEDED} are needed, a set of {round(ERRORS_NEEDED / float(far)):,}."
    )


def operating_points(
    scores: np.ndarray, same: np.ndarray
) -> tuple[list[dict[str, Any]], list[str]]:
    """(threshold, far, frr) for each of OPERATING_FARS that the set supports, and refusals.

    Supported is a FAR at which at least ERRORS_NEEDED mismatched pairs are accepted. The threshold
    is the lowest that keeps to the FAR; far is what it gives. A refusal is a sentence.
    """
    curve = verification.roc(scores, same)
    mismatched = int((~same).sum())
    points, refused = [], []
    for name in OPERATING_FARS:
        why = refusal(name, mismatched)
        if why:
            refused.append(why)
            continue
        at = int(np.flatnonzero(curve.far <= float(name))[-1])
        threshold = float(curve.thresholds[at])
        points.append(
            {
                "wanted": name,
                "threshold": threshold,
                "degrees": float(verification.to_degrees(threshold)),
                "far": float(curve.far[at]),
                "frr": float(1 - curve.tar[at]),
            }
        )
    return points, refused
