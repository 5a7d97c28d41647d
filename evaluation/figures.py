"""The plots that train.py and lfw_eval.py write: training curves, angle histograms, ROC curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evaluation.verification import Roc, to_degrees
from fileio.safe_files import atomic_write, make_folder

MATCHED, MISMATCHED = "#0072b2", "#d55e00"  # told apart by the colour-blind, too (Okabe and Ito)


def plot_curves(folder: Path, history: dict[str, list[tuple[float, ...]]], steps: int) -> None:
    """Draw train_loss.png, train_acc.png, valid_loss.png and valid_acc.png into a folder.

    history is a Trainer's; steps is how many an epoch has.
    """
    train = [(epoch + step / steps, *values) for epoch, step, *values in history["train"]]
    for name, title, points in (
        ("train", "Training", train),
        ("valid", "Held-out images", history["valid"]),
    ):
        epochs = [point[0] for point in points]
        for column, short, label in ((1, "loss", "loss"), (2, "acc", "accuracy")):
            figure, axes = _figure(f"{title}: {label}")
            marker = "o" if len(points) <= 40 else ""
            values = [point[column] for point in points]
            axes.plot(epochs, values, color=MATCHED, marker=marker, markersize=4)
            axes.set(xlabel="epoch", ylabel=label)
            if short == "acc":
                axes.yaxis.set_major_formatter(PercentFormatter(1))
            _save(figure, folder / f"{name}_{short}.png")


def plot_angles(path: Path, scores: np.ndarray, same: np.ndarray, report: dict[str, Any]) -> None:
    """Histograms of the angles of matched and of mismatched pairs, with the best threshold.

    scores (pairs,) cosines, same (pairs,) bool; report is verification.verify's.
    """
    angles = to_degrees(scores)
    bins = np.arange(np.floor(angles.min()), np.ceil(angles.max()) + 2)  # one a degree
    figure, axes = _figure("Angle between the two embeddings of a pair")
    for kind, colour, name in ((same, MATCHED, "matched"), (~same, MISMATCHED, "mismatched")):
        label = f"{kind.sum():,} {name}, mean {angles[kind].mean():.1f}°"
        axes.hist(angles[kind], bins, color=colour, alpha=0.65, label=label)
    threshold = report["best_threshold_degrees"]
    label = f"threshold {threshold:.2f}°, {report['best_accuracy']:.2%} right"
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="angle θ in degrees", ylabel="pairs per degree", xlim=(bins[0], bins[-1]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


def plot_roc(path: Path, curve: Roc, report: dict[str, Any]) -> None:
    """Write roc_figure to a file."""
    _save(roc_figure(curve, report), path)


def roc_figure(curve: Roc, report: dict[str, Any]) -> Figure:
    """TAR over FAR, on a logarithmic scale, with the equal error rate and the reported TARs."""
    mismatched = report["pairs"] - report["matched_pairs"]
    # A FAR of 0 has no place on the scale; it is drawn at the left end, below all other rates.
    left = min(0.5 / mismatched, 0.8 * min(map(float, report["tar_at_far"])))
    figure, axes = _figure("Receiver operating characteristic")
    label = f"AUC {report['auc']:.5f}"
    far = np.maximum(curve.far, left)
    axes.plot(far, curve.tar, color=MATCHED, linewidth=1.8, drawstyle="steps-post", label=label)
    for (name, tar), marker in zip(report["tar_at_far"].items(), "os", strict=True):
        label = f"TAR {tar:.2%} at FAR {name}"
        axes.plot(float(name), tar, marker, color=MISMATCHED, label=label, clip_on=False, zorder=3)
    eer = report["eer"]
    label = f"equal error rate {eer:.2%}"
    axes.plot(max(eer, left), 1 - eer, "D", color="black", label=label, clip_on=False, zorder=3)
    # What happens near the top is what matters; a poor model needs the whole height.
    lowest = min(1 - eer, *report["tar_at_far"].values())
    bottom = max(0.0, 1 - 1.5 * (1 - lowest) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(left, 1), ylim=(bottom, 1))
    decimals = 1 if 1 - bottom < 0.05 else 0
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals))
    axes.legend(loc="lower right")
    return figure


def plot_robustness(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Accuracy by corruption; found is robustness.measure's."""
    figure, axes = _figure("Accuracy with the second image of each pair made worse")
    draw_robustness(axes, found, "black")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    _save(figure, path)


def draw_robustness(axes: Any, found: dict[str, dict[str, Any]], ink: str) -> None:
    """A row a corruption: accuracy with its standard error, and that at the clean thresholds."""
    names = [name for name in found if name != "clean"][::-1]
    rows, places = [found[name] for name in names], range(len(names))
    own = [row["accuracy"] for row in rows]
    errors = [row["standard_error"] for row in rows]
    label = "own threshold, with standard error"
    axes.errorbar(own, places, xerr=errors, fmt="o", color=MATCHED, capsize=3, label=label)
    kept = [row["accuracy_as_set"] for row in rows]
    axes.plot(kept, places, "x", color=MISMATCHED, mew=2, label="threshold as set on clean pairs")
    clean = found["clean"]["accuracy"]
    axes.axvline(clean, color=ink, linestyle="--", linewidth=1, label="clean pairs")
    axes.set_yticks(places, names)
    axes.set(xlabel="accuracy", ylim=(-0.6, len(names) - 0.4))


def plot_corruptions(path: Path, faces: dict[str, np.ndarray]) -> None:
    """One face under every corruption: robustness.showcase's images, named."""
    columns = 4
    rows = -(-len(faces) // columns)
    figure = Figure(figsize=(8, 2.25 * rows), dpi=120, layout="constrained")
    for place, (name, face) in enumerate(faces.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(face)
        axes.set_title(name, fontsize=10)
        axes.axis("off")
    _save(figure, path)


def plot_tars(
    path: Path, far: np.ndarray, tar: np.ndarray, rates: dict[str, float], title: str
) -> None:
    """TAR over FAR, (points,) each, on a logarithmic scale, with a mark at each named FAR."""
    figure, axes = _figure(f"{title}: receiver operating characteristic")
    axes.plot(far, tar, color=MATCHED, linewidth=1.8)
    shown = {name: rate for name, rate in rates.items() if float(name) >= far[0]}
    for name, rate in shown.items():
        label = f"{rate:.2%} at {name}"
        axes.plot(float(name), rate, "o", color=MISMATCHED, label=label, clip_on=False, zorder=3)
    bottom = max(0.0, 1 - 1.2 * (1 - float(tar.min())) - 0.002)
    axes.set(xlabel="false accept rate (FAR)", ylabel="true accept rate (TAR)", xscale="log")
    axes.set(xlim=(far[0], 1), ylim=(bottom, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="lower right")
    _save(figure, path)


def _figure(title: str) -> tuple[Figure, Any]:
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
