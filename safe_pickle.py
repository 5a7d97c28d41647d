"""A pickle of two lists read without trusting it: nothing that it names is ever imported or called.

InsightFace's *.bin test sets are pickles of (list of JPEG bytes, list of bool), written by Python
2 or 3, some with numpy's scalars and arrays in place of bools, bytes or lists. What such files
name is answered by the stand-ins below, which do no more than keep bytes; all else is refused.
"""

from __future__ import annotations

import pickle
import re
from typing import IO, Any

import numpy as np


class _Bytes:
    """In place of bytes, bytearray and _codecs.encode, by which older protocols write bytes."""

    def __new__(cls, text: Any = b"", encoding: Any = "latin1") -> bytes:
        if isinstance(text, str) and encoding in ("latin1", "latin-1"):
            return text.encode("latin1")
        if isinstance(text, (bytes, bytearray)):
            return bytes(text)
        raise pickle.UnpicklingError("it makes bytes of something that is no text")

    # Each stand-in has this method, so that a pickle's BUILD cannot set attributes of the class.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives bytes a state")


class _Dtype:
    """In place of numpy.dtype: truth values, whole numbers, objects."""

    spec = "?"

    def __init__(self, spec: Any, *_: Any):
        self.spec = spec.decode("latin1") if isinstance(spec, bytes) else str(spec)
        if not re.fullmatch(r"[|<=]?([iu][1248]|b1|\?|bool|O8?)", self.spec):
            raise pickle.UnpicklingError(f"it has numpy values of type {self.spec[:20]!r}")

    def __setstate__(self, state: Any) -> None:
        if state[1] in (b">", ">"):
            raise pickle.UnpicklingError("it has numpy values in big-endian order")


class _Array:
    """In place of numpy.ndarray and the functions that rebuild one."""

    items: list[Any] | None = None
    raw: bytes | None = None

    def __init__(self, *arguments: Any):
        # _frombuffer(bytes, dtype, shape, order); _reconstruct(...) is filled in by its state
        if len(arguments) == 4 and isinstance(arguments[1], _Dtype):
            self.__setstate__((1, arguments[2], arguments[1], False, arguments[0]))

    def __setstate__(self, state: Any) -> None:
        _, _, dtype, _, raw = state
        if "O" in dtype.spec:
            self.items = list(raw)
        else:
            self.items, self.raw = np.frombuffer(raw, dtype.spec).tolist(), bytes(raw)


class _Scalar:
    """In place of numpy's scalar(dtype, bytes): a plain bool or int."""

    def __new__(cls, dtype: _Dtype, raw: bytes) -> Any:
        return np.frombuffer(raw, dtype.spec).item()

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run anything")
        return _STAND_INS[module, name]


def _items(part: Any) -> list[Any]:
    part = part.items if isinstance(part, _Array) else part
    if not isinstance(part, (list, tuple)):
        raise pickle.UnpicklingError(f"it has a {type(part).__name__} for a list")
    return [_leaf(item) for item in part]


def _leaf(item: Any) -> bytes | bool | int:
    item = item.raw if isinstance(item, _Array) else item
    if not isinstance(item, (bytes, bytearray, bool, int)):
        raise pickle.UnpicklingError(f"it has a {type(item).__name__} in a list")
    return bytes(item) if isinstance(item, bytearray) else item


def load_two_lists(file: IO[bytes]) -> tuple[list[Any], list[Any]]:
    """Read a pickle of two lists (or numpy arrays) of bytes, bools and whole numbers.

    Raises pickle.UnpicklingError, whose text says what the pickle asks for or holds instead.
    """
    try:
        value = _Unpickler(file, encoding="bytes").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes mean anything, and raise anything
        raise pickle.UnpicklingError(f"it is no whole pickle ({type(error).__name__})") from None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, not a pair of lists")
    return _items(value[0]), _items(value[1])
