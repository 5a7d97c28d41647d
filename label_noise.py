"""Find wrong labels with a trained model: each picture's angle to its class centre, and to others'.

    python label_noise.py                       # the newest run's last.pt and its training set
    python label_noise.py --checkpoint runs/<run>/last.pt --output data/keep.tsv
    python train.py --keep data/keep.tsv        # without the pictures that were dropped

writes a line a picture: record id, label (both as in train.rec), angle in degrees to the centre of
its class, the nearest other class, the angle to that, and kept, 0 or 1. A picture is dropped that
is nearer to another class than to its own, or further from its own than --max-angle; whoever wants
another rule changes the last column. Centres are the head's rows, as ArcFace trained them.

A network that has trained for long has learnt wrong labels by heart: score with an early epoch, or
with one that saw fewer of them. Sub-center ArcFace, which gives noise centres of its own, is a
margin; this works with any.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints import load_checkpoint
from config import Config, parse_args
from data_gen import BLOCK, ImageStore, Split
from embedders import Embed, load_embedder
from resume import check_run, fingerprint, resumed_config
from selection import KeepList, write_keep
from shard_order import ShardStore
from training_set import open_training_set
from utils import UserError, exit_with_sentence, get_device, keep_freed_memory, newest_run
from verification import to_degrees

ROWS = 1024  # pictures compared with all centres at a time


class Scores(NamedTuple):
    """What a model makes of n pictures with labels."""

    angle: np.ndarray  # (n,) float64 degrees to the centre of the picture's class
    other: np.ndarray  # (n,) int64, the nearest class but its own
    other_angle: np.ndarray  # (n,) float64 degrees to that

    def kept(self, max_angle: float) -> np.ndarray:
        """Pictures nearer to their own class than to any other, and within max_angle: (n,) bool."""
        return (self.angle <= self.other_angle) & (self.angle <= max_angle)


@torch.inference_mode()
def score(embeddings: Tensor, labels: Tensor, centres: Tensor) -> Scores:
    """Compare embeddings (n, d) of unit length with centres (classes, d) of any length.

    labels (n,) int64; some pictures at a time, with every centre.
    """
    directions = F.normalize(centres.float())
    found = []
    for start in range(0, len(labels), ROWS):
        label = labels[start : start + ROWS, None]
        cosine = embeddings[start : start + ROWS] @ directions.T
        own = cosine.gather(1, label)[:, 0]
        best, other = cosine.scatter(1, label, -2.0).max(1)
        found.append((own, other, best))
    own, other, best = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    return Scores(to_degrees(own.astype(np.float64)), other, to_degrees(best.astype(np.float64)))


def embed_store(store: ImageStore, positions: np.ndarray, embed: Embed) -> Tensor:
    """Embeddings (n, d) float32 of the pictures at `positions` (n,), a block at a time."""
    blocks = range(0, len(positions), BLOCK)
    return torch.cat([embed(store.fetch(positions[b : b + BLOCK])).float().cpu() for b in blocks])


def check_checkpoint(
    checkpoint: dict[str, Any], path: Path, store: ImageStore, faces: Split
) -> None:
    """Raise UserError unless a checkpoint was trained on these pictures, with a centre a class."""
    if isinstance(store, ShardStore):
        raise UserError("label_noise.py needs a training set in one train.rec, not shards.")
    pictures = fingerprint(store, store.good(faces.train), store.good(faces.valid))
    if checkpoint["pictures"] != pictures:
        raise UserError(
            f"{path} was trained on other pictures than {store.reader.path} gives it now; give the "
            "set it was trained on (--train-set), its --keep and --hold-out lists as they were."
        )
    rows = len(checkpoint["head"]["weight"])
    if rows != faces.num_classes:
        raise UserError(
            f"{path} has {rows:,} centres for {faces.num_classes:,} classes; give one with "
            "one a class."
        )


@exit_with_sentence
def main(cfg: Config) -> None:
    """Score the training set of a run with its own network and head, and write the list."""
    keep_freed_memory()
    path = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "last.pt"))
    checkpoint = load_checkpoint(path)
    check_run(checkpoint, path)
    cfg = resumed_config(cfg, checkpoint, path)
    print(f"Model: {path} ({cfg.network}, epoch {checkpoint['epoch']})")
    device = get_device(cfg.device)
    store, faces = open_training_set(cfg, device)
    check_checkpoint(checkpoint, path, store, faces)
    embed = load_embedder(path, device=device, batch=cfg.eval_batch)[0]
    positions = store.good(np.arange(len(faces.indices)))
    embeddings = embed_store(store, positions, embed)
    whole = np.isin(positions, store.good(positions))  # without a cache, bad ones show only now
    positions, embeddings = positions[whole], embeddings[torch.from_numpy(whole)]
    labels = torch.from_numpy(faces.labels[positions])
    found = score(embeddings, labels, checkpoint["head"]["weight"].cpu())
    kept = found.kept(cfg.max_angle)
    output = Path(cfg.output or Path(cfg.data_dir, "keep.tsv"))
    original = np.zeros(faces.num_classes, np.int64)  # classes are numbered anew for training
    original[faces.labels] = store.reader.labels[faces.indices]
    rows = KeepList(
        store.reader.keys[faces.indices[positions]],
        original[faces.labels[positions]],
        found.angle,
        original[found.other],
        found.other_angle,
        kept,
    )
    write_keep(output, rows)
    nearer, far = found.angle > found.other_angle, found.angle > cfg.max_angle
    print(
        f"{len(kept):,} pictures, {np.median(found.angle):.1f} degrees from their class in the "
        f"median; {nearer.sum():,} are nearer to another class, {far.sum():,} further than "
        f"{cfg.max_angle:g} degrees from their own\n"
        f"Wrote {output}: {int(kept.sum()):,} kept, {int((~kept).sum()):,} dropped. "
        f"Next: python train.py --keep {output}"
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "label_noise"))
