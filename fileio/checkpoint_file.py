"""Checkpoints that can be trusted: whole, and with a checksum.

A checkpoint is a dict of state dicts, numbers and strings that `torch.load(path,
weights_only=True)` reads. PyTorch's container is a zip, but its reader skips the zip's own checks;
so the zip's comment, which readers pass over, holds the SHA-256 of all bytes before it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from fileio.safe_files import atomic_write
from fileio.weights import check_packing
from utils import UserError, describe_os_error, is_out_of_memory

_SEAL = re.compile(rb"sha256:([0-9a-f]{64})\Z")
_SEAL_SIZE = len("sha256:") + 64


class CorruptCheckpointError(UserError):
    """A file that is no whole checkpoint, whatever is tried; the one before it may be."""


def save_checkpoint(
    path: Path | str,
    checkpoint: dict[str, Any],
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a dict of state dicts, numbers and strings so that `path` is always a whole file."""
    with atomic_write(path, "w+b", before_rename) as file:
        torch.save(_plain(checkpoint), file)
        # A zip ends with the length of its comment, two bytes, and the comment.
        file.seek(-2, os.SEEK_END)
        if file.read(2) != b"\0\0":
            raise RuntimeError("torch.save wrote no zip file, or one with a comment")
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_SIZE.to_bytes(2, "little"))
        digest = _sha256(file, file.tell())
        file.write(b"sha256:" + digest.encode())


def _plain(value: Any) -> Any:
    """The same with no string or container twice, so that what is equal makes equal files.

    Pickle writes an object that it has seen as a reference; which ones a resumed run shares depends
    on what it loaded.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is dict:
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; its pickle may hold tensors and plain values only (`weights_only=True`).

    A file with a checksum must match it; third-party files have none. Raises CorruptCheckpointError
    if the file is missing, corrupt or no checkpoint, UserError if it cannot be read here and now.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpointError(f"There is no checkpoint at {path}.")
    try:
        with path.open("rb") as file:
            _check(file, path)
            check_packing(path)
            checkpoint = torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({reason}); free some.") from None
        # A disk that is away for a moment is no damage. Torch itself looks beyond the end (EINVAL).
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"{path} cannot be read: {describe_os_error(error)}") from None
        raise CorruptCheckpointError(
            f"{path} is damaged or not a PyTorch checkpoint ({reason}); give another one."
        ) from None
    if not isinstance(checkpoint, dict):
        raise CorruptCheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dict."
        )
    return checkpoint


def _sha256(file: IO[bytes], size: int) -> str:
    """Of the first `size` bytes; the file stands behind them afterwards."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(size, 1 << 20))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _check(file: IO[bytes], path: Path) -> None:
    """Hold a file that carries a checksum against it, and go back to its beginning."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_SIZE))
    seal = _SEAL.match(file.read(_SEAL_SIZE))
    if seal and _sha256(file, size - _SEAL_SIZE) != seal[1].decode():
        raise CorruptCheckpointError(
            f"{path} is damaged (its checksum does not match); give another one."
        )
    file.seek(0)
