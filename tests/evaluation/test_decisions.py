"""The threshold of a search among many faces, extrapolated; texts of probabilities."""

import numpy as np
import pytest
from scipy.stats import norm

from evaluation.decisions import SEARCH_FPIR, Decision


def make(**changes):
    # Thresholds of impostors that are normal with mean 0.02 and deviation 0.1.
    by_far = {far: norm.isf(far, 0.02, 0.1) for far in (0.1, 0.01)}
    return Decision("", 0.27, "99.00 % +- 0.10 accurate", "6,000 pairs of x", by_far, **changes)


@pytest.mark.parametrize("faces", [100, 5000])
def test_a_search_among_normal_impostors_keeps_to_its_fpir(faces):
    threshold, origin = make().choose_threshold(faces=faces)
    assert (
        f"FPIR of {SEARCH_FPIR} among {faces:,} faces, extrapolated from FARs 0.01 and 0.1"
        in origin
    )
    rng = np.random.default_rng(0)
    best = np.array([rng.normal(0.02, 0.1, faces).max() for _ in range(20_000)])
    assert np.mean(best > threshold) == pytest.approx(SEARCH_FPIR, abs=0.003)


def test_pairs_and_small_evaluations_take_the_accuracy_s_threshold():
    for decision, faces in (
        (make(), 1),
        (Decision("", 0.27, "a", "x", {0.1: 0.1}), 999),
    ):
        threshold, origin = decision.choose_threshold(faces=faces)
        assert threshold == 0.27
        assert "extrapolated" not in origin
    assert make().choose_threshold("1e-2", faces=999)[0] == pytest.approx(norm.isf(0.01, 0.02, 0.1))
    assert make().choose_threshold("1e-2", 0.5, faces=999) == (0.5, "as given by --threshold")


def test_no_probability_is_called_certain():
    decision = make(platt=(30.0, -9.0))
    assert decision.format_probabilities([-1, 0.3, 1]) == ["< 0.01 %", "50.00 %", "> 99.99 %"]
    assert make().format_probabilities([0.1, 0.2]) == ["", ""]
