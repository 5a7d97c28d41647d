"""Pickles by Python 2 and 3 as those wrote them, and pickles that want to run something."""

import collections
import io
import os
import pickle
import struct
import subprocess

import numpy as np
import pytest

from fileio.safe_pickle import load_two_lists
from tests.helpers.bounded import within

IMAGES = [b"\xff\xd8a\x00", b"", b"\xe9\n", b"x" * 300]
SAME = [True, False]


def load(data: bytes):
    return load_two_lists(io.BytesIO(data))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "same", [SAME, [np.bool_(True), np.bool_(False)], np.array(SAME), [1, 0], np.array([1, 0])]
)
def test_every_protocol_and_kind_of_bool(protocol, same):
    assert load(pickle.dumps((IMAGES, same), protocol)) == (IMAGES, SAME)
    kept_as_lists = [IMAGES, same]
    assert load(pickle.dumps(kept_as_lists, protocol)) == (IMAGES, SAME)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_images_as_arrays_and_bytearrays(protocol):
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    columns = [array[:, None] for array in arrays]  # the shape that cv2.imencode once gave
    for images in (arrays, columns, [bytearray(i) for i in IMAGES], np.array(IMAGES, object)):
        assert load(pickle.dumps((images, SAME), protocol)) == (IMAGES, SAME)


@pytest.mark.parametrize(
    "data",
    [  # cPickle.dumps((['\xff\xd8a', 'b\n'], [True]), 0 to 2) of Python 2.7
        b"((lp1\nS'\\xff\\xd8a'\np2\naS'b\\n'\np3\na(lp4\nI01\natp5\n.",
        b"(]q\x01(U\x03\xff\xd8aq\x02U\x02b\nq\x03e]q\x04I01\natq\x05.",
        b"\x80\x02]q\x01(U\x03\xff\xd8aq\x02U\x02b\nq\x03e]q\x04\x88a\x86q\x05.",
    ],
)
def test_python_2(data):
    assert load(data) == ([b"\xff\xd8a", b"b\n"], [True])


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_python_2_with_numpys_bool(core):
    state = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    dtype = b"cnumpy\ndtype\n(U\x02b1K\x00K\x01tR" + state
    scalar = b"c" + core + b".multiarray\nscalar\n(" + dtype + b"U\x01\x01tR"
    assert load(b"\x80\x02](U\x01aU\x01be](" + scalar + b"e\x86.") == ([b"a", b"b"], [True])


class Runs:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"\.system"),
        (eval, r"\.eval"),
        (exec, r"\.exec"),
        (getattr, r"\.getattr"),
        (subprocess.Popen, r"\.Popen"),
        (np.load, r"numpy\.load"),
        (collections.OrderedDict, r"collections\.OrderedDict"),
        (pickle.loads, r"pickle\.loads"),
    ],
)
def test_refused_by_name_and_not_run(tmp_path, monkeypatch, protocol, function, name):
    monkeypatch.chdir(tmp_path)
    argument = "touch owned" if function is os.system else "open('owned', 'w')"
    data = pickle.dumps(([b"a", b"b"], [Runs(function, argument)]), protocol)
    with pytest.raises(pickle.UnpicklingError, match=f"it asks for .*{name}, which could run"):
        load(data)
    assert not list(tmp_path.iterdir())


def test_a_class_is_refused_by_name():
    with pytest.raises(pickle.UnpicklingError, match="Runs"):
        load(b"\x80\x02ctest_safe_pickle\nRuns\n)\x81.")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([IMAGES, [1.0]], "a float in a list"),
        ([IMAGES, [None]], "a NoneType in a list"),
        ([IMAGES, ["yes"]], "a str in a list"),
        ([[IMAGES], SAME], "a list in a list"),
        ([IMAGES, {1: 2}], "it has a dict"),
        ([IMAGES, b"yes"], "a bytes for a list"),
        ([IMAGES, np.array([1.5])], "numpy values of type 'f8'"),
        ([IMAGES, np.array([1], ">i8")], "big-endian"),
        ([IMAGES, np.array([object()])], r"asks for __builtin__\.object"),
        ([IMAGES], "not a pair of lists"),
        (7, "it holds a int, not a pair"),
    ],
)
def test_other_values_are_refused_by_name(value, words):
    with pytest.raises(pickle.UnpicklingError, match=words):
        load(pickle.dumps(value, 2))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04",
        b"no pickle",
        pickle.dumps((IMAGES, SAME))[:-20],
        b"\x80\x02c_codecs\nencode\n}(X\x01\x00\x00\x00aK\x01ub.",  # gives it an attribute
        b"\x80\x02cnumpy\nndarray\n}U\x05itemsK\x01sb.",
        b"\x80\x02N}U\x05itemsK\x01s\x86b.",
        b"\x80\x02c_codecs\nencode\nJ\x00\x00\x00\x40\x85R.",  # bytes(2 ** 30)
        b"\x80\x02cnumpy.core.multiarray\nscalar\n)R.",
        b"\x80\x02cnumpy\ndtype\n)\x81.",
        b"\x80\x02cnumpy\nndarray\n)\x81]\x86.",
        b"\x80\x02P0\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",  # bytes longer than any memory
    ],
)
def test_corrupt_or_crafted_bytes_end_in_one_error(data):
    with pytest.raises(pickle.UnpicklingError):
        load(data)


