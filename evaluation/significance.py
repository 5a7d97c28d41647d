"""Confidence intervals and significance tests for verification results. Pure maths, no files.

    from evaluation.significance import bootstrap_intervals, bootstrap_weights
    weights = bootstrap_weights(identities, pairs.first, pairs.second, resamples=1000, seed=0)
    bootstrap_intervals(scores, pairs.same, correct, weights)["accuracy"]     # (low, high), 95 %

Pairs that share an identity are not independent: one hard face lowers the score of several pairs.
The bootstrap therefore resamples identities, not pairs: each resample draws as many identities as
the set has, with replacement. A genuine pair gets the multiplicity of its identity as its weight,
an impostor pair the product of the multiplicities of its two identities.

For genuine pairs this is the subsets bootstrap (Bolle, Ratha and Pankanti, "Error analysis of
pattern recognition systems - the subsets bootstrap", CVIU 2004); for impostor pairs it is the
pigeonhole bootstrap (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007). It is
conservative: intervals are up to sqrt(3) times too wide where no two impostor pairs share an
identity.

Two models are compared on the same pairs by McNemar's exact test and by this bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from evaluation.metrics import Comparison, Interval, Intervals
from evaluation.verification import FARS

CONFIDENCE = 0.95
RESAMPLES_PER_BLOCK = 100  # 100 x 6,000 pairs x 8 bytes is 5 MB an array


# ------------------------------------------------------------------------------ the bootstrap


def bootstrap_weights(
    identities: np.ndarray, first: np.ndarray, second: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Weight of each pair in each resample of the identities: (resamples, pairs) float32.

    identities (n,) int64 are the identities of the faces, from 0; first and second (pairs,) are
    indices of faces. Example: a resample of the identities 0, 1, 2 draws 0, 0, 2. A genuine pair
    of identity 0 then has weight 2, an impostor pair of 0 and 2 has 2 x 1 = 2, and every pair with
    a face of identity 1 has 0.
    """
    count = int(identities.max()) + 1
    rng = np.random.default_rng(seed)
    left, right = identities[first], identities[second]
    weights = np.empty((resamples, len(first)), np.float32)
    for row in range(resamples):
        multiplicity = np.bincount(rng.integers(0, count, count), minlength=count)
        # A genuine pair has one identity: its multiplicity must not be squared.
        weights[row] = multiplicity[left] * np.where(left == right, 1, multiplicity[right])
    return weights


class BootstrapRates(NamedTuple):
    """The rates of one model in each resample, (resamples,) float64 each; TAR by FAR."""

    accuracy: np.ndarray
    tar_at_far: dict[str, np.ndarray]
    eer: np.ndarray


def bootstrap_rates(
    scores: np.ndarray,
    same: np.ndarray,
    correct: np.ndarray,
    weights: np.ndarray,
    fars: Sequence[str] = FARS,
) -> BootstrapRates:
    """Accuracy, TAR at FAR and EER of each resample; weights (resamples, pairs).

    scores (pairs,) float64, same (pairs,) bool: genuine. correct (pairs,) bool: predicted
    correctly at the threshold of the pair's fold. Those thresholds are kept, not fitted again. The
    fraction of genuine pairs is also kept at that of the set: a resample changes which pairs count,
    not how common each kind is.
    """
    # Sort once: from high to low score, the pairs accepted at a threshold are a prefix, so every
    # resample's ROC curve is a cumulative sum of its weights. Tied scores are accepted together,
    # hence only the last index of each run of equal scores is a point of the curve.
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    genuine, genuine_fraction = same[order], same.mean()
    blocks: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(weights), RESAMPLES_PER_BLOCK):
        block = weights[start : start + RESAMPLES_PER_BLOCK, order].astype(np.float64)
        genuine_weight = np.cumsum(block * genuine, 1)
        impostor_weight = np.cumsum(block * ~genuine, 1)
        # A resample of a tiny set may have no genuine or no impostor pair: its rates become nan,
        # and percentile_interval leaves it out.
        with np.errstate(invalid="ignore", divide="ignore"):
            hits = np.stack(
                [block @ (correct[order] & genuine), block @ (correct[order] & ~genuine)]
            )
            tpr, tnr = hits / np.stack([genuine_weight[:, -1], impostor_weight[:, -1]])
            tar = genuine_weight[:, ends] / genuine_weight[:, -1:]
            far = impostor_weight[:, ends] / impostor_weight[:, -1:]
        accuracy = genuine_fraction * tpr + (1 - genuine_fraction) * tnr
        tars = [np.where(far <= float(limit), tar, 0).max(1) for limit in fars]
        blocks.append((accuracy, _equal_error_rates(far, tar), *tars))
    accuracy, eer, *tars = (np.concatenate(values) for values in zip(*blocks, strict=True))
    return BootstrapRates(accuracy, dict(zip(fars, tars, strict=True)), eer)


