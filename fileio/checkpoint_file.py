"""Checkpoint files: complete or not there, with a checksum, and read as untrusted input.

    save_checkpoint("last.pt", {"config": {...}, "model": model.state_dict(), "epoch": 3})
    checkpoint = load_checkpoint("last.pt")
    check_weights(checkpoint["model"], "last.pt")
    named_tensors(load_checkpoint("theirs.ckpt", third_party=True))

A checkpoint is a dict of state dicts, numbers and strings that `torch.load(path,
weights_only=True)` reads, so it runs no code that the file names. PyTorch's container is a zip, but
its reader skips the zip's own CRCs; so the zip's comment, which readers ignore, holds a SHA-256:

    zip archive | comment length (2 bytes, little-endian): 71 | "sha256:" | 64 hex digits

The digest is of all bytes before the comment, its length included.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fileio.safe_files import atomic_write
from utils import UserError, describe_os_error, is_out_of_memory

_SEAL = re.compile(rb"sha256:([0-9a-f]{64})\Z")
_SEAL_BYTES = len("sha256:") + 64

# Types of weights and counters. Complex, quantised or float8 tensors are in no network of ours.
_PLAIN_TYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
}


class CorruptCheckpointError(UserError):
    """A file that will never load: missing, corrupt or no checkpoint. An older one may load."""


# ------------------------------------------------------------------------------ writing


def save_checkpoint(
    path: Path | str,
    checkpoint: dict[str, Any],
    before_rename: Callable[[], None] = lambda: None,
) -> None:
    """Write a dict of state dicts, numbers and strings; `path` never names an incomplete file.

    `before_rename` is called when the new file is complete and on disk, still under a temporary
    name. Equal checkpoints give equal bytes.
    """
    with atomic_write(path, "w+b", before_rename) as file:
        torch.save(_without_shared_objects(checkpoint), file)
        # The last two bytes of a zip without a comment are the comment's length, 0.
        file.seek(-2, os.SEEK_END)
        if file.read(2) != b"\0\0":
            raise RuntimeError("torch.save wrote no zip file, or one with a comment")
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_BYTES.to_bytes(2, "little"))
        digest = _sha256(file, file.tell())
        file.write(b"sha256:" + digest.encode())


def _without_shared_objects(value: Any) -> Any:
    """A copy in which no container is used twice, and equal strings are one object.

    Pickle writes an object that it has seen before as a reference. Which objects are shared differs
    between a resumed run and an unbroken one, though their values are equal; the files should be.
    """
    if type(value) is str:
        return sys.intern(value)
    if type(value) is dict:
        return {
            _without_shared_objects(key): _without_shared_objects(entry)
            for key, entry in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(map(_without_shared_objects, value))
    return value


# ------------------------------------------------------------------------------ reading


def load_checkpoint(
    path: Path | str, device: torch.device | str = "cpu", *, third_party: bool = False
) -> dict[str, Any]:
    """Read a checkpoint; it may hold only tensors and plain values (`weights_only=True`).

    With `third_party` it may be a .safetensors file, a TorchScript archive or a pickled module, and
    objects of any class are read as their attributes alone. A file with a checksum must match it;
    third-party files have none. Raises CorruptCheckpointError if the file is missing, corrupt or no
    checkpoint, UserError if it cannot be read at the moment.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptCheckpointError(f"There is no checkpoint at {path}.")
    try:
        if third_party and path.suffix.lower() == ".safetensors":
            return load_file(path, str(device))
        with path.open("rb") as file:
            _check_seal(file, path)
            _check_not_compressed(path)
            if third_party:
                checkpoint = _load_inert(_without_program(file), device)
            else:
                checkpoint = torch.load(file, map_location=device, weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises half a dozen types for corrupt files
        reason = _describe_load_error(error)
        if is_out_of_memory(error):
            raise UserError(f"{path} does not fit into memory ({reason}); free some.") from None
        # A network disk that is away for a moment does not make the file corrupt: a resumed run
        # would discard it and lose hours. EINVAL is no fault of the disk: torch seeks to positions
        # outside a file that is cut short.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(f"{path} cannot be read: {describe_os_error(error)}") from None
        raise CorruptCheckpointError(
            f"{path} is corrupt or not a PyTorch checkpoint ({reason}); give another one."
        ) from None
    checkpoint = getattr(checkpoint, "attributes", checkpoint)
    if not isinstance(checkpoint, dict):
        raise CorruptCheckpointError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dict."
        )
    return checkpoint


def _describe_load_error(error: Exception) -> str:
    """What is wrong, without PyTorch's advice to load the file with weights_only=False."""
    if name := re.search(r"(?:GLOBAL|global|function) (\S+\.\S+)", str(error)):
        return f"it asks for {name[1][:80]}, which could run anything"
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    reason = "no tensors and plain values" if "weights_only" in text else text.partition("\n")[0]
    return f"{type(error).__name__}: {reason[:200]}"


