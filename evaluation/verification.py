"""Face verification as on LFW: pairs, scores, thresholds, folds, ROC. Pure maths, no files.

    from evaluation.verification import pair_scores, verify
    verify(pair_scores(embeddings, pairs.first, pairs.second), pairs.same, pairs.folds)

A pair of images is genuine (one identity) or impostor (two). It is accepted, that is predicted to
be genuine, if its score, the cosine of the two embeddings, is at least the threshold. Every rate is
a fraction of 1, every angle is in degrees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn.metrics import auc, roc_curve

from evaluation.metrics import VerificationMetrics

FARS = ("1e-3", "1e-2")  # LFW has 3,000 impostor pairs: too few to measure 1e-4
PAIRS_PER_CHUNK = 65536  # scored at a time: 2 x 268 MB of 512-d float64


class Pairs(NamedTuple):
    """Pairs of images, as indices into names."""

    names: list[str]  # "Name/Name_0001", in order of first appearance
    first: np.ndarray  # (pairs,) int64, indices into names
    second: np.ndarray  # (pairs,) int64
    same: np.ndarray  # (pairs,) bool: genuine
    folds: np.ndarray  # (pairs,) int64, 0-based


class Folds(NamedTuple):
    """The result of cross-validation by fold: (folds,) float64 each."""

    accuracies: np.ndarray
    thresholds: np.ndarray


class Roc(NamedTuple):
    """Rates at every threshold, from accepting nothing to accepting everything: (points,) each."""

    far: np.ndarray
    tar: np.ndarray
    thresholds: np.ndarray


# ------------------------------------------------------------------------------ folds


def contiguous_folds(pairs: int, folds: int = 10) -> np.ndarray:
    """The fold of each pair, (pairs,) int64, as of scikit-learn's KFold(folds, shuffle=False).

    Folds are runs of neighbours; where folds does not divide pairs the first ones have one pair
    more. InsightFace evaluates its .bin sets in this way, since they do not store folds.
    """
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def stratified_folds(same: np.ndarray, keys: np.ndarray, folds: int = 10) -> np.ndarray:
    """The fold of each pair, (pairs,) int64: folds as large as contiguous_folds', in proportion.

    Of genuine and of impostor pairs, same (pairs,) bool, each fold has the share that all pairs
    have, to one pair. Each kind is dealt out in the order of its keys (pairs,).
    """
    quantile = np.empty(len(same))
    for kind in (np.flatnonzero(same), np.flatnonzero(~same)):
        ordered = kind[np.argsort(keys[kind], kind="stable")]
        quantile[ordered] = (np.arange(len(kind)) + 0.5) / max(1, len(kind))
    result = np.empty(len(same), np.int64)
    result[np.lexsort((~same, quantile))] = contiguous_folds(len(same), folds)
    return result


# ------------------------------------------------------------------------------ scores


def pair_scores(
    embeddings: np.ndarray, first: np.ndarray, second: np.ndarray, chunk: int = PAIRS_PER_CHUNK
) -> np.ndarray:
    """Cosine of each pair, (pairs,) float64; embeddings (n, d) of any length, indices (pairs,).

    An embedding of zeros has a cosine of 0 with everything. Computed in float64, `chunk` pairs at a
    time, so that memory does not grow with the number of pairs.
    """
    scores = np.zeros(len(first))
    for start in range(0, len(first), chunk):
        part = slice(start, start + chunk)
        left = embeddings[first[part]].astype(np.float64)
        right = embeddings[second[part]].astype(np.float64)
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        products = np.einsum("nd,nd->n", left, right)
        np.divide(products, norms, out=scores[part], where=norms > 0)
    return scores.clip(-1, 1)  # rounding can exceed 1, which has no angle


def to_degrees(cosine: np.ndarray | float) -> np.ndarray:
    """Angle between two unit vectors in degrees, 0 to 180, from their cosine."""
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


# ------------------------------------------------------------------------------ thresholds


def accuracy(scores: np.ndarray, same: np.ndarray, threshold: float) -> float:
    """Fraction of pairs predicted correctly if those scoring at least threshold are accepted."""
    return float(np.mean((scores >= threshold) == same))


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the most correct predictions, exact, in O(n log n).

    scores (n,), same (n,) bool. Candidates are the midpoints between neighbouring distinct scores,
    the lowest score (accept all) and the next number above the highest (accept none). Of equally
    good candidates the one in the widest gap between scores is taken, since it leaves the most room
    for scores of unseen pairs; of equally wide gaps the lowest.

    Example, with genuine scores 0.3, 0.7, 0.9 and impostor scores 0.1, 0.4:

        candidate             0.1   0.2   0.35   0.55   0.8   just above 0.9
        correct predictions   3     4     3      4      3     2
        gap                   -     0.2   0.1    0.3    0.2   -

    0.2 and 0.55 are equally good, and 0.55 is in the wider gap.
    """
    values, index = np.unique(scores, return_inverse=True)
    genuine = np.bincount(index, weights=same, minlength=len(values))
    impostor = np.bincount(index, weights=~same, minlength=len(values))
    # correct[i]: correct predictions if the i lowest distinct scores are rejected. Accepting all
    # gets the genuine pairs right; each rejected impostor adds one, each rejected genuine pair
    # takes one away.
    correct = genuine.sum() + np.concatenate([[0], np.cumsum(impostor - genuine)])
    # Between two neighbouring floating-point numbers the midpoint may round down to the lower one,
    # which would then be accepted.
    middle = np.maximum(values[:-1] + np.diff(values) / 2, np.nextafter(values[:-1], np.inf))
    candidates = np.concatenate([values[:1], middle, np.nextafter(values[-1:], np.inf)])
    gaps = np.concatenate([[0], np.diff(values), [0]])
    return float(candidates[np.argmax(np.where(correct == correct.max(), gaps, -1))])


