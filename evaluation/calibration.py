"""Calibration of scores to probabilities, and operating points. Pure maths, no files.

    from evaluation.calibration import calibrate, operating_points
    calibrate(scores, pairs.same, pairs.folds)["ece"]
    points, unsupported = operating_points(scores, pairs.same)

Scores are cosines; a probability is that of a genuine pair, P(same identity).
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression

from evaluation import verification
from evaluation.metrics import Calibration, CalibrationBin, OperatingPoint

# Of equal width, as in Guo et al., "On calibration of modern neural networks" (ICML 2017).
RELIABILITY_BINS = 15
OPERATING_FARS = ("1e-1", "1e-2", "1e-3", "1e-4")
# The rule of 30 (Doddington et al., "The NIST speaker recognition evaluation", 2000; ISO/IEC
# 19795-1): with 30 errors the true rate is within 30 % of the measured one, at 90 % confidence.
ERRORS_NEEDED = 30


# ------------------------------------------------------------------------------ probabilities


def fit_platt(scores: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of P(same identity) = 1 / (1 + exp(-(slope * score + intercept))).

    Platt scaling (Platt, "Probabilistic outputs for support vector machines", 1999): logistic
    regression on targets slightly inside 0 and 1, (n+ + 1) / (n+ + 2) for genuine pairs and
    1 / (n- + 2) for impostor pairs. So the slope is finite even where one threshold separates both.
    """
    genuine, impostors = int(same.sum()), int((~same).sum())
    target = np.where(same, (genuine + 1) / (genuine + 2), 1 / (impostors + 2))
    # scikit-learn takes no fractional labels. A pair with target t is the same as one with label 1
    # and weight t plus one with label 0 and weight 1 - t. C=1e6 means practically no L2 penalty.
    model = LogisticRegression(C=1e6, solver="newton-cholesky")
    twice = np.tile(scores, 2)[:, None]
    labels = np.repeat([1, 0], len(scores))
    model.fit(twice, labels, sample_weight=np.concatenate([target, 1 - target]))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def genuine_probability(scores: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """P(same identity) of each score, (pairs,) float64."""
    return 1 / (1 + np.exp(-(slope * scores + intercept)))


def reliability_bins(probabilities: np.ndarray, same: np.ndarray) -> list[CalibrationBin]:
    """The bins of a reliability diagram, of equal width; empty ones are left out.

    "probability" is the mean over a bin's pairs, "matched" their fraction of genuine pairs.
    """
    # A probability of 1.0 belongs to the last bin, not to one beyond it.
    index = np.minimum((probabilities * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    return [
        {
            "from": number / RELIABILITY_BINS,
            "to": (number + 1) / RELIABILITY_BINS,
            "pairs": int(np.sum(index == number)),
            "probability": float(probabilities[index == number].mean()),
            "matched": float(same[index == number].mean()),
        }
        for number in np.unique(index).tolist()
    ]


def expected_calibration_error(bins: list[CalibrationBin]) -> float:
    """ECE (Guo et al. 2017): mean of |probability - fraction of genuine pairs|, weighted by pairs.

    Example: 30 pairs at 0.9 of which 80 % are genuine, and 10 at 0.1 of which 10 % are, give
    (30 * 0.1 + 10 * 0) / 40 = 0.075.
    """
    pairs = sum(row["pairs"] for row in bins)
    return sum(row["pairs"] * abs(row["probability"] - row["matched"]) for row in bins) / pairs


def calibrate(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> Calibration:
    """Platt scaling fitted on all pairs, and its error on held-out folds.

    slope and intercept are the fit on all pairs. bins, ece and brier (Brier score: mean squared
    error) come from cross-validation: each fold's probabilities from a fit on the other folds. They
    hold where genuine pairs are as common as in the set (share_matched). Raises ValueError where
    the other folds have only one kind of pair.
    """
    held_out = np.empty(len(scores))
    for fold in np.unique(folds):
        in_fold = folds == fold
        slope, intercept = fit_platt(scores[~in_fold], same[~in_fold])
        held_out[in_fold] = genuine_probability(scores[in_fold], slope, intercept)
    slope, intercept = fit_platt(scores, same)
    bins = reliability_bins(held_out, same)
    return {
        "slope": slope,
        "intercept": intercept,
        "share_matched": float(same.mean()),
        "ece": expected_calibration_error(bins),
        "brier": float(np.mean((held_out - same) ** 2)),
        "bins": bins,
    }


# ------------------------------------------------------------------------------ operating points


def explain_unsupported_far(far: str, impostors: int) -> str:
    """Why so many impostor pairs cannot support a FAR, a sentence; empty where they can.

    Example: at a FAR of 1e-3, 3,000 impostor pairs give 3 false accepts. One more or less changes
    the rate by a third, so the threshold found there says little about new pairs.
    """
    errors = float(far) * impostors
    if errors >= ERRORS_NEEDED - 1e-9:  # the product may be rounded to just below
        return ""
    return (
        f"FAR {far} is not shown: {errors:.3g} of {impostors:,} impostor pairs would decide it; "
        f"{ERRORS_NEEDED} are needed, a set of {round(ERRORS_NEEDED / float(far)):,}."
    )


def operating_points(
    scores: np.ndarray, same: np.ndarray
) -> tuple[list[OperatingPoint], list[str]]:
    """Thresholds for those of OPERATING_FARS that the set supports, and a sentence for each other.

    Supported means at least ERRORS_NEEDED false accepts. The threshold is the lowest whose FAR is
    not above the one wanted.
    """
    curve = verification.roc(scores, same)
    impostors = int((~same).sum())
    points: list[OperatingPoint] = []
    unsupported: list[str] = []
    for wanted in OPERATING_FARS:
        reason = explain_unsupported_far(wanted, impostors)
        if reason:
            unsupported.append(reason)
            continue
        # FAR rises along the curve as the threshold falls: the last point within the limit.
        index = int(np.flatnonzero(curve.far <= float(wanted))[-1])
        threshold = float(curve.thresholds[index])
        points.append(
            {
                "wanted": wanted,
                "threshold": threshold,
                "degrees": float(verification.to_degrees(threshold)),
                "far": float(curve.far[index]),
                "frr": float(1 - curve.tar[index]),
            }
        )
    return points, unsupported