# ------------------------------------------------------------------------------ third-party files


class _Inert:
    """In place of every class or function that a third-party file names: nothing is run."""

    attributes: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # a dict of a class of its own, such as Lightning's AttributeDict


MAX_CLASSES = 200  # that a file may name


def _load_inert(file: IO[bytes], device: torch.device | str) -> Any:
    """`torch.load(weights_only=True)` with `_Inert` for each name that it would refuse."""
    inert: list[Any] = []
    while True:
        file.seek(0)
        try:
            with torch.serialization.safe_globals(inert):
                return torch.load(file, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if not refused or len(inert) >= MAX_CLASSES:
                raise
            inert.append((_Inert, refused[1]))


def _without_program(file: IO[bytes]) -> IO[bytes]:
    """A TorchScript archive as a plain checkpoint of its tensors; other files as they are.

    torch.jit.load would run the program in it.
    """
    if not zipfile.is_zipfile(file):
        return file
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if not any(name.endswith("/constants.pkl") for name in names):
            return file
        kept = [
            n for n in names if re.fullmatch(r"[^/]+/(data\.pkl|data/\d+|version|byteorder)", n)
        ]
        plain = io.BytesIO()
        with zipfile.ZipFile(plain, "w") as copy:
            for name in kept:
                copy.writestr(name, archive.read(name))
    return plain


# Components of names that wrappers and pickled modules add.
_WRAPPERS = {"_parameters", "_buffers", "_modules"}
_WRAPPERS |= {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MAX_DEPTH = 50  # containers inside containers


def named_tensors(checkpoint: Mapping[Any, Any]) -> dict[str, Tensor]:
    """All tensors in a checkpoint's dicts and objects, {"state_dict.module.conv1.weight": tensor}.

    Names are paths from the outermost dict; what torch.compile and pickled modules add is left out.
    """
    tensors: dict[str, Tensor] = {}
    visited: set[int] = set()  # a pickle may refer to one dict many times

    def visit(path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, Tensor):
            parts = ".".join(path).split(".")
            tensors.setdefault(".".join(part for part in parts if part not in _WRAPPERS), value)
            return
        value = value.attributes if isinstance(value, _Inert) else value
        if isinstance(value, Mapping) and id(value) not in visited and len(path) < MAX_DEPTH:
            visited.add(id(value))
            for key, entry in value.items():
                visit((*path, str(key)[:200]), entry)

    visit((), checkpoint)
    return tensors


# ------------------------------------------------------------------------------ checks


def _check_seal(file: IO[bytes], path: Path) -> None:
    """Compare a file that carries a checksum with it; afterwards the position is 0."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SEAL_BYTES))
    seal = _SEAL.match(file.read(_SEAL_BYTES))
    if seal and _sha256(file, size - _SEAL_BYTES) != seal[1].decode():
        raise CorruptCheckpointError(
            f"{path} is corrupt (its checksum does not match); give another one."
        )
    file.seek(0)


def _sha256(file: IO[bytes], size: int) -> str:
    """The digest of the first `size` bytes; afterwards the position is `size`."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(size, 1 << 20))
        if not block:
            break
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _check_not_compressed(path: Path) -> None:
    """Raise UserError if a checkpoint's tensors are compressed, as PyTorch never writes them.

    A compressed file of a megabyte can unpack to a gigabyte (of zeros, say). Files that are no zip
    pass: PyTorch's format before 1.6 is none, and torch.load finds out what is no checkpoint.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # The program in a TorchScript archive is compressed, and never read here.
            unpacked = sum(i.file_size for i in archive.infolist() if "/code/" not in i.filename)
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError):
        return  # corrupt: torch.load will say so
    if unpacked > path.stat().st_size:
        raise UserError(
            f"{path} is compressed, or claims more than it holds, as PyTorch's own files never "
            "do; give another one."
        )


def check_weights(state: Mapping[Any, Any], path: Path | str) -> None:
    """Raise UserError unless a state dict holds named tensors of finite numbers, stored in full.

    `torch.load(weights_only=True)` guards against code; this guards against numbers that would
    fill the memory or make every result NaN.
    """
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            wrong = "is no tensor"
        elif tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _PLAIN_TYPES:
            wrong = "is no plain tensor"
        elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            # A view of stride 0 repeats a few stored numbers: a file of a kilobyte can hold a
            # tensor of shape (1000000, 100000), and a network of that shape would take 400 GB.
            wrong = "has fewer numbers in the file than it claims"
        elif not tensor.isfinite().all():
            wrong = "has numbers that are not finite: its training had diverged"
        else:
            continue
        raise UserError(
            f"The weights in {path} cannot be used: {str(name)[:80]} {wrong}; give another "
            "checkpoint."
        )
