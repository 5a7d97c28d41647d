"""Search in a gallery of embeddings, how good it is, and who is who in it. Pure maths, no files.

indices, scores = nearest(gallery.embeddings, queries, top=5)
evaluate_search(gallery.embeddings, gallery.folders, seed=0)
cluster(gallery.embeddings, threshold=0.3)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from sklearn.cluster import AgglomerativeClustering

from evaluation.metrics import Interval
from evaluation.significance import percentile_interval
from evaluation.templates import FPIRS, fpir_threshold, search_probes

SEARCH_RESAMPLES = 1000
MOST_LINKED = 8000  # faces whose pairs are all kept: 512 MB of distances
BLOCK_COSINES = 2**22  # of faces compared with all others at a time: 16 MB
ROUNDING = 1e-6  # of a cosine of float32 vectors


def nearest(embeddings: np.ndarray, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines of the nearest faces of each query: (q, top) each, the nearest first.

    embeddings (n, d) and queries (q, d) are L2-normalised; `top` is at most n.
    """
    scores = (embeddings @ queries.T).T
    some = np.argpartition(-scores, top - 1)[:, :top]
    order = np.argsort(-np.take_along_axis(scores, some, 1), kind="stable")
    indices = np.take_along_axis(some, order, 1)
    return indices, np.take_along_axis(scores, indices, 1)


# ------------------------------------------------------------------------------ how good it is


class Rate(NamedTuple):
    """A rate with its 95 % interval; of a TPIR, the threshold at its FPIR as well."""

    value: float
    interval: Interval
    threshold: float | None = None


class SearchMetrics(NamedTuple):
    """Each face searched among all others (leave one out)."""

    rank1: Rate
    rank5: Rate
    tpir: dict[str, Rate]  # by FPIR
    mated: int  # faces that have another one of their identity
    searches: int  # all faces
    identities: int


def evaluate_search(embeddings: np.ndarray, identities: np.ndarray, seed: int) -> SearchMetrics:
    """Search each face (n, d) among the others; identities (n,) are names.

    A face whose identity has another one is a mated search. The FPIR is measured on all faces, each
    searched without its own identity: the highest score of another one is the false positive.
    Intervals resample identities. Where a rate is 0 or 1, in which no resample varies, the interval
    is the exact binomial one over the identities, as if each were one search. Raises ValueError
    where no identity has two faces.
    """
    names, identity = np.unique(identities, return_inverse=True)
    if len(names) < 2:
        raise ValueError("all faces are of one folder")
    found = search_probes(embeddings, identity, embeddings, identity, leave_one_out=True)
    mated = found.mated
    if not mated.any():
        raise ValueError("no folder has two faces")
    thresholds = {fpir: fpir_threshold(found.other, fpir) for fpir in FPIRS}
    ranks = [found.rank <= 1, found.rank <= 5]
    hits = [*ranks, *(found.mate > threshold for threshold in thresholds.values())]
    rng = np.random.default_rng(seed)
    order = np.argsort(-found.other)
    resampled = np.full((SEARCH_RESAMPLES, len(hits)), np.nan)
    for row in resampled:
        drawn = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        weight = drawn[identity]
        total = weight[mated].sum()
        if not total:
            continue
        # The highest score that is one false positive too many is the threshold.
        share = np.cumsum(weight[order]) / weight.sum()
        cuts = found.other[order[np.searchsorted(share, [float(f) for f in FPIRS], side="right")]]
        own_hits = [*ranks, *(found.mate > cut for cut in cuts)]
        row[:] = [(weight * hit)[mated].sum() / total for hit in own_hits]
    mated_identities = len(np.unique(identity[mated]))
    rates = []
    for hit, values, threshold in zip(
        hits, resampled.T, (None, None, *thresholds.values()), strict=True
    ):
        value, interval = float(hit[mated].mean()), percentile_interval(values)
        if value in (0, 1):
            exact = binomtest(round(value * mated_identities), mated_identities).proportion_ci()
            interval = float(exact.low), float(exact.high)
        rates.append(Rate(value, interval, threshold))
    tpir = dict(zip(FPIRS, rates[2:], strict=True))
    return SearchMetrics(*rates[:2], tpir, int(mated.sum()), len(identity), len(names))


# ------------------------------------------------------------------------------ who is who


