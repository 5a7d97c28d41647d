"""Evaluation protocols: the ways in which verification results are computed. Pure maths, no files.

    from evaluation.protocols import PROTOCOLS, evaluate_views
    scores, metrics, pairs = evaluate_views(views, pairs, PROTOCOLS["insightface"])

The accuracy of one model differs by some hundredths of a per cent between protocols, so the metrics
name theirs: mirror image, how its embedding is combined with the face's, metric, thresholds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from evaluation import verification
from evaluation.metrics import InsightFaceMetrics, ProtocolMetrics
from evaluation.verification import PAIRS_PER_CHUNK, Folds, Pairs


class Protocol(NamedTuple):
    """An evaluation protocol; the defaults are this project's."""

    flip: bool = True  # the mirror image is embedded, too
    fuse: str = "sum"  # how the two embeddings are combined: "sum" or "concat"
    subtract_mean: bool = False  # the mean embedding of the other folds is subtracted
    metric: str = "cosine"  # or "euclidean": the squared distance of unit vectors
    threshold: str = "folds"  # the best of the other folds, or "best": of the test pairs
    grid: bool = False  # InsightFace's: thresholds 0, 0.01 ... 3.99, contiguous tenths as folds


# The presets of --as.
PROTOCOLS = {
    "": Protocol(),
    # ArcFace (1801.07698) extracts a 512-d embedding per face and does not mention mirror images;
    # it scores angles by LFW's protocol: ten folds, standard error (Huang et al. 2007).
    "paper": Protocol(flip=False),
    # recognition/arcface_torch/eval/verification.py: sum, L2-normalised, squared distance, KFold.
    "insightface": Protocol(metric="euclidean", grid=True),
}


def describe_protocol(protocol: Protocol) -> str:
    """The protocol in words, for tables and the report."""
    combined = {"sum": "summed", "concat": "concatenated"}[protocol.fuse]
    words = [f"image and mirror image {combined}" if protocol.flip else "no mirror image"]
    if protocol.subtract_mean:
        words.append("mean of the other folds subtracted")
    words.append({"cosine": "cosine", "euclidean": "squared distance"}[protocol.metric])
    if protocol.grid:
        words.append("thresholds 0 to 4 by 0.01")
    if protocol.threshold == "best":
        words.append("best threshold on the test pairs (optimistic)")
    else:
        words.append("thresholds of the other folds")
    return ", ".join(words)


# ------------------------------------------------------------------------------ embeddings


def fuse_views(views: np.ndarray, protocol: Protocol) -> np.ndarray:
    """One embedding per face, (n, d) float64, L2-normalised, from those of its views (v, n, d).

    The views are the face and, if v is 2, its mirror image, both unnormalised. Concatenation (of
    SphereFace and CosFace) gives 2d dimensions. Raises ValueError where a number is not finite, or
    where the protocol needs a mirror image that is missing.
    """
    if protocol.flip and len(views) < 2:
        raise ValueError("the protocol needs the embeddings of mirror images, too")
    broken = int((~np.isfinite(views).all((0, 2))).sum())
    if broken:
        raise ValueError(f"the embeddings of {broken} of {views.shape[1]} faces are not finite")
    if not protocol.flip:
        views = views[:1]
    views = views.astype(np.float64)
    if protocol.fuse == "concat":
        return to_unit_length(np.concatenate(list(views), 1))
    return to_unit_length(views.sum(0))


def to_unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d), L2-normalised; zeros stay zeros."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return vectors / np.where(norms > 0, norms, 1)[:, None]


