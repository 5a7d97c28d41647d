"""Galleries in .npz files: what numpy reads, memory maps, and files that are none."""

import io
import json
import zipfile

import numpy as np
import pytest

from evaluation.photo_gallery import (
    FACE_ARRAYS,
    SKIPPED_ARRAYS,
    PhotoGallery,
    open_gallery,
    save_gallery,
    select_rows,
)
from utils import UserError


def make_gallery(names=("a/1.jpg", "b/2.jpg", "3.jpg"), skipped=("x.jpg",), dimension=4):
    rng = np.random.default_rng(len(names))
    count, missing = len(names), len(skipped)
    return PhotoGallery(
        {"checksum": "c", "network": "r50"},
        np.array(names, dtype=str),
        np.array(["ok"] * count, dtype=str),
        rng.integers(0, 256, (count, 16)).astype(np.uint8),
        rng.normal(0, 1, (count, 4)).astype(np.float32),
        rng.normal(0, 1, (count, 5, 2)).astype(np.float32),
        rng.normal(0, 1, (count, dimension)).astype(np.float32),
        np.array(skipped, dtype=str),
        np.array(["no_face"] * missing, dtype=str),
        rng.integers(0, 256, (missing, 16)).astype(np.uint8),
    )


def assert_equal(a, b):
    assert a.made == b.made
    for name in (*FACE_ARRAYS, *SKIPPED_ARRAYS):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_a_gallery_comes_back_and_is_mapped(tmp_path):
    gallery, path = make_gallery(), tmp_path / "g.npz"
    save_gallery(path, gallery)
    opened = open_gallery(path)
    assert_equal(opened, gallery)
    assert isinstance(opened.embeddings, np.memmap)
    assert opened.embeddings.ctypes.data % 64 == 0  # else each search copies them
    assert opened.folders.tolist() == ["a", "b", ""]
    with np.load(path, allow_pickle=False) as stored:  # what others read
        assert np.array_equal(stored["embeddings"], gallery.embeddings)
        assert stored["names"].tolist() == ["a/1.jpg", "b/2.jpg", "3.jpg"]
    first = path.read_bytes()
    save_gallery(path, opened)  # over the file that is mapped
    assert path.read_bytes() == first
    save_gallery(path, make_gallery((), ("x.jpg",), 0))
    assert open_gallery(path).embeddings.shape == (0, 0)


def test_rows_are_selected_from_several():
    first, second = make_gallery(), make_gallery(("c/5.jpg", "longer/name/6.jpg"), ("y", "z"))
    none = make_gallery((), ("n",), 0)
    result = select_rows([first, none, second], np.array([4, 0]), np.array([3, 1]), {"new": 1})
    assert result.made == {"new": 1}
    assert result.names.tolist() == ["longer/name/6.jpg", "a/1.jpg"]
    assert np.array_equal(result.embeddings, [second.embeddings[1], first.embeddings[0]])
    assert result.skipped_names.tolist() == ["z", "n"]


def damage_member(data, member, value=None):
    """The .npz with one array replaced; None: left out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == f"{member}.npy":
                if value is None:
                    continue
                array = io.BytesIO()
                np.lib.format.write_array(array, value, allow_pickle=True)
                content = array.getvalue()
            new.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *((name, None) for name in ("made", *FACE_ARRAYS, *SKIPPED_ARRAYS)),
        ("embeddings", np.zeros((3, 4), np.float64)),
        ("embeddings", np.zeros((2, 4), np.float32)),
        ("embeddings", np.asfortranarray(np.zeros((3, 4), np.float32))),
        ("embeddings", np.array([{}] * 3)),
        ("names", np.array([{}, {}, {}])),
        ("names", np.zeros(3)),
        ("digests", np.zeros((3, 8), np.uint8)),
        ("points", np.zeros((3, 10), np.float32)),
        ("made", np.array("no json")),
        ("made", np.array(json.dumps([1]))),
    ],
)
def test_what_is_no_gallery_is_a_sentence(member, value, tmp_path):
    path = tmp_path / "g.npz"
    save_gallery(path, make_gallery())
    path.write_bytes(damage_member(path.read_bytes(), member, value))
    with pytest.raises(UserError, match=r"g\.npz is not a gallery, or is corrupt"):
        open_gallery(path)


def test_no_flipped_bit_and_no_cut_goes_unnoticed(tmp_path):
    path = tmp_path / "g.npz"
    gallery = make_gallery()
    save_gallery(path, gallery)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            opened = open_gallery(path)
        except UserError:
            continue
        assert_equal(opened, gallery)  # a bit of a date in zip's headers, for example
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a gallery"):
            open_gallery(path)
    for text in (b"", b"text", b"\x93NUMPY"):
        path.write_bytes(text)
        with pytest.raises(UserError, match="is not a gallery"):
            open_gallery(path)
    with pytest.raises(UserError, match=r"There is no gallery .*; `python -m tools.embed FOLDER`"):
        open_gallery(tmp_path / "none.npz")
