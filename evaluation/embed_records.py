"""Embed the images of a training set, in blocks that fit in memory.

    from evaluation.embed_records import embed_records
    decoded, embeddings = embed_records(reader, np.arange(len(reader)), model.embed)

embed_records reads a record file; embed_store reads an ImageStore, which may hold the images
decoded already.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_gen import ImageStore
from evaluation.embedders import Embed
from fileio.image_loader import load_images
from fileio.recordio import RecordReader

IMAGES_IN_MEMORY = 4096  # 154 MB of pixels


def embed_records(
    reader: RecordReader, indices: np.ndarray, embed: Embed, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the images at `indices` (n,) could be decoded, (n,) bool, and their embeddings.

    Embeddings are (decoded images, d) float32. Images that cannot be decoded are skipped, and a
    line says how many.
    """
    decoded, blocks = np.ones(len(indices), bool), []
    for start in tqdm(range(0, len(indices), IMAGES_IN_MEMORY), desc="embedding", unit="block"):
        block = slice(start, start + IMAGES_IN_MEMORY)
        images, errors = load_images(reader, indices[block], workers=workers)
        decoded[[start + position for position in errors]] = False
        images = images[torch.from_numpy(decoded[block])]
        blocks.append(embed(images).float().cpu().numpy())
    if not decoded.all():
        print(f"Skipped {int((~decoded).sum())} images that cannot be decoded.")
    return decoded, np.concatenate(blocks)


def embed_store(store: ImageStore, positions: np.ndarray, embed: Embed) -> Tensor:
    """Embeddings (n, d) float32 of the images at `positions` (n,) of a store."""
    blocks = []
    for start in range(0, len(positions), IMAGES_IN_MEMORY):
        images = store.fetch(positions[start : start + IMAGES_IN_MEMORY])
        blocks.append(embed(images).float().cpu())
    return torch.cat(blocks)
