"""Templates of many images, as IJB-B and IJB-C compare them. Pure maths, no files.

    from evaluation.templates import build_templates, identify, score_templates, tar_at_fars
    ids, embeddings = build_templates(features, template_of, media_of)
    tar_at_fars(score_templates(embeddings, first, second), same)

A template is a set of images and video frames of one identity that is compared as a whole. Its
embedding is aggregated in two steps: the features of each media (a photograph, or all frames of a
video) are averaged, and the media are summed. A video of 500 frames thus counts as much as one
photograph (Whitelam et al., "IARPA Janus Benchmark-B", 2017; Maze et al., "IARPA Janus
Benchmark-C", 2018). Arrays of the size of all images or all pairs are processed in blocks:
features may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from evaluation.metrics import IdentificationMetrics, TarPoint
from utils import core_count

IJB_FARS = ("1e-1", "1e-2", "1e-3", "1e-4", "1e-5", "1e-6")
FPIRS = ("0.1", "0.01")
IMAGES_PER_BLOCK = 16384  # 32 MB of 512-d float32
PAIRS_PER_BLOCK = 2048  # 4 MB per side, which fits in a core's cache
PROBES_PER_BLOCK = 2048


def build_templates(
    features: np.ndarray,
    template_of: np.ndarray,
    media_of: np.ndarray,
    weights: np.ndarray | None = None,
    unit_length: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Template ids (t,) int64, ascending, and embeddings (t, d) float32, L2-normalised.

    features (n, d) are those of the images, template_of and media_of (n,) their ids. weights (n,),
    e.g. detector scores, scale the images. With unit_length False features are not normalised
    first: an image counts by the norm of its feature, which is small for images of low quality.
    Raises ValueError where features are not finite.

    Example: a template of a photograph a and a video of frames b, c, d gets a + (b + c + d) / 3,
    normalised.
    """
    # Sorted by template and media, both are runs of neighbours, which reduceat can sum.
    order = np.lexsort((media_of, template_of))
    template, media = template_of[order], media_of[order]
    new_template = np.append(True, template[1:] != template[:-1])
    new_media = new_template | np.append(True, media[1:] != media[:-1])
    starts = np.flatnonzero(new_template)
    ends = np.append(starts[1:], len(order))
    embeddings = np.empty((len(starts), features.shape[1]), np.float32)
    done = 0  # templates
    while done < len(starts):
        # As many complete templates as fit in a block, but one at least.
        stop = max(
            done + 1, int(np.searchsorted(ends, starts[done] + IMAGES_PER_BLOCK, side="right"))
        )
        block = slice(starts[done], ends[stop - 1])
        rows = np.asarray(features[order[block]], np.float32)
        if not np.isfinite(rows).all():
            raise ValueError("features hold numbers that are not finite")
        if unit_length:
            rows = _normalise_rows(rows)
        if weights is not None:
            rows = rows * weights[order[block], None].astype(np.float32)
        media_starts = np.flatnonzero(new_media[block])
        media_means = np.add.reduceat(rows, media_starts)
        media_means /= np.diff(np.append(media_starts, len(rows)))[:, None]
        # The media at which each template of the block begins.
        template_starts = np.flatnonzero(new_template[block][media_starts])
        embeddings[done:stop] = _normalise_rows(np.add.reduceat(media_means, template_starts))
        done = stop
    return template[starts], embeddings


