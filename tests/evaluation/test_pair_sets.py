"""Sets of every kind, from good and from bad files; LFW's own are in test_lfw_eval.py."""

import json
import lzma
import pickle

import cv2
import numpy as np
import pytest
import torch

from config import parse_args
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_sets import find_pairs, find_set, identity_groups, load_set, set_name
from fileio.bin_sets import read_bin, write_bin
from fileio.images import encode_jpeg
from tests.helpers.bounded import within
from tests.test_lfw_eval import (  # noqa: F401
    IDENTITIES,
    data,
    face_of,
    mean_colours,
    name_of,
    pairs_text,
)
from tools import make_bin
from utils import UserError


def list_text(suffix=".jpg", folder=""):
    """LFW's pairs as lines "path1 path2 0/1"."""
    lines = []
    for line in pairs_text().splitlines()[1:]:
        words = line.split("\t")
        words = [words[0], words[1], words[0], words[2]] if len(words) == 3 else words
        paths = [f"{folder}{n}/{n}_{int(i):04d}{suffix}" for n, i in (words[:2], words[2:])]
        lines.append(" ".join([*paths, str(int(words[0] == words[2]))]))
    return "\n".join(lines) + "\n"


def labelled_images(test_set):
    """The pairs of a set as the images themselves, in any order."""
    pixels = [image.numpy().tobytes() for image in test_set.images]
    first, second, same, _ = test_set.pairs[1:]
    return sorted(
        (pixels[a], pixels[b], bool(s)) for a, b, s in zip(first, second, same, strict=True)
    )


