"""The plots of the report page as inline SVG: text stays text, colours are CSS variables.

Each `*_svg` function returns the markup of one plot. matplotlib knows colours, not CSS variables,
so plots are drawn in the fixed colours of `_VARIABLES`, and those are then replaced by --ink,
--grid, --a and --b. The page can thus have a dark mode.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from scipy.special import ndtri

from evaluation.figures import GENUINE_COLOUR, IMPOSTOR_COLOUR, MAX_MARKERS, draw_robustness
from evaluation.metrics import CalibrationBin, Metrics, RobustnessMetrics
from evaluation.pair_quality import QualityBin
from evaluation.verification import Roc, to_degrees

# Placeholders for the page's own colours: values that nothing else is drawn in.
INK, GRID = "#010203", "#040506"
_VARIABLES = {GENUINE_COLOUR: "--a", IMPOSTOR_COLOUR: "--b", INK: "--ink", GRID: "--grid"}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_WIDTH, _HEIGHT = 4.6, 3.1  # inches of 72 points; a phone shows them at about this size
_MAX_POINTS = 1500  # of a curve: more cannot be distinguished, and each costs bytes of the page
_numbers = itertools.count()


# ------------------------------------------------------------------------------ drawing


def _figure(height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    # Transparent: the page's background shows, light or dark.
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _to_svg(figure: Figure, title: str) -> str:
    """The figure's markup; screen readers read it as an image with this title."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]  # without the XML declaration, which HTML does not allow here
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # matplotlib's ids repeat from figure to figure ("axes_1"); in one page they must be unique, and
    # references to them follow.
    prefix = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    title = html.escape(title)
    head = f'<svg class="plot" role="img" aria-label="{title}" viewBox="0 0 {size[1]} {size[2]}">'
    return head + text[text.index(">") + 1 :].strip()


def _in_page_style(function: Callable[..., str]) -> Callable[..., str]:
    """Decorate a plot: it is drawn in the page's style, whatever the user's matplotlibrc says."""

    @functools.wraps(function)
    def styled(*args: Any, **kwargs: Any) -> str:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    return styled


def tick_percent(value: float) -> str:
    """A fraction in per cent with as many decimals as it needs: "0.1 %", "0.01 %"."""
    return f"{100 * value:.6g} %"


def format_measure(value: float) -> str:
    """A measure with a decimal if it is small: 1.3, 34.5, 1230."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


# Rounded: a tick at 0.975 may be 0.9750000000000001, which is shown as "97.5 %".
_PERCENT_TICKS = FuncFormatter(lambda value, _: tick_percent(round(value, 6)))


def _corners(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corners of a staircase, x and y (points,) each: the same line from fewer points.

    A point is no corner if the line passes straight through it, up (the same x on both sides) or
    across (the same y). Example: (0, 0), (0, 1), (0, 2), (1, 2) becomes (0, 0), (0, 2), (1, 2).
    """
    flat_x, flat_y = np.diff(x) == 0, np.diff(y) == 0
    corner = np.ones(len(x), bool)
    corner[1:-1] = ~(flat_x[:-1] & flat_x[1:]) & ~(flat_y[:-1] & flat_y[1:])
    return _at_most(x[corner], y[corner])


