"""The plots that train.py, lfw_eval.py and tools.ijb_eval write as PNG files.

What they show is drawn by evaluation/drawing.py, which the report page shares.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evaluation import drawing
from evaluation.metrics import Metrics, RobustnessMetrics
from evaluation.verification import Roc
from fileio.safe_files import atomic_write, make_folder

INK = "black"


def draw_figure(title: str, draw: Callable[..., None], *args: Any) -> Figure:
    """A figure with a title, filled by one of drawing's functions with these arguments."""
    # Figure, not pyplot: pyplot keeps every figure in a global list, and may open a window.
    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontweight="bold", pad=10)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, INK, *args)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its name says."""
    make_folder(path.parent)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())


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
            lines = [(title, epochs, [point[column] for point in points])]
            draw = drawing.draw_training_curves
            figure = draw_figure(f"{title}: {label}", draw, lines, label, short == "acc")
            save_figure(figure, folder / f"{name}_{short}.png")


def plot_angles(path: Path, scores: np.ndarray, same: np.ndarray, metrics: Metrics) -> None:
    """Histograms of the angles of genuine and impostor pairs, with the best threshold.

    scores (pairs,) cosines, same (pairs,) bool; metrics are verification.verify's.
    """
    title, draw = "Angle between the two embeddings of a pair", drawing.draw_histogram
    save_figure(draw_figure(title, draw, scores, same, metrics, True), path)


def roc_figure(curve: Roc, metrics: Metrics) -> Figure:
    """TAR against FAR, on a logarithmic scale, with the equal error rate and the reported TARs."""
    return draw_figure("Receiver operating characteristic", drawing.draw_roc, curve, metrics)


def plot_template_roc(
    path: Path, far: np.ndarray, tar: np.ndarray, rates: dict[str, float], title: str
) -> None:
    """The ROC curve of a template protocol (IJB), with the TARs of rates, by FAR."""
    title = f"{title}: receiver operating characteristic"
    save_figure(draw_figure(title, drawing.draw_template_roc, far, tar, rates), path)


def plot_robustness(path: Path, results: dict[str, RobustnessMetrics]) -> None:
    """Accuracy by corruption; results are robustness.evaluate_corruptions's."""
    title = "Accuracy with the second image of each pair corrupted"
    save_figure(draw_figure(title, drawing.draw_robustness, results), path)


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
    save_figure(figure, path)
