"""The last few checkpoints of a run, the optimiser's momentum and the random states in them."""

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

# What load_state_dict raises for the state of another module or optimiser: for `except`.
INCOMPATIBLE = (RuntimeError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError)


# ------------------------------------------------------------------------------ the last few


def save_last(run_dir: Path, checkpoint: dict[str, Any], keep: int = 2) -> None:
    """Write last.pt; the one before stays as last-1.pt, and so on, `keep` of them in all.

    The new one is on disk under another name before the old ones move up, and there is a whole
    last.pt at every moment.
    """
    save_checkpoint(run_dir / LAST, checkpoint, lambda: _move_up(run_dir, keep))


def _move_up(run_dir: Path, keep: int) -> None:
    """Give last.pt and those before it the next names, last.pt its own as well."""
    for path in _older(run_dir)[max(keep - 2, 0) :]:
        path.unlink()
    for number in range(keep - 2, 0, -1):
        if (path := run_dir / f"last-{number}.pt").exists():
            path.replace(run_dir / f"last-{number + 1}.pt")
    last, before = run_dir / LAST, run_dir / "last-1.pt"
    if keep > 1 and last.exists():
        try:
            os.link(last, before)
        except OSError:  # a file system without hard links: for a moment there is no last.pt
            last.replace(before)


def _older(run_dir: Path) -> list[Path]:
    """last-1.pt, last-2.pt ... as far as there are any."""
    numbers = {p: re.fullmatch(r"last-(\d{1,6})\.pt", p.name) for p in run_dir.glob("last-*.pt")}
    found = [(int(number[1]), path) for path, number in numbers.items() if number]
    return [path for _, path in sorted(found)]


def load_last(run_dir: Path) -> tuple[dict[str, Any], Path, dict[Path, str]]:
    """The newest checkpoint of a run that is whole, its path, and {newer one: what is wrong}.

    Raises CorruptCheckpointError, on the newest, where none is complete, and UserError where one
    cannot be read here and now: an older one in its place would lose what it holds.
    """
    wrong: dict[Path, str] = {}
    for path in (run_dir / LAST, *_older(run_dir)):
        try:
            return load_checkpoint(path), path, wrong
        except CorruptCheckpointError as error:
            wrong[path] = str(error)
    raise CorruptCheckpointError(next(iter(wrong.values())))


def tidy(run_dir: Path, corrupt: Iterable[Path]) -> None:
    """Rename corrupt checkpoints, so that they do not move up in place of complete ones.

    What a killed process left unfinished goes, too. For the owner of the run folder only.
    """
    for path in corrupt:
        if path.exists():
            path.replace(run_dir / f"damaged-{path.name}")
    for unfinished in run_dir.glob(".*.tmp"):
        unfinished.unlink()


# ------------------------------------------------------------------------------ states


def load_momentum(optimizer: torch.optim.SGD, state: dict[str, Any], path: Path) -> None:
    """Go back to an optimiser's state of a checkpoint; its settings stay as they are, but for lr.

    Raises one of INCOMPATIBLE, or UserError, where the state is not this optimiser's: fused SGD
    takes a momentum for as large as its parameter, and reads and writes beyond a smaller one.
    """
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own | {"lr": float(group["lr"])})
        states = [optimizer.state.get(parameter, {}) for parameter in group["params"]]
        if all(kept.get("momentum_buffer") is None for kept in states):
            continue  # before the first step
        for number, (parameter, kept) in enumerate(zip(group["params"], states, strict=True)):
            momentum = kept.get("momentum_buffer")
            check_weights({f"momentum {number}": momentum}, path)
            if momentum.shape != parameter.shape:
                raise ValueError(f"momentum {number} is {tuple(momentum.shape)}")
            kept["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(momentum)


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global random numbers, for a checkpoint."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        **torch_states(device),
    }


def torch_states(device: torch.device) -> dict[str, Any]:
    """Those of PyTorch alone, which dropout uses; reading them does not wait for a GPU."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what random_states returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    set_torch_states(states, device)


def set_torch_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what torch_states returned."""
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
