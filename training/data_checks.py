"""Checks of the training data: before training on a sample of images, and of LFW's accuracy later.

Data that cannot work raises a UserError; data that is unlike aligned faces gets a printed warning.
Each message says what to do. All checks before training take well under a second.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from data_gen import ImageStore, epoch_order
from utils import TEMPLATE, UserError

SAMPLE_SIZE = 256  # images
MIN_SAMPLE = 32  # with fewer, the mean colour and the mean face say nothing


def check_training_set(
    store: ImageStore, positions: np.ndarray, num_classes: int, seed: int = 0
) -> None:
    """Check the labels, the first epoch's order and a sample of the images; print warnings.

    `positions` (n,) are the images to train on, `num_classes` the head's number of classes. Raises
    UserError if training could not work.
    """
    if store.labels is not None:  # those of a sharded set are read with its images
        check_labels(store.labels, num_classes)
        check_shuffled(store.labels_of(positions).cpu().numpy(), seed)
        reader = store.reader
        warning = missing_classes_warning(reader.num_classes, num_classes, len(reader.labels))
        if warning:
            print(f"Warning: {warning}")
    check_images(store, store.sample(positions, SAMPLE_SIZE, seed))


def check_images(store: ImageStore, positions: np.ndarray) -> None:
    """Look at the images at `positions` (n,); print warnings.

    Raises UserError if training could not work.
    """
    positions = store.readable(np.sort(positions))
    images = store.fetch(positions).cpu().numpy()  # (n, 112, 112, 3) uint8
    # Without a cache, corrupt images are known only once they have been fetched: ask again.
    images = images[np.isin(positions, store.readable(positions))]
    if not len(images):
        raise UserError(f"None of {len(positions)} sampled images can be decoded; see --train-set.")
    warnings = [check_not_constant(images), bgr_warning(images), alignment_warning(images)]
    for warning in filter(None, warnings):
        print(f"Warning: {warning}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise UserError unless labels (n,) are int64, in 0 to num_classes - 1, every class used."""
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
            f"{empty} of the head's {num_classes} classes have no image; build the head with as "
            "many classes as there are identities."
        )


def missing_classes_warning(declared: int, num_classes: int, images: int) -> str:
    """A warning if a set declares far more identities than are trained on, else "".

    Published sets declare a few identities that have no images, and --max-classes leaves some out:
    only losing more than half of them is worth a warning. Sets with one image per identity are not
    checked.
    """
    if declared <= 2 * num_classes or num_classes == images:
        return ""
    return (
        f"the training set declares {declared:,} identities, {num_classes:,} are trained on; "
        "unless --max-classes was meant to do that, images are missing: copy or prepare it again."
    )


def check_shuffled(labels: np.ndarray, seed: int) -> None:
    """Raise UserError if an epoch's order keeps images of one identity together.

    `labels` (n,) are those of the images to train on. In a random order two neighbours share an
    identity with probability sum(p^2), p the identities' shares: 1% for 100 equal ones. Sorted by
    identity, almost all neighbours do.
    """
    order, _ = epoch_order(np.arange(len(labels)), seed, 0)
    if not np.array_equal(np.sort(order), np.arange(len(labels))):
        raise UserError("An epoch's order leaves images out or repeats some; see data_gen.py.")
    shuffled = labels[order]
    share = np.mean(shuffled[1:] == shuffled[:-1])
    expected = np.square(np.bincount(labels) / len(labels)).sum()
    standard_error = np.sqrt(expected * (1 - expected) / len(labels))
    # Ten standard errors: never by accident. 10 / n spares sets of so few images that it could be.
    if share > expected + 10 * standard_error + 10 / len(labels):
        raise UserError(
            f"In training order {share:.1%} of neighbouring images have the same identity; in a "
            f"random order {expected:.1%} would. The images are not shuffled; see data_gen.py."
        )


