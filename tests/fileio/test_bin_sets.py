"""bin_sets.py: InsightFace's .bin files both ways, and files that are not one."""

import os
import pickle

import numpy as np
import pytest

from fileio import bin_sets
from fileio.recordio import RecordError
from tests.helpers.record_files import (
    JPEGS,
)


def test_bin_both_ways_as_insightface_reads_it(tmp_path):
    same = [True, False]
    bin_sets.write_bin(tmp_path / "lfw.bin", [bytearray(JPEGS[0]), *JPEGS[1:4]], np.array(same))
    with (tmp_path / "lfw.bin").open("rb") as file:
        assert pickle.load(file, encoding="bytes") == (JPEGS[:4], same)
    images, read = bin_sets.read_bin(tmp_path / "lfw.bin")
    assert images == JPEGS[:4] and read.dtype == bool and read.tolist() == same
    with pytest.raises(RecordError, match="3 images do not make 2 pairs"):
        bin_sets.write_bin(tmp_path / "x.bin", JPEGS[:3], same)
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (([b"a"] * 3, [True, False]), "has 3 images for 2 pairs"),
        (([], []), "has 0 images for 0 pairs"),
        (([b"a", 7], [True]), "has '7' for an image"),
        (([b"a", b"b"], [10**5000]), "a number of more than 64 bits"),
        (([b"a", b"b"], [2]), "has '2' for an image or for True or False"),
        ({"a": 1}, "it has a dict"),
    ],
)
def test_bin_that_is_not_one(tmp_path, content, words):
    path = tmp_path / "测试.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(RecordError, match=words) as caught:
        bin_sets.read_bin(path)
    assert str(path) in str(caught.value)


def test_bin_that_is_corrupt_or_hostile(tmp_path):
    path = tmp_path / "lfw.bin"
    with pytest.raises(RecordError, match="There is no"):
        bin_sets.read_bin(path)
    for content in (b"", b"JPEG", pickle.dumps((JPEGS[:2], [True]))[:-40]):
        path.write_bytes(content)
        with pytest.raises(RecordError, match="is not a test set, a pickle of"):
            bin_sets.read_bin(path)
    path.write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "owned"))
    with pytest.raises(RecordError, match=r"asks for posix\.system.* a source you trust"):
        bin_sets.read_bin(path)
    assert not (tmp_path / "owned").exists()
