"""pair_making.py: balanced pairs, folds that share no identity, hardest impostors."""

import numpy as np
import pytest

from evaluation.pair_making import choose_held_out_identities, make_verification_pairs
from utils import UserError


@pytest.mark.parametrize("hard", [False, True])
def test_pairs_are_balanced_and_folds_share_nobody(hard):
    identities = np.repeat(np.arange(200), np.random.default_rng(0).integers(4, 9, 200))
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(len(identities), 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = make_verification_pairs(identities, 1200, 0, vectors if hard else None)
    assert len(pairs) == 1200
    assert len({tuple(sorted(pair)) for pair, _ in pairs}) == 1200
    folds, seen = np.array([pair for pair, _ in pairs]).reshape(10, 120, 2), set()
    for fold, same in zip(folds, np.array([s for _, s in pairs]).reshape(10, 120), strict=True):
        assert same.sum() == 60
        assert np.array_equal(identities[fold[:, 0]] == identities[fold[:, 1]], same)
        here = set(identities[fold.ravel()].tolist())
        assert not here & seen
        seen |= here
        turns = np.bincount(identities[fold[same, 0]])
        assert turns[turns > 0].tolist() == [3] * 20  # 20 identities, 60 genuine pairs: three each
        if hard:
            everyone = np.flatnonzero(np.isin(identities, list(here)))
            for a, b in fold[~same]:
                impostors = everyone[identities[everyone] != identities[a]]
                nearest = max(vectors[impostors] @ vectors[a])
                assert vectors[a] @ vectors[b] == pytest.approx(nearest)
    assert pairs == make_verification_pairs(identities, 1200, 0, vectors if hard else None)
    assert pairs != make_verification_pairs(identities, 1200, 1, vectors if hard else None)


def test_a_set_that_cannot_give_so_many_pairs_gives_what_it_can():
    pairs = make_verification_pairs(np.repeat(np.arange(40), 4), 10000, 0)
    assert len(pairs) == 10 * 2 * 4 * 6  # 4 identities a fold, 6 genuine pairs each
    assert sum(same for _, same in pairs) == len(pairs) / 2


def test_identities_are_chosen_by_seed_among_those_with_images_enough():
    labels = np.repeat(np.arange(100), np.arange(100) % 8)
    chosen = choose_held_out_identities(labels, 30, 0)
    assert len(set(chosen.tolist())) == 30
    assert np.bincount(labels)[chosen].min() >= 4
    assert np.array_equal(chosen, choose_held_out_identities(labels, 30, 0))
    assert not np.array_equal(chosen, choose_held_out_identities(labels, 30, 1))
    with pytest.raises(UserError, match="--held-out-identities"):
        choose_held_out_identities(labels, 80, 0)