def check_not_constant(images: np.ndarray) -> str:
    """A warning if some of (n, 112, 112, 3) images are of a single colour, else "".

    Raises UserError if all of them are, or if all are the same image.
    """
    constant = images.reshape(len(images), -1).std(1) < 1
    if constant.all():
        raise UserError(
            f"All of {len(images)} sampled images are of one colour; prepare the set again."
        )
    if len(images) > 1 and (images == images[0]).all():
        raise UserError(f"All of {len(images)} sampled images are the same; prepare the set again.")
    if not constant.any():
        return ""
    return (
        f"{constant.sum()} of {len(images)} sampled images are of one colour; is the set corrupt?"
    )


def bgr_warning(images: np.ndarray) -> str:
    """A warning if (n, 112, 112, 3) faces seem to have red and blue swapped, else "".

    Skin is redder than blue. In the middle of aligned faces the mean of R - B is about +60 of 255,
    on photographs and on synthetic faces alike, and below zero in one of 512 photographs.
    """
    face = images[:, 40:100, 30:82].reshape(len(images), -1, 3).mean(1)  # (n, 3)
    difference = float(np.mean(face[:, 0] - face[:, 2]))
    if len(images) < MIN_SAMPLE or difference > -5:
        return ""
    return (
        f"the faces are bluer than red (R - B is {difference:.0f} on average, +60 is usual): their "
        "channels seem to be BGR. Prepare the set again with RGB images; otherwise the model will "
        "expect BGR images."
    )


def find_eyes(images: np.ndarray) -> tuple[float, float, float]:
    """The eyes in the mean of (n, 112, 112, 3) faces: distance and y in pixels, and contrast.

    Of all pairs of points in one row, symmetric to the template's middle, it takes the pair that is
    darkest against the skin between and below it; contrast is in grey levels. On aligned sets the
    distance is 32 to 39 (the template's eyes: 35), y 50 to 52, and the contrast 70 and more.
    """
    mean = cv2.GaussianBlur(images.astype(np.float32).mean((0, 3)), (0, 0), 1.5)  # (112, 112)
    rows = np.arange(30, 80)[:, None]
    half = np.arange(8, 32, 0.5)[None]  # half the distance between the eyes
    middle = TEMPLATE[:2, 0].mean()
    left, right = np.rint(middle - half).astype(int), np.rint(middle + half).astype(int)
    # The cheeks are as far below the eyes as they would be in a scaled template.
    below = np.minimum(np.rint(rows + 0.55 * half).astype(int), 111)
    eyes = (mean[rows, left] + mean[rows, right]) / 2
    skin = (mean[below, left] + mean[below, right]) / 4 + mean[rows, round(middle)] / 2
    contrast = skin - eyes  # (rows, halves)
    row, column = np.unravel_index(contrast.argmax(), contrast.shape)
    return float(2 * half[0, column]), float(rows[row, 0]), float(contrast[row, column])


def alignment_warning(images: np.ndarray) -> str:
    """A warning if (n, 112, 112, 3) faces are not aligned to the template, else ""."""
    distance, y, contrast = find_eyes(images)
    if len(images) < MIN_SAMPLE or (30 <= distance <= 45 and 47 <= y <= 57 and contrast > 15):
        return ""
    if contrast <= 15:
        observation = "the mean of the images shows no eyes"
    else:
        observation = f"the eyes seem to be {distance:.0f} pixels apart at y = {y:.0f}"
    return (
        f"{observation}; ArcFace's template has them 35 apart at y = 52. Align the images with "
        "pre_process.py, as LFW's are; otherwise LFW's accuracy will not show what was learned."
    )


def warn_if_lfw_at_chance(accuracy: float, lfw: list[float]) -> None:
    """Warn if the identities are recognised but LFW stays at chance: its evaluation is broken.

    `accuracy` is this epoch's on the validation images (of training, if there are none), `lfw` the
    accuracies on LFW so far. A model that recognises half of its identities is far above 55% on
    LFW; a second epoch rules out an accident.
    """
    if accuracy >= 0.5 and len(lfw) >= 2 and max(lfw[-2:]) <= 0.55:
        print(
            f"Warning: {accuracy:.0%} of the identities are recognised, yet LFW stays at "
            f"{lfw[-1]:.0%}, which is chance level. Check that LFW's images are aligned "
            "(pre_process.py) and RGB like the training set's, and that --pairs belongs to them."
        )
