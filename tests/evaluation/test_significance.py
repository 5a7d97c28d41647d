"""significance.py against naive resampling, and its intervals against repeated experiments."""

import numpy as np
import pytest

from evaluation import verification
from evaluation.significance import (
    compare,
    identity_weights,
    interval,
    intervals,
    judged_rightly,
    mcnemar,
    resampled,
)


def made_up(seed, people=40, pairs=300, difficulty=0.0):
    """Scores of pairs among people, some of whom are harder than others: their pairs all suffer."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, difficulty, people)
    same = rng.random(pairs) < 0.5
    left = rng.integers(0, people, pairs)
    right = np.where(same, left, (left + rng.integers(1, people, pairs)) % people)
    scores = 0.5 * same + rng.normal(0, 0.2, pairs)
    scores += np.where(same, -1, 1) * (hard[left] + hard[right]) / 2
    return scores.round(2), same, left, right


def test_a_resample_is_the_same_as_writing_the_pairs_out_so_many_times():
    scores, same, left, right = made_up(0)
    weights = identity_weights(np.arange(40), left, right, 20, seed=3)
    judged = (scores >= 0.25) == same
    rates = resampled(scores, same, judged, weights, ("1e-2", "1e-1"))
    rng = np.random.default_rng(3)
    for row in range(20):
        drawn = rng.integers(0, 40, 40).tolist()
        times = [
            drawn.count(a) * (1 if a == b else drawn.count(b))
            for a, b in zip(left, right, strict=True)
        ]
        assert weights[row].tolist() == times
        out = np.repeat(np.arange(len(scores)), times)
        curve = verification.roc(scores[out], same[out])
        for far, found in rates.tar_at_far.items():
            expected = verification.tar_at_far(curve, float(far) * (1 + 1e-12))
            assert found[row] == pytest.approx(expected, abs=1e-12)
        assert rates.eer[row] == pytest.approx(verification.equal_error_rate(curve), abs=1e-12)
        share = same.mean()
        expected = share * judged[out][same[out]].mean()
        expected += (1 - share) * judged[out][~same[out]].mean()
        assert rates.accuracy[row] == pytest.approx(expected, abs=1e-12)


def test_the_whole_set_counted_once_gives_its_own_rates():
    scores, same, _, _ = made_up(1, pairs=1000)
    judged = (scores >= 0.25) == same
    rates = resampled(scores, same, judged, np.ones((1, 1000), np.float32))
    curve = verification.roc(scores, same)
    assert rates.accuracy[0] == pytest.approx(judged.mean(), abs=1e-12)
    assert rates.eer[0] == pytest.approx(verification.equal_error_rate(curve), abs=1e-12)
    for far, found in rates.tar_at_far.items():
        assert found[0] == pytest.approx(verification.tar_at_far(curve, float(far)), abs=1e-12)


def test_people_are_drawn_evenly_and_a_seed_repeats_them():
    people = np.arange(30)
    one = identity_weights(people, people, (people + 1) % 30, 2000, seed=1)
    assert (one == identity_weights(people, people, (people + 1) % 30, 2000, seed=1)).all()
    assert (one != identity_weights(people, people, (people + 1) % 30, 2000, seed=2)).any()
    # E of the product of two multiplicities of a multinomial of n: 1 - 1/n.
    assert one.mean() == pytest.approx(1 - 1 / 30, abs=0.02)
    alone = identity_weights(people, people, people, 2000, seed=1)
    assert (alone.sum(1) == 30).all()
    assert alone.mean(0) == pytest.approx(np.ones(30), abs=0.1)


def coverage(by_person, experiments=150):
    """How often a 95 % interval of accuracy holds the true value, and its mean width."""
    truth = np.mean(
        [(s >= 0.25) == m for s, m, _, _ in (made_up(i, 4000, 4000, 0.3) for i in (7, 8))]
    )
    inside, widths = 0, []
    for experiment in range(experiments):
        # Few people in many pairs each, as in CFP or IJB.
        scores, same, left, right = made_up(100 + experiment, 25, 400, 0.3)
        groups = (np.arange(25), left, right) if by_person else (np.arange(400),) * 3
        weights = identity_weights(*groups, 200, seed=experiment)
        low, high = intervals(scores, same, (scores >= 0.25) == same, weights)["accuracy"]
        inside += low <= truth <= high
        widths.append(high - low)
    return inside / experiments, np.mean(widths)


def test_intervals_by_person_hold_the_truth_where_those_by_pair_do_not():
    # With 150 experiments a true 95 % is seen as 91 % or more in all but 3 % of cases.
    assert coverage(by_person=True)[0] >= 0.9
    assert coverage(by_person=False)[0] < 0.85


def test_thresholds_are_those_of_the_folds():
    scores, same, _, _ = made_up(2)
    folds = np.repeat([3, 5, 9], 100)
    found = verification.cross_validate(scores, same, folds)
    right = judged_rightly(scores, same, folds, found.thresholds)
    assert [right[folds == k].mean() for k in (3, 5, 9)] == found.accuracies.tolist()


def test_intervals_leave_out_resamples_of_one_kind():
    assert interval(np.array([np.nan, 1.0, 1.0, np.nan])) == (1, 1)


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
def test_mcnemar_is_the_exact_binomial(only_a, only_b, p):
    right_a = np.array([True] * only_a + [False] * only_b + [True] * 7 + [False] * 3)
    right_b = np.array([False] * only_a + [True] * only_b + [True] * 7 + [False] * 3)
    assert mcnemar(right_a, right_b) == (only_a, only_b, pytest.approx(p))


def two_models(seed, gain, pairs=3000):
    """Two models' scores of the same pairs; the second is better by a gain."""
    rng = np.random.default_rng(seed)
    same = np.arange(pairs) % 2 == 0
    shared = rng.normal(0, 0.25, pairs)
    a, b = (
        0.5 * same + shared + rng.normal(0, 0.1, pairs) + sign * (same - 0.5)
        for sign in (0.0, gain)
    )
    people = np.arange(pairs)
    weights = identity_weights(people, people, people, 200, seed=seed)
    right = [(s >= 0.25) == same for s in (a, b)]
    return compare((a, b), same, right, weights)


def test_a_difference_is_called_noise_as_often_as_chance_has_it():
    calls = [two_models(seed, 0.0, 1000)["noise"] for seed in range(40)]
    assert np.mean(calls) >= 0.9  # 5 % false alarms at most, since both tests must see it
    found = two_models(0, 0.2)
    assert not found["noise"]
    assert found["verdict"].startswith("The second is better")
    assert found["accuracy_interval"][1] < 0
    assert found["accuracy_difference"] == pytest.approx(
        (found["only_first_right"] - found["only_second_right"]) / 3000
    )


def test_a_model_is_no_better_than_itself():
    scores, same, left, right = made_up(3)
    weights = identity_weights(np.arange(40), left, right, 50, seed=0)
    judged = (scores >= 0.25) == same
    found = compare((scores, scores), same, (judged, judged), weights)
    assert found["noise"]
    assert found["accuracy_interval"] == found["eer_interval"] == (0, 0)
    assert "within chance" in found["verdict"]
