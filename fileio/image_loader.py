"""Many images of a record file, decoded by threads.

    images, errors = load_images(reader, np.arange(len(reader)))

An image that cannot be decoded stays black, and `errors` says why.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fileio.recordio import RecordError, RecordReader
from utils import FACE_SIZE, core_count

BLOCK_SIZE = 8192  # images decoded before they are copied to a GPU
DECODE_CHUNK = 32  # images that a thread decodes at a time


def load_images(
    reader: RecordReader,
    indices: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: str = "",
) -> tuple[Tensor, dict[int, str]]:
    """Decode images (n,) by threads: ((n, 112, 112, 3) uint8 RGB, {row: why it stayed black}).

    They end on `device`; of a set that goes to a GPU, main memory holds one block at a time.
    `progress` is the title of a progress bar, none if empty.
    """
    images = torch.empty((len(indices), FACE_SIZE, FACE_SIZE, 3), dtype=torch.uint8, device=device)
    errors: dict[int, str] = {}
    bar = tqdm(total=len(indices), desc=progress, unit="img", disable=not progress)
    with bar, ThreadPoolExecutor(workers or core_count()) as pool:
        for start in range(0, len(indices), BLOCK_SIZE):
            block = images[start : start + BLOCK_SIZE]
            staged = block if block.device.type == "cpu" else torch.empty_like(block, device="cpu")
            selected = indices[start : start + BLOCK_SIZE]
            block_errors = decode_records(reader, selected, staged.numpy(), pool, bar)
            errors |= {start + row: reason for row, reason in block_errors.items()}
            if staged is not block:
                block.copy_(staged)
    return images, errors


def decode_records(
    reader: RecordReader,
    indices: np.ndarray,
    out: np.ndarray,
    pool: ThreadPoolExecutor,
    bar: tqdm | None = None,
) -> dict[int, str]:
    """Decode images (n,) into `out` (n, 112, 112, 3) by threads; returns {row: what is wrong}.

    Raises RecordError for an image of another size.
    """

    def decode_chunk(start: int) -> dict[int, str]:
        errors = {}
        for row, index in enumerate(indices[start : start + DECODE_CHUNK], start):
            try:
                image = reader.image(int(index))
            except RecordError as error:
                errors[row] = str(error)
                out[row] = 0
                continue
            if image.shape != out.shape[1:]:
                raise RecordError(
                    f"record {reader.keys[index]} of {reader.path} is {image.shape[1]}x"
                    f"{image.shape[0]}, not {FACE_SIZE}x{FACE_SIZE}; align it with pre_process.py."
                )
            out[row] = image
        if bar is not None:
            bar.update(min(DECODE_CHUNK, len(indices) - start))
        return errors

    errors: dict[int, str] = {}
    for chunk_errors in pool.map(decode_chunk, range(0, len(indices), DECODE_CHUNK)):
        errors |= chunk_errors
    return errors
