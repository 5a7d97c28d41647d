import tracemalloc

import numpy as np
import pytest

from evaluation import all_pairs
from evaluation.all_pairs import tar_at_low_fars
from evaluation.templates import tar_at_fars


def population(people, dimensions=16, noise=0.6, seed=0):
    """Unit vectors around a centre each, people (k,) images, shuffled; and who is on each."""
    rng = np.random.default_rng(seed)
    who = rng.permutation(np.repeat(np.arange(len(people)) * 7 + 3, people))
    centres = rng.normal(size=(len(people) * 7 + 3, dimensions))
    vectors = centres[who] + noise * rng.normal(size=(len(who), dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), who


@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (17, 23), (64, 5)])
def test_it_is_the_result_of_all_scores_at_once(monkeypatch, rows, columns):
    monkeypatch.setattr(all_pairs, "TILE_ROWS", rows)
    monkeypatch.setattr(all_pairs, "TILE_COLUMNS", columns)
    sizes = np.random.default_rng(1).integers(1, 12, 90)
    embeddings, who = population(np.append(sizes, 60))
    first, second = np.triu_indices(len(who), 1)
    scores, same = (embeddings @ embeddings.T)[first, second], who[first] == who[second]
    fars = ("1e-2", "1e-3", "5e-4")
    found, expected = tar_at_low_fars(embeddings, who, fars), tar_at_fars(scores, same, fars)
    assert found["matched_pairs"] == same.sum()
    assert found["mismatched_pairs"] == (~same).sum()
    assert not found["refused"]
    for far in fars:
        point, wanted = found["tar_at_far"][far], expected[far]
        assert point["impostors"] == wanted["impostors"] > 30
        assert point["threshold"] == pytest.approx(wanted["threshold"], abs=1e-6)
        assert point["tar"] == pytest.approx(wanted["tar"], abs=2 / same.sum())
    assert 0.05 < found["tar_at_far"]["1e-3"]["tar"] < 0.95


def test_fars_that_rest_on_too_few_pairs_are_refused():
    embeddings, who = population(np.full(100, 4))  # 79,200 mismatched pairs
    found = tar_at_low_fars(embeddings, who)
    assert list(found["tar_at_far"]) == ["1e-3"]
    assert [text.split(" is")[0] for text in found["refused"]] == [
        f"FAR {far}" for far in ("1e-4", "1e-5", "1e-6")
    ]
    with pytest.raises(ValueError, match="one kind"):
        tar_at_low_fars(embeddings[:1], who[:1])


def test_ties_are_no_acceptances():
    embeddings = np.ones((40, 4), np.float32) / 2
    found = tar_at_low_fars(embeddings, np.arange(40) // 2, ("1e-1",))
    assert found["tar_at_far"]["1e-1"]["tar"] == 0


def test_memory_does_not_grow_with_the_pairs(monkeypatch):
    monkeypatch.setattr(all_pairs, "TILE_COLUMNS", 1024)  # blocks of 4 MB
    embeddings, who = population(np.full(1500, 3))  # 10 million pairs: 40 MB of scores
    tracemalloc.start()
    found = tar_at_low_fars(embeddings, who)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["mismatched_pairs"] == 4500 * 4499 // 2 - 4500
    assert set(found["tar_at_far"]) == {"1e-3", "1e-4", "1e-5"}
    assert peak < 25 * 2**20
