"""Is a number, or a difference between two models, more than chance? Pure maths, no files.

    from evaluation.significance import identity_weights, intervals, compare
    weights = identity_weights(groups, pairs.first, pairs.second, resamples=1000, seed=0)
    intervals(scores, pairs.same, right, weights)["accuracy"]     # (low, high), 95 %

Pairs that share a person are not independent: one hard face spoils several of them. So people are
drawn anew, not pairs: a resample draws as many people as there are, with replacement, and a pair
counts as often as its person was drawn, or, of two people, the product of both. This is the subsets
bootstrap (Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems - the subsets
bootstrap", CVIU 2004) for matched pairs, and the pigeonhole bootstrap (Owen, Annals of Applied
Statistics 2007) for mismatched ones. It errs on the wide side: by a factor of up to root 3 for
mismatched pairs that have no person in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from evaluation.verification import FARS

LEVEL = 0.95
BLOCK = 100  # resamples worked on at a time: 100 x 6,000 pairs x 8 bytes is 5 MB an array


def identity_weights(
    groups: np.ndarray, first: np.ndarray, second: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """How often each pair counts in each resample of the people: (resamples, pairs) float32.

    groups (n,) int64 is the person of each face, first and second (pairs,) are faces.
    """
    people = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    left, right = groups[first], groups[second]
    weights = np.empty((resamples, len(first)), np.float32)
    for row in range(resamples):
        times = np.bincount(rng.integers(0, people, people), minlength=people)
        weights[row] = times[left] * np.where(left == right, 1, times[right])
    return weights


class Rates(NamedTuple):
    """What one model reaches in each resample, (resamples,) float64; TAR by FAR as in FARS."""

    accuracy: np.ndarray
    tar_at_far: dict[str, np.ndarray]
    eer: np.ndarray


def resampled(
    scores: np.ndarray,
    same: np.ndarray,
    right: np.ndarray,
    weights: np.ndarray,
    fars: Sequence[str] = FARS,
) -> Rates:
    """Accuracy, TAR at FAR and EER of each resample; weights (resamples, pairs).

    right (pairs,) bool says which pairs are judged rightly at the thresholds of the protocol, which
    are not fitted anew. The share of matched pairs stays what it is in the set.
    """
    # Points of the curve: after the last of each run of equal scores, from high to low.
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    matched, share = same[order], same.mean()
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(weights), BLOCK):
        block = weights[start : start + BLOCK, order].astype(np.float64)
        genuine = np.cumsum(block * matched, 1)
        impostor = np.cumsum(block * ~matched, 1)
        # A resample may hold one kind only, of a tiny set: its rates are then of no use.
        with np.errstate(invalid="ignore", divide="ignore"):
            hits = np.stack([block @ (right[order] & matched), block @ (right[order] & ~matched)])
            tpr, tnr = hits / np.stack([genuine[:, -1], impostor[:, -1]])
            tar = genuine[:, ends] / genuine[:, -1:]
            far = impostor[:, ends] / impostor[:, -1:]
        tars = [np.where(far <= float(limit), tar, 0).max(1) for limit in fars]
        parts.append((share * tpr + (1 - share) * tnr, _equal_error(far, tar), *tars))
    accuracy, eer, *tars = (np.concatenate(values) for values in zip(*parts, strict=True))
    return Rates(accuracy, dict(zip(fars, tars, strict=True)), eer)


def _equal_error(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """EER of each row of a curve (rows, points), linear between points: (rows,)."""
    nothing = np.zeros((len(far), 1))
    far, tar = np.hstack([nothing, far]), np.hstack([nothing, tar])
    excess = 1 - tar - far  # falls from 1 (accept none) to -1 (accept all)
    after = np.argmax(excess <= 0, 1)
    rows, before = np.arange(len(far)), np.maximum(after - 1, 0)
    fall = excess[rows, before] - excess[rows, after]
    step = excess[rows, before] / np.where(fall > 0, fall, 1)
    return far[rows, before] + step * (far[rows, after] - far[rows, before])


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values; those of resamples without one kind do not count."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(values[np.isfinite(values)], tails)
    return float(low), float(high)


def intervals(
    scores: np.ndarray, same: np.ndarray, right: np.ndarray, weights: np.ndarray
) -> dict[str, Any]:
    """95 % intervals, (low, high), of accuracy, tar_at_far and eer; arguments as resampled."""
    rates = resampled(scores, same, right, weights)
    return {
        "accuracy": interval(rates.accuracy),
        "tar_at_far": {far: interval(values) for far, values in rates.tar_at_far.items()},
        "eer": interval(rates.eer),
    }


def judged_rightly(
    scores: np.ndarray, same: np.ndarray, folds: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """Whether each pair is judged rightly at its fold's threshold: (pairs,) bool."""
    rank = np.unique(folds, return_inverse=True)[1]
    return (scores >= np.asarray(thresholds)[rank]) == same


# ------------------------------------------------------------------------------ two models


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> tuple[int, int, float]:
    """Pairs that only A judges rightly, those that only B does, and the exact two-sided p.

    Under chance either is as likely as the other: a binomial with p = 1/2 (McNemar 1947). Pairs on
    which both agree say nothing about the difference.
    """
    only_a = int(np.sum(right_a & ~right_b))
    only_b = int(np.sum(right_b & ~right_a))
    if only_a + only_b == 0:
        return 0, 0, 1.0
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue)


def compare(
    scores: tuple[np.ndarray, np.ndarray],
    same: np.ndarray,
    right: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray,
) -> dict[str, Any]:
    """Model A less model B on the same pairs, each at its own thresholds, and what to make of it.

    scores and right are those of A and of B, (pairs,) each. Both are resampled together, so that
    what is hard for both does not blur the difference.
    """
    a, b = (resampled(s, same, r, weights) for s, r in zip(scores, right, strict=True))
    only_a, only_b, p = mcnemar(*right)
    low, high = interval(a.accuracy - b.accuracy)
    return {
        "accuracy_difference": float(right[0].mean() - right[1].mean()),
        "accuracy_interval": (low, high),
        "tar_interval": {
            far: interval(a.tar_at_far[far] - b.tar_at_far[far]) for far in a.tar_at_far
        },
        "eer_interval": interval(a.eer - b.eer),
        "only_first_right": only_a,
        "only_second_right": only_b,
        "mcnemar_p": p,
        "noise": not (p < 1 - LEVEL and not low <= 0 <= high),
        "verdict": verdict(only_a, only_b, p, low, high),
    }


def verdict(only_a: int, only_b: int, p: float, low: float, high: float) -> str:
    """Whether a difference in accuracy is noise, in a sentence: both tests must see it."""
    counted = f"{only_a} pairs only the first gets right, {only_b} only the second: p = {p:.2g}"
    if p < 1 - LEVEL and not low <= 0 <= high:
        better = "first" if low > 0 else "second"
        return f"The {better} is better, beyond chance ({counted})."
    if p < 1 - LEVEL or not low <= 0 <= high:
        seen = "McNemar's test" if p < 1 - LEVEL else "the bootstrap"
        return f"Not settled: only {seen} sees a difference ({counted}); take it for noise."
    return f"The difference is within chance ({counted})."
