"""Embed images of a training set: those of a record file, or those of a store that caches them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_gen import ImageStore, load_images
from evaluation.embedders import Embed
from fileio.recordio import RecordReader

BLOCK = 4096  # images in memory at a time


def embed_images(
    reader: RecordReader, places: np.ndarray, embed: Embed, workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the reader's images at `places` (n,) are whole, (n,) bool, and their embeddings.

    Those are (whole, d) float32 of unit length; a block of images is in memory at a time.
    """
    whole, parts = np.ones(len(places), bool), []
    for start in tqdm(range(0, len(places), BLOCK), desc="embedding", unit="block"):
        images, errors = load_images(reader, places[start : start + BLOCK], workers=workers)
        whole[[start + place for place in errors]] = False
        kept = torch.from_numpy(whole[start : start + BLOCK])
        parts.append(embed(images[kept]).float().cpu().numpy())
    if not whole.all():
        print(f"Left out: {int((~whole).sum())} images that cannot be decoded.")
    return whole, np.concatenate(parts)


def embed_store(store: ImageStore, positions: np.ndarray, embed: Embed) -> Tensor:
    """Embeddings (n, d) float32 of the images at `positions` (n,), a block at a time."""
    blocks = range(0, len(positions), BLOCK)
    return torch.cat([embed(store.fetch(positions[b : b + BLOCK])).float().cpu() for b in blocks])