def _equal_error_rates(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """EER of each row of ROC curves (rows, points), linear between points: (rows,) float64."""
    # The curve begins at "accept nothing", which is no pair's score.
    origin = np.zeros((len(far), 1))
    far, tar = np.hstack([origin, far]), np.hstack([origin, tar])
    excess = 1 - tar - far  # FRR - FAR: falls from 1 (accept nothing) to -1 (accept everything)
    after = np.argmax(excess <= 0, 1)  # first point at which FAR has reached FRR
    rows, before = np.arange(len(far)), np.maximum(after - 1, 0)
    fall = excess[rows, before] - excess[rows, after]
    # Where on the segment the excess is 0. A row of nan has no fall; it stays nan.
    step = excess[rows, before] / np.where(fall > 0, fall, 1)
    return far[rows, before] + step * (far[rows, after] - far[rows, before])


def percentile_interval(values: np.ndarray) -> Interval:
    """The 95 % interval of the percentile bootstrap: the 2.5th and the 97.5th percentile.

    values (resamples,); resamples with only one kind of pair (nan) are left out. Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(values[np.isfinite(values)], tails)
    return float(low), float(high)


def bootstrap_intervals(
    scores: np.ndarray, same: np.ndarray, correct: np.ndarray, weights: np.ndarray
) -> Intervals:
    """95 % intervals, (low, high), of accuracy, tar_at_far and eer; see bootstrap_rates."""
    rates = bootstrap_rates(scores, same, correct, weights)
    return {
        "accuracy": percentile_interval(rates.accuracy),
        "tar_at_far": {far: percentile_interval(tars) for far, tars in rates.tar_at_far.items()},
        "eer": percentile_interval(rates.eer),
    }


def correct_predictions(
    scores: np.ndarray, same: np.ndarray, folds: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """Whether each pair is predicted correctly at the threshold of its fold: (pairs,) bool.

    thresholds (folds,) are in the order of the fold numbers, which need not begin at 0: of folds
    3, 5 and 9 the second threshold is for fold 5.
    """
    fold_index = np.unique(folds, return_inverse=True)[1]
    return (scores >= np.asarray(thresholds)[fold_index]) == same


# ------------------------------------------------------------------------------ two models


def mcnemar_test(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test: pairs only A has correct, pairs only B has, two-sided p.

    Pairs on which both are right or both are wrong say nothing about the difference. Of the others,
    under the null hypothesis, each is as likely to be A's as B's: a binomial with p = 1/2 (McNemar,
    "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 1947). Example: 8 against 2 of 10 gives p = 2 x (45 + 10 + 1) / 1024 = 0.11.
    """
    only_a = int(np.sum(correct_a & ~correct_b))
    only_b = int(np.sum(correct_b & ~correct_a))
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue)


def compare_paired(
    scores: tuple[np.ndarray, np.ndarray],
    same: np.ndarray,
    correct: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> Comparison:
    """Model A minus model B on the same pairs, each at its own thresholds, and the verdict.

    scores and correct are those of A and of B, (pairs,) each. Both are evaluated on the same
    resamples, so that pairs which are hard for both cancel out of the difference.
    """
    a, b = (bootstrap_rates(s, same, c, weights) for s, c in zip(scores, correct, strict=True))
    only_a, only_b, p = mcnemar_test(*correct)
    low, high = percentile_interval(a.accuracy - b.accuracy)
    return {
        "accuracy_difference": float(correct[0].mean() - correct[1].mean()),
        "accuracy_interval": (low, high),
        "tar_interval": {
            far: percentile_interval(a.tar_at_far[far] - b.tar_at_far[far]) for far in a.tar_at_far
        },
        "eer_interval": percentile_interval(a.eer - b.eer),
        "only_first_right": only_a,
        "only_second_right": only_b,
        "mcnemar_p": p,
        "noise": not all(_significant(p, low, high)),
        "verdict": describe_difference(only_a, only_b, p, low, high),
    }


def _significant(p: float, low: float, high: float) -> tuple[bool, bool]:
    """Whether McNemar's test and whether the bootstrap shows a difference."""
    return p < 1 - CONFIDENCE, not low <= 0 <= high


def describe_difference(only_a: int, only_b: int, p: float, low: float, high: float) -> str:
    """Whether a difference in accuracy is statistically significant, in a sentence.

    Conservative: both McNemar's test and the bootstrap must show it. McNemar's p is exact, but
    treats pairs as independent; the bootstrap does not, but its interval is approximate.
    """
    counts = f"{only_a} pairs correct only for the first, {only_b} only for the second: p = {p:.2g}"
    by_mcnemar, by_bootstrap = _significant(p, low, high)
    if by_mcnemar and by_bootstrap:
        better = "first" if low > 0 else "second"
        return f"The {better} is better, statistically significant ({counts})."
    if by_mcnemar or by_bootstrap:
        only_test = "McNemar's test" if by_mcnemar else "the bootstrap"
        return f"Inconclusive: only {only_test} shows a difference ({counts}); treat it as noise."
    return f"No statistically significant difference ({counts})."
