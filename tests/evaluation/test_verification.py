"""verification.py against values worked out by hand, brute force, and scikit-learn."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from evaluation import verification as ver


def made_up_scores(seed: int, pairs: int = 400, decimals: int = 12):
    """Overlapping scores; few decimals make ties."""
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.5
    scores = np.where(same, rng.normal(0.5, 0.2, pairs), rng.normal(0.1, 0.2, pairs))
    return scores.clip(-1, 1).round(decimals), same


# ---------------------------------------------------------------- scores


def test_pair_scores_by_hand():
    embeddings = np.array([[3, 0], [1, 1], [0, 5], [-2, 0], [0, 0]], dtype=np.float32)
    first, second = np.array([0, 0, 0, 0, 1]), np.array([1, 2, 3, 4, 1])
    for chunk in (1, 2, 100):
        scores = ver.pair_scores(embeddings, first, second, chunk)
        np.testing.assert_allclose(scores, [0.5**0.5, 0, -1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(ver.to_degrees(scores), [45, 90, 180, 90, 0], atol=1e-5)


def test_pair_scores_stay_within_one():
    """Rounding must not give a cosine of 1 + 2e-16, whose angle is NaN."""
    embeddings = np.random.default_rng(0).normal(size=(500, 7)).astype(np.float32)
    same = ver.pair_scores(embeddings, np.arange(500), np.arange(500))
    assert same.max() <= 1
    assert np.isfinite(ver.to_degrees(same)).all()


# ---------------------------------------------------------------- the best threshold


def test_best_threshold_by_hand():
    # Separable: half way between 0.2 and 0.6. Then, one error (the impostor 0.8) at best, with a
    # threshold between impostor 0.5 and genuine 0.7.
    assert ver.best_threshold(np.array([0.6, 0.1, 0.9, 0.2]), np.array([1, 0, 1, 0], bool)) == 0.4
    scores = np.array([0.5, 0.7, 0.8, 0.9, 0.1])
    same = np.array([False, True, False, True, False])
    assert ver.best_threshold(scores, same) == pytest.approx(0.6)


def test_best_threshold_of_equally_good_ones_has_the_widest_gap():
    # genuine 0.9, impostor 0.8, genuine 0.5, impostor 0.1: between 0.1 and 0.5 one error, between
    # 0.8 and 0.9 one error; the first gap is wider.
    scores, same = np.array([0.9, 0.8, 0.5, 0.1]), np.array([True, False, True, False])
    assert ver.best_threshold(scores, same) == pytest.approx(0.3)
    # The example of best_threshold's docstring.
    scores, same = np.array([0.3, 0.7, 0.9, 0.1, 0.4]), np.array([1, 1, 1, 0, 0], bool)
    assert ver.best_threshold(scores, same) == pytest.approx(0.55)
    correct = [5 * ver.accuracy(scores, same, t) for t in (0.1, 0.2, 0.35, 0.55, 0.8, 0.91)]
    assert np.rint(correct).tolist() == [3, 4, 3, 4, 3, 2]


def test_best_threshold_accepts_all_or_none():
    scores = np.array([0.3, 0.3, 0.7])
    all_of_them = ver.best_threshold(scores, np.ones(3, bool))
    none_of_them = ver.best_threshold(scores, np.zeros(3, bool))
    assert (scores >= all_of_them).all()
    assert not (scores >= none_of_them).any()


def test_best_threshold_between_neighbouring_numbers():
    """Half way between 1 and the next float64 rounds to 1, which would accept the wrong pair."""
    scores, same = np.array([1.0, np.nextafter(1.0, 2)]), np.array([False, True])
    assert ver.accuracy(scores, same, ver.best_threshold(scores, same)) == 1


@pytest.mark.parametrize("decimals", [12, 2, 1])
@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_against_brute_force(seed, decimals):
    scores, same = made_up_scores(seed, decimals=decimals)
    values = sorted(set(scores))
    tried = [values[0] - 1, values[-1] + 1]
    tried += [(low + high) / 2 for low, high in itertools.pairwise(values)]
    highest = max(sum((scores >= t) == same) for t in tried) / len(same)
    assert ver.accuracy(scores, same, ver.best_threshold(scores, same)) == highest


# ---------------------------------------------------------------- folds


@pytest.mark.parametrize(("pairs", "folds"), [(6000, 10), (7000, 10), (23, 10), (9, 4), (5, 2)])
def test_contiguous_folds_are_kfold_without_shuffling(pairs, folds):
    mine = ver.contiguous_folds(pairs, folds)
    for number, (_, test) in enumerate(KFold(folds, shuffle=False).split(np.zeros(pairs))):
        assert np.flatnonzero(mine == number).tolist() == test.tolist()


@pytest.mark.parametrize(("genuine", "impostor"), [(3000, 3000), (700, 1284), (13, 40), (10, 91)])
def test_stratified_folds_hold_both_kinds_in_proportion(genuine, impostor):
    same = np.random.default_rng(0).permutation(np.arange(genuine + impostor) < genuine)
    folds = ver.stratified_folds(same, np.arange(len(same)))
    sizes = np.bincount(ver.contiguous_folds(len(same)))
    assert np.bincount(folds).tolist() == sizes.tolist()
    expected = sizes * genuine / len(same)
    assert np.abs(np.bincount(folds, weights=same) - expected).max() <= 1
    for kind in (same, ~same):
        assert (np.diff(folds[kind]) >= 0).all()  # dealt out in the order of the keys


def test_cross_validate_by_hand():
    # Fold 1 is separable at (0.4 + 0.8) / 2 = 0.6, fold 2 at (0.1 + 0.5) / 2 = 0.3, each with a
    # single best threshold. Fold 1 under 0.3: 0.4 is wrong. Fold 2 under 0.6: 0.5 is wrong.
    scores = np.array([0.8, 0.4, 0.5, 0.1, 0.9])
    same = np.array([True, False, True, False, True])
    folds = np.array([1, 1, 2, 2, 2])
    result = ver.cross_validate(scores, same, folds)
    np.testing.assert_allclose(result.thresholds, [0.3, 0.6])
    np.testing.assert_allclose(result.accuracies, [1 / 2, 2 / 3])


def test_cross_validate_never_looks_at_the_fold_it_scores():
    scores, same = made_up_scores(3)
    folds = ver.contiguous_folds(len(same))
    before = ver.cross_validate(scores, same, folds).thresholds
    for number in range(10):
        negated = np.where(folds == number, -scores, scores)
        assert ver.cross_validate(negated, same, folds).thresholds[number] == before[number]


def test_cross_validate_refuses_a_single_fold():
    with pytest.raises(ValueError, match="two folds"):
        ver.cross_validate(np.array([0.1, 0.9]), np.array([False, True]), np.zeros(2))


def test_standard_error_by_hand():
    # Mean 3, squares 4 + 1 + 0 + 1 + 4 = 10, / (5 - 1) = 2.5; its root over the root of 5.
    assert ver.standard_error([1, 2, 3, 4, 5]) == pytest.approx((2.5 / 5) ** 0.5)


def insightface_accuracies(embeddings, same):
    """InsightFace's protocol: squared distances, thresholds 0 to 4 by 0.01, KFold, first best."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = ((unit[0::2] - unit[1::2]) ** 2).sum(1)
    thresholds = np.arange(0, 4, 0.01)
    accepted = distances[:, None] < thresholds  # (pairs, thresholds)
    right = accepted == same[:, None]
    accuracies, unique = [], []
    for train, test in KFold(10, shuffle=False).split(distances):
        counts = right[train].sum(0)
        best = np.flatnonzero(counts == counts.max())
        accuracies.append(right[test, best[0]].mean())
        unique.append(len(set(accepted[:, best].sum(0))) == 1)
    return np.array(accuracies), np.array(unique)