def cluster(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """The cluster of each face (n,) int64, numbered from 0 by size, the largest first.

    Average linkage: clusters merge while the mean cosine between them is above the threshold. That
    needs one pair of faces as near, so groups connected by such pairs are clustered each by itself:
    by scikit-learn, which keeps all distances, or of too many faces by `linkage_by_means`.
    """
    labels, groups = np.zeros(len(embeddings), np.int64), _linked_groups(embeddings, threshold)
    order, done = np.argsort(groups, kind="stable"), 0
    for group in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(group) > MOST_LINKED:
            own = linkage_by_means(embeddings[group], threshold)
        elif len(group) > 2:
            model = AgglomerativeClustering(
                n_clusters=None,
                metric="precomputed",
                linkage="average",
                distance_threshold=1 - threshold,
            )
            own = model.fit_predict((1 - embeddings[group] @ embeddings[group].T).clip(min=0))
        else:
            own = np.zeros(len(group), np.int64)
        labels[group] = done + own
        done += len(group)
    _, first, labels, sizes = np.unique(
        labels, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[labels]


def _linked_groups(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """The number of each face's group (n,), connected by cosines above the threshold."""
    count = len(embeddings)
    group = np.arange(count)
    step = max(1, BLOCK_COSINES // max(1, count))
    for start in range(0, count, step):
        row, column = np.nonzero(
            embeddings[start : start + step] @ embeddings[start:].T > threshold
        )
        # Links between the groups so far, each once: few, however many faces are alike.
        links = np.unique(group[start + row] * count + group[start + column])
        ends = np.divmod(links, count)
        graph = coo_array((np.ones(len(links), bool), ends), shape=(count, count))
        group = connected_components(graph, directed=False)[1][group]
    return group


def linkage_by_means(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """Average linkage in the memory of the embeddings: the number of each face's cluster, (n,).

    The mean cosine between two clusters is the product of their mean embeddings, so clusters are
    their sums and sizes. Nearest neighbours are followed until two are each other's and merge
    (Murtagh's nearest-neighbour chain). A neighbour that has not merged since stays the nearest
    one: a merged cluster is never nearer than the nearer of its two parts. A cluster without a
    neighbour above the threshold is final for the same reason.
    """
    sums, sizes = np.array(embeddings, np.float32), np.ones(len(embeddings), np.float32)
    neighbour, cosine = _nearest_others(sums)
    changed = np.zeros(len(sums), np.int64)  # how often a cluster has merged
    seen = np.zeros(len(sums), np.int64)  # that of its neighbour when it was found
    active, parent = np.ones(len(sums), bool), np.arange(len(sums))
    for start in range(len(sums)):
        chain = [start] if active[start] else []
        while chain:
            last = chain[-1]
            if not active[neighbour[last]] or changed[neighbour[last]] != seen[last]:
                means = (sums @ (sums[last] / sizes[last])) / sizes
                means[~active] = means[last] = -np.inf
                neighbour[last] = means.argmax()
                cosine[last], seen[last] = means[neighbour[last]], changed[neighbour[last]]
            if cosine[last] <= threshold:
                active[last] = False
                chain.pop()
            # Along the chain cosines rise, up to rounding, until two are each other's nearest.
            elif len(chain) > 1 and cosine[last] <= cosine[chain[-2]] + ROUNDING:
                chain.pop()
                kept = chain.pop()
                sums[kept] += sums[last]
                sizes[kept] += sizes[last]
                changed[kept] += 1
                neighbour[kept], seen[kept] = kept, -1  # to be found
                active[last], parent[last] = False, kept
                chain = chain or [kept]
            else:
                chain.append(int(neighbour[last]))
    while not np.array_equal(parent, parent[parent]):
        parent = parent[parent]
    return parent


def _nearest_others(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each of n vectors the one with the highest product, and that: (n,) each."""
    nearest_row = np.empty(len(embeddings), np.int64)
    product = np.empty(len(embeddings), np.float32)
    step = max(1, BLOCK_COSINES // len(embeddings))
    for start in range(0, len(embeddings), step):
        products = embeddings[start : start + step] @ embeddings.T
        rows = np.arange(len(products))
        products[rows, start + rows] = -np.inf
        nearest_row[start : start + step] = products.argmax(1)
        product[start : start + step] = products.max(1)
    return nearest_row, product
