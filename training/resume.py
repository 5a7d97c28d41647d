"""Going on with a run: from which checkpoint, and with which configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, fixed_on_resume
from data_gen import ImageStore
from fileio.checkpoint_file import check_weights, load_checkpoint
from training.checkpoints import LAST, load_last, tidy
from training.saved_settings import config_from
from training.sharded_dataset import ShardStore
from utils import UserError, newest_run

# The parts of a checkpoint and their types, and how many numbers an entry of the history has.
PARTS = {
    **dict.fromkeys(("config", "model", "head", "optimizer", "best", "history", "random"), dict),
    **dict.fromkeys(("num_classes", "epoch", "step", "steps"), int),
    **{"pictures": str, "precision": str, "window": torch.Tensor},
}
POINTS = {"train": 5, "valid": 3, "lfw": 3, "ema": 3, "ema_lfw": 3}
OPTIONAL = {"ema", "ema_lfw"}  # of a run without averaged weights
BEST = ("epoch", "accuracy", "loss")


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
    check_run(checkpoint, path)
    return checkpoint, path


def check_run(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise UserError unless a checkpoint is one that train.py can go on from, weights finite."""
    wrong_part = _wrong_part(checkpoint)
    if wrong_part:
        raise UserError(f"{path} is no checkpoint of this train.py (see its {wrong_part}).")
    for part in ("model", "head", "ema"):
        check_weights(checkpoint.get(part, {}), path)


def _wrong_part(checkpoint: dict[str, Any]) -> str:
    """A part that a run of this train.py has in no such form, empty if all are as they should be.

    A checksum is no signature: a file may be whole and say anything.
    """
    for name, kind in PARTS.items():
        if not isinstance(checkpoint.get(name), kind):
            return name
    if type(checkpoint.get("processes", 1)) is not int:
        return "processes"
    step, steps, epoch = (checkpoint[name] for name in ("step", "steps", "epoch"))
    best, window, history = (checkpoint[name] for name in ("best", "window", "history"))
    for name, numbers in POINTS.items():
        points = history.get(name, [] if name in OPTIONAL else None)
        if type(points) is not list or not all(_are_numbers(p, numbers) for p in points):
            return "history"
    if not (0 <= step <= steps and epoch >= 0):
        return "step"
    if (best or epoch) and not _are_numbers(tuple(map(best.get, BEST)), len(BEST)):
        return "best"
    if window.dim() != 2 or window.shape[1] != 3 or not window.is_floating_point():
        return "window"
    # Each step of the epoch is in a point of the history or in the window.
    logged = sum(point[4] for point in history["train"] if point[0] == epoch)
    return "" if logged + len(window) == step else "history"


def _are_numbers(values: Any, count: int) -> bool:
    fits = type(values) is tuple and len(values) == count
    return fits and all(type(value) in (int, float) for value in values)


def resumed_config(cfg: Config, checkpoint: dict[str, Any], path: Path) -> Config:
    """The configuration of the run in a checkpoint, with what the command line gave on top.

    Raises UserError where the command line would turn it into another run.
    """
    try:
        old = config_from(checkpoint["config"])
    except ValueError as error:
        raise UserError(f"{path} is no run of this train.py ({error}).") from None
    given = {name: getattr(cfg, name) for name in cfg.given if hasattr(old, name)}
    if given.get("compile") == "auto":  # which the run has decided, and keeps to
        del given["compile"]
    fixed = fixed_on_resume()
    changed = [k for k in given if k in fixed and given[k] != getattr(old, k)]
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
    """What identifies the images of a run: their ids, labels and split, and the file's size.

    `train` and `valid` are positions in the store. Hexadecimal SHA-256.
    """
    if isinstance(store, ShardStore):
        return store.fingerprint()
    digest = hashlib.sha256(str(store.reader.path.stat().st_size).encode())
    for numbers in (store.reader.keys[store.indices], store.labels.cpu().numpy(), train, valid):
        digest.update(len(numbers).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(numbers, "<i8").tobytes())
    return digest.hexdigest()
