"""The test set in TensorBoard while a model trains: rates, curves, wrong pairs, and the projector.

All tags begin with "lfw/", which tells training.event_log.truncate_events that a point belongs to
the end of an epoch.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from evaluation import verification
from evaluation.figures import roc_figure
from evaluation.pair_sets import SetResult

HARDEST = 8  # pairs of each kind that are shown
PROJECTED = 1000  # faces in the projector
SPRITE = 56  # pixels a side of a face there


def log_evaluation(writer: SummaryWriter, result: SetResult, step: int) -> None:
    """Log one evaluation: accuracy, threshold, TAR at FAR, ROC, PR curve and the hardest pairs.

    A TAR is logged where the mismatched pairs support its FAR: one of them at least is allowed.
    """
    test_set, scores, report, _ = result
    same = test_set.pairs.same
    writer.add_scalar("lfw/accuracy", report["accuracy"], step)
    writer.add_scalar("lfw/threshold", report["threshold"], step)
    for far, tar in report["tar_at_far"].items():
        if float(far) * (~same).sum() >= 1:
            writer.add_scalar(f"lfw/tar_at_far_{far}", tar, step)
    writer.add_image("lfw/roc", roc_image(scores, same, report), step, dataformats="HWC")
    # Its thresholds are 127 steps from 0 to 1, so the cosines go there.
    writer.add_pr_curve("lfw/pr", same, (scores + 1) / 2, step)
    found = verification.worst_errors(scores, same, report["best_threshold"])
    for kind, pairs in zip(("false_positives", "false_negatives"), found, strict=True):
        if len(pairs):
            grid = pair_grid(result, pairs[:HARDEST])
            writer.add_image(f"lfw/{kind}", grid, step, dataformats="HWC")


def roc_image(scores: np.ndarray, same: np.ndarray, report: dict) -> np.ndarray:
    """The ROC curve as pixels (h, w, 3) uint8."""
    canvas = FigureCanvasAgg(roc_figure(verification.roc(scores, same), report))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def pair_grid(result: SetResult, pairs: np.ndarray) -> np.ndarray:
    """Pairs as a grid of up to four columns, each side by side above its score: (h, w, 3) uint8."""
    images, ends = result.test_set.images.numpy(), result.test_set.pairs
    columns = min(4, len(pairs))
    rows = -(-len(pairs) // columns)
    grid = np.full((rows * 142, columns * 236, 3), 255, np.uint8)
    for place, pair in enumerate(pairs):
        y, x = 142 * (place // columns) + 4, 236 * (place % columns) + 4
        for side, face in enumerate((ends.first[pair], ends.second[pair])):
            grid[y : y + 112, x + 114 * side : x + 114 * side + 112] = images[face]
        score = f"{result.scores[pair]:.4f}"
        at = (x, y + 128)
        cv2.putText(grid, score, at, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return grid


def log_projector(writer: SummaryWriter, result: SetResult, step: int) -> None:
    """Up to 1,000 faces with their images and names for TensorBoard's embedding projector.

    They are those of the people with most images, whole people at a time, so that there is
    something to see. An older projection of the run is no longer listed.
    """
    names = result.test_set.pairs.names
    people = np.array([name.rpartition("/")[0] for name in names])
    _, label, counts = np.unique(people, return_inverse=True, return_counts=True)
    shown = np.lexsort((label, -counts[label]))[:PROJECTED]
    rows = [[_cell(people[face]), _cell(names[face])] for face in shown]
    writer.add_embedding(
        torch.from_numpy(result.embeddings[shown]),
        metadata=rows,
        metadata_header=["person", "image"],
        label_img=_sprites(result.test_set.images[shown]),
        global_step=step,
        tag="lfw/faces",
    )


def _sprites(images: Tensor) -> Tensor:
    """Faces (n, 112, 112, 3) uint8 as (n, 3, SPRITE, SPRITE) float32 in [0, 1]."""
    return F.interpolate(images.permute(0, 3, 1, 2).float() / 255, (SPRITE, SPRITE), mode="area")


def _cell(text: str) -> str:
    """A name that can stand in a file of tab-separated UTF-8 values."""
    clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return " ".join(clean.split())
