"""Checks before training, on a sample of the images in well under a second, and one during it.

What cannot train is an error; what is merely unlike aligned faces is a warning. Each says what to
do.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from data_gen import ImageStore, epoch_order
from utils import TEMPLATE, UserError

SAMPLE_SIZE = 256  # images looked at
MIN_SAMPLE = 32  # fewer say nothing about the colour and the place of eyes


def check_training_set(
    store: ImageStore, positions: np.ndarray, num_classes: int, seed: int = 0
) -> None:
    """Look at the labels, a sample of the images and the first epoch's order; print warnings.

    `positions` (n,) are the images to train on, `num_classes` the head's classes. Raises
    UserError where training could not work.
    """
    if store.labels is not None:  # those of a sharded set are read with its images
        check_labels(store.labels, num_classes)
        check_shuffled(store.labels_of(positions).cpu().numpy(), seed)
        warning = missing_classes_warning(
            store.reader.num_classes, num_classes, len(store.reader.labels)
        )
        if warning:
            print(f"Warning: {warning}")
    check_images(store, store.sample(positions, SAMPLE_SIZE, seed))


def check_images(store: ImageStore, chosen: np.ndarray) -> None:
    """Look at the images at the positions `chosen`; print warnings.

    Raises UserError where training could not work.
    """
    chosen = store.readable(np.sort(chosen))
    images = store.fetch(chosen).cpu().numpy()
    # Without a cache, corrupt images are found only now.
    images = images[np.isin(chosen, store.readable(chosen))]
    if not len(images):
        raise UserError(f"None of {len(chosen)} sampled images can be decoded; see --train-set.")
    warnings = [check_not_constant(images), bgr_warning(images), alignment_warning(images)]
    for warning in filter(None, warnings):
        print(f"Warning: {warning}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise UserError unless labels (n,) are int64, within the head's classes, and use them all."""
    if labels.dtype != torch.int64:
        raise UserError(f"The labels are {labels.dtype}; they must be torch.int64.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"The labels go from {low} to {high}, the head has classes 0 to {num_classes - 1}; "
            "number the identities from 0 on."
        )
    empty = num_classes - int((torch.bincount(labels, minlength=num_classes) > 0).sum())
    if empty:
        raise UserError(
            f"{empty} of the head's {num_classes} classes have no image; give it as many "
            "classes as there are identities."
        )


def missing_classes_warning(declared: int, num_classes: int, images: int) -> str:
    """What to say of a set that declares more identities than its images show; empty if nothing.

    Sets of the zoo may have lost some, and --max-classes leaves some out: neither is worth a word
    unless it is most of them.
    """
    if declared <= 2 * num_classes or num_classes == images:
        return ""
    return (
        f"the training set declares {declared:,} identities, {num_classes:,} are trained on; "
        "unless --max-classes was meant to do that, images are missing: copy or prepare it again."
    )


def check_shuffled(labels: np.ndarray, seed: int) -> None:
    """Raise UserError if an epoch's order keeps images of one identity together.

    `labels` (n,) are those of the images to train on. In shuffled order two neighbours share an
    identity as often as chance has it.
    """
    order, _ = epoch_order(np.arange(len(labels)), seed, 0)
    if not np.array_equal(np.sort(order), np.arange(len(labels))):
        raise UserError("An epoch's order leaves images out or repeats some; see data_gen.py.")
    together = labels[order]
    share = np.mean(together[1:] == together[:-1])
    chance = np.square(np.bincount(labels) / len(labels)).sum()
    spread = np.sqrt(chance * (1 - chance) / len(labels))
    if share > chance + 10 * spread + 10 / len(labels):
        raise UserError(
            f"In the order of training {share:.1%} of neighbours are one identity's, by chance "
            f"it were {chance:.1%}; the images are not shuffled, see data_gen.py."
        )


