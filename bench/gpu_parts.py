"""Shared by the parts of bench.gpu: what a part gets, and how it says that it cannot run."""

from __future__ import annotations

import gc
import importlib.util
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
DETECTOR_PACKAGES = ("mtcnn", "joblib", "lz4")  # its weights, and their format
TRAIN_PACKAGES = ("tensorboard", "matplotlib", "scipy", "sklearn")  # of train.py as a command


class Skipped(Exception):
    """A part cannot run on this machine; the message is the reason."""


@dataclass
class Context:
    """What a part gets; `network` is smaller with --quick."""

    device: torch.device
    faces: Path  # a folder with train.rec
    work: Path  # an empty folder, deleted in the end
    quick: bool
    batch: int  # images in a batch of the checks: few, since a CPU computes them, too
    launcher: str = ""  # put before a script's name

    @property
    def network(self) -> str:
        """The network that is compared with the CPU."""
        return "tiny" if self.quick else "r50"


def require_packages(*names: str) -> None:
    """Raise Skipped if a package is missing; docs/performance.md says how to carry its wheel."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}")


def free_memory() -> None:
    """Give the GPU's unused memory back, also what an error's traceback had held."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def read_faces(context: Context, count: int) -> Tensor:
    """The first `count` faces of the pack, repeated if it has fewer: (count, 112, 112, 3) uint8."""
    import numpy as np

    from fileio.image_loader import load_images
    from fileio.recordio import RecordReader

    reader = RecordReader(context.faces)
    images, _ = load_images(reader, np.arange(count) % len(reader), workers=1)
    return images


def run_script(context: Context, *arguments: str, timeout: float, processes: int = 0) -> str:
    """What a script of the project prints, run in a process of its own or by torchrun in several.

    Raises RuntimeError with its last lines if it fails.
    """
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [*shlex.split(context.launcher), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        last = " ".join((done.stdout + done.stderr).split())[-400:]
        name = next(argument for argument in arguments if argument != "-m")
        raise RuntimeError(f"{name} ended with status {done.returncode}: {last}")
    return done.stdout


def expect(holds: bool, result: dict[str, Any]) -> dict[str, Any]:
    """The result of a check; raises AssertionError with it if the check does not hold."""
    if not holds:
        raise AssertionError(result)
    return result
