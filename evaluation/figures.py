"""The plots that train.py, lfw_eval.py and tools.ijb_eval write: training curves, histograms, ROC.

The report page has plots of its own, as SVG, in evaluation/report/plots.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.metrics import Metrics, RobustnessMetrics
from evaluation.verification import Roc, to_degrees
from fileio.safe_files import atomic_write, make_folder

# Blue and vermillion of Okabe and Ito's palette, which colour-blind readers can tell apart.
GENUINE_COLOUR, IMPOSTOR_COLOUR = "#0072b2", "#d55e00"
MAX_MARKERS = 40  # a line with more points is drawn without a marker at each


def plot_curves(folder: Path, history: dict[str, list[tuple[float, ...]]], steps: int) -> None:
    """Draw train_loss.png, train_acc.png, valid_loss.png and valid_acc.png into a folder.

    history is that of a run (training/run.py): "train" has (epoch, step, loss, accuracy, ...),
    "valid" has (epoch, loss, accuracy). steps is the number of steps per epoch.
    """
    train = [(epoch + step / steps, *values) for epoch, step, *values in history["train"]]
    for name, title, points in (
        ("train", "Training", train),
        ("valid", "Held-out images", history["valid"]),
    ):
        epochs = [point[0] for point in points]
        for column, short, label in ((1, "loss", "loss"), (2, "acc", "accuracy")):
            figure, axes = _figure(f"{title}: {label}")
            marker = "o" if len(points) <= MAX_MARKERS else ""
            values = [point[column] for point in points]
            axes.plot(epochs, values, color=GENUINE_COLOUR, marker=marker, markersize=4)
            axes.set(xlabel="epoch", ylabel=label)
            if short == "acc":
                axes.yaxis.set_major_formatter(PercentFormatter(1))
            _save(figure, folder / f"{name}_{short}.png")


def plot_angles(path: Path, scores: np.ndarray, same: np.ndarray, metrics: Metrics) -> None:
    """Histograms of the angles of genuine and impostor pairs, with the best threshold.

    scores (pairs,) cosines, same (pairs,) bool; metrics are verification.verify's.
    """
    angles = to_degrees(scores)
    bins = np.arange(np.floor(angles.min()), np.ceil(angles.max()) + 2)  # one per degree
    figure, axes = _figure("Angle between the two embeddings of a pair")
    for mask, colour, name in (
        (same, GENUINE_COLOUR, "genuine"),
        (~same, IMPOSTOR_COLOUR, "impostor"),
    ):
        label = f"{mask.sum():,} {name}, mean {angles[mask].mean():.1f}°"
        axes.hist(angles[mask], bins, color=colour, alpha=0.65, label=label)
    threshold = metrics["best_threshold_degrees"]
    label = f"best threshold {threshold:.2f}°: {metrics['best_accuracy']:.2%}"
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="angle θ in degrees", ylabel="pairs per degree", xlim=(bins[0], bins[-1]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


# ------------------------------------------------------------------------------ ROC curves


def plot_roc(path: Path, curve: Roc, metrics: Metrics) -> None:
    """Write roc_figure to a file."""
    _save(roc_figure(curve, metrics), path)


def roc_figure(curve: Roc, metrics: Metrics) -> Figure:
    """TAR against FAR, on a logarithmic scale, with the equal error rate and the reported TARs."""
    impostors = metrics["pairs"] - metrics["matched_pairs"]
    # A logarithmic axis has no FAR of 0. It is drawn at the left end, below the smallest rate that
    # can occur (1 / impostors) and below all FARs that the legend names.
    left = min(0.5 / impostors, 0.8 * min(map(float, metrics["tar_at_far"])))
    figure, axes = _figure("Receiver operating characteristic")
    label = f"AUC {metrics['auc']:.5f}"
    far = np.maximum(curve.far, left)
    axes.plot(
        far, curve.tar, color=GENUINE_COLOUR, linewidth=1.8, drawstyle="steps-post", label=label
    )
    for (name, tar), marker in zip(metrics["tar_at_far"].items(), "os", strict=True):
        label = f"TAR {tar:.2%} at FAR {name}"
        # Unclipped and above the grid: a mark at 100 % lies on the edge of the plot.
        axes.plot(
            float(name), tar, marker, color=IMPOSTOR_COLOUR, label=label, clip_on=False, zorder=3
        )
    eer = metrics["eer"]
    label = f"equal error rate {eer:.2%}"
    axes.plot(max(eer, left), 1 - eer, "D", color="black", label=label, clip_on=False, zorder=3)
    # Good models differ near the top only, so the axis begins a little below the lowest mark; a
    # poor model needs the whole height.
    lowest = min(1 - eer, *metrics["tar_at_far"].values())
    bottom = max(0.0, 1 - 1.5 * (1 - lowest) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(left, 1), ylim=(bottom, 1))
    decimals = 1 if 1 - bottom < 0.05 else 0
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals))
    axes.legend(loc="lower right")
    return figure


def plot_template_roc(
    path: Path, far: np.ndarray, tar: np.ndarray, rates: dict[str, float], title: str
) -> None:
    """The ROC curve of a template protocol (IJB), far and tar (points,), on a logarithmic scale.

    rates are the TARs to mark, by FAR; those left of the curve's first point are not shown.
    """
    figure, axes = _figure(f"{title}: receiver operating characteristic")
    axes.plot(far, tar, color=GENUINE_COLOUR, linewidth=1.8)
    on_curve = {name: rate for name, rate in rates.items() if float(name) >= far[0]}
    for name, rate in on_curve.items():
        label = f"{rate:.2%} at {name}"
        axes.plot(
            float(name), rate, "o", color=IMPOSTOR_COLOUR, label=label, clip_on=False, zorder=3
        )
    bottom = max(0.0, 1 - 1.2 * (1 - float(tar.min())) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(far[0], 1), ylim=(bottom, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower right")
    _save(figure, path)


# ------------------------------------------------------------------------------ robustness


def plot_robustness(path: Path, results: dict[str, RobustnessMetrics]) -> None:
    """Accuracy by corruption; results are robustness.evaluate_corruptions's."""
    figure, axes = _figure("Accuracy with the second image of each pair corrupted")
    draw_robustness(axes, results, "black")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


