"""Angles of images to the centre of their class and to the nearest other class: label noise.

    angles, keep = leave_one_out(embeddings, labels, classes, nearer_by=12.0)
    centres = dominant_centres(embeddings, labels, head_weight, classes)
    angles = angles_to_centres(embeddings, labels, centres)
    keep = angles.keep_mask(nearer_by=12.0, max_angle=75.0)

A centre is the mean direction of the images of a class, or a row of a head. Embeddings are
L2-normalised.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.verification import to_degrees

IMAGES_PER_TILE = 1024  # compared with all centres at a time
# Degrees added to the threshold in the first rounds of leave_one_out. A centre still contains wrong
# images then, so that of a small class a correct image may be just over the threshold: only clear
# cases are dropped until the centres have become clean.
SLACK = (24.0, 18.0, 12.0, 6.0)
MAX_ROUNDS = 10  # after those with slack it mostly takes three more until nothing changes


class CentreAngles(NamedTuple):
    """Angles of n labelled images to the centres of classes."""

    angle: np.ndarray  # (n,) float64, degrees to the centre of the image's own class
    other: np.ndarray  # (n,) int64, the nearest other class
    other_angle: np.ndarray  # (n,) float64, degrees to its centre

    def nearer_to_other(self) -> np.ndarray:
        """By how much each image is nearer to another class than to its own, (n,) degrees."""
        return self.angle - self.other_angle

    def keep_mask(self, nearer_by: float, max_angle: float) -> np.ndarray:
        """Images within max_angle of their class, and not nearer to another by more: (n,) bool.

        Example: at nearer_by = 12, an image at 70 degrees from its own class and 60 from another is
        kept; at 75 and 60 degrees it is not.
        """
        return (self.nearer_to_other() <= nearer_by) & (self.angle <= max_angle)


@torch.inference_mode()
def angles_to_centres(
    embeddings: Tensor, labels: Tensor, centres: Tensor, own_cosine: Tensor | None = None
) -> CentreAngles:
    """Compare embeddings (n, d), L2-normalised, with centres (classes, d) of any length.

    labels (n,) int64. own_cosine (n,) replaces the cosines to the images' own classes. A class
    whose centre is zero is never the nearest. The cosines are computed on the centres' device, a
    tile of images at a time.
    """
    directions = F.normalize(centres.float())
    empty = (directions == 0).all(1)  # (classes,)
    tiles = []
    for start in range(0, len(labels), IMAGES_PER_TILE):
        tile = slice(start, start + IMAGES_PER_TILE)
        label = labels[tile, None].to(directions.device)  # (tile, 1)
        cosine = embeddings[tile].to(directions.device) @ directions.T  # (tile, classes)
        own = cosine.gather(1, label)[:, 0]
        # -2 is below any cosine: neither empty classes nor the own class can be the nearest.
        best, other = cosine.masked_fill_(empty, -2.0).scatter_(1, label, -2.0).max(1)
        tiles.append((own.cpu(), other.cpu(), best.cpu()))
    own, other, best = (torch.cat(column) for column in zip(*tiles, strict=True))
    if own_cosine is not None:
        own = own_cosine
    angle, other_angle = (to_degrees(cosine.double().numpy()) for cosine in (own, best))
    return CentreAngles(angle, other.numpy(), other_angle)


# ------------------------------------------------------------------------------ mean directions


def leave_one_out(
    embeddings: Tensor,
    labels: Tensor,
    classes: int,
    *,
    nearer_by: float,
    max_angle: float = 180.0,
    device: torch.device | str = "cpu",
) -> tuple[CentreAngles, np.ndarray]:
    """Angles to the mean directions of the images kept, and which images are kept, (n,) bool.

    An image is compared with its own class without itself. In each round the images dropped so far
    are left out of all centres, and every image is judged again, until nothing changes. An image
    that is alone in its class has nothing to be compared with: its angle is 0 and it is kept. Of a
    class whose images would all be dropped, the one furthest from other classes is kept.
    """
    keep = np.ones(len(labels), bool)
    for turn in range(MAX_ROUNDS):
        angles, alone = _angles_without_itself(embeddings, labels, classes, keep, device)
        slack = SLACK[turn] if turn < len(SLACK) else 0.0
        # The absolute limit waits for clean centres, too.
        limit = 180.0 if slack else max_angle
        now = angles.keep_mask(nearer_by + slack, limit) | alone
        now = _keep_one_per_class(now, labels.numpy(), angles.other_angle)
        settled = not slack and np.array_equal(now, keep)
        keep = now
        if settled:
            break
    return angles, keep


def _angles_without_itself(
    embeddings: Tensor, labels: Tensor, classes: int, keep: np.ndarray, device: torch.device | str
) -> tuple[CentreAngles, np.ndarray]:
    """Angles to the sums of the images kept, each image's without itself; who is alone, (n,) bool.

    A centre's length does not matter, so that sums do for means; leaving an image out of its sum is
    a subtraction.
    """
    kept = torch.from_numpy(keep)
    sums = embeddings.new_zeros(classes, embeddings.shape[1])
    sums.index_add_(0, labels[kept], embeddings[kept])
    others_in_class = torch.bincount(labels[kept], minlength=classes)[labels] - kept.long()
    own_cosine = torch.ones(len(labels))
    for start in range(0, len(labels), IMAGES_PER_TILE):
        tile = slice(start, start + IMAGES_PER_TILE)
        # An image that was dropped is in no sum: nothing to subtract.
        without = sums[labels[tile]] - embeddings[tile] * kept[tile, None]
        own_cosine[tile] = (F.normalize(without) * embeddings[tile]).sum(1)
    alone = others_in_class == 0
    own_cosine[alone] = 1.0  # 0 degrees; what is left of the sum is rounding error
    return angles_to_centres(embeddings, labels, sums.to(device), own_cosine), alone.numpy()


def _keep_one_per_class(
    keep: np.ndarray, labels: np.ndarray, other_angle: np.ndarray
) -> np.ndarray:
    """keep (n,), and in classes without a kept image the one furthest from other classes."""
    # Within each class kept images come first, then those far from other classes.
    order = np.lexsort((-other_angle, ~keep, labels))
    first = order[np.unique(labels[order], return_index=True)[1]]
    keep = keep.copy()
    keep[first] = True
    return keep


# ------------------------------------------------------------------------------ rows of a head


@torch.inference_mode()
def dominant_centres(embeddings: Tensor, labels: Tensor, weight: Tensor, classes: int) -> Tensor:
    """Of each class's K sub-centers the one nearest to most of its images, (classes, d), unit norm.

    weight (classes * K, d): rows K * j ... K * j + K - 1 are the sub-centers of class j. Sub-center
    ArcFace (Deng et al., ECCV 2020, section 3.3) drops images over 75 degrees from these.
    """
    centres = F.normalize(weight.float()).unflatten(0, (classes, -1))  # (classes, K, d)
    votes = torch.zeros(centres.shape[:2], dtype=torch.int64)
    for start in range(0, len(labels), IMAGES_PER_TILE):
        tile = slice(start, start + IMAGES_PER_TILE)
        label = labels[tile]
        cosine = torch.einsum("nkd,nd->nk", centres[label], embeddings[tile])
        votes.index_put_((label, cosine.argmax(1)), torch.ones_like(label), accumulate=True)
    return centres[torch.arange(classes), votes.argmax(1)]
