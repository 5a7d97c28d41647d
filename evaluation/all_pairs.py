"""TAR at low FAR over every pair of a set of images, millions or more, in bounded memory.

    found = low_far(embeddings, people)
    found["tar_at_far"]["1e-4"]["tar"]

Pure maths, no files. A threshold rests on the highest scores of mismatched pairs alone, so only as
many of those are kept as the largest FAR allows; matched pairs are counted, not kept. Both are
exact: the numbers are those of templates.tar_at_fars on all scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.calibration import explain_unsupported_far

LOW_FARS = ("1e-3", "1e-4", "1e-5", "1e-6")
ROWS, COLUMNS = 1024, 8192  # pairs worked on at a time: 32 MB of scores


def low_far(
    embeddings: np.ndarray, people: np.ndarray, fars: Sequence[str] = LOW_FARS
) -> dict[str, Any]:
    """TAR at each FAR that the set supports: embeddings (n, d) of unit length, people (n,) ints.

    {"pictures", "identities", "matched_pairs", "mismatched_pairs", "tar_at_far": {far: {"tar",
    "threshold", "impostors"}}, "refused": [sentence]}; pairs that score above the threshold are
    accepted, `impostors` of the mismatched ones at most. Raises ValueError where one kind of pair
    is missing.
    """
    order = np.argsort(people, kind="stable")
    sizes = np.unique(people, return_counts=True)[1]
    rows = np.ascontiguousarray(embeddings[order], np.float32)
    matched = int((sizes * (sizes - 1) // 2).sum())
    mismatched = len(rows) * (len(rows) - 1) // 2 - matched
    if not matched or not mismatched:
        raise ValueError("there are pairs of one kind only")
    reasons = {far: explain_unsupported_far(far, mismatched) for far in fars}
    refused = [reason for reason in reasons.values() if reason]
    allowed = {
        far: int(float(far) * mismatched + 1e-9) for far, reason in reasons.items() if not reason
    }
    ends = np.cumsum(sizes)
    highest = top_impostors(rows, np.repeat(ends, sizes), max(allowed.values(), default=0) + 1)
    thresholds = np.array([highest[count] for count in allowed.values()], np.float32)
    accepted = np.zeros(len(thresholds), np.int64)
    for scores in matched_scores(rows, ends):
        accepted += (scores[:, None] > thresholds).sum(0)
    tars = {
        far: {"tar": int(right) / matched, "threshold": float(threshold), "impostors": count}
        for (far, count), right, threshold in zip(
            allowed.items(), accepted, thresholds, strict=True
        )
    }
    found = {"pictures": len(rows), "identities": len(sizes), "matched_pairs": matched}
    return found | {"mismatched_pairs": mismatched, "tar_at_far": tars, "refused": refused}


def top_impostors(rows: np.ndarray, ends: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest scores of mismatched pairs, falling, float32.

    rows (n, d) sorted by person, ends (n,): where each row's person ends. A pair is looked at once,
    as an earlier row and one behind its person's end.
    """
    kept, held, floor = [], 0, -np.inf
    for begin in range(0, len(rows), ROWS):
        block, end_of = rows[begin : begin + ROWS], ends[begin : begin + ROWS, None]
        for start in range(int(end_of[0, 0]), len(rows), COLUMNS):
            scores = block @ rows[start : start + COLUMNS].T
            chosen = (np.arange(start, start + scores.shape[1]) >= end_of) & (scores > floor)
            kept.append(scores[chosen])
            held += len(kept[-1])
            if held > 2 * count + ROWS * COLUMNS // 8:
                kept = [_highest(np.concatenate(kept), count)]
                held = len(kept[0])
                floor = kept[0].min() if held == count else floor
    return np.sort(_highest(np.concatenate(kept), count))[::-1]


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    return scores if len(scores) <= count else np.partition(scores, -count)[-count:]


def matched_scores(rows: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """The scores of all matched pairs, some at a time: rows (n, d) by person, ends (people,)."""
    for first, last in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        for begin in range(first, last - 1, ROWS):
            stop = min(begin + ROWS, last)
            for start in range(begin, last, COLUMNS):
                scores = rows[begin:stop] @ rows[start : min(start + COLUMNS, last)].T
                later = np.arange(start, start + scores.shape[1]) > np.arange(begin, stop)[:, None]
                yield scores[later]
