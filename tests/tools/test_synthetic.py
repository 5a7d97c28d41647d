"""The synthetic set: same seed, same bytes; the archives' layout; faces that are detected."""

import io
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter

import cv2
import numpy as np
import pytest

from config import parse_args
from preprocessing.detector import FaceDetector
from tests.helpers.paths import ROOT
from tools import synthetic
from tools.synthetic import Task, draw_image, lfw_pairs_text, make_identity, make_names
from utils import UserError

FLAGS = [
    *("--identities", "4"),
    *("--images-per-identity", "3"),
    *("--lfw-identities", "20"),
    *("--workers", "1"),
]


def population(folder, *flags):
    synthetic.main(
        parse_args([*FLAGS, "--output", str(folder), *flags], "synthetic", synthetic.Settings)
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return population(tmp_path_factory.mktemp("synthetic"))


def decode(jpeg):
    """(h, w, 3) uint8 RGB, or None."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def pair_lines(text):
    """pairs.txt by its definition: folds of (name, i, name, j), and how many a fold has of each."""
    first, *lines = text.splitlines()
    folds, size = map(int, first.split("\t"))
    pairs = []
    for line in lines:
        words = line.split("\t")
        a, i, b, j = (words[0], words[1], words[0], words[2]) if len(words) == 3 else words
        pairs.append((a, int(i), b, int(j)))
    assert len(pairs) == 2 * folds * size
    return [pairs[k : k + 2 * size] for k in range(0, len(pairs), 2 * size)], size


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(files, tmp_path):
    assert population(tmp_path, "--workers", "2") == files


def test_another_seed_gives_other_bytes(files, tmp_path):
    other = population(tmp_path, "--seed", "1")
    assert other.keys() == files.keys()
    assert all(other[name] != files[name] for name in files)


def test_the_training_archive_has_casias_layout(files):
    with zipfile.ZipFile(io.BytesIO(files["CASIA-WebFace.zip"])) as archive:
        assert archive.testzip() is None
        names = [name.split("/") for name in archive.namelist()]
        decoded = [decode(archive.read(name)) for name in archive.namelist()]
    assert {parts[0] for parts in names} == {"CASIA-WebFace"}
    identities = Counter(parts[1] for parts in names)
    assert len(identities) == 4
    assert set(identities.values()) == {3}
    assert all(len(folder) == 7 and folder.isdigit() for folder in identities)
    assert {parts[2] for parts in names} == {"001.jpg", "002.jpg", "003.jpg"}
    broken = [k for k, image in enumerate(decoded) if image is None]
    assert broken == [5]  # the last image of the second identity is truncated
    assert {image.shape for image in decoded if image is not None} == {(250, 250, 3)}


def test_the_test_archive_has_lfws_layout(files):
    with tarfile.open(fileobj=io.BytesIO(files["lfw-funneled.tgz"])) as archive:
        members = archive.getmembers()
        images = [decode(archive.extractfile(member).read()) for member in members]
    identities = Counter(member.name.split("/")[1] for member in members)
    assert len(identities) == 20
    for name, count in identities.items():
        wanted = [f"lfw_funneled/{name}/{name}_{i + 1:04d}.jpg" for i in range(count)]
        assert [member.name for member in members if f"/{name}/" in member.name] == wanted
    assert {image.shape for image in images} == {(250, 250, 3)}


def test_pairs_name_images_that_are_there_and_folds_share_no_identity(files):
    with tarfile.open(fileobj=io.BytesIO(files["lfw-funneled.tgz"])) as archive:
        there = set(archive.getnames())
    folds, size = pair_lines(files["pairs.txt"].decode())
    assert len(folds) == 10
    identities = []
    for fold in folds:
        assert len(set(fold)) == 2 * size
        assert [a == b for a, _, b, _ in fold] == [True] * size + [False] * size
        assert all(a != b or i != j for a, i, b, j in fold)
        for a, i, b, j in fold:
            assert f"lfw_funneled/{a}/{a}_{i:04d}.jpg" in there
            assert f"lfw_funneled/{b}/{b}_{j:04d}.jpg" in there
        identities.append({a for a, *_ in fold} | {b for _, _, b, _ in fold})
    assert sum(len(fold) for fold in identities) == len(set().union(*identities))


def test_pairs_of_a_large_population_are_limited():
    counts = dict.fromkeys(make_names(0, 100), 5)
    _, size = pair_lines(lfw_pairs_text(0, counts))
    assert size == synthetic.PAIRS_PER_FOLD


def test_the_archives_share_no_identity(tmp_path, monkeypatch):
    """Numbers and traits of one archive's identities are not used in the other."""
    tasks = []

    def record(task):
        tasks.append(task)
        return b""

    monkeypatch.setattr(synthetic, "draw_image", record)
    population(tmp_path)
    train, test = {t.identity for t in tasks[:12]}, {t.identity for t in tasks[12:]}
    assert len(train) == 4
    assert len(test) == 20
    widths = [make_identity(0, number).width for number in sorted(train | test)]
    assert len(set(widths)) == 24


def test_images_of_an_identity_differ_and_an_empty_one_has_no_face():
    one, two = (decode(draw_image(Task(0, 7, index))) for index in range(2))
    assert np.abs(one.astype(float) - two).mean() > 10
    empty = decode(draw_image(Task(0, 7, 0, "empty")))
    faces = FaceDetector("cpu").detect(empty[None])
    assert len(faces[0].boxes) == 0


def test_nearly_every_face_is_detected():
    images = [decode(draw_image(Task(1, identity, 0))) for identity in range(40)]
    found = FaceDetector("cpu").detect(np.stack(images))
    assert sum(len(faces.boxes) > 0 for faces in found) >= 36


def test_too_small_a_population_is_a_sentence(tmp_path):
    cfg = parse_args(
        ["--lfw-identities", "20", "--images-per-identity", "1"], "synthetic", synthetic.Settings
    )
    with pytest.raises(UserError, match="images-per-identity"):
        synthetic.main(cfg)
    assert not list(tmp_path.iterdir())


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools import synthetic; "
    code += "print('torch' in sys.modules, 'fileio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]  # the drawing processes start quickly
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())
