"""Resuming a run: from which checkpoint, and with which settings.

folder = find_run("newest", "runs")
with own_folder(folder):
    checkpoint, path = open_checkpoint("newest", folder)
    cfg = resumed_config(cfg, checkpoint["config"], path)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from config import Config, fixed_on_resume
from distributed.collectives import run_on_main
from distributed.process_group import is_main
from fileio.checkpoint_file import check_weights, load_checkpoint
from fileio.locks import lock_folder
from fileio.safe_files import describe_write_errors
from training.checkpoints import LAST, clean_up, load_last
from training.saved_settings import config_from
from utils import UserError, newest_run

# The entries of a checkpoint and their types.
ENTRIES = {
    **dict.fromkeys(("config", "model", "head", "optimizer", "best", "history", "random"), dict),
    **dict.fromkeys(("num_classes", "epoch", "step", "steps"), int),
    "pictures": str,  # the fingerprint of the training set
    "precision": str,
    "window": torch.Tensor,
}
# How many numbers a point of each history has; those of runs without EMA weights lack two.
POINTS = {"train": 5, "valid": 3, "lfw": 3, "ema": 3, "ema_lfw": 3}
OPTIONAL = {"ema", "ema_lfw"}
BEST = ("epoch", "accuracy", "loss")
SCALER = ("scale", "_growth_tracker", "skipped_steps")  # of a run in float16


def find_run(resume: str, runs_dir: Path | str) -> Path:
    """The folder of the run that --resume names; UserError if there is none.

    `resume` is "newest", a run's folder or a checkpoint in it.
    """
    if resume == "newest":
        return newest_run(runs_dir, "last*.pt").parent
    path = Path(resume)
    if not path.exists():
        raise UserError(f"There is no run and no checkpoint at {path}; name another to --resume.")
    return path if path.is_dir() else path.parent


@contextlib.contextmanager
def own_folder(folder: Path, create: bool = False) -> Iterator[None]:
    """Lock a run's folder for the block: rank 0 holds the lock for all processes of the group.

    UserError if another train.py holds it, or if it cannot be created.
    """
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            if create:
                with describe_write_errors(folder):
                    folder.mkdir(parents=True)
            stack.enter_context(lock_folder(folder, "train.py"))

        run_on_main(lock)
        yield


def open_checkpoint(resume: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to resume and its path; rank 0 chooses, every process reads the file."""
    chosen = run_on_main(lambda: choose_checkpoint(resume, folder), broadcast=False)
    path = run_on_main(lambda: chosen[1])
    return chosen if is_main() else (load_checkpoint(path), path)


def choose_checkpoint(resume: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """The newest complete checkpoint of a locked run folder, or the one named, and its path.

    A newer one that is corrupt is reported and renamed. Raises UserError if none is complete.
    """
    named = Path(resume)
    if named.is_file() and named.name != LAST:
        path, checkpoint = named, load_checkpoint(named)
    else:
        checkpoint, path, errors = load_last(folder)
        for error in errors.values():
            print(f"{error.split(';')[0].rstrip('.')}; taking {path.name}, which is older.")
        clean_up(folder, errors)
    check_run(checkpoint, path)
    return checkpoint, path


def check_run(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise UserError unless train.py can resume from a checkpoint and its weights are finite."""
    entry = _invalid_entry(checkpoint)
    if entry:
        raise UserError(f"{path} is not a checkpoint of this train.py (see its {entry}).")
    for name in ("model", "head", "ema"):
        check_weights(checkpoint.get(name, {}), path)


def _invalid_entry(checkpoint: dict[str, Any]) -> str:
    """The first entry that no run of train.py writes in this form, "" if all are valid.

    A checksum is no signature: a complete file may still say anything.
    """
    for name, expected in ENTRIES.items():
        if not isinstance(checkpoint.get(name), expected):
            return name
    if type(checkpoint.get("processes", 1)) is not int:
        return "processes"
    scaler = checkpoint.get("scaler")
    if "scaler" in checkpoint and not (
        isinstance(scaler, dict)
        and _are_numbers(tuple(map(scaler.get, SCALER)), len(SCALER))
        and 1 <= scaler["scale"] < math.inf
    ):
        return "scaler"
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
    # Each finished step of the epoch is in a point of the history or in the window. With points of
    # 3 steps, a checkpoint after step 8 has two points of this epoch and a window of 2.
    logged = sum(point[4] for point in history["train"] if point[0] == epoch)
    return "" if logged + len(window) == step else "history"


def _are_numbers(values: Any, count: int) -> bool:
    is_tuple = type(values) is tuple and len(values) == count
    return is_tuple and all(type(value) in (int, float) for value in values)


def resumed_config(cfg: Config, saved: dict[str, Any], path: Path) -> Config:
    """The settings of a run as `saved` in its checkpoint, updated by those given in `cfg`.

    `path` is the run's, for messages. Raises UserError if a setting is given that would make it
    another run, or if the saved settings are invalid.
    """
    try:
        old = config_from(saved)
    except ValueError as error:
        raise UserError(f"{path} is not a run of this train.py ({error}).") from None
    if cfg.init:
        raise UserError(
            f"--init begins a new run, and {path} has its weights already; leave one of --init and "
            "--resume out."
        )
    # A tool's own settings, which no run has, are left out.
    given = {name: getattr(cfg, name) for name in cfg.given if hasattr(old, name)}
    if given.get("compile") == "auto":  # the run has decided that, and keeps to it
        del given["compile"]
    changed = [k for k in given if k in fixed_on_resume() and given[k] != getattr(old, k)]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} (it has {getattr(old, k)})" for k in changed)
        raise UserError(f"{path} cannot be resumed with another {flags}; start a new run for that.")
    if "epochs" in given and given["epochs"] != old.epochs and old.schedule != "step":
        print(
            f"The {old.schedule} schedule ends with the run: from here on the learning rate is "
            f"that of {given['epochs']} epochs, before it was that of {old.epochs}."
        )
    return dataclasses.replace(old, **given, given=cfg.given)