def squared_distances(embeddings: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Squared Euclidean distance of each pair, (pairs,) float64; embeddings (n, d) float64."""
    distances = np.empty(len(pairs.same))
    for start in range(0, len(distances), PAIRS_PER_CHUNK):
        part = slice(start, start + PAIRS_PER_CHUNK)
        difference = embeddings[pairs.first[part]] - embeddings[pairs.second[part]]
        distances[part] = np.sum(np.square(difference), 1)
    return distances


def protocol_scores(embeddings: np.ndarray, pairs: Pairs, protocol: Protocol) -> np.ndarray:
    """Cosine of each pair, (pairs,) float64, from the distance if that is the protocol's metric.

    For unit vectors the squared distance d2 is 2 - 2 cos, hence 1 - d2 / 2 is the cosine. Both
    metrics rank pairs equally; they differ in the last digits only.
    """
    if protocol.metric == "euclidean":
        return 1 - squared_distances(embeddings, pairs) / 2
    return verification.pair_scores(embeddings, pairs.first, pairs.second)


def protocol_scores_by_fold(embeddings: np.ndarray, pairs: Pairs, protocol: Protocol) -> np.ndarray:
    """Scores for each fold held out, (folds, pairs): without the mean embedding of the others.

    The mean is over both faces of all pairs of the other folds, as in FaceNet's evaluation. The
    centred embeddings are L2-normalised again, since distances do not change under a shift.
    """
    rows = []
    for fold in np.unique(pairs.folds):
        others = pairs.folds != fold
        faces = np.concatenate([pairs.first[others], pairs.second[others]])
        # A face counts as often as it is in a pair.
        counts = np.bincount(faces, minlength=len(embeddings))
        centred = embeddings - counts @ embeddings / counts.sum()
        rows.append(protocol_scores(to_unit_length(centred), pairs, protocol))
    return np.array(rows)


# ------------------------------------------------------------------------------ metrics


def evaluate_views(
    views: np.ndarray, pairs: Pairs, protocol: Protocol
) -> tuple[np.ndarray, ProtocolMetrics, Pairs]:
    """Scores (pairs,) float64, metrics, and the pairs with the folds that the protocol uses.

    views (v, n, d) are those of fuse_views. Where scores depend on the fold held out, a pair's
    score is that of its own fold. Raises ValueError as fuse_views and verify do.
    """
    embeddings = fuse_views(views, protocol)
    if protocol.grid:
        pairs = pairs._replace(folds=verification.contiguous_folds(len(pairs.same)))
    numbers, fold_index = np.unique(pairs.folds, return_inverse=True)
    if protocol.subtract_mean:
        scores_by_fold = protocol_scores_by_fold(embeddings, pairs, protocol)
        scores = scores_by_fold[fold_index, np.arange(len(fold_index))]
    else:
        scores_by_fold = scores = protocol_scores(embeddings, pairs, protocol)
    insightface: InsightFaceMetrics = {}
    if protocol.threshold == "best":
        best = verification.best_threshold(scores, pairs.same)
        correct = (scores >= best) == pairs.same
        validated = Folds(
            accuracies=np.array([correct[pairs.folds == fold].mean() for fold in numbers]),
            thresholds=np.full(len(numbers), best),
        )
    elif protocol.grid:
        distances = squared_distances(embeddings, pairs)
        validated, insightface = validate_on_grid(distances, pairs.same, pairs.folds)
    else:
        validated = verification.cross_validate(scores_by_fold, pairs.same, pairs.folds)
    metrics: ProtocolMetrics = {
        **verification.verify(scores, pairs.same, pairs.folds, validated),
        "protocol": protocol._asdict(),
        "protocol_in_words": describe_protocol(protocol),
        **insightface,
    }
    return scores, metrics, pairs


def validate_on_grid(
    distances: np.ndarray, same: np.ndarray, folds: np.ndarray, far: float = 1e-3
) -> tuple[Folds, InsightFaceMetrics]:
    """Cross-validation as InsightFace's verification.py does it, and its three further metrics.

    A pair is accepted if its squared distance is below the threshold, which is the first of the
    best ones on the other folds from the grid 0, 0.01 ... 3.99. standard_deviation is np.std of the
    folds' accuracies, not a standard error. val ("VAL at FAR") is the fraction of genuine pairs
    below the threshold that gives the FAR on the other folds, linear between points of the grid 0,
    0.001 ... 3.999, and 0 if the FAR is not reached.
    """
    grid, fine_grid = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    accuracies, thresholds, vals = [], [], []
    for fold in np.unique(folds):
        held_out = folds == fold
        genuine, impostor = distances[~held_out & same], distances[~held_out & ~same]
        correct = _count_below(genuine, grid) + len(impostor) - _count_below(impostor, grid)
        thresholds.append(grid[int(np.argmax(correct))])
        accuracies.append(float(np.mean((distances[held_out] < thresholds[-1]) == same[held_out])))

        far_on_grid = _count_below(impostor, fine_grid) / max(1, len(impostor))
        after = int(np.searchsorted(far_on_grid, far))  # the first point that reaches the FAR
        limit = 0.0
        if 0 < after < len(fine_grid):
            before = after - 1
            step = (far - far_on_grid[before]) / (far_on_grid[after] - far_on_grid[before])
            limit = fine_grid[before] + step * (fine_grid[after] - fine_grid[before])
        if np.any(held_out & same):
            vals.append(float(np.mean(distances[held_out & same] < limit)))
    # As cosines, like all other thresholds in the metrics.
    validated = Folds(np.array(accuracies), 1 - np.array(thresholds) / 2)
    return validated, {
        "standard_deviation": float(np.std(accuracies)),
        "val": float(np.mean(vals)),
        "val_far": far,
    }


def _count_below(distances: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The number of distances strictly below each threshold, (thresholds,) int64."""
    return np.searchsorted(np.sort(distances), thresholds, side="left")
