"""Whether the weight files that an ONNX model names are in its own folder.

    check_onnx("model.onnx")  # UserError if it names a file outside its folder

An ONNX model may keep its weights in other files ("external data") and names them inside. A name
such as "../../secret", "/etc/passwd" or a link would make the libraries that run models read
whatever it points to. So the file is searched for such names before any library opens it.

The file is a protobuf message (onnx.proto). A message is a sequence of fields; a field is

    key (varint): field number << 3 | wire type
    wire type 0: a varint
              1: 8 bytes
              2: length (varint) and as many bytes: a string, raw data or a message
              5: 4 bytes

A varint has 7 bits per byte, the lowest first; the top bit is set in all bytes but the last. Only
the fields that lead to a tensor's `external_data` are followed, by hand: protobuf would load all
tensors into memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UserError

# For each type of message: the fields that may lead to external data, {number: type of message}.
_NESTED_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external_data"},  # pairs of a key ("location", "offset", ...) and a value
}
MAX_MESSAGE_DEPTH = 100  # messages inside messages; protobuf's own limit
MAX_STRING_BYTES = 5000  # no file system opens a longer name


def check_onnx(path: Path | str) -> list[Path]:
    """The weight files that an ONNX model names; they must exist, in the model's own folder.

    Raises UserError if they do not, or if the file is no ONNX model. Reads the structure of the
    file, not its tensors: memory does not grow with its size.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty, no ONNX model; give another --checkpoint.")
    folder = path.parent.resolve()
    weight_files = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for name in _external_names(data, "model", 0, len(data)):
                # Joined as the libraries would; links are followed, or they would lead outside.
                target = Path(os.path.realpath(folder / name))
                if not target.is_relative_to(folder) or not target.is_file():
                    raise UserError(
                        f"{path} keeps weights in {name[:100]!r}, which is no file in its own "
                        "folder; put all of a model's files into one, or give another --checkpoint."
                    )
                weight_files.add(target)
        except (ValueError, OSError) as error:
            raise UserError(
                f"{path} is corrupt or not an ONNX model ({error}); give another --checkpoint."
            ) from None
    return sorted(weight_files)


def _external_names(
    data: Any, message_type: str, start: int, stop: int, depth: int = 0
) -> Iterator[str]:
    """The file names in the message at [start, stop); ValueError if it is none."""
    if depth > MAX_MESSAGE_DEPTH:
        raise ValueError("too many messages inside messages")
    if message_type == "external_data":
        strings = {
            number: bytes(data[begin:end])
            for number, begin, end in _fields_with_length(data, start, stop)
            if end - begin < MAX_STRING_BYTES
        }
        key, value = strings.get(1), strings.get(2, b"")
        if key == b"location":
            yield value.decode("utf-8")
        return
    nested = _NESTED_MESSAGES[message_type]
    for number, begin, end in _fields_with_length(data, start, stop):
        if number in nested:
            yield from _external_names(data, nested[number], begin, min(end, stop), depth + 1)


def _fields_with_length(data: Any, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each field of wire type 2 in the message at [start, stop)."""
    position = start
    while position < stop:
        key, position = _read_varint(data, position, stop)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            _, position = _read_varint(data, position, stop)
        elif wire_type == 1:
            position += 8
        elif wire_type == 5:
            position += 4
        elif wire_type == 2:
            length, position = _read_varint(data, position, stop)
            yield number, position, position + length
            position += length
        else:  # 3 and 4 are groups, which onnx.proto does not have
            raise ValueError(f"a field of wire type {wire_type}")
        if position > stop:
            raise ValueError("a field goes beyond its end")


def _read_varint(data: Any, position: int, stop: int) -> tuple[int, int]:
    """A number of at most 64 bits, and the position after it."""
    value = shift = 0
    while position < stop and shift < 70:  # ten bytes of 7 bits
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value & (1 << 64) - 1, position
    raise ValueError("a number is cut short")
