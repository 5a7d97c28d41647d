"""Sheets of faces, and two photos side by side, as tools.compare and tools.search draw them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evaluation.drawing import GENUINE_COLOUR, IMPOSTOR_COLOUR
from evaluation.figures import save_figure
from utils import UserError

FIGURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


class Cell(NamedTuple):
    """A face in a sheet: its crop (112, 112, 3) or None, its caption, whether to stress it."""

    crop: np.ndarray | None
    caption: str
    stressed: bool = False


def plot_sheet(path: Path, rows: Sequence[Sequence[Cell]], title: str) -> None:
    """Rows of faces with captions; stressed ones have a frame."""
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.5 * columns, 1.85 * len(rows) + 0.4), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes_row in zip(rows, grid, strict=True):
        for axes in axes_row[len(row) :]:
            axes.axis("off")
        for cell, axes in zip(row, axes_row, strict=False):
            axes.set_title(_plain(cell.caption), fontsize=7)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=cell.stressed, color=GENUINE_COLOUR, linewidth=3)
            if cell.crop is not None:
                axes.imshow(cell.crop)
    save_figure(figure, path)


class PhotoPanel(NamedTuple):
    """A photo and its face, as plot_comparison shows them; coordinates in the photo's pixels."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8 RGB
    crop: np.ndarray  # (112, 112, 3), the aligned face
    box: np.ndarray  # (4,)
    points: np.ndarray  # (5, 2)
    others: np.ndarray  # (k, 4), boxes of faces that were not taken


def plot_comparison(path: Path, panels: Sequence[PhotoPanel], title: str) -> None:
    """Two photos with boxes and points, the faces as they were aligned, and the verdict."""
    figure = Figure(figsize=(9, 6.6), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, wrap=True)
    grid = figure.subplots(2, 2, height_ratios=(3, 1.2))
    for panel, photo, crop in zip(panels, *grid, strict=True):
        height, width = panel.image.shape[:2]
        # Every pixel of a large photo would be kept twice over by matplotlib.
        step = max(1, max(height, width) // 1200)
        photo.imshow(panel.image[::step, ::step], extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        for box, style in ((panel.box, "-"), *((other, ":") for other in panel.others)):
            corner, size = box[:2], box[2:] - box[:2]
            colour = GENUINE_COLOUR if style == "-" else IMPOSTOR_COLOUR
            photo.add_patch(
                Rectangle(corner, *size, fill=False, color=colour, linewidth=2, linestyle=style)
            )
        photo.plot(*panel.points.T, "o", color=GENUINE_COLOUR, markersize=3)
        photo.set_title(_plain(panel.name), fontsize=9)
        crop.imshow(panel.crop)
        for axes in (photo, crop):
            axes.axis("off")
    save_figure(figure, path)


def check_figure_path(path: str) -> None:
    """UserError unless a figure can be written in the format of the file's suffix."""
    if Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise UserError(f"{path} should end in one of {', '.join(FIGURE_SUFFIXES)}.")


def _plain(text: str) -> str:
    """A text that matplotlib takes literally: "$" would begin a formula."""
    return text.replace("$", r"\$")