def draw_robustness(axes: Axes, results: dict[str, RobustnessMetrics], ink: str) -> None:
    """One row per corruption: accuracy at thresholds fitted to corrupted and to clean pairs.

    ink is the colour of the line that marks the accuracy on clean pairs.
    """
    names = [name for name in results if name != "clean"][::-1]  # the first one on top
    rows, positions = [results[name] for name in names], range(len(names))
    axes.errorbar(
        [row["accuracy"] for row in rows],
        positions,
        xerr=[row["standard_error"] for row in rows],
        fmt="o",
        color=GENUINE_COLOUR,
        capsize=3,
        label="threshold fitted to corrupted pairs, ± s.e.",
    )
    axes.plot(
        [row["accuracy_as_set"] for row in rows],
        positions,
        "x",
        color=IMPOSTOR_COLOUR,
        mew=2,
        label="threshold fitted to clean pairs",
    )
    clean = results["clean"]["accuracy"]
    axes.axvline(clean, color=ink, linestyle="--", linewidth=1, label="clean pairs")
    axes.set_yticks(positions, names)
    axes.set(xlabel="accuracy", ylim=(-0.6, len(names) - 0.4))


def plot_corruptions(path: Path, faces: dict[str, np.ndarray]) -> None:
    """One face under every corruption, by name; faces are robustness.corruption_examples's."""
    columns = 4
    rows = -(-len(faces) // columns)
    figure = Figure(figsize=(8, 2.25 * rows), dpi=120, layout="constrained")
    for position, (name, face) in enumerate(faces.items(), 1):
        axes = figure.add_subplot(rows, columns, position)
        axes.imshow(face)
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    _save(figure, path)


# ------------------------------------------------------------------------------ matplotlib


def _figure(title: str) -> tuple[Figure, Axes]:
    # Figure, not pyplot: pyplot keeps every figure in a global list, and may open a window.
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontweight="bold", pad=10)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    make_folder(path.parent)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:])