def counted(number, code="<i"):
    return struct.pack(code, number)


TEXT = b"X" + counted(4_000_000) + bytes(4_000_000)  # memoized as 0 below
BOMBS = {
    # C's unpickler would take 32 GB for the memo entry that these name.
    "LONG_BINPUT": (b"\x80\x02]r\xff\xff\xff\x7f]\x86.", ([], [])),
    "PUT": (b"]p2147483647\n]\x86.", ([], [])),
    "LONG_BINGET": (b"\x80\x02j\xff\xff\xff\x7f]\x86.", None),
    "FRAME": (b"\x80\x04\x95" + counted(1 << 60, "<Q") + b"]]\x86.", ([], [])),
    "BINBYTES8": (b"\x80\x04\x8e" + counted(1 << 40, "<Q") + b"]]\x86.", None),
    "BYTEARRAY8": (b"\x80\x05\x96" + counted(1 << 60, "<Q") + b"]]\x86.", None),
    "BYTEARRAY8 of a gigabyte": (b"\x80\x05\x96" + counted(1 << 30, "<Q") + b"]]\x86.", None),
    "BINUNICODE8": (b"\x80\x04\x8d" + counted(1 << 62, "<Q") + b"]]\x86.", None),
    "LONG4": (b"\x80\x02]\x8b" + counted(2**31 - 1) + b"a]\x86.", None),
    "a long number": (b"\x80\x02]\x8b" + counted(9999) + b"\x7f" * 9999 + b"a]\x86.", None),
    "digits": (b"](L" + b"9" * 100_000 + b"L\ne]\x86.", None),
    "a text encoded again and again": (
        b"\x80\x02" + TEXT + b"q\x00](" + b"c_codecs\nencode\nh\x00\x85R" * 1000 + b"e]\x86.",
        None,
    ),
    "an array of a text again and again": (
        (b"\x80\x02" + TEXT + b"q\x00]cnumpy\ndtype\n(X\x02\0\0\0i1K\0K\1tRq\1" + b"(")
        + b"cnumpy.core.numeric\n_frombuffer\n(c_codecs\nencode\nh\0\x85Rh\1K\0X\1\0\0\0CtR" * 500
        + b"e]\x86.",
        None,
    ),
    "lists in lists": (b"]" * 1_000_000 + b"a" * 999_999 + b"]\x86.", None),
    "tuples in tuples": (b")" + b"\x85" * 1_000_000 + b"]\x86.", None),
    "a list in itself": (b"]q\0(" + b"h\0" * 1000 + b"e]\x86.", None),
    "marks": (b"(" * 1_000_000 + b"]]\x86.", ([], [])),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_takes_little_memory(name):
    data, expected = BOMBS[name]
    if expected is None:
        with pytest.raises(pickle.UnpicklingError) as error:
            within(150, load, data)
        assert "MemoryError" not in str(error.value)
    else:
        assert within(150, load, data) == expected


def test_images_named_twice_are_no_bomb():
    """A face of several pairs may be one object: its bytes count once."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for one in (b"\xff" * 5000, bytearray(b"\xff" * 5000)):
            data = pickle.dumps(([one] * 100, [True] * 50), protocol)
            assert load(data) == ([bytes(one)] * 100, [True] * 50)


def test_any_corruption_ends_in_one_error_or_in_lists():
    rng = np.random.default_rng(0)
    complete = pickle.dumps((IMAGES, np.array(SAME)), 4)
    for _ in range(2000):
        data = bytearray(complete)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            images, same = load(bytes(data))
        except pickle.UnpicklingError:
            continue
        assert all(isinstance(value, (bytes, bool, int)) for value in images + same)