def _at_most(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line of _MAX_POINTS points at most, evenly spaced; its ends are kept."""
    if len(x) <= _MAX_POINTS:
        return x, y
    index = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).astype(int))
    return x[index], y[index]


def _percent_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(_PERCENT_TICKS)
    axes.yaxis.set_major_locator(MaxNLocator(5))


# ------------------------------------------------------------------------------ scores


@_in_page_style
def roc_svg(curve: Roc, metrics: Metrics) -> str:
    """TAR against FAR, logarithmic, with the equal error rate and the reported TARs."""
    figure, axes = _figure()
    impostors = metrics["pairs"] - metrics["matched_pairs"]
    left = 10 ** np.floor(np.log10(1 / impostors))  # a FAR of 0 is drawn here
    far, tar = _corners(np.maximum(curve.far, left), curve.tar)
    axes.plot(far, tar, color=GENUINE_COLOUR, linewidth=1.8, drawstyle="steps-post")
    points = [(float(far), tar) for far, tar in metrics["tar_at_far"].items() if float(far) >= left]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o", color=IMPOSTOR_COLOUR, markersize=5, label="TAR at FAR")
    eer = max(metrics["eer"], left)
    axes.plot(eer, 1 - metrics["eer"], "D", color=INK, markersize=5, label="equal error rate")
    lowest = min([1 - metrics["eer"], *(tar for _, tar in points)])
    bottom = max(0.0, 1 - 1.5 * (1 - lowest) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(left, 1), ylim=(bottom, 1 + 0.02 * (1 - bottom)))
    axes.yaxis.set_major_formatter(_PERCENT_TICKS)
    # Not rounded as other axes are: a FAR of 1e-7 is "1e-05 %", not "0 %".
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_percent(value)))
    axes.legend(loc="lower right")
    return _to_svg(figure, f"ROC curve: AUC {metrics['auc']:.5f}, equal error rate {eer:.3%}")


@_in_page_style
def det_svg(curve: Roc, metrics: Metrics) -> str:
    """The DET curve: FRR against FAR, both on the scale of a normal deviate.

    Two normal distributions of scores give a straight line (Martin et al., "The DET curve in
    assessment of detection task performance", Eurospeech 1997).
    """
    figure, axes = _figure()
    genuine, pairs = metrics["matched_pairs"], metrics["pairs"]
    # The normal deviate of 0 is minus infinity: a rate of 0 is drawn as half an error.
    low = 0.5 / max(genuine, pairs - genuine)
    far, frr = (np.clip(rate, low, 1 - low) for rate in (curve.far, 1 - curve.tar))
    x, y = _corners(ndtri(far), ndtri(frr))
    axes.plot(x, y, color=GENUINE_COLOUR, linewidth=1.8, drawstyle="steps-post")
    ends = ndtri([low, 0.5])
    axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")  # equal errors
    rates = [r for r in (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5) if r >= low]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ndtri(rates)))
        axis.set_ticklabels([tick_percent(rate) for rate in rates])
    axes.set(xlim=ends, ylim=ends)
    axes.set(xlabel="false accept rate (FAR)", ylabel="false reject rate (FRR)")
    return _to_svg(figure, "DET curve: false reject rate against false accept rate")


@_in_page_style
def histogram_svg(scores: np.ndarray, same: np.ndarray, metrics: Metrics, angles: bool) -> str:
    """Histograms of genuine and impostor pairs by cosine or by angle, and the best threshold."""
    figure, axes = _figure()
    if angles:
        values, step, digits, unit = to_degrees(scores), 2.0, 1, "°"
        threshold = metrics["best_threshold_degrees"]
        threshold_label = f"best threshold {threshold:.2f}°"
    else:
        values, step, digits, unit = scores, 0.02, 3, ""
        threshold = metrics["best_threshold"]
        threshold_label = f"best threshold {threshold:.4f}"
    bins = np.arange(np.floor(values.min() / step), np.ceil(values.max() / step) + 2) * step
    for mask, colour, name in (
        (same, GENUINE_COLOUR, "genuine"),
        (~same, IMPOSTOR_COLOUR, "impostor"),
    ):
        label = f"{name}, mean {values[mask].mean():.{digits}f}{unit}"
        axes.hist(values[mask], bins, color=colour, alpha=0.7, label=label, histtype="stepfilled")
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=threshold_label)
    axes.set(xlabel="angle θ, degrees" if angles else "score (cosine)", ylabel="pairs")
    axes.set_xlim(bins[0], bins[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    measure = "angles" if angles else "scores"
    return _to_svg(figure, f"Histogram of the {measure} of genuine and impostor pairs")


@_in_page_style
def folds_svg(metrics: Metrics) -> str:
    """Accuracy by fold as dots, and their mean."""
    figure, axes = _figure(2.3)
    accuracies = metrics["fold_accuracies"]
    folds = np.arange(1, len(accuracies) + 1)
    axes.plot(folds, accuracies, "o", color=GENUINE_COLOUR, markersize=6)
    axes.axhline(metrics["accuracy"], color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="fold", ylabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent_axis(axes)
    return _to_svg(figure, f"Accuracy by fold, mean {metrics['accuracy']:.3%}")


@_in_page_style
def reliability_svg(bins: list[CalibrationBin]) -> str:
    """The reliability diagram of calibration.reliability_bins; dotted: perfect calibration."""
    figure, axes = _figure()
    axes.plot((0, 1), (0, 1), color=INK, linestyle=":", linewidth=0.8)
    predicted = [row["probability"] for row in bins]
    observed = [row["matched"] for row in bins]
    axes.plot(predicted, observed, "o-", color=GENUINE_COLOUR, linewidth=1.2, clip_on=False)
    axes.set(xlabel="predicted probability", ylabel="fraction of genuine pairs")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return _to_svg(figure, "Reliability: fraction of genuine pairs against predicted probability")


# ------------------------------------------------------------------------------ images


@_in_page_style
def quality_svg(rows: list[QualityBin], unit: str, title: str) -> str:
    """Accuracy in the bins of pair_quality.accuracy_by_quality, with standard errors."""
    figure, axes = _figure(2.3)
    # Side by side at equal distances: a quantile bin may be far wider than its neighbour.
    positions = np.arange(len(rows))
    axes.errorbar(
        positions,
        [row["accuracy"] for row in rows],
        [row["standard_error"] for row in rows],
        fmt="o-",
        color=GENUINE_COLOUR,
        capsize=4,
        linewidth=1.2,
    )
    axes.set(xlabel=unit, ylabel="accuracy", xlim=(-0.5, len(rows) - 0.5))
    labels = [f"{format_measure(row['low'])}–{format_measure(row['high'])}" for row in rows]
    axes.set_xticks(positions, labels, fontsize=8)
    _percent_axis(axes)
    return _to_svg(figure, f"Accuracy by {title}")


@_in_page_style
def robustness_svg(results: dict[str, RobustnessMetrics]) -> str:
    """Accuracy by corruption; results are robustness.evaluate_corruptions's."""
    figure, axes = _figure(0.27 * len(results) + 1.2)
    draw_robustness(axes, results, INK)
    axes.xaxis.set_major_formatter(_PERCENT_TICKS)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.legend(loc="outside upper left", ncols=2, fontsize=7.5)
    return _to_svg(figure, "Accuracy under each corruption")


# ------------------------------------------------------------------------------ training


@_in_page_style
def training_curves_svg(
    lines: Iterable[tuple[str, Sequence[float], Sequence[float]]], label: str, rate: bool
) -> str:
    """Curves over epochs: (name, epochs, values) each, at most three; rate: in per cent."""
    figure, axes = _figure()
    styles = ((GENUINE_COLOUR, "-", ""), (IMPOSTOR_COLOUR, "-", "o"), (INK, "--", "s"))
    for (name, epochs, values), (colour, style, marker) in zip(lines, styles, strict=False):
        marker = marker if len(epochs) <= MAX_MARKERS else ""
        x, y = _at_most(np.asarray(epochs), np.asarray(values))
        axes.plot(x, y, style, color=colour, marker=marker, markersize=4, label=name, linewidth=1.4)
    axes.set(xlabel="epoch", ylabel=label)
    if rate:
        _percent_axis(axes)
    figure.legend(loc="outside upper left", ncols=3)
    return _to_svg(figure, f"{label} over epochs")
