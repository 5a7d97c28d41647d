import tracemalloc

import numpy as np
import pytest

from evaluation import all_pairs
from evaluation.all_pairs import tar_at_low_fars
from evaluation.templates import tar_at_fars


def population(sizes, dimensions=16, noise=0.6, seed=0):
    """Unit vectors around the centres of identities, sizes (k,) of each, shuffled; their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)) * 7 + 3, sizes))
    centres = rng.normal(size=(len(sizes) * 7 + 3, dimensions))
    vectors = centres[labels] + noise * rng.normal(size=(len(labels), dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (17, 23), (64, 5)])
def test_it_is_the_result_of_all_scores_at_once(monkeypatch, rows, columns):
    monkeypatch.setattr(all_pairs, "TILE_ROWS", rows)
    monkeypatch.setattr(all_pairs, "TILE_COLUMNS", columns)
    sizes = np.random.default_rng(1).integers(1, 12, 90)
    embeddings, labels = population(np.append(sizes, 60))
    first, second = np.triu_indices(len(labels), 1)
    scores, same = (embeddings @ embeddings.T)[first, second], labels[first] == labels[second]
    fars = ("1e-2", "1e-3", "5e-4")
    result = tar_at_low_fars(embeddings, labels, fars)
    expected = tar_at_fars(scores, same, fars)
    assert result["matched_pairs"] == same.sum()
    assert result["mismatched_pairs"] == (~same).sum()
    assert not result["refused"]
    for far in fars:
        point, wanted = result["tar_at_far"][far], expected[far]
        assert point["impostors"] == wanted["impostors"] > 30
        assert point["threshold"] == pytest.approx(wanted["threshold"], abs=1e-6)
        assert point["tar"] == pytest.approx(wanted["tar"], abs=2 / same.sum())
    assert 0.05 < result["tar_at_far"]["1e-3"]["tar"] < 0.95


def test_fars_that_rest_on_too_few_pairs_are_refused():
    embeddings, labels = population(np.full(100, 4))  # 79,200 impostor pairs
    result = tar_at_low_fars(embeddings, labels)
    assert list(result["tar_at_far"]) == ["1e-3"]
    assert [text.split(" is")[0] for text in result["refused"]] == [
        f"FAR {far}" for far in ("1e-4", "1e-5", "1e-6")
    ]
    with pytest.raises(ValueError, match="one kind"):
        tar_at_low_fars(embeddings[:1], labels[:1])


def test_ties_are_no_acceptances():
    embeddings = np.ones((40, 4), np.float32) / 2
    result = tar_at_low_fars(embeddings, np.arange(40) // 2, ("1e-1",))
    assert result["tar_at_far"]["1e-1"]["tar"] == 0


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    monkeypatch.setattr(all_pairs, "TILE_COLUMNS", 1024)  # blocks of 4 MB
    embeddings, labels = population(np.full(1500, 3))  # 10 million pairs: 40 MB of scores
    tracemalloc.start()
    result = tar_at_low_fars(embeddings, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["mismatched_pairs"] == 4500 * 4499 // 2 - 4500
    assert set(result["tar_at_far"]) == {"1e-3", "1e-4", "1e-5"}
    assert peak < 25 * 2**20
