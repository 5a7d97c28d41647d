"""The images of a run: opened, chosen, split and decoded, from one train.rec or from shards.

store, split = open_training_set(folder, device, batch_size=512, seed=0, valid_fraction=0.02)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_gen import ImageStore, Split, make_split
from distributed.collectives import run_on_all
from distributed.process_group import is_main
from fileio.recordio import RecordReader
from fileio.shards import ShardReader, is_sharded
from training.sample_lists import training_mask
from training.sharded_dataset import ShardOrder, ShardStore
from utils import UserError

DEFAULT_SET = "faces_webface_112x112"  # in data_dir
NAMED_CORRUPT = 5  # corrupt images that are named before training; the rest is counted


def open_training_set(
    folder: Path,
    device: torch.device,
    *,
    batch_size: int,
    seed: int,
    valid_fraction: float,
    max_classes: int = 0,
    keep: str = "",
    hold_out: str = "",
    workers: int = 0,
) -> tuple[ImageStore, Split]:
    """The images to train on, not decoded yet, and their split.

    `keep` and `hold_out` are lists of sample_lists.py. Raises UserError if the folder is not a
    training set, or if one identity is left to train on.
    """
    if not folder.exists():
        raise UserError(
            f"There is no training set at {folder}; prepare one (python pre_process.py), name one "
            "with --train-set, or try everything on synthetic faces (make demo)."
        )
    if is_sharded(folder):
        for flag, value in {"max-classes": max_classes, "keep": keep, "hold-out": hold_out}.items():
            if value:
                raise UserError(f"--{flag} needs a set in one train.rec; leave it out for shards.")
        return open_shards(folder, device, batch_size, seed, valid_fraction, workers)
    reader = RecordReader(folder)
    mask = training_mask(reader, keep=keep, hold_out=hold_out)
    if mask is not None:
        print(f"Left out by lists: {np.sum(~mask):,} of {len(mask):,} images.")
    options = {"valid_fraction": valid_fraction, "max_classes": max_classes, "seed": seed}
    split = make_split(reader.labels, **options, used=mask)
    if split.num_classes < 2:
        raise UserError(f"{folder} has one identity only; a classifier needs two or more.")
    return ImageStore(reader, split, device, cache="none", workers=workers), split


def cache_images(store: ImageStore, train: np.ndarray, cache: str) -> np.ndarray:
    """Decode a store's images into a cache, and say which are corrupt; every process must call it.

    Returns those of the positions `train` (n,) that can be trained on; UserError if there are none.
    """
    if store.can_cache:
        store.fill_cache(cache, "decoding" if is_main() else "")
    for reason in list(store.corrupt.values())[:NAMED_CORRUPT]:
        print(f"Left out: {reason}")
    if len(store.corrupt) > NAMED_CORRUPT:
        print(f"Left out: {len(store.corrupt) - NAMED_CORRUPT} images more.")
    positions = store.readable(train)

    def check() -> None:
        if len(positions) < 2:
            raise UserError(f"{store.reader.path} has no images left to train on.")

    run_on_all(check)
    return positions


def open_shards(
    folder: Path,
    device: torch.device,
    batch_size: int,
    seed: int,
    valid_fraction: float,
    workers: int = 0,
) -> tuple[ShardStore, Split]:
    """A training set of many record files, of which nothing is decoded in advance.

    A fraction of 0.02 holds out every 50th image of each file.
    """
    reader = ShardReader(folder)
    every = max(2, round(1 / valid_fraction)) if valid_fraction else 0
    order = ShardOrder(reader.starts, batch_size, seed, every)
    store = ShardStore(reader, order, device, workers)
    none = np.zeros(0, np.int64)
    return store, Split(none, none, reader.num_classes, order, order.validation())
