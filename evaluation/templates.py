"""Templates of many images, as IJB-B and IJB-C compare them: pure maths, no files.

    from evaluation.templates import build_templates, score_pairs, tar_at_fars, identify
    ids, embeddings = build_templates(features, template_of, media_of)
    tar_at_fars(score_pairs(embeddings, first, second), same)

A template is all images and frames of a person that are compared at once. Frames of one video
(one media) are averaged first, so that a long video does not outvote a photograph (Whitelam et al.,
"IARPA Janus Benchmark-B", 2017; Maze et al., "IARPA Janus Benchmark-C", 2018). Arrays of the size
of all images or all pairs are worked on in chunks: features may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from utils import core_count

IJB_FARS = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
FPIRS = ("0.1", "0.01")
ROWS = 16384  # images worked on at a time: 32 MB of 512-d float32
PAIRS = 2048  # pairs at a time: 4 MB a side, which a core's cache can hold


def build_templates(
    features: np.ndarray,
    template_of: np.ndarray,
    media_of: np.ndarray,
    weights: np.ndarray | None = None,
    unit_length: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of templates (t,) int64, ascending, and their embeddings (t, d) float32 of unit length.

    features (n, d) of images, with template and media ids (n,). A template's is the sum over its
    media of the mean within each; weights (n,), detector scores say, scale images. With
    unit_length False an image counts by the length of its feature, which is short where the
    network is unsure. Raises ValueError for features that are not finite.
    """
    order = np.lexsort((media_of, template_of))
    template, media = template_of[order], media_of[order]
    new_template = np.append(True, template[1:] != template[:-1])
    new_media = new_template | np.append(True, media[1:] != media[:-1])
    starts = np.flatnonzero(new_template)
    ends = np.append(starts[1:], len(order))
    embeddings = np.empty((len(starts), features.shape[1]), np.float32)
    done = 0
    while done < len(starts):
        # As many whole templates as fit, one at least.
        stop = max(done + 1, int(np.searchsorted(ends, starts[done] + ROWS, side="right")))
        part = slice(starts[done], ends[stop - 1])
        rows = np.asarray(features[order[part]], np.float32)
        if not np.isfinite(rows).all():
            raise ValueError("features hold numbers that are not finite")
        if unit_length:
            rows = _unit(rows)
        if weights is not None:
            rows = rows * weights[order[part], None].astype(np.float32)
        begins = np.flatnonzero(new_media[part])
        means = np.add.reduceat(rows, begins)
        means /= np.diff(np.append(begins, len(rows)))[:, None]
        firsts = np.flatnonzero(new_template[part][begins])
        embeddings[done:stop] = _unit(np.add.reduceat(means, firsts))
        done = stop
    return template[starts], embeddings


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.where(lengths > 0, lengths, 1)[:, None]


# ------------------------------------------------------------------------------ 1:1


