"""What several scripts need: errors, devices, seeds, safe files, alignment."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch

FACE_SIZE = 112

# ArcFace's template for 112x112: left eye, right eye, nose, left and right mouth corner as they
# appear in the picture, (x, y) in pixels (deepinsight/insightface, utils/face_align.py).
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class UserError(Exception):
    """Something the user can cause and mend; its text is a sentence that says how."""


def exit_with_sentence(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a script's main: what a user can cause becomes one sentence and exit status 2.

    That is UserError, OSError and a GPU without memory. A sudden Ctrl-C ends with status 130, as
    shells expect, and no traceback either.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        script = Path(sys.argv[0]).name
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"{script}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except OSError as error:
            if error.filename is None:
                print(f"{script}: {error}", file=sys.stderr)
            else:
                print(f"{script}: {error.filename}: {error.strerror}", file=sys.stderr)
            raise SystemExit(2) from None
        except torch.OutOfMemoryError as error:
            print(
                f"{script}: the GPU's memory is full; take a smaller --batch-size (train), "
                f"--eval-batch or --detect-batch, or --cache ram. ({str(error).splitlines()[0]})",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None

    return wrapped


def get_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" is the first GPU where there is one, else the CPU.

    Raises UserError if the name means nothing or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used ({reason}); try --device cpu.") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively, so that autocast makes it faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def core_count() -> int:
    """How many CPU cores this process may use; in a container, fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when it is complete and on disk.

    Written under a temporary name in the same folder, flushed, synced and renamed; if the block
    raises, the old file stays as it was.
    """
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}-", suffix=".tmp"
    )
    try:
        with os.fdopen(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; give this one the permissions any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def newest_run(runs_dir: Path | str, file: str) -> Path:
    """The newest `runs_dir/<run>/file`, by the time in the run's name and then by the file's age.

    Raises UserError if no run has such a file.
    """
    found = [p for p in Path(runs_dir).glob(f"*/{file}") if p.is_file()]
    if not found:
        raise UserError(
            f"No run in {runs_dir}/ has a {file} yet; train first (python train.py), name a file, "
            "or try everything on drawn faces (make demo)."
        )
    return max(found, key=lambda p: (p.parent.name[:15], p.stat().st_mtime))


def similarity_transform(points: np.ndarray, template: np.ndarray = TEMPLATE) -> np.ndarray:
    """The least-squares similarity (rotation, scale, translation) that takes points to a template.

    `points` (..., k, 2) in pixels, `template` (k, 2); returns (..., 2, 3) float64 matrices that
    take picture coordinates to template coordinates, never with a reflection. In two dimensions
    there is a closed form of Umeyama's solution ("Least-squares estimation of transformation
    parameters between two point patterns", 1991). Points that all coincide have no scale; they give
    a matrix of zeros.
    """
    points = np.asarray(points, dtype=np.float64)
    template = np.asarray(template, dtype=np.float64)
    centre = points.mean(-2, keepdims=True)
    target = template.mean(-2, keepdims=True)
    x, y = np.moveaxis(points - centre, -1, 0)
    u, v = np.moveaxis(template - target, -1, 0)
    spread = (x * x + y * y).sum(-1)
    spread = np.where(spread > 0, spread, np.inf)
    a = (x * u + y * v).sum(-1) / spread  # scale * cos(angle)
    b = (x * v - y * u).sum(-1) / spread  # scale * sin(angle)
    linear = np.stack([np.stack([a, -b], -1), np.stack([b, a], -1)], -2)
    shift = target[..., 0, :] - (linear @ centre[..., 0, :, None])[..., 0]
    shift = np.where(np.isfinite(spread)[..., None], shift, 0.0)
    return np.concatenate([linear, shift[..., None]], -1)


def warp_face(image: np.ndarray, matrix: np.ndarray, size: int = FACE_SIZE) -> np.ndarray:
    """Cut a (size, size, 3) face out of an (H, W, 3) uint8 picture: bilinear, zeros outside."""
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
