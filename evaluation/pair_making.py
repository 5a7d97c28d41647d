"""Make verification pairs of identities that are held out of a training set.

    from evaluation.pair_making import choose_held_out_identities, make_verification_pairs
    identities = choose_held_out_identities(labels, count=500, seed=0)
    pairs = make_verification_pairs(labels[np.isin(labels, identities)], count=6000, seed=0)

As in LFW's protocol there are ten folds that share no identity, half of each genuine pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from utils import UserError

NUM_FOLDS = 10
LEAST_IMAGES = 4  # of an identity that is held out

Pair = tuple[int, int]


def choose_held_out_identities(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` identities at random among those with LEAST_IMAGES or more; labels, ascending.

    labels (n,) int are those of the training set's images. Raises UserError where there are too
    few such identities, or fewer than two would be left to train on.
    """
    eligible = np.flatnonzero(np.bincount(labels) >= LEAST_IMAGES)
    left = len(np.unique(labels)) - count
    if len(eligible) < count or left < 2:
        raise UserError(
            f"The training set has {len(eligible):,} identities with {LEAST_IMAGES} images or "
            f"more, and {max(left, 0):,} would be left to train on; hold out fewer "
            "(--held-out-identities)."
        )
    return np.sort(np.random.default_rng([seed, 8]).choice(eligible, count, replace=False))


def make_verification_pairs(
    labels: np.ndarray, count: int, seed: int, embeddings: np.ndarray | None = None
) -> list[tuple[Pair, bool]]:
    """Pairs of images, as indices into labels (n,), and whether each is genuine, fold by fold.

    Each fold has as many genuine as impostor pairs, no pair twice. There are `count` pairs in all,
    or fewer: the fold that can give fewest decides for all. Every identity of a fold is in one
    genuine pair before any is in a second. With embeddings (n, d), L2-normalised, an impostor pair
    is an image and its hardest impostor in the fold: the image of another identity with the highest
    cosine. Without embeddings it is two images at random.
    """
    rng = np.random.default_rng([seed, 9])
    wanted = count // (2 * NUM_FOLDS)  # of each kind in each fold
    folds = []
    for identities in np.array_split(rng.permutation(np.unique(labels)), NUM_FOLDS):
        images = [rng.permutation(np.flatnonzero(labels == identity)) for identity in identities]
        genuine = _unique_pairs(_genuine_pairs(images, rng), wanted)
        if embeddings is None:
            candidates = _random_impostors(images, rng)
        else:
            candidates = _hardest_impostors(images, labels, embeddings)
        folds.append((genuine, _unique_pairs(candidates, wanted)))
    # Equal sizes, so that a mean over folds gives every pair the same weight.
    size = min(len(kind) for fold in folds for kind in fold)
    pairs = []
    for genuine, impostors in folds:
        pairs += [(pair, True) for pair in genuine[:size]]
        pairs += [(pair, False) for pair in impostors[:size]]
    return pairs


def _genuine_pairs(images: list[np.ndarray], rng: np.random.Generator) -> Iterator[Pair]:
    """Every genuine pair once, in rounds of one pair per identity.

    images holds the image indices of each identity. Of identities with 2 and 3 images, which have
    one and three pairs, the order is A, B, B, B.
    """
    waiting = []
    for indices in images:
        first, second = np.triu_indices(len(indices), 1)
        pairs = np.stack([indices[first], indices[second]], 1)
        waiting.append(iter(rng.permutation(pairs).tolist()))
    while waiting:
        for pairs in waiting.copy():
            pair = next(pairs, None)
            if pair is None:
                waiting.remove(pairs)
            else:
                yield pair[0], pair[1]


def _random_impostors(images: list[np.ndarray], rng: np.random.Generator) -> Iterator[Pair]:
    """Random images of two random identities; the same pair may come up again."""
    if len(images) < 2:
        return
    for _ in range(100 * sum(map(len, images))):  # an end, should a fold run out of pairs
        a, b = rng.choice(len(images), 2, replace=False)
        yield int(rng.choice(images[a])), int(rng.choice(images[b]))


def _hardest_impostors(
    images: list[np.ndarray], labels: np.ndarray, embeddings: np.ndarray
) -> Iterator[Pair]:
    """An image and its hardest impostor in the fold, in rounds of one image per identity."""
    gallery = np.concatenate(images)
    for turn in range(max(map(len, images))):
        probes = np.array([indices[turn] for indices in images if turn < len(indices)])
        scores = embeddings[probes] @ embeddings[gallery].T
        scores[labels[probes][:, None] == labels[gallery]] = -np.inf
        hardest = scores.argmax(1)
        for row, probe in enumerate(probes.tolist()):
            if np.isfinite(scores[row, hardest[row]]):  # not so in a fold of one identity
                yield probe, int(gallery[hardest[row]])


def _unique_pairs(pairs: Iterator[Pair], count: int) -> list[Pair]:
    """The first `count` different pairs; (a, b) and (b, a) are the same pair."""
    unique: dict[Pair, Pair] = {}
    for a, b in pairs:
        if len(unique) == count:
            break
        unique.setdefault((min(a, b), max(a, b)), (a, b))
    return list(unique.values())
