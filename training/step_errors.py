"""When a training step fails: what it was, in a sentence, and what to do."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_gen import ImageStore
from fileio.checkpoint_file import save_checkpoint
from training.augment import Augment
from utils import UserError


class TrainingError(UserError):
    """A step failed.

    The state in mid-step is inconsistent and must not be saved: last.pt stays as it is.
    """


def bad_step(results: Tensor, loss_scale: float | None) -> int | None:
    """The index of the step that ends a run, None if none of them does.

    `results` (steps, 3) are losses, accuracies and gradient norms. The first that is not finite
    ends it. But with a loss scale a step is skipped where the gradient alone is not finite, until
    the scale falls below 1: then it is not the scale that is too large.
    """
    finite = results.isfinite()
    failed = (~(finite if loss_scale is None else finite[:, :2]).all(1)).nonzero()
    if not len(failed) and loss_scale is not None and loss_scale < 1:
        failed = (~finite[:, 2]).nonzero()[-1:]
    return int(failed[0]) if len(failed) else None


def non_finite_error(
    path: Path,
    store: ImageStore,
    positions: np.ndarray,
    flipped: np.ndarray,
    step: dict[str, Any],
    augment: Augment | None = None,
) -> TrainingError:
    """The error for a step whose loss or gradient is not finite; its batch is saved to `path`.

    `positions` (n,) are the batch's images and `flipped` (n,) bool the mask of the mirrored ones,
    before `augment`. `step` has the loss, gradient_norm, loss_scale, lr, scale, epoch, step, steps,
    and the random states before the step.
    """
    try:
        save_bad_batch(path, store, positions, flipped, step, augment)
        batch = f"the batch is in {path}"
    except (UserError, OSError) as error:
        # A full disk must not hide the error for which the batch was to be saved.
        batch = f"the batch could not be saved ({error})"
    loss, norm, loss_scale = step["loss"], step["gradient_norm"], step["loss_scale"]
    cause, other = f"loss is {loss}", ""
    if math.isfinite(loss):
        cause = f"gradient's norm is {norm}"
        if loss_scale is not None:
            cause += f", even with a loss scale of {loss_scale:g},"
    if loss_scale is not None:
        other = " float16 ends at 65,504: --no-amp trains in float32."
    return TrainingError(
        f"The {cause} at epoch {step['epoch'] + 1}, step {step['step'] + 1} of {step['steps']} "
        f"(loss {loss:g}, lr {step['lr']:g}, scale {step['scale']:g}), on records "
        f"{store.record_ids(store.readable(positions))}; {batch}, the last good state in last.pt. "
        "A resumed run would fail at the same step; start a new run with a lower --lr, a longer "
        f"--warmup-epochs or a --clip-norm.{other}"
    )


def save_bad_batch(
    path: Path,
    store: ImageStore,
    positions: np.ndarray,
    flipped: np.ndarray,
    step: dict[str, Any],
    augment: Augment | None = None,
) -> None:
    """Save a batch as the network saw it, together with `step`.

    The file is read like a checkpoint: images (n, 112, 112, 3) uint8 RGB, labels (n,) int64, their
    record ids [n], and the items of `step`.
    """
    images = store.fetch(positions, flipped).cpu()
    if augment is not None:
        images = augment(images, positions)
    # Corrupt images were left out of the step, too.
    readable = np.isin(positions, store.readable(positions))
    mask = torch.from_numpy(readable)
    labels = store.labels_of(positions).cpu()[mask]
    records = store.record_ids(positions[readable])
    save_checkpoint(path, {"images": images[mask], "labels": labels, "records": records} | step)


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def requested_bytes(error: BaseException) -> int:
    """The bytes that an out-of-memory error says were requested, 0 if it does not say."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def describe_out_of_memory(error: BaseException, free: int | None) -> str:
    """The size of the failed request and of the free memory, as clauses of a sentence.

    `free` is the GPU's, in bytes; None for CPU memory.
    """
    requested = requested_bytes(error)
    clauses = ["memory is full" if free is None else "the GPU's memory is full"]
    if requested:
        clauses.append(f"{requested / 2**30:,.2f} GiB were asked for")
    if free is not None:
        clauses.append(f"{free / 2**30:,.2f} GiB were free")
    return ", ".join(clauses)
