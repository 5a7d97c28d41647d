"""Each image's angle to the centre of its class, and to the nearest other: three sorts of centre.

    found, kept = leave_one_out(embeddings, labels, classes, nearer_by=12.0)
    found = score(embeddings, labels, dominant_centres(embeddings, labels, head_rows, classes))
    kept = found.kept(nearer_by=12.0, max_angle=75.0)

Centres come from the images themselves, or are a head's rows; embeddings have unit length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.verification import to_degrees

ROWS = 1024  # images compared with all centres at a time
# The first rounds drop only what is so many degrees surer than asked: a wrong image must not take
# a right one of a small class along.
SURER = (24.0, 18.0, 12.0, 6.0)
ROUNDS = 10  # at most; after the first four it mostly takes three more to settle


class Scores(NamedTuple):
    """What n images with labels look like."""

    angle: np.ndarray  # (n,) float64 degrees to the centre of the image's class
    other: np.ndarray  # (n,) int64, the nearest class but its own
    other_angle: np.ndarray  # (n,) float64 degrees to that

    def nearer(self) -> np.ndarray:
        """By how much each image is nearer to another class than to its own, (n,) degrees."""
        return self.angle - self.other_angle

    def kept(self, nearer_by: float, max_angle: float) -> np.ndarray:
        """Images not so much nearer to another class, nor further than max_angle: (n,) bool."""
        return (self.nearer() <= nearer_by) & (self.angle <= max_angle)


@torch.inference_mode()
def score(embeddings: Tensor, labels: Tensor, centres: Tensor, own: Tensor | None = None) -> Scores:
    """Compare embeddings (n, d) of unit length with centres (classes, d) of any length.

    labels (n,) int64; own (n,) are the cosines to the images' own classes, by default to the
    centres given. A centre of zeros is nobody's nearest. Some images at a time, with every
    centre, on the device that the centres are on.
    """
    directions = F.normalize(centres.float())
    nobody = (directions == 0).all(1)
    found = []
    for start in range(0, len(labels), ROWS):
        label = labels[start : start + ROWS, None].to(directions.device)
        cosine = embeddings[start : start + ROWS].to(directions.device) @ directions.T
        mine = cosine.gather(1, label)[:, 0]
        best, other = cosine.masked_fill_(nobody, -2.0).scatter_(1, label, -2.0).max(1)
        found.append((mine.cpu(), other.cpu(), best.cpu()))
    mine, other, best = (torch.cat(column) for column in zip(*found, strict=True))
    mine = mine if own is None else own
    angles = [to_degrees(cosine.double().numpy()) for cosine in (mine, best)]
    return Scores(angles[0], other.numpy(), angles[1])


def leave_one_out(
    embeddings: Tensor,
    labels: Tensor,
    classes: int,
    *,
    nearer_by: float,
    max_angle: float = 180.0,
    device: torch.device | str = "cpu",
) -> tuple[Scores, np.ndarray]:
    """Scores against the mean directions of the images kept, and which are kept (n,) bool.

    An image has no part in the centre of its own class that it is compared with. In rounds the
    images found wrong are left out of all centres and everything is judged anew, until nothing
    changes. An image that has nobody to be compared with is at 0 degrees and stays; of a class
    whose images all look wrong the one least like another class stays.
    """
    kept = np.ones(len(labels), bool)
    for turn in range(ROUNDS):
        found, alone = _score_without_itself(embeddings, labels, classes, kept, device)
        surer = SURER[turn] if turn < len(SURER) else 0.0
        now = found.kept(nearer_by + surer, max_angle if not surer else 180.0) | alone
        now = _spare_one(now, labels.numpy(), found.other_angle)
        settled = not surer and np.array_equal(now, kept)
        kept = now
        if settled:
            break
    return found, kept


def _score_without_itself(
    embeddings: Tensor, labels: Tensor, classes: int, kept: np.ndarray, device: torch.device | str
) -> tuple[Scores, np.ndarray]:
    """Scores against the sums of the kept images, each without itself; and who is alone (n,)."""
    inside = torch.from_numpy(kept)
    sums = embeddings.new_zeros(classes, embeddings.shape[1])
    sums.index_add_(0, labels[inside], embeddings[inside])
    company = torch.bincount(labels[inside], minlength=classes)[labels] - inside.long()
    own = torch.ones(len(labels))
    for start in range(0, len(labels), ROWS):
        rows = slice(start, start + ROWS)
        without = sums[labels[rows]] - embeddings[rows] * inside[rows, None]
        own[rows] = (F.normalize(without) * embeddings[rows]).sum(1)
    alone = company == 0
    own[alone] = 1.0
    return score(embeddings, labels, sums.to(device), own), alone.numpy()


def _spare_one(kept: np.ndarray, labels: np.ndarray, other_angle: np.ndarray) -> np.ndarray:
    """kept (n,), and of each class without any the image furthest from other classes."""
    order = np.lexsort((-other_angle, ~kept, labels))
    first = order[np.unique(labels[order], return_index=True)[1]]
    spared = kept.copy()
    spared[first] = True
    return spared


@torch.inference_mode()
def dominant_centres(embeddings: Tensor, labels: Tensor, weight: Tensor, classes: int) -> Tensor:
    """The centre of each class to which most of its images are nearest, (classes, d) unit length.

    weight (classes·K, d): rows K·j ... K·j + K − 1 are the centres of class j. Sub-center ArcFace
    (Deng et al., ECCV 2020, section 3.3) drops what is over 75 degrees from these.
    """
    centres = F.normalize(weight.float()).unflatten(0, (classes, -1))
    votes = torch.zeros(centres.shape[:2], dtype=torch.int64)
    for start in range(0, len(labels), ROWS):
        label = labels[start : start + ROWS]
        cosine = torch.einsum("nkd,nd->nk", centres[label], embeddings[start : start + ROWS])
        votes.index_put_((label, cosine.argmax(1)), torch.ones_like(label), accumulate=True)
    return centres[torch.arange(classes), votes.argmax(1)]