def test_accuracy_equals_insightface_where_the_definitions_coincide():
    """Where all of the grid's best thresholds split the pairs alike, the fold's accuracy agrees."""
    compared = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        same = rng.random(2000) < 0.5
        angle = np.where(same, rng.normal(0.9, 0.3, 2000), rng.normal(1.5, 0.3, 2000))
        # Squared distances 0.005, 0.015, ...: each grid threshold splits between two of them.
        distance = np.floor((2 - 2 * np.cos(angle.clip(0.1, 3))) * 100) / 100 + 0.005
        cosine = 1 - distance / 2
        embeddings = np.zeros((4000, 2))
        embeddings[0::2, 0] = 3  # any length
        embeddings[1::2] = np.stack([cosine, np.sqrt(1 - cosine**2)], 1)
        theirs, unique = insightface_accuracies(embeddings, same)
        scores = ver.pair_scores(embeddings, np.arange(0, 4000, 2), np.arange(1, 4000, 2))
        scores = scores.round(9)  # the same distance must be the same score
        mine = ver.cross_validate(scores, same, ver.contiguous_folds(2000)).accuracies
        np.testing.assert_array_equal(mine[unique], theirs[unique])
        compared += unique.sum()
    assert compared >= 50


# ---------------------------------------------------------------- ROC


