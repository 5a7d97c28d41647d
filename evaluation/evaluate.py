"""Evaluate a model on test sets: metrics, their statistics, comparisons with another model.

    from evaluation.evaluate import evaluate_set, set_statistics
    result = evaluate_set(model, load_set(folder, pairs), PROTOCOLS["insightface"])
    result.metrics.update(set_statistics(result, seed=0))
    compare_results(result, other_result, seed=0)["verdict"]

Here metrics.Metrics, the structure of lfw.json, is filled in.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evaluation import verification
from evaluation.calibration import calibrate, operating_points
from evaluation.embedders import Embed
from evaluation.embedding_cache import EmbeddingCache
from evaluation.evaluated_model import EvaluatedModel
from evaluation.metrics import Comparison, Metrics, RobustnessMetrics, Statistics
from evaluation.pair_sets import PairSet, SetResult, identity_groups
from evaluation.protocols import Protocol, evaluate_views, fuse_views
from evaluation.robustness import evaluate_corruptions
from evaluation.significance import (
    bootstrap_intervals,
    bootstrap_weights,
    compare_paired,
    correct_predictions,
)
from utils import UserError

RESAMPLES = 1000


# ------------------------------------------------------------------------------ metrics


def evaluate_lfw(embed: Embed, test_set: PairSet) -> SetResult:
    """Embed every face once and verify the pairs, by this project's protocol.

    train.py evaluates so after each epoch, by shared_set.py; evaluate_set adds other protocols and
    a cache.
    """
    return verify_embeddings(embed(test_set.images), test_set)


def verify_embeddings(embeddings: Tensor, test_set: PairSet) -> SetResult:
    """The result that the embeddings (n, d) of a set's faces give by this project's protocol."""
    rows = embeddings.float().cpu().numpy()
    scores = verification.pair_scores(rows, test_set.pairs.first, test_set.pairs.second)
    return SetResult(test_set, scores, pair_set_metrics(scores, test_set), rows)


def pair_set_metrics(scores: np.ndarray, test_set: PairSet) -> Metrics:
    """The metrics that the cosines of a set's pairs, (pairs,), give."""
    return {
        **verification.verify(scores, test_set.pairs.same, test_set.pairs.folds),
        "faces": len(test_set.images),
        "missed_faces": test_set.missed,
    }


def evaluate_set(model: EvaluatedModel, test_set: PairSet, protocol: Protocol) -> SetResult:
    """Verify the pairs of a test set by a protocol; embeddings come from the cache if they can.

    The model must give unnormalised embeddings without mirror images: the protocol says how they
    are combined. Raises UserError where embeddings are not finite.
    """
    start = time.perf_counter()
    cache = EmbeddingCache(model.folder / "embeddings", model.checkpoint.stem, model.checksum)
    views = cache.views(model.embed, test_set.name, test_set.images, protocol.flip)
    try:
        scores, metrics, pairs = evaluate_views(views, test_set.pairs, protocol)
    except ValueError as error:
        raise UserError(f"{test_set.path} with {model.checkpoint}: {error}.") from None
    false_positives, false_negatives = verification.worst_errors(
        scores, pairs.same, metrics["best_threshold"]
    )
    set_metrics: Metrics = {
        **metrics,
        "faces": len(test_set.images),
        "missed_faces": test_set.missed,
        "false_positives": len(false_positives),
        "false_negatives": len(false_negatives),
        "flip": protocol.flip,
        "test_set": str(test_set.path),
        "from_cache": cache.computed == 0,
        "seconds": round(time.perf_counter() - start, 2),
    }
    # A protocol may have folds of its own; what follows (statistics, report) must use the same.
    test_set = dataclasses.replace(test_set, pairs=pairs)
    embeddings = fuse_views(views, protocol).astype(np.float32)
    return SetResult(test_set, scores, set_metrics, embeddings)


def measure_robustness(
    model: EvaluatedModel, result: SetResult, protocol: Protocol
) -> dict[str, RobustnessMetrics]:
    """Metrics under each corruption, from the embeddings that the protocol prescribes.

    Scores are always cosines, and no mean is subtracted.
    """

    def embed(faces: Tensor) -> Tensor:
        views = [model.embed(faces)]
        if protocol.flip:
            views.append(model.embed(faces.flip(2)))
        return torch.from_numpy(fuse_views(torch.stack(views).numpy(), protocol))

    test_set = result.test_set
    return evaluate_corruptions(embed, test_set.images, test_set.pairs, result.embeddings)


# ------------------------------------------------------------------------------ statistics


def set_statistics(result: SetResult, seed: int) -> Statistics:
    """Confidence intervals over identities, operating points and calibration of a result."""
    pairs = result.test_set.pairs
    weights, identities, how = _identity_weights(result, seed)
    points, refused = operating_points(result.scores, pairs.same)
    statistics: Statistics = {
        "intervals": bootstrap_intervals(result.scores, pairs.same, _correct(result), weights),
        "identities": identities,
        "identities_known": how,
        "resamples": RESAMPLES,
        "operating_points": points,
        "operating_points_refused": refused,
    }
    # The calibration of a fold is fitted on the other folds, which need pairs of both kinds.
    rest = [pairs.same[pairs.folds != fold] for fold in np.unique(pairs.folds)]
    if all(same.any() and not same.all() for same in rest):
        statistics["calibration"] = calibrate(result.scores, pairs.same, pairs.folds)
    return statistics


def compare_models(
    other: EvaluatedModel, results: Sequence[SetResult], protocol: Protocol, seed: int
) -> tuple[list[SetResult], list[Comparison]]:
    """Evaluate another model on the sets of the first one's results, and compare the two."""
    other_results = [evaluate_set(other, result.test_set, protocol) for result in results]
    comparisons = [
        compare_results(first, second, seed)
        for first, second in zip(results, other_results, strict=True)
    ]
    return other_results, comparisons


def compare_results(first: SetResult, second: SetResult, seed: int) -> Comparison:
    """Two models on one set, each at the thresholds of its own folds."""
    weights, _, _ = _identity_weights(first, seed)
    return compare_paired(
        (first.scores, second.scores),
        first.test_set.pairs.same,
        (_correct(first), _correct(second)),
        weights,
    )


def _identity_weights(result: SetResult, seed: int) -> tuple[np.ndarray, int, str]:
    """Bootstrap weights (resamples, pairs), the number of identities, and how they are known."""
    groups, how = identity_groups(result.test_set)
    pairs = result.test_set.pairs
    weights = bootstrap_weights(groups, pairs.first, pairs.second, RESAMPLES, seed)
    return weights, int(groups.max()) + 1, how


def _correct(result: SetResult) -> np.ndarray:
    """Whether each pair is predicted correctly at its fold's threshold, (pairs,) bool."""
    pairs = result.test_set.pairs
    return correct_predictions(
        result.scores, pairs.same, pairs.folds, result.metrics["fold_thresholds"]
    )
