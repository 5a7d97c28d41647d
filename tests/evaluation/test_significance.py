"""The bootstrap against naive resampling, and the coverage of its intervals; McNemar's test."""

import numpy as np
import pytest

from evaluation import verification
from evaluation.significance import (
    bootstrap_intervals,
    bootstrap_rates,
    bootstrap_weights,
    compare_paired,
    correct_predictions,
    mcnemar_test,
    percentile_interval,
)


def made_up(seed, identities=40, pairs=300, difficulty=0.0):
    """Scores of pairs among identities, some of them hard: all their pairs score worse."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, difficulty, identities)
    same = rng.random(pairs) < 0.5
    left = rng.integers(0, identities, pairs)
    right = np.where(same, left, (left + rng.integers(1, identities, pairs)) % identities)
    scores = 0.5 * same + rng.normal(0, 0.2, pairs)
    scores += np.where(same, -1, 1) * (hard[left] + hard[right]) / 2
    return scores.round(2), same, left, right


def test_a_weight_equals_repeating_the_pair():
    scores, same, left, right = made_up(0)
    weights = bootstrap_weights(np.arange(40), left, right, 20, seed=3)
    correct = (scores >= 0.25) == same
    rates = bootstrap_rates(scores, same, correct, weights, ("1e-2", "1e-1"))
    rng = np.random.default_rng(3)
    for row in range(20):
        resample = rng.integers(0, 40, 40).tolist()
        times = [
            resample.count(a) * (1 if a == b else resample.count(b))
            for a, b in zip(left, right, strict=True)
        ]
        assert weights[row].tolist() == times
        out = np.repeat(np.arange(len(scores)), times)
        curve = verification.roc(scores[out], same[out])
        for far, tars in rates.tar_at_far.items():
            expected = verification.tar_at_far(curve, float(far) * (1 + 1e-12))
            assert tars[row] == pytest.approx(expected, abs=1e-12)
        assert rates.eer[row] == pytest.approx(verification.equal_error_rate(curve), abs=1e-12)
        share = same.mean()
        expected = share * correct[out][same[out]].mean()
        expected += (1 - share) * correct[out][~same[out]].mean()
        assert rates.accuracy[row] == pytest.approx(expected, abs=1e-12)


def test_weights_of_one_give_the_rates_of_the_set():
    scores, same, _, _ = made_up(1, pairs=1000)
    correct = (scores >= 0.25) == same
    rates = bootstrap_rates(scores, same, correct, np.ones((1, 1000), np.float32))
    curve = verification.roc(scores, same)
    assert rates.accuracy[0] == pytest.approx(correct.mean(), abs=1e-12)
    assert rates.eer[0] == pytest.approx(verification.equal_error_rate(curve), abs=1e-12)
    for far, tars in rates.tar_at_far.items():
        assert tars[0] == pytest.approx(verification.tar_at_far(curve, float(far)), abs=1e-12)


def test_identities_are_resampled_uniformly_and_reproducibly():
    faces = np.arange(30)
    one = bootstrap_weights(faces, faces, (faces + 1) % 30, 2000, seed=1)
    assert (one == bootstrap_weights(faces, faces, (faces + 1) % 30, 2000, seed=1)).all()
    assert (one != bootstrap_weights(faces, faces, (faces + 1) % 30, 2000, seed=2)).any()
    # E of the product of two multiplicities of a multinomial of n: 1 - 1/n.
    assert one.mean() == pytest.approx(1 - 1 / 30, abs=0.02)
    alone = bootstrap_weights(faces, faces, faces, 2000, seed=1)
    assert (alone.sum(1) == 30).all()
    assert alone.mean(0) == pytest.approx(np.ones(30), abs=0.1)


def coverage(by_identity, experiments=150):
    """How often a 95 % interval of accuracy holds the true value, and its mean width."""
    truth = np.mean(
        [(s >= 0.25) == m for s, m, _, _ in (made_up(i, 4000, 4000, 0.3) for i in (7, 8))]
    )
    inside, widths = 0, []
    for experiment in range(experiments):
        # Few identities in many pairs each, as in CFP or IJB.
        scores, same, left, right = made_up(100 + experiment, 25, 400, 0.3)
        groups = (np.arange(25), left, right) if by_identity else (np.arange(400),) * 3
        weights = bootstrap_weights(*groups, 200, seed=experiment)
        low, high = bootstrap_intervals(scores, same, (scores >= 0.25) == same, weights)["accuracy"]
        inside += low <= truth <= high
        widths.append(high - low)
    return inside / experiments, np.mean(widths)


def test_resampling_identities_covers_the_truth_where_resampling_pairs_does_not():
    # With 150 experiments a true 95 % is seen as 91 % or more in all but 3 % of cases.
    assert coverage(by_identity=True)[0] >= 0.9
    assert coverage(by_identity=False)[0] < 0.85


def test_each_pair_is_predicted_at_its_folds_threshold():
    scores, same, _, _ = made_up(2)
    folds = np.repeat([3, 5, 9], 100)
    validated = verification.cross_validate(scores, same, folds)
    correct = correct_predictions(scores, same, folds, validated.thresholds)
    assert [correct[folds == k].mean() for k in (3, 5, 9)] == validated.accuracies.tolist()


def test_intervals_leave_out_resamples_of_one_kind():
    assert percentile_interval(np.array([np.nan, 1.0, 1.0, np.nan])) == (1, 1)


# ------------------------------------------------------------------------------ two models


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (8, 2, 2 * 56 / 1024),
        (0, 10, 2 / 1024),
    ],
)
def test_mcnemar_is_an_exact_binomial_test(only_a, only_b, p):
    correct_a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 3)
    correct_b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 3)
    assert mcnemar_test(correct_a, correct_b) == (only_a, only_b, pytest.approx(p))


def two_models(seed, gain, pairs=3000):
    """Two models' scores of the same pairs; the second is better by a gain."""
    rng = np.random.default_rng(seed)
    same = np.arange(pairs) % 2 == 0
    shared = rng.normal(0, 0.25, pairs)
    a, b = (
        0.5 * same + shared + rng.normal(0, 0.1, pairs) + sign * (same - 0.5)
        for sign in (0.0, gain)
    )
    faces = np.arange(pairs)
    weights = bootstrap_weights(faces, faces, faces, 200, seed=seed)
    correct = [(s >= 0.25) == same for s in (a, b)]
    return compare_paired((a, b), same, correct, weights)


def test_a_difference_of_equal_models_is_rarely_called_significant():
    calls = [two_models(seed, 0.0, 1000)["noise"] for seed in range(40)]
    assert np.mean(calls) >= 0.9  # 5 % false alarms at most, since both tests must see it
    comparison = two_models(0, 0.2)
    assert not comparison["noise"]
    assert comparison["verdict"].startswith("The second is better, statistically significant (")
    assert comparison["accuracy_interval"][1] < 0
    assert comparison["accuracy_difference"] == pytest.approx(
        (comparison["only_first_right"] - comparison["only_second_right"]) / 3000
    )


def test_a_model_does_not_differ_from_itself():
    scores, same, left, right = made_up(3)
    weights = bootstrap_weights(np.arange(40), left, right, 50, seed=0)
    correct = (scores >= 0.25) == same
    comparison = compare_paired((scores, scores), same, (correct, correct), weights)
    assert comparison["noise"]
    assert comparison["accuracy_interval"] == comparison["eer_interval"] == (0, 0)
    assert "No statistically significant difference" in comparison["verdict"]