def score_pairs(embeddings: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of templates, (pairs,) float32; embeddings (t, d) of unit length."""
    scores = np.empty(len(first), np.float32)

    def score(start: int) -> None:
        part = slice(start, start + PAIRS)
        left, right = embeddings[first[part]], embeddings[second[part]]
        np.einsum("nd,nd->n", left, right, out=scores[part])

    with ThreadPoolExecutor(core_count()) as pool:  # NumPy lets others run meanwhile
        for _ in pool.map(score, range(0, len(first), PAIRS)):
            pass
    return scores


def tar_at_fars(
    scores: np.ndarray, same: np.ndarray, fars: Sequence[str] = IJB_FARS
) -> dict[str, dict[str, float]]:
    """For each FAR the largest TAR that keeps to it, its threshold, and what it rests on.

    {far: {"tar", "threshold", "impostors"}}; pairs that score above the threshold are accepted, at
    most impostors of them wrongly. Raises ValueError where one kind of pair is missing.
    """
    if same.all() or not same.any():
        raise ValueError("there are pairs of one kind only")
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    found = {}
    for far in fars:
        allowed = min(int(float(far) * len(impostor) + 1e-9), len(impostor) - 1)
        threshold = impostor[len(impostor) - 1 - allowed]
        accepted = len(genuine) - np.searchsorted(genuine, threshold, side="right")
        found[far] = {
            "tar": float(accepted / len(genuine)),
            "threshold": float(threshold),
            "impostors": allowed,
        }
    return found


def tar_line(far: str, point: dict[str, float]) -> str:
    """How a FAR and what tar_at_fars found for it are printed."""
    return (
        f"TAR at FAR {far:<10}{100 * point['tar']:8.3f} %  threshold {point['threshold']:.4f}; "
        f"rests on {point['impostors']:,} mismatched pairs"
    )


def roc_points(
    scores: np.ndarray, same: np.ndarray, points: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, (points,) each, at FARs evenly spaced on a logarithmic scale up to 1."""
    lowest = 1 / max(2, int((~same).sum()))
    fars = np.geomspace(lowest, 1, points)
    found = tar_at_fars(scores, same, [repr(float(far)) for far in fars])
    return fars, np.array([point["tar"] for point in found.values()])


# ------------------------------------------------------------------------------ 1:N


class Identification(NamedTuple):
    """A search of probes in a gallery."""

    rank1: float  # share of mated probes whose person comes first
    rank5: float
    tpir: dict[str, float]  # share of mated probes whose person scores above the FPIR's threshold
    mated: int  # probes whose person is in the gallery
    others: int  # searches that the FPIR rests on
    best_non_mates: bool  # these are mated probes without their mate, for want of others

    def report(self) -> dict[str, Any]:
        """As plain numbers."""
        return self._asdict()


def identify(
    probes: np.ndarray,
    probe_subjects: np.ndarray,
    gallery: np.ndarray,
    gallery_subjects: np.ndarray,
    fpirs: Sequence[str] = FPIRS,
) -> Identification:
    """Search each probe (p, d) in a gallery (g, d) of templates, by cosine; subjects (p,) and (g,).

    A person scores as their best template. FPIR is the share of probes of people not in the gallery
    for whom somebody scores above the threshold (Grother and Ngan, NIST IR 8009); where all probes
    have a mate, the best of the others stands for that, as InsightFace's evaluation has it. Equal
    scores count against the mate. Raises ValueError where no probe has a mate.
    """
    people, place = np.unique(gallery_subjects, return_inverse=True)
    order = np.argsort(place, kind="stable")
    begins = np.searchsorted(place[order], np.arange(len(people)))
    mate = np.searchsorted(people, probe_subjects).clip(max=len(people) - 1)
    mated = people[mate] == probe_subjects
    if not mated.any():
        raise ValueError("no probe has a mate in the gallery")
    own, best_other, rank = (np.full(len(probes), np.nan) for _ in range(3))
    targets = np.ascontiguousarray(gallery[order].T)
    for start in range(0, len(probes), 2048):
        part = slice(start, start + 2048)
        scores = np.maximum.reduceat(probes[part] @ targets, begins, axis=1)
        has, row = mated[part], np.arange(len(scores))
        own[part] = np.where(has, scores[row, mate[part]], np.nan)
        scores[row[has], mate[part][has]] = -np.inf
        best_other[part] = scores.max(1)
        rank[part] = 1 + (scores >= own[part, None]).sum(1)
    searches = best_other[~mated] if not mated.all() else best_other
    false = np.sort(searches)[::-1]
    tpir = {}
    for fpir in fpirs:
        allowed = min(int(float(fpir) * len(false) + 1e-9), len(false) - 1)
        tpir[fpir] = float(np.mean(own[mated] > false[allowed]))
    return Identification(
        rank1=float(np.mean(rank[mated] <= 1)),
        rank5=float(np.mean(rank[mated] <= 5)),
        tpir=tpir,
        mated=int(mated.sum()),
        others=len(false),
        best_non_mates=bool(mated.all()),
    )
