"""Every plot shows what it says: legends, axes, their direction, and the numbers that are drawn."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation import drawing, verification
from evaluation.drawing import GENUINE_COLOUR, IMPOSTOR_COLOUR
from evaluation.robustness import CORRUPTIONS


@pytest.fixture
def axes():
    return Figure(figsize=(8, 5), layout="constrained").add_subplot()


@pytest.fixture
def scored():
    """(scores, same, metrics) of 400 genuine and 400 impostor pairs."""
    rng = np.random.default_rng(0)
    same = np.arange(800) % 2 == 0
    scores = np.clip(rng.normal(0.5 * same, 0.15), -1, 1)
    return scores, same, verification.verify(scores, same, verification.contiguous_folds(800, 4))


def labels(axes):
    """(xlabel, ylabel)."""
    return axes.get_xlabel(), axes.get_ylabel()


def lines(axes):
    """{legend entry: (x, y, colour)}."""
    return {
        str(line.get_label()): (*map(np.asarray, line.get_data()), line.get_color())
        for line in axes.get_lines()
    }


def ticks(axis):
    return [axis.get_major_formatter()(value, None) for value in (0.975, 0.5)]


def test_roc(axes, scored):
    scores, same, metrics = scored
    curve = verification.roc(scores, same)
    drawing.draw_roc(axes, "black", curve, metrics)
    assert labels(axes) == ("false accept rate (FAR)", "true accept rate (TAR)")
    shown = lines(axes)
    low, high = metrics["tar_at_far"].values()
    assert list(shown) == [
        f"AUC {metrics['auc']:.5f}",
        f"TAR {low:.2%} at FAR 1e-3",
        f"TAR {high:.2%} at FAR 1e-2",
        f"equal error rate {metrics['eer']:.2%}",
    ]
    assert low < high
    x, y, colour = shown[f"AUC {metrics['auc']:.5f}"]
    assert colour == GENUINE_COLOUR
    at = np.geomspace(0.01, 1, 50)
    assert (staircase(x, y, at) == staircase(curve.far, curve.tar, at)).all()
    x, y, colour = shown[f"TAR {high:.2%} at FAR 1e-2"]
    assert (x, y, colour) == ([0.01], [high], IMPOSTOR_COLOUR)
    x, y, colour = shown[f"equal error rate {metrics['eer']:.2%}"]
    assert (x, y, colour) == ([metrics["eer"]], [1 - metrics["eer"]], "black")
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] < 1 / 400 < axes.get_xlim()[1] == 1  # to the right: a larger FAR
    bottom, top = axes.get_ylim()
    assert bottom < low < top == 1
    assert ticks(axes.yaxis) == ["97.5 %", "50 %"]
    assert axes.xaxis.get_major_formatter()(1e-7, None) == "1e-05 %"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(shown)


def test_template_roc_marks_the_rates_that_lie_on_the_curve(axes):
    far, tar = np.array([1e-4, 1e-2, 1.0]), np.array([0.5, 0.8, 1.0])
    rates = {"1e-5": 0.2, "1e-3": 0.6, "1e-2": 0.8}
    drawing.draw_template_roc(axes, "black", far, tar, rates)
    named = [line.get_label() for line in axes.get_lines() if line.get_label()[0] != "_"]
    assert named == ["TAR 60.00% at FAR 1e-3", "TAR 80.00% at FAR 1e-2"]
    assert labels(axes) == ("false accept rate (FAR)", "true accept rate (TAR)")


def test_det(axes, scored):
    scores, same, metrics = scored
    drawing.draw_det(axes, "black", verification.roc(scores, same), metrics)
    assert labels(axes) == ("false accept rate (FAR)", "false reject rate (FRR)")
    curve, diagonal = axes.get_lines()
    x, y = map(np.asarray, curve.get_data())
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) <= 0).all()  # more accepted, fewer rejected
    # The curve crosses the diagonal of equal errors at the equal error rate.
    from scipy.special import ndtr

    crossing = ndtr(x[np.argmax(y <= x)])
    assert crossing == pytest.approx(metrics["eer"], abs=0.01)
    assert diagonal.get_linestyle() == ":"
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown[-3:] == ["5 %", "20 %", "50 %"]
    assert shown == [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize("angles", [False, True])
def test_histogram(axes, scored, angles):
    scores, same, metrics = scored
    drawing.draw_histogram(axes, "black", scores, same, metrics, angles)
    degrees = verification.to_degrees(scores)
    values = degrees if angles else scores
    (line,) = axes.get_lines()
    threshold = metrics["best_threshold_degrees" if angles else "best_threshold"]
    assert line.get_xdata()[0] == threshold
    best = f"{threshold:.2f}°" if angles else f"{threshold:.4f}"
    mean = "{:.1f}°" if angles else "{:.3f}"
    entries = {
        f"400 genuine, mean {mean.format(values[same].mean())}": GENUINE_COLOUR,
        f"400 impostor, mean {mean.format(values[~same].mean())}": IMPOSTOR_COLOUR,
        f"best threshold {best}: {metrics['best_accuracy']:.2%}": "black",
    }
    handles, names = axes.get_legend_handles_labels()
    assert sorted(names) == sorted(entries)
    for handle, name in zip(handles, names, strict=True):
        colour = handle.get_facecolor() if hasattr(handle, "get_facecolor") else handle.get_color()
        if "best" not in name:
            assert matches(colour, entries[name])
            # The bars of its colour lie where the values of its kind are.
            path = handle.get_path().vertices
            kind = values[same if "genuine" in name else ~same]
            filled = path[path[:, 1] > 0, 0]
            step = 1.0 if angles else 0.02
            assert kind.min() - step <= filled.min() <= filled.max() <= kind.max() + step
    assert labels(axes) == ("angle θ, degrees" if angles else "score (cosine)", "pairs")


def matches(colour, name):
    from matplotlib.colors import to_rgb

    return np.allclose(to_rgb(colour), to_rgb(name))


def test_folds(axes, scored):
    metrics = scored[2]
    drawing.draw_folds(axes, "black", metrics)
    dots, mean = axes.get_lines()
    assert list(dots.get_xdata()) == [1, 2, 3, 4]
    assert list(dots.get_ydata()) == metrics["fold_accuracies"]
    assert list(mean.get_ydata()) == [metrics["accuracy"]] * 2
    assert labels(axes) == ("fold", "accuracy")
    assert ticks(axes.yaxis) == ["97.5 %", "50 %"]


def test_reliability(axes):
    bins = [
        {"from": 0, "to": 0.5, "pairs": 5, "probability": 0.2, "matched": 0.1},
        {"from": 0.5, "to": 1, "pairs": 5, "probability": 0.9, "matched": 0.8},
    ]
    drawing.draw_reliability(axes, "black", bins)
    diagonal, curve = axes.get_lines()
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert list(curve.get_xdata()) == [0.2, 0.9]
    assert list(curve.get_ydata()) == [0.1, 0.8]
    assert labels(axes) == ("predicted probability", "fraction of genuine pairs")


def test_quality(axes):
    rows = [
        {"low": 1.26, "high": 34.5, "accuracy": 0.8, "standard_error": 0.05},
        {"low": 34.5, "high": 1230.4, "accuracy": 0.9, "standard_error": 0.01},
    ]
    drawing.draw_quality(axes, "black", rows, "sharpness")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.3–34.5", "34.5–1230"]
    line = axes.get_lines()[0]
    assert list(line.get_ydata()) == [0.8, 0.9]
    assert labels(axes) == ("sharpness", "accuracy")
    (bars,) = axes.collections
    assert np.allclose(bars.get_segments()[0], [(0, 0.75), (0, 0.85)])


def test_robustness(axes):
    row = {"accuracy": 0.9, "standard_error": 0.01, "accuracy_as_set": 0.8}
    results = {"clean": row | {"accuracy": 0.95}, **dict.fromkeys(CORRUPTIONS, row)}
    first = next(iter(CORRUPTIONS))
    results[first] = {"accuracy": 0.7, "standard_error": 0.01, "accuracy_as_set": 0.6}
    drawing.draw_robustness(axes, "black", results)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*CORRUPTIONS][::-1]  # the first on top
    shown = lines(axes)
    on_top = len(names) - 1
    x, y, colour = shown["threshold fitted to clean pairs"]
    assert (x[y == on_top], colour) == ([0.6], IMPOSTOR_COLOUR)
    assert shown["clean pairs"][0][0] == 0.95
    bars, *_ = axes.containers
    assert bars.get_label() == "threshold fitted to corrupted pairs, ± s.e."
    line = bars.lines[0]
    assert (line.get_xdata()[on_top], line.get_color()) == (0.7, GENUINE_COLOUR)
    assert axes.get_xlabel() == "accuracy"


def test_training_curves(axes):
    curves = [("training", [0.5, 1.0], [0.2, 0.4]), ("held-out images", [1.0], [0.3])]
    drawing.draw_training_curves(axes, "black", curves, "accuracy", True)
    shown = lines(axes)
    assert list(shown) == ["training", "held-out images"]
    assert [list(part) for part in shown["training"][:2]] == [[0.5, 1.0], [0.2, 0.4]]
    assert shown["training"][2] == GENUINE_COLOUR
    assert shown["held-out images"][2] == IMPOSTOR_COLOUR
    assert labels(axes) == ("epoch", "accuracy")
    assert ticks(axes.yaxis) == ["97.5 %", "50 %"]
    loss = Figure().add_subplot()
    drawing.draw_training_curves(loss, "black", curves, "loss", False)
    assert loss.get_ylabel() == "loss"
    assert "%" not in loss.yaxis.get_major_formatter()(0.5, None)


def staircase(x, y, at):
    """The value of a "steps-post" line at positions: y of the last point at or before each."""
    return y[np.searchsorted(x, at, side="right") - 1]


def test_a_curve_keeps_its_shape_when_reduced_to_its_corners():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=2000) + np.repeat([0, 1], 1000)
    curve = verification.roc(scores, np.arange(2000) >= 1000)
    x, y = drawing.corners(curve.far, curve.tar)
    assert len(x) < len(curve.far) / 2
    at = rng.random(5000)
    assert (staircase(x, y, at) == staircase(curve.far, curve.tar, at)).all()
    points = [(0, 0), (0, 1), (0, 2), (1, 2)]
    x, y = drawing.corners(*np.array(points).T)
    assert list(zip(x, y, strict=True)) == [(0, 0), (0, 2), (1, 2)]


def test_a_long_curve_is_thinned_out_to_its_ends():
    x, y = drawing.at_most(np.arange(10_000), np.arange(10_000))
    assert len(x) == drawing.MAX_POINTS
    assert (x[0], x[-1], y[-1]) == (0, 9999, 9999)
