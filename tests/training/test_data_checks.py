import time

import cv2
import numpy as np
import pytest
import torch

from data_gen import ImageStore, make_split
from fileio.images import decode_image, encode_jpeg
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from preprocessing.detector import FaceDetector, find_face
from preprocessing.pipeline import align_face
from tests.helpers.synthetic_faces import face
from training import data_checks as checks
from utils import UserError


@pytest.fixture(scope="module")
def images():
    """48 synthetic faces of 16 identities, unaligned, 250x250."""
    return np.stack([decode_image(face(identity, i)) for identity in range(16) for i in range(3)])


@pytest.fixture(scope="module")
def faces(images):
    """The same, aligned."""
    detections = find_face(FaceDetector(), images)
    pairs = zip(images, detections, strict=True)
    return np.stack([align_face(p, d.points) for p, d in pairs if d.points is not None])


def check(tmp_path, images, cache="ram", labels=None):
    labels = [i // 4 for i in range(len(images))] if labels is None else labels
    write_dataset(tmp_path, [encode_jpeg(image) for image in images], labels)
    reader = RecordReader(tmp_path)
    parts = make_split(reader.labels, valid_fraction=0)
    store = ImageStore(reader, parts, torch.device("cpu"), cache=cache, workers=1)
    checks.check_training_set(store, parts.train, parts.num_classes)


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_aligned_faces_give_no_warning(tmp_path, faces, capsys, cache):
    assert len(faces) >= 40
    check(tmp_path, faces, cache)
    assert capsys.readouterr().out == ""


def test_faces_with_swapped_channels_get_a_warning(tmp_path, faces, capsys):
    check(tmp_path, np.ascontiguousarray(faces[..., ::-1]))
    assert "seem to be BGR" in capsys.readouterr().out
    grey = np.repeat(faces.mean(3, keepdims=True).astype(np.uint8), 3, 3)
    check(tmp_path, grey)
    assert capsys.readouterr().out == ""


def test_faces_off_the_template_get_a_warning(tmp_path, faces, images, capsys):
    check(tmp_path, np.stack([cv2.resize(p, (112, 112)) for p in images]))
    assert "template has them 35 apart" in capsys.readouterr().out
    for scale, x, y, text in ((1.35, 0, 0, "apart"), (0.7, 0, 0, "apart"), (1, 0, 10, "at y = 6")):
        matrix = np.array(
            [[scale, 0, 56 * (1 - scale) + x], [0, scale, 56 * (1 - scale) + y]], float
        )
        check(tmp_path, np.stack([cv2.warpAffine(f, matrix, (112, 112)) for f in faces]))
        assert text in capsys.readouterr().out
    check(tmp_path, np.random.default_rng(0).integers(0, 255, faces.shape, np.uint8))
    assert "shows no eyes" in capsys.readouterr().out


def test_real_faces_give_no_warning_and_flipped_or_bgr_ones_do(real_faces, capsys):
    reader = RecordReader(real_faces / "faces_mixed_112x112")
    chosen = np.random.default_rng(1).permutation(len(reader))[: checks.SAMPLE_SIZE]
    images = np.stack([reader.image(int(i)) for i in chosen])
    assert checks.bgr_warning(images) == checks.alignment_warning(images) == ""
    assert checks.check_not_constant(images) == ""
    assert "BGR" in checks.bgr_warning(images[..., ::-1])
    assert "at y = 6" in checks.alignment_warning(images[:, ::-1])
    parts = make_split(reader.labels, valid_fraction=0.02)
    store = ImageStore(reader, parts, torch.device("cpu"), cache="none")
    began = time.perf_counter()
    checks.check_training_set(store, parts.train, parts.num_classes)
    print(f"{time.perf_counter() - began:.2f} s for all checks of {len(reader):,} images")
    assert "Warning" not in capsys.readouterr().out


def test_constant_images_are_an_error_or_a_warning(tmp_path, faces, capsys):
    grey = np.full_like(faces, 128)
    with pytest.raises(UserError, match="one colour; prepare"):
        check(tmp_path, grey)
    with pytest.raises(UserError, match="are the same"):
        check(tmp_path, np.repeat(faces[:1], 40, 0))
    check(tmp_path, np.concatenate([grey[:3], faces[3:]]))
    assert f"3 of {len(faces)} sampled images are of one colour" in capsys.readouterr().out


def test_labels_that_do_not_fit_the_head():
    good = torch.arange(12) % 4
    checks.check_labels(good, 4)
    for labels, classes, text in (
        (good.int(), 4, "torch.int32"),
        (good - 1, 4, "from -1 to 2"),
        (good + 1, 4, "from 1 to 4"),
        (good, 5, "1 of the head's 5 classes"),
        (good, 3, "from 0 to 3, the head has classes 0 to 2"),
    ):
        with pytest.raises(UserError, match=text):
            checks.check_labels(labels, classes)


def test_a_set_without_most_of_its_identities_gives_a_warning():
    assert checks.missing_classes_warning(10572, 10572, 490623) == ""
    assert checks.missing_classes_warning(10575, 10572, 490623) == ""
    assert "declares 10,572" in checks.missing_classes_warning(10572, 4000, 490623)


@pytest.mark.parametrize("counts", [[1000] * 2, [30] * 100, [1] * 3000, [2000, 1, 1, 1], [4] * 4])
def test_an_order_that_is_not_shuffled_is_an_error(counts, monkeypatch):
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(20):
        checks.check_shuffled(labels, seed)
    if max(counts) == 1 or len(counts) * 10 < max(counts) or len(labels) < 100:
        return  # too small for a sorted order to be told from a random one
    sorted_order = lambda positions, seed, epoch: (positions, None)  # noqa: E731
    monkeypatch.setattr(checks, "epoch_order", sorted_order)
    with pytest.raises(UserError, match="not shuffled"):
        checks.check_shuffled(labels, 0)
    monkeypatch.setattr(checks, "epoch_order", lambda p, seed, epoch: (np.zeros_like(p), None))
    with pytest.raises(UserError, match="leaves images out"):
        checks.check_shuffled(labels, 0)


def test_lfw_at_chance_level_beside_good_validation_gives_a_warning(capsys):
    for accuracy, lfw in ((0.9, []), (0.9, [0.5]), (0.2, [0.5, 0.5]), (0.9, [0.5, 0.7])):
        checks.warn_if_lfw_at_chance(accuracy, lfw)
    assert capsys.readouterr().out == ""
    checks.warn_if_lfw_at_chance(0.9, [0.8, 0.5, 0.51])
    assert "90% of the identities are recognised, yet LFW stays at 51%" in capsys.readouterr().out