@pytest.fixture
def images(tmp_path):
    """A plain folder of aligned faces, as PNG and JPEG, with a list of pairs in it."""
    folder = tmp_path / "plain"
    for identity in range(IDENTITIES):
        (folder / name_of(identity)).mkdir(parents=True)
        for shot in (1, 2):
            path = folder / name_of(identity) / f"{name_of(identity)}_{shot:04d}.jpg"
            path.write_bytes(encode_jpeg(face_of(identity, shot)))
    (folder / "pairs.txt").write_text(list_text(), "utf-8")
    return folder


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("suffix", ["", ".jpg", ".png"])
@pytest.mark.parametrize("root", ["", "lfw_funneled/"])
def test_a_list_of_pairs_names_the_same_pairs_as_lfws_format(data, suffix, root):  # noqa: F811
    expected = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    (data / "list.txt").write_text(list_text(suffix, root), "utf-8")
    result = load_set(data / "faces_lfw_112x112", data / "list.txt")
    assert labelled_images(result) == labelled_images(expected)
    assert len(np.unique(result.pairs.folds)) == 10
    assert (np.diff(result.pairs.folds) >= 0).all()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a/1.jpg a/2.jpg 1\na/1.jpg b/1.jpg\n", "line 2 is not"),
        ("a/1.jpg a/2.jpg 1\na/1.jpg b/1.jpg 2\n", "line 2 is not"),
        ("a/1.jpg a/2.jpg 1\n", "fewer than two lines"),
        ("", "pairs.txt"),
    ],
)
def test_a_list_that_is_none_gets_a_sentence(images, text, complaint):
    (images / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        load_set(images, images / "pairs.txt")
    assert "pairs.txt" in str(raised.value)


def test_a_name_that_fits_two_images_gets_a_sentence(images):
    for folder in ("x", "y"):
        (images / folder).mkdir()
        (images / folder / "one.png").write_bytes(encode_jpeg(face_of(0, 1)))
    (images / "pairs.txt").write_text("one.png x/one.png 1\ny/one.png x/one.png 0\n" * 5)
    with pytest.raises(UserError, match=r"names one\.png, but several images"):
        load_set(images, images / "pairs.txt")


def test_a_list_that_names_a_missing_image_gets_a_sentence(images):
    (images / "pairs.txt").write_text(list_text().replace("Ann_0_0002", "Ann_0_0009"), "utf-8")
    with pytest.raises(UserError, match=r"names 1 of .* images .* \(Ann_0/Ann_0_0009\.jpg\)"):
        load_set(images, images / "pairs.txt")


# ---------------------------------------------------------------- plain folders


def test_a_plain_folder_of_aligned_faces_is_a_set(images, data):  # noqa: F811
    expected = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    result = load_set(images, find_pairs(images, data))
    assert labelled_images(result) == labelled_images(expected)
    assert (result.name, result.identity, result.points) == ("plain", None, None)
    assert result.missed is None and "missed" not in str(result)


def test_images_of_another_size_or_none_get_a_sentence(images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nor images"):
        load_set(tmp_path / "empty", images / "pairs.txt")
    path = images / "Ann_0" / "Ann_0_0001.jpg"
    path.write_bytes(encode_jpeg(np.zeros((250, 200, 3), np.uint8)))
    with pytest.raises(UserError, match=r"Ann_0_0001\.jpg is 200x250, not an aligned face"):
        load_set(images, images / "pairs.txt")
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"Ann_0_0001\.jpg: its 7 bytes"):
        load_set(images, images / "pairs.txt")


# ---------------------------------------------------------------- finding


def test_sets_and_their_pairs_are_found_by_name(data, tmp_path):  # noqa: F811
    (data / "agedb_30.bin").write_bytes(b"")
    assert find_set("agedb_30", data) == data / "agedb_30.bin"
    assert find_set("lfw", data) == data / "faces_lfw_112x112"
    assert find_set(str(data / "agedb_30.bin"), tmp_path) == data / "agedb_30.bin"
    assert find_set("cfp_fp", data) is None
    folder = data / "faces_calfw_112x112"
    assert find_pairs(folder, data) == data / "pairs.txt"
    (data / "calfw_pairs.txt").write_text("")
    assert find_pairs(folder, data) == data / "calfw_pairs.txt"
    folder.mkdir()
    (folder / "pairs.txt").write_text("")
    assert find_pairs(folder, data) == folder / "pairs.txt"
    assert find_pairs(folder, data, "given.txt").name == "given.txt"
    assert [set_name(p) for p in (folder, data / "agedb_30.bin")] == ["calfw", "agedb_30"]


# ---------------------------------------------------------------- .bin files


def test_make_bin_holds_the_same_set_as_the_folder(data, tmp_path, capsys):  # noqa: F811
    flags = ["--data-dir", str(data), "--output", str(tmp_path / "new" / "lfw.bin")]
    make_bin.main(parse_args(flags, "make_bin", make_bin.Settings))
    assert "24 pairs of 24 faces, 12 of them genuine" in capsys.readouterr().out
    folder = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    packed = load_set(tmp_path / "new" / "lfw.bin", "")
    assert (packed.images == folder.images).all()
    for field in ("first", "second", "same"):
        assert (getattr(packed.pairs, field) == getattr(folder.pairs, field)).all()
    with (tmp_path / "new" / "lfw.bin").open("rb") as file:  # as InsightFace's tools read it
        jpegs, same = pickle.load(file, encoding="bytes")
    assert (len(jpegs), len(same)) == (48, 24)
    assert cv2.imdecode(np.frombuffer(jpegs[0], np.uint8), 1).shape == (112, 112, 3)


def test_make_bin_takes_a_plain_folder_and_names_what_is_missing(images, tmp_path, capsys):
    output = tmp_path / "mine.bin"
    make_bin.main(
        parse_args(["--lfw", str(images), "--output", str(output)], "make_bin", make_bin.Settings)
    )
    assert len(read_bin(output)[0]) == 48
    output.unlink()
    for flags, complaint in (
        (["--lfw", str(tmp_path / "nowhere")], "no folder of aligned faces"),
        (["--lfw", str(images), "--pairs", "gone.txt"], "There is no gone.txt"),
    ):
        with pytest.raises(SystemExit):
            make_bin.main(
                parse_args([*flags, "--output", str(output)], "make_bin", make_bin.Settings)
            )
        assert complaint in capsys.readouterr().err
        assert not output.exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\x00\x01no pickle", "not a test set"),
        (pickle.dumps({"images": [], "same": []}), "not a test set"),
        (pickle.dumps(([b"a", b"b", b"c"], [True])), "3 images for 1 pairs"),
        (pickle.dumps(([b"a", b"b"], [])), "2 images for 0 pairs"),
        (pickle.dumps(([b"a", b"b"] * 2, [True, "no"])), "not a test set|for an image or for"),
        (json.dumps([1]).encode(), "not a test set"),
        (b"", "not a test set"),
    ],
)
def test_bins_that_are_none_get_a_sentence(tmp_path, content, complaint):
    path = tmp_path / "cfp_fp.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as raised:
        load_set(path, "")
    assert "cfp_fp.bin" in str(raised.value)


def test_a_bin_of_one_fold_only_gets_a_sentence(tmp_path):
    write_bin(tmp_path / "one.bin", [encode_jpeg(face_of(i, 1)) for i in range(2)], [True])
    with pytest.raises(UserError, match=r"one\.bin"):
        load_set(tmp_path / "one.bin", "")


