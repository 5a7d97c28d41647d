"""Whether an ONNX file keeps to its folder: it may name other files that hold its weights.

    check_onnx("model.onnx")  # UserError where it names a file outside its folder

Such a name ("../../secret", "/etc/passwd", a link) would have the libraries that run models read
whatever it points to. The file is a protobuf message (onnx.proto): a key `number << 3 | kind`, then
a varint (kind 0), 8 or 4 bytes (1, 5) or a length and as many bytes (2). Only the fields on the way
to a tensor's `external_data` are looked into.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UserError

# What a message of each kind holds on the way to names of files: {field: kind of its message}.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},  # external_data: a key ("location", "offset", ...) and a value
}
MAX_DEPTH = 100  # messages in messages; protobuf's own limit
MAX_NAME = 5000  # bytes: no file system opens a longer name


def check_onnx(path: Path | str) -> list[Path]:
    """The files of weights that an ONNX file names, which must be there and in the same folder.

    Raises UserError where they are not, or where the file is no ONNX model.
    Reads the file's structure, not its tensors: memory does not grow with its size.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty, no ONNX model; give another --checkpoint.")
    folder = path.parent.resolve()
    targets = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for name in _locations(data, "model", 0, len(data)):
                # Links count as what they point to; the name as the libraries would join it.
                target = Path(os.path.realpath(folder / name))
                if not target.is_relative_to(folder) or not target.is_file():
                    raise UserError(
                        f"{path} keeps weights in {name[:100]!r}, which is no file in its own "
                        "folder; put all of a model's files into one, or give another --checkpoint."
                    )
                targets.add(target)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} is damaged or not an ONNX model ({error}); give another --checkpoint."
            ) from None
    return sorted(targets)


def _locations(data: Any, kind: str, start: int, stop: int, depth: int = 0) -> Iterator[str]:
    """The names of files in a message; ValueError where it is not one."""
    if depth > MAX_DEPTH:
        raise ValueError("it goes too deep")
    if kind == "entry":
        parts = {n: bytes(data[a:b]) for n, a, b in _fields(data, start, stop) if b - a < MAX_NAME}
        if parts.get(1) == b"location":
            yield parts.get(2, b"").decode("utf-8")
        return
    for number, begin, end in _fields(data, start, stop):
        inside = _INSIDE[kind].get(number)
        if inside:
            yield from _locations(data, inside, begin, min(end, stop), depth + 1)


def _fields(data: Any, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of the fields of a message that have a length."""
    while at < stop:
        key, at = _varint(data, at, stop)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at, stop)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(data, at, stop)
            yield key >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > stop:
            raise ValueError("a field goes beyond its end")


def _varint(data: Any, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise ValueError("a number is cut short")