def _normalise_rows(rows: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return rows / np.where(norms > 0, norms, 1)[:, None]


# ------------------------------------------------------------------------------ 1:1


def score_templates(embeddings: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of templates, (pairs,) float32; embeddings (t, d), L2-normalised."""
    scores = np.empty(len(first), np.float32)

    def score_block(start: int) -> None:
        block = slice(start, start + PAIRS_PER_BLOCK)
        left, right = embeddings[first[block]], embeddings[second[block]]
        np.einsum("nd,nd->n", left, right, out=scores[block])

    # Threads, since NumPy releases the GIL while it gathers and multiplies.
    with ThreadPoolExecutor(core_count()) as pool:
        for _ in pool.map(score_block, range(0, len(first), PAIRS_PER_BLOCK)):
            pass  # map raises an error of a thread only when its result is taken
    return scores


def tar_at_fars(
    scores: np.ndarray, same: np.ndarray, fars: Sequence[str] = IJB_FARS
) -> dict[str, TarPoint]:
    """The highest TAR at each FAR, and its threshold; same (pairs,) bool: genuine.

    Raises ValueError where there are no genuine or no impostor pairs.
    """
    if same.all() or not same.any():
        raise ValueError("there are pairs of one kind only")
    genuine, impostor = np.sort(scores[same]), np.sort(scores[~same])
    points: dict[str, TarPoint] = {}
    for far in fars:
        # The next impostor after those allowed is the threshold, which must be exceeded: of 1,000
        # impostor pairs FAR 1e-2 allows 10, so it is the 11th highest impostor score. The 1e-9 is
        # for rounding: 0.29 * 100 is 28.999999999999996.
        allowed = min(int(float(far) * len(impostor) + 1e-9), len(impostor) - 1)
        threshold = impostor[len(impostor) - 1 - allowed]
        accepted = len(genuine) - np.searchsorted(genuine, threshold, side="right")
        points[far] = {
            "tar": float(accepted / len(genuine)),
            "threshold": float(threshold),
            "impostors": allowed,
        }
    return points


def format_tar(far: str, point: TarPoint) -> str:
    """A line of text for a FAR and what tar_at_fars gives for it."""
    return (
        f"TAR at FAR {far:<10}{100 * point['tar']:8.3f} %  threshold {point['threshold']:.4f}; "
        f"rests on {point['impostors']:,} impostor pairs"
    )


def roc_points(
    scores: np.ndarray, same: np.ndarray, points: int = 400
) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR, (points,) each, at FARs evenly spaced on a logarithmic scale up to 1."""
    lowest = 1 / max(2, int((~same).sum()))
    fars = np.geomspace(lowest, 1, points)
    tars = tar_at_fars(scores, same, [repr(float(far)) for far in fars])
    return fars, np.array([point["tar"] for point in tars.values()])


# ------------------------------------------------------------------------------ 1:N


class SearchScores(NamedTuple):
    """What a search of each probe in a gallery gives: (p,) float64 each, cosines but for `rank`."""

    mate: np.ndarray  # of the probe's own subject; nan where that is not in the gallery
    other: np.ndarray  # the highest of another subject
    rank: np.ndarray  # of its own subject, from 1; nan likewise

    @property
    def mated(self) -> np.ndarray:
        """Which probes have their subject in the gallery: (p,) bool."""
        return ~np.isnan(self.mate)


def search_probes(
    probes: np.ndarray,
    probe_subjects: np.ndarray,
    gallery: np.ndarray,
    gallery_subjects: np.ndarray,
    leave_one_out: bool = False,
) -> SearchScores:
    """Search probes (p, d) in a gallery (g, d) by cosine; subjects (p,) and (g,).

    A subject's score is that of its best template. Equal scores count against the mate. With
    `leave_one_out` probes and gallery are the same rows, and none is compared with itself.
    """
    # Gallery sorted by subject, so that reduceat takes the maximum over each subject's templates.
    subjects, subject_of = np.unique(gallery_subjects, return_inverse=True)
    order = np.argsort(subject_of, kind="stable")
    begins = np.searchsorted(subject_of[order], np.arange(len(subjects)))
    column_of = np.argsort(order)
    mate = np.searchsorted(subjects, probe_subjects).clip(max=len(subjects) - 1)
    mated = subjects[mate] == probe_subjects
    if leave_one_out:
        mated &= np.bincount(subject_of)[mate] > 1
    result = SearchScores(*(np.full(len(probes), np.nan) for _ in range(3)))
    columns = np.ascontiguousarray(gallery[order].T)
    for start in range(0, len(probes), PROBES_PER_BLOCK):
        block = slice(start, start + PROBES_PER_BLOCK)
        cosines = probes[block] @ columns
        row = np.arange(len(cosines))
        if leave_one_out:
            cosines[row, column_of[block]] = -np.inf
        scores = np.maximum.reduceat(cosines, begins, axis=1)  # (block, subjects)
        has_mate = mated[block]
        result.mate[block] = np.where(has_mate, scores[row, mate[block]], np.nan)
        # Without the mate, what is left are the scores of other subjects.
        scores[row[has_mate], mate[block][has_mate]] = -np.inf
        result.other[block] = scores.max(1)
        beaten = (scores >= result.mate[block, None]).sum(1)
        result.rank[block] = np.where(has_mate, 1 + beaten, np.nan)
    return result


def identify(
    probes: np.ndarray,
    probe_subjects: np.ndarray,
    gallery: np.ndarray,
    gallery_subjects: np.ndarray,
    fpirs: Sequence[str] = FPIRS,
) -> IdentificationMetrics:
    """Metrics of search_probes; a probe is mated if its subject is in the gallery.

    FPIR is the fraction of non-mated probes for which any subject scores above the threshold
    (Grother and Ngan, NIST IR 8009). Where all probes are mated, each probe's best score of another
    subject is used in its place, as in InsightFace's evaluation. Raises ValueError where no probe
    is mated.
    """
    found = search_probes(probes, probe_subjects, gallery, gallery_subjects)
    mated = found.mated
    if not mated.any():
        raise ValueError("no probe has a mate in the gallery")
    non_mated = found.other if mated.all() else found.other[~mated]
    thresholds = {fpir: fpir_threshold(non_mated, fpir) for fpir in fpirs}
    return {
        "rank1": float(np.mean(found.rank[mated] <= 1)),
        "rank5": float(np.mean(found.rank[mated] <= 5)),
        "tpir": {fpir: float(np.mean(found.mate[mated] > t)) for fpir, t in thresholds.items()},
        "mated": int(mated.sum()),
        "others": len(non_mated),
        "best_non_mates": bool(mated.all()),
    }


def fpir_threshold(non_mated: np.ndarray, fpir: str) -> float:
    """The score above which at most a fraction `fpir` of non-mated searches (n,) has a subject."""
    allowed = min(int(float(fpir) * len(non_mated) + 1e-9), len(non_mated) - 1)
    return float(np.sort(non_mated)[len(non_mated) - 1 - allowed])
