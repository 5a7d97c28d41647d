"""The figures' text: legends that fit, labels in the field's words."""

import numpy as np
import pytest

from evaluation import figures, verification
from evaluation.robustness import CORRUPTIONS


@pytest.fixture
def saved(monkeypatch):
    """The figures that are saved, in place of their files."""
    saved = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure))
    return saved


def legend_texts(figure):
    """The entries of a figure's legend, which must lie within the figure."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 <= page.y1
    return [text.get_text() for text in legend.get_texts()]


def test_the_histogram_names_both_kinds_of_pairs(tmp_path, saved):
    rng = np.random.default_rng(0)
    same = np.arange(600_000) % 2 == 0
    scores = np.clip(rng.normal(0.3 * same - 0.2, 0.1), -1, 1)  # angles of three digits
    metrics = verification.verify(scores, same, verification.contiguous_folds(len(same), 2))
    figures.plot_angles(tmp_path / "theta_dist.png", scores, same, metrics)
    genuine, impostors, threshold = legend_texts(*saved)
    assert genuine.startswith("300,000 genuine, mean 84.")
    assert impostors.startswith("300,000 impostor, mean 101.")
    assert threshold.startswith("best threshold 9")


def test_the_legend_of_the_corruptions_fits(tmp_path, saved):
    row = {"accuracy": 0.9, "standard_error": 0.01, "accuracy_as_set": 0.8}
    figures.plot_robustness(
        tmp_path / "robustness.png", dict.fromkeys(("clean", *CORRUPTIONS), row)
    )
    assert set(legend_texts(*saved)) == {
        "clean pairs",
        "threshold fitted to clean pairs",
        "threshold fitted to corrupted pairs, ± s.e.",
    }
