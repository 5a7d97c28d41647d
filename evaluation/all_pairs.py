"""TAR at low FAR over every pair of a set of images - millions or more - in bounded memory.

    from evaluation.all_pairs import tar_at_low_fars
    metrics = tar_at_low_fars(embeddings, labels)
    metrics["tar_at_far"]["1e-4"]["tar"]

Pure maths, no files. The threshold of a FAR depends on the highest impostor scores only, so no more
of them are kept than the largest FAR accepts; genuine pairs are counted, not kept. The result is
exact: that of templates.tar_at_fars on all scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from evaluation.calibration import explain_unsupported_far
from evaluation.metrics import AllPairsMetrics, TarPoint
from evaluation.templates import format_tar

LOW_FARS = ("1e-3", "1e-4", "1e-5", "1e-6")
# Scores are computed in tiles of so many rows and columns: 32 MB of float32.
TILE_ROWS, TILE_COLUMNS = 1024, 8192


def tar_at_low_fars(
    embeddings: np.ndarray, labels: np.ndarray, fars: Sequence[str] = LOW_FARS
) -> AllPairsMetrics:
    """TAR at each FAR that the set supports; a sentence for each of the others.

    embeddings (n, d), L2-normalised; labels (n,) int are their identities. Pairs that score above
    a threshold are accepted. Raises ValueError where there are no genuine or no impostor pairs.
    """
    # Sorted by identity: rows[ends[i - 1] : ends[i]] are the images of identity i, genuine pairs
    # are blocks on the diagonal of the score matrix, and everything right of them is impostors.
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    rows = np.ascontiguousarray(embeddings[order], np.float32)
    genuine = int((sizes * (sizes - 1) // 2).sum())
    impostors = len(rows) * (len(rows) - 1) // 2 - genuine
    if not genuine or not impostors:
        raise ValueError("there are pairs of one kind only")
    refused = [reason for far in fars if (reason := explain_unsupported_far(far, impostors))]
    # At FAR 1e-3, of 79,200 impostor pairs 79 may be accepted; the threshold is then the 80th
    # highest impostor score, since pairs must score above it. The 1e-9 is for rounding: 0.29 * 100
    # is 28.999999999999996.
    allowed = {
        far: int(float(far) * impostors + 1e-9)
        for far in fars
        if not explain_unsupported_far(far, impostors)
    }
    ends = np.cumsum(sizes)
    highest = top_impostor_scores(
        rows, np.repeat(ends, sizes), max(allowed.values(), default=0) + 1
    )
    thresholds = np.array([highest[count] for count in allowed.values()], np.float32)
    accepted = np.zeros(len(thresholds), np.int64)
    for scores in genuine_scores(rows, ends):
        accepted += (scores[:, None] > thresholds).sum(0)
    points: dict[str, TarPoint] = {
        far: {"tar": int(count) / genuine, "threshold": float(threshold), "impostors": limit}
        for (far, limit), count, threshold in zip(
            allowed.items(), accepted, thresholds, strict=True
        )
    }
    return {
        "pictures": len(rows),
        "identities": len(sizes),
        "matched_pairs": genuine,
        "mismatched_pairs": impostors,
        "tar_at_far": points,
        "refused": refused,
    }


def top_impostor_scores(rows: np.ndarray, ends: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest scores of impostor pairs, descending, float32.

    rows (n, d) are sorted by identity, ends (n,) is where each row's identity ends. Each pair
    (i, j) is scored once, with j at or after the end of i's identity.
    """
    kept, num_kept, floor = [], 0, -np.inf
    for begin in range(0, len(rows), TILE_ROWS):
        block, end_of = rows[begin : begin + TILE_ROWS], ends[begin : begin + TILE_ROWS, None]
        for start in range(int(end_of[0, 0]), len(rows), TILE_COLUMNS):
            scores = block @ rows[start : start + TILE_COLUMNS].T
            columns = np.arange(start, start + scores.shape[1])
            # Tiles begin at the end of the block's first identity; later rows of the block may
            # still have genuine pairs in them.
            kept.append(scores[(columns >= end_of) & (scores > floor)])
            num_kept += len(kept[-1])
            # Pruning costs a partition of everything kept: only once that has doubled.
            if num_kept > 2 * count + TILE_ROWS * TILE_COLUMNS // 8:
                kept = [_highest(np.concatenate(kept), count)]
                num_kept = len(kept[0])
                # From here on a score at or below the count-th highest cannot matter.
                floor = kept[0].min() if num_kept == count else floor
    return np.sort(_highest(np.concatenate(kept), count))[::-1]


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    return scores if len(scores) <= count else np.partition(scores, -count)[-count:]


def genuine_scores(rows: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """The scores of all genuine pairs, a tile at a time.

    rows (n, d) are sorted by identity, ends (identities,) is where each ends.
    """
    for first, last in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        for begin in range(first, last - 1, TILE_ROWS):
            stop = min(begin + TILE_ROWS, last)
            for start in range(begin, last, TILE_COLUMNS):
                scores = rows[begin:stop] @ rows[start : min(start + TILE_COLUMNS, last)].T
                columns = np.arange(start, start + scores.shape[1])
                yield scores[columns > np.arange(begin, stop)[:, None]]  # above the diagonal


def all_pairs_table(metrics: AllPairsMetrics) -> str:
    """The metrics as text, one FAR per line."""
    lines = [
        f"{metrics['pictures']:,} images of {metrics['identities']:,} identities: "
        f"{metrics['matched_pairs']:,} genuine and {metrics['mismatched_pairs']:,} impostor pairs"
    ]
    lines += [format_tar(far, point) for far, point in metrics["tar_at_far"].items()]
    return "\n".join(lines + metrics["refused"])
