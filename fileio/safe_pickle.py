"""A pickle of two lists read without trusting it: nothing that it names is ever imported or called.

InsightFace's *.bin test sets are pickles of (list of JPEG bytes, list of bool), written by Python
2 or 3, some with numpy's scalars and arrays in place of bools, bytes or lists. What such files
name is answered by the stand-ins below, which do no more than keep bytes; all else is refused.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
from typing import IO, Any, ClassVar

import numpy as np


class _Bytes:
    """In place of bytes, bytearray and _codecs.encode, by which older protocols write bytes."""

    def __init__(self, text: Any = b"", encoding: Any = "latin1"):
        if isinstance(text, _Bytes):  # bytearray(bytes), as protocols 3 and 4 write it
            text = text.text
        if not isinstance(text, (str, bytes, bytearray)) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("it makes bytes of something that is no text")
        self.text = text

    # Each stand-in has this method, so that a pickle's BUILD cannot set attributes of the class.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives bytes a state")


class _Dtype:
    """In place of numpy.dtype: truth values, whole numbers, objects."""

    spec = "?"

    def __init__(self, spec: Any, *_: Any):
        spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
        if not isinstance(spec, str) or not re.fullmatch(
            r"[|<=]?([iu][1248]|b1|\?|bool|O8?)", spec
        ):
            raise pickle.UnpicklingError(f"it has numpy values of type {str(spec)[:20]!r}")
        self.spec = spec

    def __setstate__(self, state: Any) -> None:
        if state[1] in (b">", ">"):
            raise pickle.UnpicklingError("it has numpy values in big-endian order")


class _Array:
    """In place of numpy.ndarray and the functions that rebuild one."""

    dtype: Any = None
    raw: Any = None

    def __init__(self, *arguments: Any):
        # _frombuffer(bytes, dtype, shape, order); _reconstruct(...) is filled in by its state
        if len(arguments) == 4 and isinstance(arguments[1], _Dtype):
            self.raw, self.dtype = arguments[:2]

    def __setstate__(self, state: Any) -> None:
        _, _, self.dtype, _, self.raw = state


class _Scalar:
    """In place of numpy's scalar(dtype, bytes): a plain bool or int."""

    def __init__(self, dtype: _Dtype, raw: Any):
        self.dtype, self.raw = dtype, raw

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives a number a state")


_STAND_INS: dict[tuple[str, str], type] = {
    ("_codecs", "encode"): _Bytes,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
}
for _module in ("builtins", "__builtin__"):  # Python 3 and 2
    _STAND_INS |= {(_module, "bytes"): _Bytes, (_module, "bytearray"): _Bytes}
for _core in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _Array
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _Scalar
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _Array


class _Unpickler(pickle._Unpickler):
    """Python's own machine: that in C takes 32 GB for a memo of one number (LONG_BINPUT 2^31)."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run anything")
        return _STAND_INS[module, name]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has a dict or a set")

    def _load_bytearray8(self) -> None:
        # Python's own sets memory aside for as many bytes as the pickle claims.
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(min(size, sys.maxsize))
        if len(data) < size:
            raise pickle.UnpicklingError("it ends within a bytearray")
        self.append(bytearray(data))

    # Neither is needed; keys of one hash would keep a dict or a set busy for hours.
    dispatch: ClassVar = pickle._Unpickler.dispatch | dict.fromkeys(b"}dsu\x8f\x90\x91", _refuse)
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8


class _Lists:
    """Makes plain lists of what the machine left, of no more bytes than the file has.

    The stand-ins merely keep what they are given: a pickle can name one string a million times.
    """

    def __init__(self, size: int):
        self.left = size
        self.made: dict[int, bytes] = {}  # by the identity of what they were made of

    def spend(self, size: int) -> None:
        """Take from what may still be made."""
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError("it repeats itself until it is larger than its file")

    def items(self, part: Any) -> list[Any]:
        """A list of the values of a list, a tuple or an array."""
        if isinstance(part, _Array) and isinstance(part.dtype, _Dtype):
            if "O" not in part.dtype.spec:
                return self.numbers(part)
            part = part.raw
        if not isinstance(part, (list, tuple)):
            raise pickle.UnpicklingError(f"it has a {_kind(part)} for a list")
        self.spend(len(part))
        return [self.leaf(item) for item in part]

    def numbers(self, part: _Array | _Scalar) -> list[Any]:
        """The values of an array of truth values or whole numbers."""
        raw = self.plain(part.raw)
        self.spend(len(raw))
        return np.frombuffer(raw, part.dtype.spec).tolist()

    def plain(self, raw: Any) -> bytes:
        """The bytes that a value of any kind of bytes means."""
        if isinstance(raw, bytes):
            return raw
        if id(raw) in self.made:
            return self.made[id(raw)]
        text = raw.text if isinstance(raw, _Bytes) else raw
        if not isinstance(text, (str, bytes, bytearray)):
            raise pickle.UnpicklingError(f"it has a {_kind(raw)} for bytes")
        self.spend(len(text))
        self.made[id(raw)] = text.encode("latin1") if isinstance(text, str) else bytes(text)
        return self.made[id(raw)]

    def leaf(self, item: Any) -> bytes | bool | int:
        """One value of a list."""
        if isinstance(item, _Scalar):
            (item,) = self.numbers(item)
        elif isinstance(item, _Array):
            item = self.plain(item.raw)
        elif isinstance(item, (_Bytes, bytearray)):
            item = self.plain(item)
        if not isinstance(item, (bytes, bool, int)):
            raise pickle.UnpicklingError(f"it has a {_kind(item)} in a list")
        if isinstance(item, int) and item.bit_length() > 64:
            raise pickle.UnpicklingError("it has a number of more than 64 bits")
        return item


def _kind(value: Any) -> str:
    name = type(value).__name__
    return name[1:].lower() if name.startswith("_") else name


def load_two_lists(file: IO[bytes]) -> tuple[list[Any], list[Any]]:
    """Read a pickle of two lists (or numpy arrays) of bytes, bools and whole numbers.

    Takes a few times the memory of the file. Raises pickle.UnpicklingError, whose text says what
    the pickle asks for or holds instead.
    """
    data = file.read()
    lists = _Lists(len(data))
    try:
        # From memory: a file object would set memory aside for as many bytes as a pickle claims.
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise pickle.UnpicklingError(f"it holds a {_kind(value)}, not a pair of lists")
        return lists.items(value[0]), lists.items(value[1])
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # corrupt bytes can raise anything
        raise pickle.UnpicklingError(f"it is no whole pickle ({type(error).__name__})") from None
