"""The conventions in which verification numbers are quoted, each by name: pure maths, no files.

    from evaluation.protocols import PROTOCOLS, evaluate_views
    scores, report, folds = evaluate_views(views, pairs, PROTOCOLS["insightface"])

Numbers of one model differ by some hundredths of a point between conventions, so a report names
its own: mirror image, how the two embeddings become one, metric, how the threshold is found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from evaluation import verification
from evaluation.verification import Folds, Pairs

CHUNK = 65536  # pairs scored at a time


class Protocol(NamedTuple):
    """One convention; the defaults are this project's."""

    flip: bool = True  # the mirror image is embedded, too
    fuse: str = "sum"  # how the two embeddings become one: "sum" or "concat"
    subtract_mean: bool = False  # the mean embedding of the other folds is taken off
    metric: str = "cosine"  # or "euclidean": the squared distance of unit vectors
    threshold: str = "folds"  # the best one on the other folds, or the "best" on all pairs
    grid: bool = False  # InsightFace's: thresholds 0 to 4 by 0.01, contiguous tenths as folds


PROTOCOLS = {
    "": Protocol(),
    # ArcFace (1801.07698) extracts a 512-d embedding for each face, says nothing of mirror images,
    # and scores angles by LFW's protocol: ten folds, standard error (Huang et al. 2007).
    "paper": Protocol(flip=False),
    # recognition/arcface_torch/eval/verification.py: sum, unit length, squared distance, KFold.
    "insightface": Protocol(metric="euclidean", grid=True),
}


def describe(protocol: Protocol) -> str:
    """The convention in words, for a report."""
    fused = {"sum": "summed", "concat": "concatenated"}[protocol.fuse]
    words = [f"image and mirror image {fused}" if protocol.flip else "no mirror image"]
    if protocol.subtract_mean:
        words.append("mean of the other folds subtracted")
    words.append({"cosine": "cosine", "euclidean": "squared distance"}[protocol.metric])
    if protocol.grid:
        words.append("thresholds 0 to 4 by 0.01")
    best_on_all = "one threshold, best on the very pairs"
    words.append(best_on_all if protocol.threshold == "best" else "thresholds of the other folds")
    return ", ".join(words)


# ------------------------------------------------------------------------------ embeddings


def fuse_views(views: np.ndarray, protocol: Protocol) -> np.ndarray:
    """One embedding a face, (n, d) float64 of unit length, from those of its views (v, n, d).

    The views are the face and, where v is 2, its mirror image, in whatever length the network gave
    them. Concatenation (of SphereFace and CosFace) has 2d numbers. Raises ValueError where a number
    is not finite, or where the protocol wants a mirror image that is not there.
    """
    if protocol.flip and len(views) < 2:
        raise ValueError("the protocol needs the embeddings of mirror images, too")
    broken = int((~np.isfinite(views).all((0, 2))).sum())
    if broken:
        raise ValueError(f"the embeddings of {broken} of {views.shape[1]} faces are not finite")
    views = views[: 1 + protocol.flip].astype(np.float64)
    concat = protocol.fuse == "concat"
    return to_unit_length(np.concatenate(list(views), 1) if concat else views.sum(0))


def to_unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d) divided by their lengths; zeros stay zeros."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return vectors / np.where(lengths > 0, lengths, 1)[:, None]


