"""A restricted unpickler for two lists: nothing that the pickle names is imported or called.

    with open("lfw.bin", "rb") as file:
        images, is_same = load_two_lists(file)

A pickle is a program for a stack machine. It can name any function (GLOBAL), call it (REDUCE) and
set attributes (BUILD), so `pickle.load` on an untrusted file runs whatever its author wants.

InsightFace's *.bin test sets are pickles of (list of JPEG bytes, list of bool), written by Python 2
or 3, some with numpy's scalars and arrays in place of bools, bytes or lists. The few names that
such files need are answered by the stand-in classes below, which only keep the bytes they are
given; every other name is refused. What is on the stack at the end is then turned into plain lists
by `_Lists`, within limits on memory.
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
    """In place of bytes, bytearray and _codecs.encode.

    Protocols 0 to 2 have no bytes: Python 3 writes b"\\xe9" as _codecs.encode("\\u00e9", "latin1").
    """

    def __init__(self, text: Any = b"", encoding: Any = "latin1"):
        if isinstance(text, _Bytes):  # bytearray(bytes), as protocols 3 and 4 write it
            text = text.text
        if not isinstance(text, (str, bytes, bytearray)) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("it makes bytes of something that is no text")
        self.text = text

    # Each stand-in has this method: without it, BUILD would set any attributes that the pickle
    # gives, methods included.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives bytes a state")


class _Dtype:
    """In place of numpy.dtype, of bools, integers or objects."""

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
        # _frombuffer(bytes, dtype, shape, order) is all of an array (protocol 5);
        # _reconstruct(type, shape, typecode) makes an empty one, filled by the state that follows.
        if len(arguments) == 4 and isinstance(arguments[1], _Dtype):
            self.raw, self.dtype = arguments[:2]

    def __setstate__(self, state: Any) -> None:
        _version, _shape, self.dtype, _is_fortran, self.raw = state


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
    """The unpickler written in Python: the one in C can be made to allocate without limit.

    Its memo is an array, so the 5 bytes of LONG_BINPUT 2^31 - 1 make it take 32 GB; here it is a
    dict.
    """

    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run anything")
        return _STAND_INS[module, name]

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has a dict or a set")

    def _load_bytearray8(self) -> None:
        # The library's own version allocates as many bytes as the pickle claims.
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(min(size, sys.maxsize))
        if len(data) < size:
            raise pickle.UnpicklingError("it ends within a bytearray")
        self.append(bytearray(data))

    # Opcodes of dicts and sets: EMPTY_DICT, DICT, SETITEM, SETITEMS, EMPTY_SET, ADDITEMS and
    # FROZENSET. No test set needs them, and keys that all have the same hash would take hours.
    dispatch: ClassVar = pickle._Unpickler.dispatch | dict.fromkeys(b"}dsu\x8f\x90\x91", _refuse)
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8


class _Lists:
    """Turns what the unpickler left into plain lists that take no more bytes than the file has.

    The stand-ins keep references, and a pickle can refer to one string of a megabyte a million
    times: so each byte that is made is taken from a budget.
    """

    def __init__(self, file_bytes: int):
        self.budget = file_bytes
        # {id of what it was made of: bytes}: one image in many pairs is made, and counted, once.
        self.made: dict[int, bytes] = {}

    def spend(self, size: int) -> None:
        """Take from the budget; UnpicklingError if it is used up."""
        self.budget -= size
        if self.budget < 0:
            raise pickle.UnpicklingError("it repeats itself until it is larger than its file")

    def list_of(self, value: Any) -> list[Any]:
        """The items of a list, a tuple or an array."""
        if isinstance(value, _Array) and isinstance(value.dtype, _Dtype):
            if "O" not in value.dtype.spec:
                return self.numbers_of(value)
            value = value.raw  # an array of objects keeps them in a list
        if not isinstance(value, (list, tuple)):
            raise pickle.UnpicklingError(f"it has a {_type_name(value)} for a list")
        self.spend(len(value))
        return [self.item_of(item) for item in value]

    def numbers_of(self, value: _Array | _Scalar) -> list[Any]:
        """The values of an array or a scalar of bools or integers."""
        raw = self.bytes_of(value.raw)
        self.spend(len(raw))
        return np.frombuffer(raw, value.dtype.spec).tolist()

    def bytes_of(self, value: Any) -> bytes:
        """The bytes that bytes, a bytearray, a string or their stand-in mean."""
        if isinstance(value, bytes):
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        text = value.text if isinstance(value, _Bytes) else value
        if not isinstance(text, (str, bytes, bytearray)):
            raise pickle.UnpicklingError(f"it has a {_type_name(value)} for bytes")
        self.spend(len(text))
        # Text stands for bytes of the same numbers, see _Bytes.
        self.made[id(value)] = text.encode("latin1") if isinstance(text, str) else bytes(text)
        return self.made[id(value)]

    def item_of(self, item: Any) -> bytes | bool | int:
        """One item of a list: an image's bytes, a bool or an integer."""
        if isinstance(item, _Scalar):
            (item,) = self.numbers_of(item)
        elif isinstance(item, _Array):  # an encoded image as an array of uint8
            item = self.bytes_of(item.raw)
        elif isinstance(item, (_Bytes, bytearray)):
            item = self.bytes_of(item)
        if not isinstance(item, (bytes, bool, int)):
            raise pickle.UnpicklingError(f"it has a {_type_name(item)} in a list")
        if isinstance(item, int) and item.bit_length() > 64:
            raise pickle.UnpicklingError("it has a number of more than 64 bits")
        return item


def _type_name(value: Any) -> str:
    """For messages: "list", or "array" for the stand-in _Array."""
    name = type(value).__name__
    return name[1:].lower() if name.startswith("_") else name


def load_two_lists(file: IO[bytes]) -> tuple[list[Any], list[Any]]:
    """Read a pickle of two lists (or numpy arrays) of bytes, bools and integers.

    Takes a few times the memory of the file. Raises pickle.UnpicklingError, whose text says what
    the pickle asks for or holds instead.
    """
    data = file.read()
    lists = _Lists(len(data))
    try:
        # From memory: when reading from a file, it allocates as many bytes as a pickle claims.
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise pickle.UnpicklingError(f"it holds a {_type_name(value)}, not a pair of lists")
        return lists.list_of(value[0]), lists.list_of(value[1])
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # corrupt bytes can raise anything
        reason = type(error).__name__
        raise pickle.UnpicklingError(f"it is no complete pickle ({reason})") from None
