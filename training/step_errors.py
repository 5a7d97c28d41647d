"""When a training step fails: what it was, in a sentence, and what to do."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_gen import ImageStore
from fileio.checkpoint_file import save_checkpoint
from training.augment import Augment
from utils import UserError


class TrainingError(UserError):
    """A step went wrong; what it changed is not to be saved, the checkpoint before it stays."""


def non_finite_error(
    path: Path,
    store: ImageStore,
    positions: np.ndarray,
    flipped: np.ndarray,
    step: dict[str, Any],
    augment: Augment | None = None,
) -> TrainingError:
    """The error of a step whose loss or gradient is not finite; its batch goes into `path`.

    `positions` (n,) are its images, `flipped` (n,) bool those that were mirrored before `augment`
    changed them; `step` has its loss, gradient_norm, lr, scale, epoch, step, steps, and the random
    states before it.
    """
    try:
        save_bad_batch(path, store, positions, flipped, step, augment)
        where = f"the batch is in {path}"
    except (UserError, OSError) as error:  # a full disk must not hide why it was to be written
        where = f"the batch could not be kept ({error})"
    loss, norm = step["loss"], step["gradient_norm"]
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
    return TrainingError(
        f"The {what} at epoch {step['epoch'] + 1}, step {step['step'] + 1} of {step['steps']} "
        f"(loss {loss:g}, lr {step['lr']:g}, scale {step['scale']:g}), on records "
        f"{store.record_ids(store.readable(positions))}; {where}, the last good state in last.pt. "
        "From there it would come to the same; start a new run with a lower --lr, a longer "
        "--warmup-epochs or a --clip-norm."
    )


def save_bad_batch(
    path: Path,
    store: ImageStore,
    positions: np.ndarray,
    flipped: np.ndarray,
    step: dict[str, Any],
    augment: Augment | None = None,
) -> None:
    """Write a batch as the network saw it, and what is known of its step.

    The file reads like a checkpoint: images (n, 112, 112, 3) uint8 RGB, labels (n,) int64,
    records [n], and the parts of `step`.
    """
    images = store.fetch(positions, flipped).cpu()
    if augment is not None:
        images = augment(images, positions)
    # Corrupt images were left out of the step, too.
    good = np.isin(positions, store.readable(positions))
    kept = torch.from_numpy(good)
    labels = store.labels_of(positions).cpu()[kept]
    records = store.record_ids(positions[good])
    save_checkpoint(path, {"images": images[kept], "labels": labels, "records": records} | step)


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def requested_bytes(error: BaseException) -> int:
    """How many bytes an out-of-memory error says were asked for, 0 where it does not say."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error))
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def describe_out_of_memory(error: BaseException, free: int | None) -> str:
    """What was asked for and what was free, as clauses for a sentence.

    `free` bytes the GPU had, None if main memory is meant.
    """
    requested = requested_bytes(error)
    clauses = ["memory is full" if free is None else "the GPU's memory is full"]
    if requested:
        clauses.append(f"{requested / 2**30:,.2f} GiB were asked for")
    if free is not None:
        clauses.append(f"{free / 2**30:,.2f} GiB were free")
    return ", ".join(clauses)
