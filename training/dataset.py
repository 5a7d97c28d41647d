"""The images of a run: opened, chosen, split and decoded, from one train.rec or from shards.

store, faces = open_training_set(cfg, device)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from config import Config
from data_gen import ImageStore, Split, split
from distributed.process_group import is_main
from fileio.recordio import RecordReader
from fileio.shards import ShardReader, is_sharded
from training.sample_lists import training_mask
from training.sharded_dataset import ShardOrder, ShardStore
from utils import UserError


def open_training_set(cfg: Config, device: torch.device) -> tuple[ImageStore, Split]:
    """The images to train on, decoded into their cache, and their split."""
    folder = Path(cfg.train_set or Path(cfg.data_dir, "faces_webface_112x112"))
    if not folder.exists():
        raise UserError(
            f"There is no training set at {folder}; prepare one (python pre_process.py), name one "
            "with --train-set, or try everything on synthetic faces (make demo)."
        )
    if is_sharded(folder):
        return open_shards(cfg, folder, device)
    reader = RecordReader(folder)
    used = training_mask(reader, keep=cfg.keep, hold_out=cfg.hold_out)
    if used is not None:
        print(f"Left out by lists: {np.sum(~used):,} of {len(used):,} images.")
    faces = split(
        reader.labels,
        valid_fraction=cfg.valid_fraction,
        max_classes=cfg.max_classes,
        seed=cfg.seed,
        used=used,
    )
    if faces.num_classes < 2:
        raise UserError(f"{folder} has one identity only; a classifier needs two or more.")
    store = ImageStore(
        reader, faces, device, cache=cfg.cache, workers=cfg.workers, progress="decoding" * is_main()
    )
    for why in list(store.bad.values())[:5]:
        print(f"Left out: {why}")
    if len(store.bad) > 5:
        print(f"Left out: {len(store.bad) - 5} images more.")
    if len(store.good(faces.train)) < 2:
        raise UserError(f"{folder} has no images left to train on.")
    return store, faces


def open_shards(cfg: Config, folder: Path, device: torch.device) -> tuple[ShardStore, Split]:
    """A training set of many record files, of which nothing is decoded ahead."""
    for flag in ("max_classes", "keep", "hold_out"):
        if getattr(cfg, flag):
            flag = f"--{flag.replace('_', '-')}"
            raise UserError(f"{flag} needs a set in one train.rec; leave it out for shards.")
    reader = ShardReader(folder)
    every = max(2, round(1 / cfg.valid_fraction)) if cfg.valid_fraction else 0
    order = ShardOrder(reader.starts, cfg.batch_size, cfg.seed, every)
    store = ShardStore(reader, order, device, cfg.workers)
    nothing = np.zeros(0, np.int64)
    return store, Split(nothing, nothing, reader.num_classes, order, order.validation())
