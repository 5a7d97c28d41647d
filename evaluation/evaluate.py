"""Evaluate a model on pair sets: metrics, confidence intervals, comparisons.

    from evaluation.evaluate import evaluate_lfw, set_statistics
    result = evaluate_lfw(torch_embedder(model, device), load_set(folder, pairs))
    result.metrics.update(set_statistics(result, seed=0))

This is where metrics.Metrics, the structure of lfw.json, is filled in.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from evaluation import robustness, verification
from evaluation.calibration import calibrate, operating_points
from evaluation.embedders import Embed, InputSpec, load_embedder
from evaluation.embedding_cache import EmbeddingCache, model_checksum
from evaluation.pair_sets import PairSet, SetResult, identity_groups
from evaluation.protocols import Protocol, evaluate_views, fuse_views
from evaluation.significance import (
    bootstrap_intervals,
    bootstrap_weights,
    compare_paired,
    correct_predictions,
)
from evaluation.verification import worst_errors
from utils import UserError, get_device

RESAMPLES = 1000


# ------------------------------------------------------------------------------ metrics


def summarise(scores: np.ndarray, test_set: PairSet) -> dict[str, Any]:
    """All numbers of lfw.json that the scores of the pairs give; see verification.verify."""
    return verification.verify(scores, test_set.pairs.same, test_set.pairs.folds) | {
        "faces": len(test_set.images),
        "missed_faces": test_set.missed,
    }


def evaluate_lfw(embed: Embed, test_set: PairSet) -> SetResult:
    """Embed every face once and report on the pairs: accuracy, threshold, tar_at_far, auc, ...

    For the loop of train.py: load_set once, then call this each epoch with torch_embedder(model).
    """
    embeddings = embed(test_set.images).float().cpu().numpy()
    scores = verification.pair_scores(embeddings, test_set.pairs.first, test_set.pairs.second)
    return SetResult(test_set, scores, summarise(scores, test_set), embeddings)


class Model(NamedTuple):
    """A checkpoint that is being evaluated."""

    checkpoint: Path
    embed: Embed  # to the length that the network gives, without mirror images
    about: dict[str, Any]  # kind, network, epoch, seed ...
    cache: EmbeddingCache
    folder: Path  # for what is found out about it


def open_model(cfg: Config, checkpoint: Path) -> Model:
    """The model of a checkpoint of any kind, with the embeddings that are kept of it."""
    spec = InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr)
    embed, about = load_embedder(
        checkpoint,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        flip=False,
        batch=cfg.eval_batch,
        spec=spec,
        progress="embedding",
        unnormalised=True,
    )
    ours = about["kind"] == "ours"
    folder = checkpoint.parent if ours else Path(cfg.runs_dir) / checkpoint.stem
    checksum = model_checksum(checkpoint, spec, about["network"])
    about |= {"checkpoint": str(checkpoint), "checksum": checksum}
    cache = EmbeddingCache(folder / "embeddings", checkpoint.stem, checksum)
    return Model(checkpoint, embed, about, cache, folder)


def evaluate_set(model: Model, test_set: PairSet, protocol: Protocol) -> SetResult:
    """Embed the faces of a set, where that has not been done, and report on its pairs."""
    start = time.perf_counter()
    computed = model.cache.computed
    views = model.cache.views(model.embed, test_set.name, test_set.images, protocol.flip)
    try:
        scores, report, pairs = evaluate_views(views, test_set.pairs, protocol)
    except ValueError as error:
        raise UserError(f"{test_set.path} with {model.checkpoint}: {error}.") from None
    positives, negatives = worst_errors(scores, pairs.same, report["best_threshold"])
    report |= {
        "faces": len(test_set.images),
        "missed_faces": test_set.missed,
        "false_positives": len(positives),
        "false_negatives": len(negatives),
        "flip": protocol.flip,
        "test_set": str(test_set.path),
        "from_cache": model.cache.computed == computed,
        "seconds": round(time.perf_counter() - start, 2),
    }
    test_set = dataclasses.replace(test_set, pairs=pairs)
    return SetResult(test_set, scores, report, fuse_views(views, protocol).astype(np.float32))


def measure_robustness(model: Model, result: SetResult, protocol: Protocol) -> dict[str, Any]:
    """evaluate_corruptions with the protocol's embeddings; always on cosines, without a mean."""

    def embed(faces: Tensor) -> Tensor:
        views = [model.embed(side) for side in (faces, faces.flip(2))[: 1 + protocol.flip]]
        return torch.from_numpy(fuse_views(torch.stack(views).numpy(), protocol))

    test_set = result.test_set
    return robustness.evaluate_corruptions(
        embed, test_set.images, test_set.pairs, result.embeddings
    )


# ------------------------------------------------------------------------------ statistics


def set_statistics(result: SetResult, seed: int) -> dict[str, Any]:
    """95 % intervals by identity, score to probability, and thresholds for given FARs."""
    pairs = result.test_set.pairs
    weights, people, how = _weights(result, seed)
    points, refused = operating_points(result.scores, pairs.same)
    report: dict[str, Any] = {
        "intervals": bootstrap_intervals(result.scores, pairs.same, _right(result), weights),
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
    return compare_paired(scores, same, right, weights)


def _weights(result: SetResult, seed: int) -> tuple[np.ndarray, int, str]:
    groups, how = identity_groups(result.test_set)
    pairs = result.test_set.pairs
    weights = bootstrap_weights(groups, pairs.first, pairs.second, RESAMPLES, seed)
    return weights, int(groups.max()) + 1, how


def _right(result: SetResult) -> np.ndarray:
    pairs = result.test_set.pairs
    return correct_predictions(
        result.scores, pairs.same, pairs.folds, result.metrics["fold_thresholds"]
    )