def accuracy_of(test_set):
    """Of an embedding that confuses some images: the cells of face_of with much noise."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 150, (len(test_set.images), 147)))
    order = sorted(range(len(test_set.images)), key=lambda i: test_set.images[i].numpy().tobytes())
    by_image = torch.empty_like(noise)
    by_image[order] = noise  # the same for an image wherever it is in the list
    return evaluate_lfw(lambda faces: mean_colours(faces) + by_image, test_set).metrics


def test_a_list_has_one_accuracy_in_any_order_and_as_a_bin(images, tmp_path, capsys):
    mixed = np.random.default_rng(1).permutation(list_text().splitlines()).tolist()
    expected = None
    for order in (mixed, sorted(mixed, key=lambda line: line[-1]), mixed[::-1]):
        (images / "pairs.txt").write_text("\n".join(order), "utf-8")
        metrics = accuracy_of(load_set(images, images / "pairs.txt"))
        assert metrics == (expected or metrics)
        expected = metrics
        make_bin.main(
            parse_args(
                ["--lfw", str(images), "--output", str(tmp_path / "mine.bin")],
                "make_bin",
                make_bin.Settings,
            )
        )
        packed = accuracy_of(load_set(tmp_path / "mine.bin", ""))
        assert packed["fold_accuracies"] == expected["fold_accuracies"]
    assert 0.5 < expected["accuracy"] < 1
    assert "Warning" not in capsys.readouterr().out


def test_folds_that_a_format_fixes_and_that_hold_one_kind_are_named(images, tmp_path, capsys):
    faces = [encode_jpeg(face_of(i, shot)) for i in range(12) for shot in (1, 2)]
    write_bin(tmp_path / "sorted.bin", faces * 5, [True] * 30 + [False] * 30)
    load_set(tmp_path / "sorted.bin", "")
    assert "Warning: 10 of the 10 folds of" in capsys.readouterr().out
    write_bin(tmp_path / "mixed.bin", faces * 5, [True, False] * 30)
    load_set(tmp_path / "mixed.bin", "")
    header, *lines = pairs_text().splitlines()
    (images / "pairs.txt").write_text("\n".join([header, *sorted(lines, key=len)]), "utf-8")
    assert capsys.readouterr().out == ""
    load_set(images, images / "pairs.txt")
    assert "Warning: 4 of the 4 folds of" in capsys.readouterr().out


def test_xz_is_a_compressed_bin(tmp_path):
    faces = [encode_jpeg(face_of(i % 7, i)) for i in range(80)]
    write_bin(tmp_path / "hadrian.bin", faces, [True, False] * 20)
    packed = (tmp_path / "hadrian.bin").read_bytes()
    (tmp_path / "hadrian.bin").rename(tmp_path / "plain.bin")
    (tmp_path / "hadrian.xz").write_bytes(lzma.compress(packed))
    assert find_set("hadrian", tmp_path) == tmp_path / "hadrian.xz"
    result, expected = (load_set(tmp_path / name, "") for name in ("hadrian.xz", "plain.bin"))
    assert (result.name, result.missed) == ("hadrian", None)
    assert (result.images == expected.images).all()
    assert all((a == b).all() for a, b in zip(result.pairs[1:], expected.pairs[1:], strict=True))
    for content in (lzma.compress(packed)[:-30], packed, b"", lzma.compress(b"no pickle")):
        (tmp_path / "hadrian.xz").write_bytes(content)
        with pytest.raises(UserError, match=r"hadrian\.xz is not a test set"):
            load_set(tmp_path / "hadrian.xz", "")


def test_an_xz_that_is_a_bomb_gets_a_sentence(tmp_path):
    """60 kB that would be 400 MB."""
    packer = lzma.LZMACompressor(preset=0)
    content = b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()
    (tmp_path / "x.xz").write_bytes(content)
    with pytest.raises(UserError, match="more than 268,435,456 bytes"):
        within(600, load_set, tmp_path / "x.xz", "")


def test_square_images_of_a_bin_are_scaled(tmp_path):
    large = [cv2.resize(face_of(i, 1), (224, 224)) for i in range(40)]
    write_bin(tmp_path / "x.bin", [encode_jpeg(image) for image in large], [True, False] * 10)
    result = load_set(tmp_path / "x.bin", "")
    for face, image in enumerate(result.images):
        assert np.abs(image.numpy().astype(int) - face_of(face, 1)).mean() < 6  # JPEG


# ---------------------------------------------------------------- identities


def test_identities_by_name_and_by_chains_of_genuine_pairs(data, tmp_path):  # noqa: F811
    folder = load_set(data / "faces_lfw_112x112", data / "pairs.txt")
    groups, how = identity_groups(folder)
    assert how == "by name"
    identities = [name.split("/")[0] for name in folder.pairs.names]
    assert (np.equal.outer(groups, groups) == np.equal.outer(identities, identities)).all()
    faces = [encode_jpeg(face_of(i, 1)) for i in range(6)]
    order = [0, 1, 1, 2, 3, 4, 0, 3, 5, 0] * 2  # 0, 1, 2 are one; 3, 4 another; 5 is alone
    same = [True, True, True, False, False] * 2
    write_bin(tmp_path / "chain.bin", [faces[i] for i in order], same)
    groups, how = identity_groups(load_set(tmp_path / "chain.bin", ""))
    assert "chains" in how
    assert (np.equal.outer(groups, groups)[[0, 0, 3, 0, 0], [1, 2, 4, 3, 5]]).tolist() == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_bin_that_claims_many_images_takes_little_memory(tmp_path):
    """Decoded, these would be 11 GB."""
    claimed = [b"\xff%06d" % number for number in range(300_000)]
    write_bin(tmp_path / "x.bin", claimed, [True, False] * 75_000)
    with pytest.raises(UserError, match=r"Image 0 of .*x\.bin: its 7 bytes cannot be decoded"):
        within(300, load_set, tmp_path / "x.bin", "")