def test_tar_at_far_and_eer_by_hand():
    # From the top: + + - + - + - -. FAR 0 has TAR 2/4, FAR 1/4 has 3/4, FAR 2/4 has 4/4.
    same = np.array([1, 1, 0, 1, 0, 1, 0, 0], bool)
    scores = np.linspace(0.9, 0.1, 8)
    curve = ver.roc(scores, same)
    assert ver.tar_at_far(curve, 0.0) == 0.5
    assert ver.tar_at_far(curve, 0.249) == 0.5
    assert ver.tar_at_far(curve, 0.25) == 0.75
    assert ver.tar_at_far(curve, 0.5) == 1
    # At FAR 1/4 and TAR 3/4 both errors are 1/4.
    assert ver.equal_error_rate(curve) == pytest.approx(0.25)


def test_eer_lies_between_points():
    # + at 0.9, then a tie of three + and one - at 0.5, then - at 0.1: the ROC goes (0, 1/4) ->
    # (1/2, 1). On that line 1 - TAR = FAR: 3/4 - 1.5 x = x, x = 0.3.
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.1])
    same = np.array([True, True, True, True, False, False])
    assert ver.equal_error_rate(ver.roc(scores, same)) == pytest.approx(0.3)


def test_perfect_and_inverted_scores():
    same = np.array([True] * 5 + [False] * 5)
    scores = np.linspace(0.9, 0.1, 10)
    assert ver.equal_error_rate(ver.roc(scores, same)) == 0
    assert ver.tar_at_far(ver.roc(scores, same), 1e-3) == 1
    assert ver.equal_error_rate(ver.roc(-scores, same)) == 1
    assert ver.tar_at_far(ver.roc(-scores, same), 1e-3) == 0


@pytest.mark.parametrize("decimals", [12, 1])
def test_tar_at_far_against_brute_force(decimals):
    scores, same = made_up_scores(7, decimals=decimals)
    curve = ver.roc(scores, same)
    for far in (0, 1e-3, 1e-2, 0.03, 0.2, 0.5, 1):
        allowed = [t for t in (*scores, 9) if np.mean(scores[~same] >= t) <= far]
        expected = max(np.mean(scores[same] >= t) for t in allowed)
        assert ver.tar_at_far(curve, far) == pytest.approx(expected)


@pytest.mark.parametrize("same", [np.ones(4, bool), np.zeros(4, bool)])
def test_roc_needs_both_kinds(same):
    with pytest.raises(ValueError, match="genuine and impostor"):
        ver.roc(np.linspace(0, 1, 4), same)


# ---------------------------------------------------------------- everything


def test_verify_agrees_with_its_parts_and_scikit_learn():
    scores, same = made_up_scores(11, 600)
    folds = ver.contiguous_folds(600)
    report = ver.verify(scores, same, folds)
    right = []
    for number in range(10):
        train, test = folds != number, folds == number
        tried = np.unique(scores[train])
        tried = (tried[1:] + tried[:-1]) / 2
        counts = [np.sum((scores[train] >= t) == same[train]) for t in tried]
        threshold = report["fold_thresholds"][number]
        assert np.sum((scores[train] >= threshold) == same[train]) == max(counts)
        right.append(np.mean((scores[test] >= threshold) == same[test]))
    assert report["fold_accuracies"] == pytest.approx(right)
    assert report["accuracy"] == pytest.approx(np.mean(right))
    assert report["standard_error"] == pytest.approx(np.std(right) / 3)  # sqrt(10 - 1)
    assert report["threshold"] == pytest.approx(np.mean(report["fold_thresholds"]))
    assert report["auc"] == pytest.approx(roc_auc_score(same, scores))
    far, tar, _ = roc_curve(same, scores)
    assert report["eer"] == pytest.approx(far[np.argmin(abs(1 - tar - far))], abs=0.01)
    assert np.cos(np.radians(report["best_threshold_degrees"])) == pytest.approx(
        report["best_threshold"]
    )
    assert (report["pairs"], report["matched_pairs"]) == (600, same.sum())


def test_a_fitted_threshold_is_never_worse_than_cross_validation():
    for seed in range(30):
        scores, same = made_up_scores(seed, 200, decimals=2)
        report = ver.verify(scores, same, ver.contiguous_folds(200))
        assert report["best_accuracy"] >= report["accuracy"] - 1e-12
