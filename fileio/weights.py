"""What the weights in a checkpoint must be, before a network is made of them.

    check_packing("best.pt")  # UserError where it unpacks to more than it is
    check_weights(state, "best.pt")  # UserError where a tensor is not finite, or not all there

`torch.load(weights_only=True)` runs no code that a file names; this is about its numbers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import UserError

_PLAIN = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32}


def check_packing(path: Path | str) -> None:
    """Raise UserError where a checkpoint's tensors are compressed, as PyTorch never writes them.

    A compressed one of a megabyte can unpack to a gigabyte. Files that are no zip pass: older
    checkpoints are none, and what is no checkpoint is told by who reads it.
    """
    path = Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError):
        return  # damaged: PyTorch will say so
    if unpacked > path.stat().st_size:
        raise UserError(
            f"{path} is compressed, or claims more than it holds, as PyTorch's own files never "
            "are; give another one."
        )


def check_weights(state: Mapping[Any, Any], path: Path | str) -> None:
    """Raise UserError unless a state dict holds named tensors of finite numbers, all in the file.

    A tensor may be a view that repeats a few numbers of its file (stride 0): a network of its shape
    could take any amount of memory.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            wrong = "is no tensor"
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _PLAIN:
            wrong = "is no plain tensor"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            wrong = "has fewer numbers in the file than it claims"
        elif not tensor.isfinite().all():
            wrong = "has numbers that are not finite: its training had diverged"
        else:
            continue
        raise UserError(
            f"The weights in {path} cannot be used: {str(name)[:80]} {wrong}; give another "
            "checkpoint."
        )
