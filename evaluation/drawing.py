"""What every plot shows, drawn on given axes: the PNG files and the report page share it.

    figure = Figure()
    draw_roc(figure.add_subplot(), "black", curve, metrics)

`ink` is the colour of thresholds, means and equal error rates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from scipy.special import ndtri

from evaluation.metrics import CalibrationBin, Metrics, RobustnessMetrics
from evaluation.pair_quality import QualityBin
from evaluation.verification import Roc, to_degrees

# Blue and vermillion of Okabe and Ito's palette, which colour-blind readers can tell apart.
GENUINE_COLOUR, IMPOSTOR_COLOUR = "#0072b2", "#d55e00"
MAX_MARKERS = 40  # a line with more points is drawn without a marker at each
MAX_POINTS = 1500  # of a curve: more cannot be distinguished, and each costs bytes of the page


def tick_percent(value: float) -> str:
    """A fraction in per cent with as many decimals as it needs: "0.1 %", "0.01 %"."""
    return f"{100 * value:.6g} %"


def format_measure(value: float) -> str:
    """A measure with a decimal if it is small: 1.3, 34.5, 1230."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


# Rounded: a tick at 0.975 may be 0.9750000000000001, which is shown as "97.5 %".
_PERCENT_TICKS = FuncFormatter(lambda value, _: tick_percent(round(value, 6)))
# Not rounded: a FAR of 1e-7 is "1e-05 %", not "0 %".
_FAR_TICKS = FuncFormatter(lambda value, _: tick_percent(value))


def corners(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a staircase, x and y (points,) each: the same line from fewer points.

    A point is no corner if the line passes straight through it, up (the same x on both sides) or
    across (the same y). Example: (0, 0), (0, 1), (0, 2), (1, 2) becomes (0, 0), (0, 2), (1, 2).
    """
    flat_x, flat_y = np.diff(x) == 0, np.diff(y) == 0
    corner = np.ones(len(x), bool)
    corner[1:-1] = ~(flat_x[:-1] & flat_x[1:]) & ~(flat_y[:-1] & flat_y[1:])
    return at_most(x[corner], y[corner])


def at_most(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of MAX_POINTS points at most, evenly spaced; its ends are kept."""
    if len(x) <= MAX_POINTS:
        return x, y
    index = np.unique(np.linspace(0, len(x) - 1, MAX_POINTS).astype(int))
    return x[index], y[index]


def _legend(axes: Axes) -> None:
    """Below the axes, where it hides nothing."""
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(_PERCENT_TICKS)
    axes.yaxis.set_major_locator(MaxNLocator(5))


# ------------------------------------------------------------------------------ scores


def draw_roc(axes: Axes, ink: str, curve: Roc, metrics: Metrics) -> None:
    """TAR against FAR, logarithmic, with the equal error rate and the reported TARs."""
    impostors = metrics["pairs"] - metrics["matched_pairs"]
    # A logarithmic axis has no FAR of 0. It is drawn at the left end, below the smallest rate that
    # can occur (1 / impostors) and below all FARs that the legend names.
    left = min(0.5 / impostors, 0.8 * min(map(float, metrics["tar_at_far"])))
    far, tar = corners(np.maximum(curve.far, left), curve.tar)
    _draw_rates(axes, far, tar, metrics["tar_at_far"], left, f"AUC {metrics['auc']:.5f}")
    eer = metrics["eer"]
    mark = {"label": f"equal error rate {eer:.2%}", "clip_on": False, "zorder": 3}
    axes.plot(max(eer, left), 1 - eer, "D", color=ink, markersize=5, **mark)
    # Good models differ near the top only, so the axis begins a little below the lowest mark; a
    # poor model needs the whole height.
    lowest = min(1 - eer, *metrics["tar_at_far"].values())
    axes.set(ylim=(max(0.0, 1 - 1.5 * (1 - lowest) - 0.002), 1))
    axes.legend(loc="lower right")


def draw_template_roc(
    axes: Axes, ink: str, far: np.ndarray, tar: np.ndarray, rates: dict[str, float]
) -> None:
    """The ROC curve of a template protocol (IJB), far and tar (points,), on a logarithmic scale.

    rates are the TARs to mark, by FAR; those left of the curve's first point are not shown.
    """
    on_curve = {name: rate for name, rate in rates.items() if float(name) >= far[0]}
    _draw_rates(axes, far, tar, on_curve, far[0], "")
    axes.set(ylim=(max(0.0, 1 - 1.2 * (1 - float(tar.min())) - 0.002), 1))
    axes.legend(loc="lower right")


def _draw_rates(
    axes: Axes, far: np.ndarray, tar: np.ndarray, rates: dict[str, float], left: float, label: str
) -> None:
    """A ROC curve from FAR `left` on, and a mark at each of the rates."""
    line = {"linewidth": 1.8, "drawstyle": "steps-post", "label": label or None}
    axes.plot(far, tar, color=GENUINE_COLOUR, **line)
    for (name, rate), marker in zip(rates.items(), "osv^<>pP*X", strict=False):
        # Unclipped and above the grid: a mark at 100 % lies on the edge of the plot.
        mark = {"label": f"TAR {rate:.2%} at FAR {name}", "clip_on": False, "zorder": 3}
        axes.plot(float(name), rate, marker, color=IMPOSTOR_COLOUR, markersize=5, **mark)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(left, 1))
    axes.xaxis.set_major_formatter(_FAR_TICKS)
    axes.yaxis.set_major_formatter(_PERCENT_TICKS)