def check_not_constant(images: np.ndarray) -> str:
    """What to say of (n, 112, 112, 3) images of one colour, empty if there are none.

    Raises UserError where none shows anything, or all show the same.
    """
    blank = images.reshape(len(images), -1).std(1) < 1
    if blank.all():
        raise UserError(
            f"All of {len(images)} sampled images are of one colour; prepare the set again."
        )
    if len(images) > 1 and (images == images[0]).all():
        raise UserError(f"All of {len(images)} sampled images are the same; prepare the set again.")
    if not blank.any():
        return ""
    return f"{blank.sum()} of {len(images)} sampled images are of one colour; is the set damaged?"


def bgr_warning(images: np.ndarray) -> str:
    """What to say of (n, 112, 112, 3) images with red and blue swapped, empty if they are not.

    Skin is redder than blue. In the middle of aligned faces the mean of R - B is about +60 of 255
    on photographs and on drawn ones, and of 512 photographs one is below zero.
    """
    face = images[:, 40:100, 30:82].reshape(len(images), -1, 3).mean(1)
    difference = float(np.mean(face[:, 0] - face[:, 2]))
    if len(images) < MIN_SAMPLE or difference > -5:
        return ""
    return (
        f"the faces are bluer than red (R - B is {difference:.0f} on average, +60 is usual): their "
        "channels seem to be BGR. Prepare the set again with RGB images, or the model will need "
        "BGR images for good."
    )


def find_eyes(images: np.ndarray) -> tuple[float, float, float]:
    """Where the mean of (n, 112, 112, 3) faces has its eyes: distance, y, and how clearly.

    Two dark spots in one row, alike far from the middle, brighter skin between and below them; the
    third number is the contrast in grey levels. On aligned sets the spots are 32 to 39 pixels apart
    (the template's eyes 35) at y = 50 to 52, with a contrast of 70 and more.
    """
    mean = cv2.GaussianBlur(images.astype(np.float32).mean((0, 3)), (0, 0), 1.5)
    rows = np.arange(30, 80)[:, None]
    half = np.arange(8, 32, 0.5)[None]
    middle = TEMPLATE[:2, 0].mean()
    left, right = np.rint(middle - half).astype(int), np.rint(middle + half).astype(int)
    below = np.minimum(np.rint(rows + 0.55 * half).astype(int), 111)
    eyes = (mean[rows, left] + mean[rows, right]) / 2
    skin = (mean[below, left] + mean[below, right]) / 4 + mean[rows, round(middle)] / 2
    contrast = skin - eyes
    row, column = np.unravel_index(contrast.argmax(), contrast.shape)
    return float(2 * half[0, column]), float(rows[row, 0]), float(contrast[row, column])


def alignment_warning(images: np.ndarray) -> str:
    """What to say of (n, 112, 112, 3) images that are not on the template, empty if they are."""
    distance, y, contrast = find_eyes(images)
    if len(images) < MIN_SAMPLE or (30 <= distance <= 45 and 47 <= y <= 57 and contrast > 15):
        return ""
    if contrast <= 15:
        found = "the mean of the images shows no eyes"
    else:
        found = f"the eyes seem to be {distance:.0f} pixels apart at y = {y:.0f}"
    return (
        f"{found}; ArcFace's template has them 35 apart at y = 52. Align the images with "
        "pre_process.py, as LFW's are, or LFW's accuracy will not show what was learned."
    )


def warn_if_lfw_at_chance(accuracy: float, lfw: list[float]) -> None:
    """Say so where people are told apart in training and not on LFW: the evaluation is broken.

    `accuracy` is that of this epoch on the images that choose the best, `lfw` LFW's so far. A
    model that knows half of its identities is far above 55 % on LFW; two epochs are no accident.
    """
    if accuracy >= 0.5 and len(lfw) >= 2 and max(lfw[-2:]) <= 0.55:
        print(
            f"Warning: {accuracy:.0%} of the identities are recognised, yet LFW stays at "
            f"{lfw[-1]:.0%}, which is chance. The evaluation does not see what training sees: are "
            "LFW's images aligned (pre_process.py) and RGB like the training set's, and do "
            "--pairs belong to them?"
        )
