"""When a training step fails: what it was, in a sentence, and what to do."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

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


class GpuMemory(NamedTuple):
    """Bytes of a GPU's memory: what the driver has free, and this process's peak and its share."""

    free: int
    peak: int  # most that tensors took at one moment
    reserved: int  # what PyTorch holds, used or not


def gpu_memory(device: torch.device) -> GpuMemory | None:
    """The memory of a GPU as it stands, None for other devices."""
    if device.type != "cuda":
        return None
    return GpuMemory(
        torch.cuda.mem_get_info(device)[0],
        torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_reserved(device),
    )


def fixed_gpu_memory(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes on a GPU that no smaller batch saves: cache, weights, gradients, momentum.

    Between two steps only; from here on the peak is measured anew. 0 for other devices.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    optimizer.zero_grad()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    missing = weights if optimizer.state else 2 * weights
    return torch.cuda.memory_allocated(device) + missing


def largest_fitting_batch(batch: int, asked: int, fixed: int, memory: GpuMemory) -> int:
    """The largest power of two under `batch` that should fit, 0 if not even two images do.

    `fixed` bytes are needed whatever the batch is; what a step took on top when it failed, with
    the `asked` bytes that it did not get, is shared by its images. A tenth is left free.
    """
    each = max(memory.peak + asked - fixed, 1) / batch
    room = 0.9 * (memory.free + memory.reserved) - fixed
    fits = min(int(room / each), batch - 1)
    return 1 << (fits.bit_length() - 1) if fits >= 2 else 0


_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def requested_bytes(error: BaseException) -> int:
    """How many bytes an out-of-memory error says were asked for, 0 where it does not say."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def describe_out_of_memory(
    error: BaseException, *, batch: int, flag: str, fixed: int = 0, memory: GpuMemory | None = None
) -> str:
    """What was asked for, what was free, which batch size would fit: clauses for a sentence.

    `flag` is the setting that `batch` came from, `memory` the GPU's, None for main memory.
    """
    asked = requested_bytes(error)
    words = ["the GPU's memory is full" if memory else "memory is full"]
    if asked:
        words.append(f"{asked / 2**30:,.2f} GiB were asked for")
    fits = batch // 2
    if memory:
        words.append(f"{memory.free / 2**30:,.2f} GiB were free")
        fits = largest_fitting_batch(batch, asked, fixed, memory)
    if fits >= 2:
        words.append(f"{flag} {fits} should fit in place of {batch}")
    else:
        words.append("not even a batch of two would fit")
    return ", ".join(words)
