"""The last few checkpoints of a run; the optimiser's momentum and the random states in them.

save_last(run_dir, state)                        # last.pt; the one before is last-1.pt
state, path, errors = load_last(run_dir)         # the newest that is complete
load_momentum(optimizer, state["optimizer"], path)
set_random_states(state["random"], device)
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fileio.checkpoint_file import (
    CorruptCheckpointError,
    check_weights,
    load_checkpoint,
    save_checkpoint,
)

LAST = "last.pt"
KEEP = 2  # last.pt and the one before, in case the newest is corrupt

# What load_state_dict raises for the state of another module or optimiser: for `except`.
INCOMPATIBLE = (RuntimeError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError)


# ------------------------------------------------------------------------------ the last few


def save_last(run_dir: Path, checkpoint: dict[str, Any], keep: int = KEEP) -> None:
    """Write last.pt; the one before stays as last-1.pt and so on, `keep` of them in all.

    The new one is on disk under a temporary name before the old ones are renamed, and at every
    moment there is a complete last.pt.
    """
    save_checkpoint(run_dir / LAST, checkpoint, lambda: _rotate(run_dir, keep))


def _rotate(run_dir: Path, keep: int) -> None:
    """Make room for a new last.pt: with keep 3, last-1.pt becomes last-2.pt, last.pt last-1.pt."""
    for path in _older(run_dir)[max(keep - 2, 0) :]:
        path.unlink()
    for number in range(keep - 2, 0, -1):  # the oldest first
        path = run_dir / f"last-{number}.pt"
        if path.exists():
            path.replace(run_dir / f"last-{number + 1}.pt")
    last, previous = run_dir / LAST, run_dir / "last-1.pt"
    if keep > 1 and last.exists():
        try:
            # A second name for the same file, so that last.pt exists until the new one replaces it.
            os.link(last, previous)
        except OSError:  # a file system without hard links: for a moment there is no last.pt
            last.replace(previous)


def _older(run_dir: Path) -> list[Path]:
    """last-1.pt, last-2.pt ... that exist, the newest first."""
    names = {p: re.fullmatch(r"last-(\d{1,6})\.pt", p.name) for p in run_dir.glob("last-*.pt")}
    numbered = [(int(match[1]), path) for path, match in names.items() if match]
    return [path for _, path in sorted(numbered)]


def load_last(run_dir: Path) -> tuple[dict[str, Any], Path, dict[Path, str]]:
    """The newest complete checkpoint of a run, its path, and {newer one: what is wrong with it}.

    Raises CorruptCheckpointError, on the newest, if none is complete, and UserError if one cannot
    be read for now: resuming from an older one would lose the work since then.
    """
    errors: dict[Path, str] = {}
    for path in (run_dir / LAST, *_older(run_dir)):
        try:
            return load_checkpoint(path), path, errors
        except CorruptCheckpointError as error:
            errors[path] = str(error)
    raise CorruptCheckpointError(next(iter(errors.values())))


def clean_up(run_dir: Path, corrupt: Iterable[Path]) -> None:
    """Rename corrupt checkpoints, so that none takes the place of a complete one in the rotation.

    Temporary files that a killed process has left are removed. Call it with the folder locked.
    """
    for path in corrupt:
        if path.exists():
            path.replace(run_dir / f"damaged-{path.name}")
    for unfinished in run_dir.glob(".*.tmp"):
        unfinished.unlink()


# ------------------------------------------------------------------------------ states


def load_momentum(optimizer: torch.optim.SGD, state: dict[str, Any], path: Path) -> None:
    """Load an optimiser's momentum and learning rate from its state; its settings stay.

    Raises one of INCOMPATIBLE, or UserError naming `path`, if it is another optimiser's state.
    PyTorch does not check that: fused SGD would read and write beyond the end of a momentum that is
    smaller than its parameter.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    rates = [group.get("lr") for group in optimizer.param_groups]
    # Before anything can fail: an untrusted file must not leave settings of its own behind.
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = float(rate)
        states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
        if all(entry.get("momentum_buffer") is None for entry in states):
            continue  # before the first step
        for number, (parameter, entry) in enumerate(zip(group["params"], states, strict=True)):
            momentum = entry.get("momentum_buffer")
            check_weights({f"momentum {number}": momentum}, path)
            if momentum.shape != parameter.shape:
                raise ValueError(f"momentum {number} is {tuple(momentum.shape)}")
            # In the memory format of its parameter, channels_last for convolutions.
            entry["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(momentum)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global random generators, for a checkpoint."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        **torch_random_states(device),
    }


def torch_random_states(device: torch.device) -> dict[str, Any]:
    """Those of PyTorch alone, which dropout uses; reading them does not wait for a GPU."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    states = {"cpu": torch.get_rng_state(), "cuda": cuda}
    return states | {"mps": torch.mps.get_rng_state()} if device.type == "mps" else states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what random_states returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    set_torch_random_states(states, device)


def set_torch_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what torch_random_states returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    if device.type == "mps" and states.get("mps") is not None:
        torch.mps.set_rng_state(states["mps"].cpu())
