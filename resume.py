"""Going on with a run: from which checkpoint, with which configuration, on what it has logged."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from checkpoints import LAST, load_checkpoint, load_last, tidy
from config import Config
from data_gen import ImageStore
from shard_order import ShardStore
from utils import UserError, atomic_write, newest_run

# fmt: off
# What a resumed run may not change: it would be another run under the old one's name.
FIXED_ON_RESUME = {
    "seed", "network", "emb_size", "use_se", "dropout", "margin_m", "margin_s", "easy_margin",
    "focal_loss", "gamma", "max_classes", "valid_fraction", "flip", "augment", "batch_size", "lr",
    "momentum", "weight_decay", "schedule", "milestones", "poly_power", "warmup_epochs",
    "clip_norm", "amp", "compile", "accumulate", "sync_bn", "sample_rate",
}
# What it may: where things are (the training set's contents are compared apart), the machine,
# what is logged, measured and kept, and how long to go on. No weight depends on these, but for
# `epochs` under a schedule that ends with them (which train.py says) and for rounding on another
# `device`.
FREE_ON_RESUME = {
    "data_dir", "runs_dir", "images_dir", "train_set", "keep", "hold_out", "lfw", "pairs",
    "device", "workers", "cache", "eval_batch", "log_every", "checkpoint_steps",
    "checkpoint_minutes", "keep_checkpoints", "resume", "epochs", "checkpoint_activations",
}
# fmt: on

PARTS = {
    *("config", "num_classes", "pictures", "precision", "model", "head", "optimizer", "epoch"),
    *("step", "steps", "best", "history", "window", "random"),
}


def run_folder(cfg: Config) -> Path:
    """The folder of a new run, or of the one to go on with; UserError where there is none."""
    if not cfg.resume:
        return Path(cfg.runs_dir, f"{time.strftime('%Y%m%d-%H%M%S')}-{cfg.network}-s{cfg.seed}")
    if cfg.resume == "newest":
        return newest_run(cfg.runs_dir, "last*.pt").parent
    path = Path(cfg.resume)
    if not path.exists():
        raise UserError(f"There is no run and no checkpoint at {path}; name another to --resume.")
    return path if path.is_dir() else path.parent


def open_checkpoint(cfg: Config, run_dir: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from and its path: the newest whole one, or the one named.

    Says so where a newer one is damaged, and puts that aside; the folder must be this process's
    own. Raises UserError where none is whole.
    """
    named = Path(cfg.resume)
    if named.is_file() and named.name != LAST:
        path, checkpoint = named, load_checkpoint(named)
    else:
        checkpoint, path, wrong = load_last(run_dir)
        for why in wrong.values():
            print(f"{why.split(';')[0].rstrip('.')}; taking {path.name}, which is older.")
        tidy(run_dir, wrong)
    missing = PARTS - checkpoint.keys()
    if missing:
        raise UserError(f"{path} is no checkpoint of this train.py (it has no {min(missing)}).")
    return checkpoint, path


def resumed_config(cfg: Config, checkpoint: dict[str, Any], path: Path) -> Config:
    """The configuration of the run in a checkpoint, with what the command line gave on top.

    Raises UserError where the command line would turn it into another run.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    old = Config(**{k: v for k, v in checkpoint["config"].items() if k in known})
    given = {name: getattr(cfg, name) for name in cfg.given}
    changed = [k for k in given if k in FIXED_ON_RESUME and given[k] != getattr(old, k)]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} (it has {getattr(old, k)})" for k in changed)
        raise UserError(f"{path} cannot go on with another {flags}; start a new run for that.")
    if "epochs" in given and given["epochs"] != old.epochs and old.schedule != "step":
        print(
            f"The {old.schedule} schedule ends with the run: from here on the learning rate is "
            f"that of {given['epochs']} epochs, before it was that of {old.epochs}."
        )
    return dataclasses.replace(old, **given, given=cfg.given)


def fingerprint(store: ImageStore, train: np.ndarray, valid: np.ndarray) -> str:
    """What identifies the pictures of a run: their ids, labels and split, and the file's size.

    `train` and `valid` are positions in the store. Hexadecimal SHA-256.
    """
    if isinstance(store, ShardStore):
        return store.fingerprint()
    digest = hashlib.sha256(str(store.reader.path.stat().st_size).encode())
    for numbers in (store.reader.keys[store.indices], store.labels.cpu().numpy(), train, valid):
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ TensorBoard


def cut_events(run_dir: Path, step: int, epoch_is_open: bool) -> None:
    """Take out of TensorBoard's files what was logged after the checkpoint at global step `step`.

    The run logs it again. At `step` itself, training's points stay, and those of validation and
    LFW stay unless the epoch is still open. A point that a kill cut in two goes as well.
    """
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = [frame for frame, event in _frames(data) if _is_before(event, step, epoch_is_open)]
        if sum(map(len, kept)) < len(data):
            with atomic_write(path) as file:
                file.writelines(kept)


def _is_before(event: Event, step: int, epoch_is_open: bool) -> bool:
    if event.step != step or not epoch_is_open:
        return event.step <= step
    return not any(value.tag.startswith(("valid/", "lfw/")) for value in event.summary.value)


def _frames(data: bytes) -> list[tuple[bytes, Event]]:
    """The whole records of a TFRecord file: (size, its CRC, an Event, its CRC) each."""
    found, start = [], 0
    while start + 16 <= len(data):
        size = struct.unpack_from("<Q", data, start)[0]
        end = start + 16 + size
        if not size or end > len(data):  # a power cut can leave zeros
            break
        try:
            found.append((data[start:end], Event.FromString(data[start + 12 : end - 4])))
        except DecodeError:
            break
        start = end
    return found


def sync_events(run_dir: Path) -> None:
    """Have TensorBoard's newest file on disk, so that no checkpoint knows more than it."""
    files = sorted(run_dir.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
    for path in files[-1:]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
