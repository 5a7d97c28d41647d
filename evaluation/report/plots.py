"""The report's plots as SVG that stands in the page: its text stays text, its colours are CSS's.

Each function returns the markup of one figure. Colours are CSS variables (--ink, --grid, --a, --b),
so that a page can have a dark mode; matplotlib only knows colours, and those of `_VARIABLES` are
replaced by the variables.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from scipy.special import ndtri

from evaluation.figures import MATCHED, MISMATCHED, draw_robustness
from evaluation.verification import Roc, to_degrees

INK, GRID = "#010203", "#040506"  # stand for the page's own
_VARIABLES = {MATCHED: "--a", MISMATCHED: "--b", INK: "--ink", GRID: "--grid"}
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
_WIDTH, _HEIGHT = 4.6, 3.1  # inches of 72 points; a phone shows them at about their own size
_LARGEST = 1500  # points of a curve: more cannot be told apart
_numbers = itertools.count()


def _figure(height: float = _HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure's markup, to be read out as its title."""
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Ids are the page's, not the figure's own.
    own = f"f{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{own}", text).replace("xlink:href", "href")
    text = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    title = html.escape(title)
    head = f'<svg class="plot" role="img" aria-label="{title}" viewBox="0 0 {size[1]} {size[2]}">'
    return head + text[text.index(">") + 1 :].strip()


def styled(function):
    """Decorate a plot: drawn in the report's style whatever the user's matplotlibrc says."""

    def drawn(*args, **kwargs) -> str:
        with matplotlib.rc_context(_STYLE):
            return function(*args, **kwargs)

    drawn.__doc__ = function.__doc__
    drawn.__name__ = function.__name__
    return drawn


def percent(value: float) -> str:
    """A rate as text with as many decimals as it needs: 0.1 %, 0.01 %."""
    return f"{100 * value:.6g} %"


def _thin(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The corners of a staircase, and no more than _LARGEST of them."""
    x, y = columns[0], columns[1]
    keep = np.ones(len(x), bool)
    keep[1:-1] = (np.diff(x)[:-1] != 0) | (np.diff(y)[1:] != 0)
    keep[1:-1] &= (np.diff(y)[:-1] != 0) | (np.diff(x)[1:] != 0)
    places = np.flatnonzero(keep)
    if len(places) > _LARGEST:
        places = places[np.unique(np.linspace(0, len(places) - 1, _LARGEST).astype(int))]
    return tuple(column[places] for column in columns)


@styled
def roc_figure(curve: Roc, report: dict[str, Any]) -> str:
    """TAR over FAR, logarithmic, with the equal error rate and the reported TARs."""
    figure, axes = _figure()
    mismatched = report["pairs"] - report["matched_pairs"]
    left = 10 ** np.floor(np.log10(1 / mismatched))
    far, tar = _thin(np.maximum(curve.far, left), curve.tar)
    axes.plot(far, tar, color=MATCHED, linewidth=1.8, drawstyle="steps-post")
    points = [(float(far), tar) for far, tar in report["tar_at_far"].items() if float(far) >= left]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=MISMATCHED, markersize=5, label="TAR")
    eer = max(report["eer"], left)
    axes.plot(eer, 1 - report["eer"], "D", color=INK, markersize=5, label="equal error rate")
    lowest = min([1 - report["eer"], *(tar for _, tar in points)])
    bottom = max(0.0, 1 - 1.5 * (1 - lowest) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(left, 1), ylim=(bottom, 1 + 0.02 * (1 - bottom)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(value, 6))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.legend(loc="lower right")
    return _svg(figure, f"ROC curve: area {report['auc']:.5f}, equal error rate {eer:.3%}")


@styled
def det_figure(curve: Roc, report: dict[str, Any]) -> str:
    """FRR over FAR, both on a normal deviate's scale (Martin et al. 1997), as DET curves have."""
    figure, axes = _figure()
    matched, pairs = report["matched_pairs"], report["pairs"]
    low = 0.5 / max(matched, pairs - matched)  # a rate of 0 is drawn below all others
    far, frr = (np.clip(rate, low, 1 - low) for rate in (curve.far, 1 - curve.tar))
    x, y = _thin(ndtri(far), ndtri(frr))
    axes.plot(x, y, color=MATCHED, linewidth=1.8, drawstyle="steps-post")
    ends = ndtri([low, 0.5])
    axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":")
    rates = [r for r in (1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5) if r >= low]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ndtri(rates)))
        axis.set_ticklabels([percent(rate) for rate in rates])
    axes.set(xlim=ends, ylim=ends)
    axes.set(xlabel="false accept rate (FAR)", ylabel="false reject rate (FRR)")
    return _svg(figure, "DET curve: false reject rate over false accept rate")