def draw_det(axes: Axes, ink: str, curve: Roc, metrics: Metrics) -> None:
    """The DET curve: FRR against FAR, both on the scale of a normal deviate.

    Two normal distributions of scores give a straight line (Martin et al., "The DET curve in
    assessment of detection task performance", Eurospeech 1997).
    """
    genuine, pairs = metrics["matched_pairs"], metrics["pairs"]
    # The normal deviate of 0 is minus infinity: a rate of 0 is drawn as half an error.
    low = 0.5 / max(genuine, pairs - genuine)
    far, frr = (np.clip(rate, low, 1 - low) for rate in (curve.far, 1 - curve.tar))
    x, y = corners(ndtri(far), ndtri(frr))
    axes.plot(x, y, color=GENUINE_COLOUR, linewidth=1.8, drawstyle="steps-post")
    ends = ndtri([low, 0.5])
    axes.plot(ends, ends, color=ink, linewidth=0.8, linestyle=":")  # equal errors
    rates = [r for r in (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5) if r >= low]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ndtri(rates)))
        axis.set_ticklabels([tick_percent(rate) for rate in rates])
    axes.set(xlim=ends, ylim=ends)
    axes.set(xlabel="false accept rate (FAR)", ylabel="false reject rate (FRR)")


def draw_histogram(
    axes: Axes, ink: str, scores: np.ndarray, same: np.ndarray, metrics: Metrics, angles: bool
) -> None:
    """Histograms of genuine and impostor pairs by cosine or by angle, and the best threshold."""
    threshold, values, step, format_value = metrics["best_threshold"], scores, 0.02, "{:.3f}".format
    label = f"best threshold {threshold:.4f}: {metrics['best_accuracy']:.2%}"
    if angles:
        threshold, values = metrics["best_threshold_degrees"], to_degrees(scores)
        step, format_value = 1.0, "{:.1f}°".format
        label = f"best threshold {threshold:.2f}°: {metrics['best_accuracy']:.2%}"
    bins = np.arange(np.floor(values.min() / step), np.ceil(values.max() / step) + 2) * step
    for mask, colour, kind in (
        (same, GENUINE_COLOUR, "genuine"),
        (~same, IMPOSTOR_COLOUR, "impostor"),
    ):
        text = f"{mask.sum():,} {kind}, mean {format_value(values[mask].mean())}"
        axes.hist(values[mask], bins, color=colour, alpha=0.7, label=text, histtype="stepfilled")
    axes.axvline(threshold, color=ink, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="angle θ, degrees" if angles else "score (cosine)", ylabel="pairs")
    axes.set_xlim(bins[0], bins[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)


def draw_folds(axes: Axes, ink: str, metrics: Metrics) -> None:
    """Accuracy by fold as dots, and their mean."""
    accuracies = metrics["fold_accuracies"]
    folds = np.arange(1, len(accuracies) + 1)
    axes.plot(folds, accuracies, "o", color=GENUINE_COLOUR, markersize=6)
    axes.axhline(metrics["accuracy"], color=ink, linestyle="--", linewidth=1)
    axes.set(xlabel="fold", ylabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent_axis(axes)


def draw_reliability(axes: Axes, ink: str, bins: Sequence[CalibrationBin]) -> None:
    """The reliability diagram of calibration.reliability_bins; dotted: perfect calibration."""
    axes.plot((0, 1), (0, 1), color=ink, linestyle=":", linewidth=0.8)
    predicted = [row["probability"] for row in bins]
    observed = [row["matched"] for row in bins]
    axes.plot(predicted, observed, "o-", color=GENUINE_COLOUR, linewidth=1.2, clip_on=False)
    axes.set(xlabel="predicted probability", ylabel="fraction of genuine pairs")
    axes.set(xlim=(0, 1), ylim=(0, 1))


# ------------------------------------------------------------------------------ images


def draw_quality(axes: Axes, ink: str, rows: Sequence[QualityBin], unit: str) -> None:
    """Accuracy in the bins of pair_quality.accuracy_by_quality, with standard errors."""
    # Side by side at equal distances: a quantile bin may be far wider than its neighbour.
    positions = np.arange(len(rows))
    values = [row["accuracy"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    style = {"fmt": "o-", "color": GENUINE_COLOUR, "capsize": 4, "linewidth": 1.2}
    axes.errorbar(positions, values, errors, **style)
    axes.set(xlabel=unit, ylabel="accuracy", xlim=(-0.5, len(rows) - 0.5))
    labels = [f"{format_measure(row['low'])}–{format_measure(row['high'])}" for row in rows]
    axes.set_xticks(positions, labels, fontsize=8)
    _percent_axis(axes)


def draw_robustness(axes: Axes, ink: str, results: dict[str, RobustnessMetrics]) -> None:
    """One row per corruption: accuracy at thresholds fitted to corrupted and to clean pairs."""
    names = [name for name in results if name != "clean"][::-1]  # the first one on top
    rows, positions = [results[name] for name in names], range(len(names))
    values = [row["accuracy"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    style = {"fmt": "o", "color": GENUINE_COLOUR, "capsize": 3}
    label = "threshold fitted to corrupted pairs, ± s.e."
    axes.errorbar(values, positions, xerr=errors, label=label, **style)
    as_set, style = [row["accuracy_as_set"] for row in rows], {"color": IMPOSTOR_COLOUR, "mew": 2}
    axes.plot(as_set, positions, "x", label="threshold fitted to clean pairs", **style)
    clean = results["clean"]["accuracy"]
    axes.axvline(clean, color=ink, linestyle="--", linewidth=1, label="clean pairs")
    axes.set_yticks(positions, names)
    axes.set(xlabel="accuracy", ylim=(-0.6, len(names) - 0.4))
    axes.xaxis.set_major_formatter(_PERCENT_TICKS)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    _legend(axes)


# ------------------------------------------------------------------------------ training


def draw_training_curves(
    axes: Axes,
    ink: str,
    lines: Iterable[tuple[str, Sequence[float], Sequence[float]]],
    label: str,
    rate: bool,
) -> None:
    """Curves over epochs: (name, epochs, values) each, at most three; rate: in per cent."""
    styles = ((GENUINE_COLOUR, "-", ""), (IMPOSTOR_COLOUR, "-", "o"), (ink, "--", "s"))
    for (name, epochs, values), (colour, style, marker) in zip(lines, styles, strict=False):
        marker = marker if len(epochs) <= MAX_MARKERS else ""
        x, y = at_most(np.asarray(epochs), np.asarray(values))
        axes.plot(x, y, style, color=colour, marker=marker, markersize=4, label=name, linewidth=1.4)
    axes.set(xlabel="epoch", ylabel=label)
    if rate:
        _percent_axis(axes)
    _legend(axes)