def cross_validate(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> Folds:
    """Accuracy on each fold at the best threshold of all other folds (LFW: ten-fold).

    scores (n,), or (folds, n) where they depend on the fold held out; same (n,) bool, folds (n,)
    int. Raises ValueError for fewer than two folds.
    """
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise ValueError("cross-validation needs at least two folds")
    thresholds, accuracies = [], []
    by_fold = np.broadcast_to(scores, (len(numbers), len(same)))
    for fold, row in zip(numbers, by_fold, strict=True):
        held_out = folds == fold
        thresholds.append(best_threshold(row[~held_out], same[~held_out]))
        accuracies.append(accuracy(row[held_out], same[held_out], thresholds[-1]))
    return Folds(np.array(accuracies), np.array(thresholds))


def worst_errors(
    scores: np.ndarray, same: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of false positives (fp,) and of false negatives (fn,) at a threshold, worst first.

    A false positive is worse the higher it scores, a false negative the lower.
    """
    order = np.argsort(scores, kind="stable")
    rejected = scores[order] < threshold
    false_negatives = order[rejected & same[order]]
    false_positives = order[~rejected & ~same[order]][::-1]
    return false_positives, false_negatives


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean: the sample standard deviation over the square root of n.

    This is what LFW's report asks for (Huang et al. 2007). InsightFace prints np.std instead, which
    is sqrt(n - 1) times as large.
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


# ------------------------------------------------------------------------------ ROC


def roc(scores: np.ndarray, same: np.ndarray) -> Roc:
    """Every point of the ROC curve; ValueError where there are no genuine or no impostor pairs."""
    if same.all() or not same.any():
        raise ValueError("an ROC curve needs genuine and impostor pairs")
    # drop_intermediate would leave out points on the line between their neighbours. With tied
    # scores one of them can be the highest TAR under a FAR.
    return Roc(*roc_curve(same, scores, drop_intermediate=False))


def tar_at_far(curve: Roc, far: float) -> float:
    """The largest fraction of genuine pairs accepted while that of impostor pairs is at most far.

    Nothing is interpolated: of 300 impostor pairs FAR 1e-2 allows 3, FAR 1e-3 none.
    """
    return float(curve.tar[curve.far <= far].max())


def equal_error_rate(curve: Roc) -> float:
    """The rate at which false accepts equal false rejects, linear between points of the curve."""
    excess = (1 - curve.tar) - curve.far  # falls from 1 (accept none) to -1 (accept all)
    after = int(np.argmax(excess <= 0))
    before = after - 1
    step = excess[before] / (excess[before] - excess[after])
    return float(curve.far[before] + step * (curve.far[after] - curve.far[before]))


# ------------------------------------------------------------------------------ metrics


def verify(
    scores: np.ndarray, same: np.ndarray, folds: np.ndarray, validated: Folds | None = None
) -> VerificationMetrics:
    """All metrics of scored pairs, as plain numbers that JSON can hold.

    scores (n,) are cosines, same (n,) bool, folds (n,) int. accuracy is the mean over the folds,
    and threshold the mean of their thresholds. best_accuracy is at the best threshold on the test
    pairs: it is optimistic, since the threshold is fitted to the pairs that it is scored on, and
    with folds of equal size it is never below accuracy. validated replaces the result of
    cross_validate. Raises ValueError for fewer than two folds, or for pairs of one kind only.
    """
    if validated is None:
        validated = cross_validate(scores, same, folds)
    curve = roc(scores, same)
    best = best_threshold(scores, same)
    threshold = float(validated.thresholds.mean())
    return {
        "accuracy": float(validated.accuracies.mean()),
        "standard_error": standard_error(validated.accuracies),
        "threshold": threshold,
        "threshold_degrees": float(to_degrees(threshold)),
        "best_accuracy": accuracy(scores, same, best),
        "best_threshold": best,
        "best_threshold_degrees": float(to_degrees(best)),
        "tar_at_far": {far: tar_at_far(curve, float(far)) for far in FARS},
        "auc": float(auc(curve.far, curve.tar)),
        "eer": equal_error_rate(curve),
        "pairs": len(scores),
        "matched_pairs": int(same.sum()),
        "fold_accuracies": validated.accuracies.tolist(),
        "fold_thresholds": validated.thresholds.tolist(),
    }