@styled
def histogram_figure(
    scores: np.ndarray, same: np.ndarray, report: dict[str, Any], angles: bool
) -> str:
    """Histograms of the cosines, or the angles, of both kinds of pairs, and the best threshold."""
    figure, axes = _figure()
    values = to_degrees(scores) if angles else scores
    step = 2.0 if angles else 0.02
    bins = np.arange(np.floor(values.min() / step), np.ceil(values.max() / step) + 2) * step
    for kind, colour, name in ((same, MATCHED, "matched"), (~same, MISMATCHED, "mismatched")):
        label = f"{name}, mean {values[kind].mean():.{1 if angles else 3}f}{'°' * angles}"
        axes.hist(values[kind], bins, color=colour, alpha=0.7, label=label, histtype="stepfilled")
    threshold = report["best_threshold_degrees" if angles else "best_threshold"]
    label = f"threshold {threshold:.{2 if angles else 4}f}{'°' * angles}"
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="angle θ, degrees" if angles else "score (cosine)", ylabel="pairs")
    axes.set_xlim(bins[0], bins[-1])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    what = "angles" if angles else "scores"
    return _svg(figure, f"Histogram of the {what} of matched and mismatched pairs")


@styled
def folds_figure(report: dict[str, Any]) -> str:
    """Accuracy by fold as dots, and their mean."""
    figure, axes = _figure(2.3)
    accuracies = report["fold_accuracies"]
    folds = np.arange(1, len(accuracies) + 1)
    axes.plot(folds, accuracies, "o", color=MATCHED, markersize=6)
    axes.axhline(report["accuracy"], color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="fold", ylabel="accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent_axis(axes)
    return _svg(figure, f"Accuracy by fold, {report['accuracy']:.3%} on average")


@styled
def bins_figure(rows: list[dict[str, Any]], unit: str, title: str) -> str:
    """Accuracy in quantile bins with its standard error; the bins stand side by side."""
    figure, axes = _figure(2.3)
    places = np.arange(len(rows))
    accuracies = [row["accuracy"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    axes.errorbar(places, accuracies, errors, fmt="o-", color=MATCHED, capsize=4, linewidth=1.2)
    axes.set(xlabel=unit, ylabel="accuracy", xlim=(-0.5, len(rows) - 0.5))
    labels = [f"{shown(row['low'])}–{shown(row['high'])}" for row in rows]
    axes.set_xticks(places, labels, fontsize=8)
    _percent_axis(axes)
    return _svg(figure, f"Accuracy by {title}")


def shown(value: float) -> str:
    """A measure as text, with a decimal where it is small: 1.3, 34.5, 1230."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


@styled
def curves_figure(
    lines: Iterable[tuple[str, Sequence[float], Sequence[float]]], label: str, rate: bool
) -> str:
    """Training curves over epochs: (name, epochs, values) each, at most three."""
    figure, axes = _figure()
    looks = ((MATCHED, "-", ""), (MISMATCHED, "-", "o"), (INK, "--", "s"))
    for (name, epochs, values), (colour, style, marker) in zip(lines, looks, strict=False):
        marker = marker if len(epochs) <= 40 else ""
        x, y = _thin(np.asarray(epochs), np.asarray(values))
        axes.plot(x, y, style, color=colour, marker=marker, markersize=4, label=name, linewidth=1.4)
    axes.set(xlabel="epoch", ylabel=label)
    if rate:
        _percent_axis(axes)
    figure.legend(loc="outside upper left", ncols=3)
    return _svg(figure, f"{label} over epochs")


@styled
def reliability_figure(bins: list[dict[str, Any]]) -> str:
    """Share of matched pairs over mean probability, calibration.calibrate's bins."""
    figure, axes = _figure()
    axes.plot((0, 1), (0, 1), color=INK, linestyle=":", linewidth=0.8)
    said, seen = ([row[key] for row in bins] for key in ("probability", "matched"))
    axes.plot(said, seen, "o-", color=MATCHED, linewidth=1.2, clip_on=False)
    axes.set(xlabel="probability", ylabel="share of matched pairs", xlim=(0, 1), ylim=(0, 1))
    return _svg(figure, "Reliability: share of matched pairs over probability")


@styled
def robustness_figure(found: dict[str, dict[str, Any]]) -> str:
    """Accuracy by corruption; found is robustness.measure's."""
    figure, axes = _figure(0.27 * len(found) + 1.2)
    draw_robustness(axes, found, INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(value, 6))))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    figure.legend(loc="outside upper left", ncols=2, fontsize=7.5)
    return _svg(figure, "Accuracy under each corruption")


def _percent_axis(axes: Any) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(round(value, 6))))
    axes.yaxis.set_major_locator(MaxNLocator(5))