def squared_distances(embeddings: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Squared Euclidean distance of each pair, (pairs,) float64; embeddings (n, d) float64."""
    distances = np.empty(len(pairs.same))
    for start in range(0, len(distances), CHUNK):
        part = slice(start, start + CHUNK)
        difference = embeddings[pairs.first[part]] - embeddings[pairs.second[part]]
        distances[part] = np.sum(np.square(difference), 1)
    return distances


def score(embeddings: np.ndarray, pairs: Pairs, protocol: Protocol) -> np.ndarray:
    """Cosine of each pair, (pairs,) float64, by way of the distance where the metric is that.

    Of unit vectors the squared distance d2 is 2 - 2 cos, so that 1 - d2 / 2 is a cosine again.
    """
    if protocol.metric == "euclidean":
        return 1 - squared_distances(embeddings, pairs) / 2
    return verification.pair_scores(embeddings, pairs.first, pairs.second)


def score_by_fold(embeddings: np.ndarray, pairs: Pairs, protocol: Protocol) -> np.ndarray:
    """Scores for each fold held out, (folds, pairs): the mean of the others is taken off first.

    The mean is over both faces of the other folds' pairs, as FaceNet's evaluation has it; what is
    left gets unit length again, since a distance would not notice the shift.
    """
    rows = []
    for fold in np.unique(pairs.folds):
        others = pairs.folds != fold
        ends = np.concatenate([pairs.first[others], pairs.second[others]])
        counts = np.bincount(ends, minlength=len(embeddings))
        centred = embeddings - counts @ embeddings / counts.sum()
        rows.append(score(to_unit_length(centred), pairs, protocol))
    return np.array(rows)


# ------------------------------------------------------------------------------ the numbers


def evaluate_views(
    views: np.ndarray, pairs: Pairs, protocol: Protocol
) -> tuple[np.ndarray, dict[str, Any], Pairs]:
    """Scores (pairs,) float64, verification.verify's report, and the pairs with the folds used.

    views (v, n, d) are fuse_views'. A pair's score is the one from its own held-out fold where the
    protocol depends on folds. Raises ValueError as fuse_views and verify do.
    """
    embeddings = fuse_views(views, protocol)
    if protocol.grid:
        pairs = pairs._replace(folds=verification.contiguous_folds(len(pairs.same)))
    numbers, rank = np.unique(pairs.folds, return_inverse=True)
    if protocol.subtract_mean:
        by_fold = score_by_fold(embeddings, pairs, protocol)
        scores = by_fold[rank, np.arange(len(rank))]
    else:
        by_fold = scores = score(embeddings, pairs, protocol)
    extra: dict[str, Any] = {}
    if protocol.threshold == "best":
        best = verification.best_threshold(scores, pairs.same)
        right = (scores >= best) == pairs.same
        validated = Folds(
            np.array([right[pairs.folds == k].mean() for k in numbers]), np.full(len(numbers), best)
        )
    elif protocol.grid:
        distances = squared_distances(embeddings, pairs)
        validated, extra = grid_report(distances, pairs.same, pairs.folds)
    else:
        validated = verification.cross_validate(by_fold, pairs.same, pairs.folds)
    report = verification.verify(scores, pairs.same, pairs.folds, validated)
    report |= {"protocol": protocol._asdict(), "protocol_in_words": describe(protocol)} | extra
    return scores, report, pairs


def grid_report(
    distances: np.ndarray, same: np.ndarray, folds: np.ndarray, far: float = 1e-3
) -> tuple[Folds, dict[str, float]]:
    """Folds by InsightFace's routine (verification.py), and its deviation and "VAL at FAR".

    A pair is accepted where its squared distance is below the threshold; of the grid 0, 0.01 ...
    3.99 the first of the best ones on the other folds is taken. The deviation is np.std, without
    n - 1 and without the root of n. VAL is the share of matched pairs below a threshold that gives
    the FAR on the other folds, linear between points of the grid 0, 0.001 ... 3.999.
    """
    grid, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    accuracies, thresholds, vals = [], [], []
    for fold in np.unique(folds):
        held = folds == fold
        accepted = [_below(distances[~held & kind], grid) for kind in (same, ~same)]
        right = accepted[0] + (~same & ~held).sum() - accepted[1]
        thresholds.append(grid[int(np.argmax(right))])
        accuracies.append(float(np.mean((distances[held] < thresholds[-1]) == same[held])))
        false = _below(distances[~held & ~same], fine) / max(1, (~held & ~same).sum())
        at = int(np.searchsorted(false, far))  # the first that reaches it
        limit = 0.0
        if 0 < at < len(fine):
            step = (far - false[at - 1]) / (false[at] - false[at - 1])
            limit = fine[at - 1] + step * (fine[at] - fine[at - 1])
        if np.any(held & same):
            vals.append(float(np.mean(distances[held & same] < limit)))
    validated = Folds(np.array(accuracies), 1 - np.array(thresholds) / 2)
    return validated, {
        "standard_deviation": float(np.std(accuracies)),
        "val": float(np.mean(vals)),
        "val_far": far,
    }


def _below(distances: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many distances are below each threshold, strictly: (thresholds,) int64."""
    return np.searchsorted(np.sort(distances), thresholds, side="left")
