"""TensorBoard: the test set while a model trains, as rates, curves, hardest pairs and projector.

All tags begin with "lfw/". training/event_log.py relies on that: it is how truncate_events knows
which points belong to the end of an epoch.
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
from evaluation.metrics import Metrics
from evaluation.pair_sets import SetResult
from utils import FACE_SIZE

HARDEST = 8  # pairs of each kind in the image grids
PROJECTED = 1000  # faces in the projector
SPRITE = 56  # width and height of a face there, in pixels

# A cell of the grid of pairs: two faces with a gap of 2, a margin of 4, a line of text below.
CELL_HEIGHT, CELL_WIDTH, MARGIN, SECOND_FACE = 142, 236, 4, 114


def log_evaluation(writer: SummaryWriter, result: SetResult, step: int) -> None:
    """Log one evaluation: accuracy, threshold, TAR at FAR, ROC, PR curve and the hardest pairs.

    A TAR is logged only if the set has enough impostor pairs for its FAR to allow at least one
    false accept: with 300 of them a FAR of 1e-2 allows 3, one of 1e-3 none.
    """
    test_set, scores, metrics, _ = result
    same = test_set.pairs.same
    writer.add_scalar("lfw/accuracy", metrics["accuracy"], step)
    writer.add_scalar("lfw/threshold", metrics["threshold"], step)
    for far, tar in metrics["tar_at_far"].items():
        if float(far) * (~same).sum() >= 1:
            writer.add_scalar(f"lfw/tar_at_far_{far}", tar, step)
    writer.add_image("lfw/roc", roc_image(scores, same, metrics), step, dataformats="HWC")
    # TensorBoard's PR curve has 127 thresholds from 0 to 1, so cosines are mapped to that range.
    writer.add_pr_curve("lfw/pr", same, (scores + 1) / 2, step)
    errors = verification.worst_errors(scores, same, metrics["best_threshold"])
    for kind, indices in zip(("false_positives", "false_negatives"), errors, strict=True):
        if len(indices):
            grid = pair_grid(result, indices[:HARDEST])
            writer.add_image(f"lfw/{kind}", grid, step, dataformats="HWC")


def roc_image(scores: np.ndarray, same: np.ndarray, metrics: Metrics) -> np.ndarray:
    """The ROC curve as pixels (h, w, 3) uint8."""
    canvas = FigureCanvasAgg(roc_figure(verification.roc(scores, same), metrics))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def pair_grid(result: SetResult, indices: np.ndarray) -> np.ndarray:
    """Pairs in up to four columns, their faces side by side above the score: (h, w, 3) uint8."""
    images, pairs = result.test_set.images.numpy(), result.test_set.pairs
    columns = min(4, len(indices))
    rows = -(-len(indices) // columns)
    grid = np.full((rows * CELL_HEIGHT, columns * CELL_WIDTH, 3), 255, np.uint8)
    for cell, pair in enumerate(indices):
        y = CELL_HEIGHT * (cell // columns) + MARGIN
        x = CELL_WIDTH * (cell % columns) + MARGIN
        for left, face in ((x, pairs.first[pair]), (x + SECOND_FACE, pairs.second[pair])):
            grid[y : y + FACE_SIZE, left : left + FACE_SIZE] = images[face]
        score = f"{result.scores[pair]:.4f}"
        baseline = (x, y + 128)
        cv2.putText(
            grid, score, baseline, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA
        )
    return grid


def log_projector(writer: SummaryWriter, result: SetResult, step: int) -> None:
    """Up to 1,000 faces with images and names for TensorBoard's embedding projector.

    They are those of the identities with most images, all images of one before the next, so that
    clusters can be seen. The run's list of projections (projector_config.pbtxt) then has only this
    one.
    """
    names = result.test_set.pairs.names
    identities = np.array([name.rpartition("/")[0] for name in names])
    _, label, counts = np.unique(identities, return_inverse=True, return_counts=True)
    # lexsort's last key is the first: most images first, and within a tie by identity.
    shown = np.lexsort((label, -counts[label]))[:PROJECTED]
    rows = [[_tsv_cell(identities[face]), _tsv_cell(names[face])] for face in shown]
    writer.add_embedding(
        torch.from_numpy(result.embeddings[shown]),
        metadata=rows,
        metadata_header=["identity", "image"],
        label_img=_sprites(result.test_set.images[shown]),
        global_step=step,
        tag="lfw/faces",
    )


def _sprites(images: Tensor) -> Tensor:
    """Faces (n, 112, 112, 3) uint8 as (n, 3, SPRITE, SPRITE) float32 in [0, 1]."""
    return F.interpolate(images.permute(0, 3, 1, 2).float() / 255, (SPRITE, SPRITE), mode="area")


def _tsv_cell(text: str) -> str:
    """A name for a UTF-8 file of tab-separated values: no tabs, no line breaks, valid UTF-8."""
    clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return " ".join(clean.split())
