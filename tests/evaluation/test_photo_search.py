"""Search, leave-one-out rates and clustering against plain loops over all pairs."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from evaluation import photo_search
from evaluation.photo_search import cluster, evaluate_search, nearest


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def people(sizes, noise, seed=0, dimension=8):
    """Noisy unit vectors around a direction per person, and the person's name of each."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = unit(rng.normal(0, 1, (len(sizes), dimension)))
    rows = unit(centres[labels] + rng.normal(0, noise, (len(labels), dimension)))
    return rows, np.array([f"p{label}" for label in labels])


def partition(labels):
    """The sets of rows that share a label."""
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


def test_the_nearest_come_first():
    rows, _ = people([40, 30, 30], 0.5)
    indices, scores = nearest(rows, rows[:7], top=5)
    expected = np.argsort(-(rows[:7] @ rows.T), axis=1)[:, :5]
    assert indices.tolist() == expected.tolist()
    assert indices[:, 0].tolist() == list(range(7))
    assert np.array_equal(scores, np.take_along_axis(rows[:7] @ rows.T, expected, 1))
    assert nearest(rows[:3], rows[:1], top=3)[0].shape == (1, 3)


@pytest.mark.parametrize("seed", range(3))
def test_each_face_is_searched_among_the_others(seed, monkeypatch):
    monkeypatch.setattr("evaluation.templates.PROBES_PER_BLOCK", 7)
    rows, names = people([5, 1, 3, 4, 1, 6, 2], 0.5, seed)
    ranks, mates, others = [], [], []
    for i in range(len(rows)):
        best = {}
        for j in range(len(rows)):
            if i != j:
                best[names[j]] = max(best.get(names[j], -2), float(rows[i] @ rows[j]))
        mate = best.pop(names[i], None)
        others.append(max(best.values()))
        if mate is not None:
            ranks.append(1 + sum(score >= mate for score in best.values()))
            mates.append(mate)
    metrics = evaluate_search(rows, names, seed=0)
    assert (metrics.searches, metrics.mated, metrics.identities) == (22, 20, 7)
    assert metrics.rank1.value == np.mean(np.array(ranks) == 1)
    assert metrics.rank5.value == np.mean(np.array(ranks) <= 5)
    for fpir, rate in metrics.tpir.items():
        assert rate.threshold == pytest.approx(sorted(others)[-1 - int(float(fpir) * 22)])
        assert np.mean(np.array(others) > rate.threshold + 1e-6) <= float(fpir)
        assert rate.value == np.mean(np.array(mates) > rate.threshold)
    for rate in (metrics.rank1, metrics.rank5, *metrics.tpir.values()):
        assert rate.interval[0] <= rate.value <= rate.interval[1]
        assert rate.interval[0] < rate.interval[1]


def test_a_perfect_rate_is_not_called_certain():
    """Clopper and Pearson: all of n right leaves a lower end of (0.05 / 2) ** (1 / n)."""
    rows, names = people([4] * 10, 0.01)
    rank1 = evaluate_search(rows, names, seed=0).rank1
    assert (rank1.value, rank1.interval) == (1, (pytest.approx(0.025**0.1), 1))


def test_intervals_resample_people_and_not_photos():
    """Ten people of whom one is never found: as uncertain as ten coins, however many photos."""
    rng = np.random.default_rng(0)
    centres = unit(rng.normal(0, 1, (10, 64)))
    rows = np.repeat(centres, 50, 0) + rng.normal(0, 0.01, (500, 64))
    rows[450:] = rows[:450:9]  # photos of the other nine
    names = np.repeat([f"p{i}" for i in range(10)], 50)
    rank1 = evaluate_search(unit(rows), names, seed=0).rank1
    assert 0.5 < rank1.value < 0.95
    assert rank1.interval[1] - rank1.interval[0] > 0.2  # of 500 coins it would be 0.09 at most


@pytest.mark.parametrize(("sizes", "why"), [([1, 1, 1], "two faces"), ([5], "one folder")])
def test_what_cannot_be_evaluated_is_an_error(sizes, why):
    with pytest.raises(ValueError, match=why):
        evaluate_search(*people(sizes, 0.1), seed=0)


@pytest.mark.parametrize("most", [8000, 1])  # scikit-learn's, and without the pairs' distances
@pytest.mark.parametrize("threshold", [-0.2, 0.2, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_those_of_average_linkage(seed, threshold, most, monkeypatch):
    monkeypatch.setattr(photo_search, "MOST_LINKED", most)
    monkeypatch.setattr(photo_search, "BLOCK_COSINES", 300)
    rows, _ = people([7, 1, 12, 4, 30, 2], 0.35, seed)
    rows = np.concatenate([rows, rows[:9], rows[:9]])  # equal faces: ties
    condensed = linkage(rows.astype(np.float64), "average", "cosine")
    expected = fcluster(condensed, 1 - threshold, "distance")
    labels = cluster(rows, threshold)
    assert partition(labels) == partition(expected)
    sizes = np.bincount(labels)
    assert (np.diff(sizes) <= 0).all()  # the largest first
    assert len(sizes) > 1 or threshold < 0


def test_one_face_and_none_are_clusters():
    assert cluster(np.ones((1, 1), np.float32), 0.5).tolist() == [0]
    assert cluster(np.ones((0, 4), np.float32), 0.5).tolist() == []
