"""Make a verification set out of a training set: which identities, and pairs of their images.

    from evaluation.pair_making import choose_identities, make_pairs
    identities = choose_identities(labels, count=500, seed=0)
    pairs = make_pairs(labels[np.isin(labels, identities)], count=6000, seed=0)

Ten folds that share no identity, half of each genuine pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from utils import UserError

FOLDS = 10
LEAST = 4  # images of an identity that is held out

Pair = tuple[int, int]


def choose_identities(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` classes by chance among those with LEAST images or more, ascending.

    Raises UserError where there are too few, or none would be left to train on.
    """
    able = np.flatnonzero(np.bincount(labels) >= LEAST)
    left = len(np.unique(labels)) - count
    if len(able) < count or left < 2:
        raise UserError(
            f"The training set has {len(able):,} identities with {LEAST} images or more, and "
            f"{max(left, 0):,} would be left to train on; hold out fewer (--held-out-identities)."
        )
    return np.sort(np.random.default_rng([seed, 8]).choice(able, count, replace=False))


def make_pairs(
    people: np.ndarray, count: int, seed: int, embeddings: np.ndarray | None = None
) -> list[tuple[Pair, bool]]:
    """Pairs of images and whether they match, fold by fold; people (n,) of the images.

    `count` pairs, or as many as every fold can give; a fold has as many of each kind, none twice,
    and shares nobody with another. Identities give one pair each before any gives a second one.
    With embeddings (n, d) of unit length mismatched pairs are an image and its nearest stranger.
    """
    rng = np.random.default_rng([seed, 9])
    folds = np.array_split(rng.permutation(np.unique(people)), FOLDS)
    found = []
    for fold in folds:
        images = [rng.permutation(np.flatnonzero(people == person)) for person in fold]
        strangers = (
            _random_strangers(images, rng)
            if embeddings is None
            else _nearest_strangers(images, people, embeddings)
        )
        each = count // (2 * FOLDS)
        found.append([_distinct(kind, each) for kind in (_matched(images, rng), strangers)])
    each = min(len(kind) for fold in found for kind in fold)
    return [
        (pair, same)
        for fold in found
        for kind, same in zip(fold, (True, False), strict=True)
        for pair in kind[:each]
    ]


def _matched(images: list[np.ndarray], rng: np.random.Generator) -> Iterator[Pair]:
    """Every matched pair, in rounds in which each identity has its turn."""
    waiting = []
    for mine in images:
        first, second = np.triu_indices(len(mine), 1)
        waiting.append(iter(rng.permutation(np.stack([mine[first], mine[second]], 1)).tolist()))
    while waiting:
        for pairs in waiting.copy():
            pair = next(pairs, None)
            if pair is None:
                waiting.remove(pairs)
            else:
                yield pair[0], pair[1]


def _random_strangers(images: list[np.ndarray], rng: np.random.Generator) -> Iterator[Pair]:
    """Images of two people, both by chance, again and again."""
    for _ in range(100 * sum(map(len, images))):
        a, b = rng.choice(len(images), 2, replace=False) if len(images) > 1 else (0, 0)
        if a != b:
            yield int(rng.choice(images[a])), int(rng.choice(images[b]))


def _nearest_strangers(
    images: list[np.ndarray], people: np.ndarray, embeddings: np.ndarray
) -> Iterator[Pair]:
    """An image and the most alike of another person's, in rounds in which each has their turn."""
    everyone = np.concatenate(images)
    for turn in range(max(map(len, images))):
        probes = np.array([mine[turn] for mine in images if turn < len(mine)])
        scores = embeddings[probes] @ embeddings[everyone].T
        scores[people[probes][:, None] == people[everyone]] = -np.inf
        best = scores.argmax(1)
        for row, probe in enumerate(probes.tolist()):
            if np.isfinite(scores[row, best[row]]):
                yield probe, int(everyone[best[row]])


def _distinct(pairs: Iterator[Pair], count: int) -> list[Pair]:
    """The first `count` pairs, of which none is another one turned round."""
    found: dict[Pair, Pair] = {}
    for a, b in pairs:
        if len(found) == count:
            break
        found.setdefault((min(a, b), max(a, b)), (a, b))
    return list(found.values())
