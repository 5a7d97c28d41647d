"""What a model's scores on a set are worth: intervals, calibration, operating points, comparisons.

    from evaluation.evaluate import compare_results, set_statistics
    result.report.update(set_statistics(result, seed=0))
    compare_results(result, other, seed=0)["verdict"]

The bridge from SetResult to the maths in significance.py and calibration.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation.calibration import calibrate, operating_points
from evaluation.pair_sets import SetResult, identity_groups
from evaluation.significance import compare, identity_weights, intervals, judged_rightly

RESAMPLES = 1000


def set_statistics(result: SetResult, seed: int) -> dict[str, Any]:
    """95 % intervals by identity, score to probability, and thresholds for given FARs."""
    pairs = result.test_set.pairs
    weights, people, how = _weights(result, seed)
    points, refused = operating_points(result.scores, pairs.same)
    report: dict[str, Any] = {
        "intervals": intervals(result.scores, pairs.same, _right(result), weights),
        "identities": people,
        "identities_known": how,
        "resamples": RESAMPLES,
        "operating_points": points,
        "operating_points_refused": refused,
    }
    others = (pairs.same[pairs.folds != fold] for fold in np.unique(pairs.folds))
    if all(0 < same.sum() < len(same) for same in others):
        report["calibration"] = calibrate(result.scores, pairs.same, pairs.folds)
    return report


def compare_results(first: SetResult, second: SetResult, seed: int) -> dict[str, Any]:
    """Two models on one set, each at its own cross-validated thresholds; see significance.py."""
    weights, _, _ = _weights(first, seed)
    same = first.test_set.pairs.same
    scores, right = (first.scores, second.scores), (_right(first), _right(second))
    return compare(scores, same, right, weights)


def _weights(result: SetResult, seed: int) -> tuple[np.ndarray, int, str]:
    groups, how = identity_groups(result.test_set)
    pairs = result.test_set.pairs
    weights = identity_weights(groups, pairs.first, pairs.second, RESAMPLES, seed)
    return weights, int(groups.max()) + 1, how


def _right(result: SetResult) -> np.ndarray:
    pairs = result.test_set.pairs
    return judged_rightly(result.scores, pairs.same, pairs.folds, result.report["fold_thresholds"])
