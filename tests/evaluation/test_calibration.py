"""Platt scaling against an independent optimiser, ECE against its definition, operating points."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.calibration import calibration_curve

from evaluation import verification
from evaluation.calibration import (
    calibrate,
    expected_calibration_error,
    fit_platt,
    genuine_probability,
    operating_points,
    reliability_bins,
)


def made_up(seed, pairs=2000, gap=0.4):
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.5
    return rng.normal(0, 0.2, pairs) + gap * same, same, np.arange(pairs) * 10 // pairs


def test_the_fit_is_platt_scaling_by_another_optimiser():
    scores, same, _ = made_up(0)
    positive, negative = same.sum(), (~same).sum()
    target = np.where(same, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters):
        z = parameters[0] * scores + parameters[1]
        return np.sum(np.logaddexp(0, z) - target * z)

    expected = minimize(loss, [1.0, 0.0], method="BFGS").x
    assert fit_platt(scores, same) == pytest.approx(tuple(expected), rel=2e-3)


def test_two_normal_distributions_give_bayes_posterior():
    # Equal variances v, means 0 and g: log odds are g / v * s - g^2 / 2v, here 10 s - 2.
    slope, intercept = fit_platt(*made_up(1, 100_000)[:2])
    assert (slope, intercept) == (pytest.approx(10, rel=0.03), pytest.approx(-2, rel=0.03))


def test_separable_scores_have_a_finite_slope():
    same = np.arange(60) % 2 == 0
    slope, intercept = fit_platt(np.where(same, 0.9, 0.1), same)
    assert 0 < slope < 1000
    assert genuine_probability(np.array([0.5]), slope, intercept) == pytest.approx(0.5, abs=0.01)


def test_bins_equal_scikit_learns():
    rng = np.random.default_rng(2)
    probabilities = np.concatenate([rng.random(500), [0.0, 1.0]])
    same = rng.random(502) < probabilities**2
    bins = reliability_bins(probabilities, same)
    genuine, mean = calibration_curve(same, probabilities, n_bins=15)
    assert [row["matched"] for row in bins] == pytest.approx(genuine)
    assert [row["probability"] for row in bins] == pytest.approx(mean)
    assert sum(row["pairs"] for row in bins) == 502
    # ECE by definition, written as a sum over pairs.
    index = np.minimum(probabilities * 15 // 1, 14)
    off = sum(abs((probabilities - same)[index == k].sum()) for k in range(15)) / 502
    assert expected_calibration_error(bins) == pytest.approx(off)


def test_ece_and_brier_score_are_those_of_held_out_folds():
    scores, same, folds = made_up(3)
    calibration = calibrate(scores, same, folds)
    assert calibration["ece"] < 0.03  # the model is true: what is left is sampling error
    held_out = np.concatenate([
        genuine_probability(scores[folds == k], *fit_platt(scores[folds != k], same[folds != k]))
        for k in range(10)
    ])  # fmt: skip
    assert calibration["brier"] == pytest.approx(np.mean((held_out - same) ** 2))
    assert calibration["bins"] == reliability_bins(held_out, same)


def test_scores_that_shift_in_one_fold_are_worse_calibrated():
    scores, same, folds = made_up(4)
    shifted = scores + 0.4 * (folds == 9)
    assert calibrate(shifted, same, folds)["ece"] > calibrate(scores, same, folds)["ece"] + 0.01


@pytest.mark.parametrize(
    ("impostors", "supported"),
    [(299, 0), (300, 1), (2999, 1), (3000, 2), (30_000, 3), (300_000, 4)],
)
def test_operating_points_need_thirty_errors(impostors, supported):
    rng = np.random.default_rng(5)
    same = np.arange(impostors + 500) < 500
    scores = (rng.normal(0, 0.2, len(same)) + 0.5 * same).round(4)
    points, unsupported = operating_points(scores, same)
    assert [row["wanted"] for row in points] == ["1e-1", "1e-2", "1e-3", "1e-4"][:supported]
    assert len(points) + len(unsupported) == 4
    for row in points:
        accepted = scores >= row["threshold"]
        assert row["far"] == accepted[~same].mean() <= float(row["wanted"])
        assert row["frr"] == pytest.approx(1 - accepted[same].mean(), abs=1e-12)
        lower = scores[scores < row["threshold"]].max()
        assert (scores >= lower)[~same].mean() > float(row["wanted"])
        assert row["degrees"] == pytest.approx(verification.to_degrees(row["threshold"]))
    for sentence in unsupported:
        assert f"of {impostors:,} impostor pairs" in sentence
