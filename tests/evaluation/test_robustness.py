"""Each corruption against its definition, and the evaluation on made-up embeddings."""

import json

import cv2
import numpy as np
import pytest
import torch

from evaluation import figures, robustness, verification
from evaluation.robustness import CORRUPTIONS, EYES, MOUTH
from tests.helpers.synthetic_faces import face


@pytest.fixture(scope="module")
def faces():
    images = [cv2.imdecode(np.frombuffer(face(identity), np.uint8), 1) for identity in range(6)]
    return np.stack([cv2.resize(p[45:205, 45:205, ::-1], (112, 112)) for p in images])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_pure_and_changes_every_face(name, faces):
    before = faces.copy()
    corrupted = CORRUPTIONS[name](faces)
    assert (corrupted.shape, corrupted.dtype) == (faces.shape, np.uint8)
    assert (faces == before).all()
    assert all((one != other).any() for one, other in zip(faces, corrupted, strict=True))
    assert (CORRUPTIONS[name](faces) == corrupted).all()
    assert len(CORRUPTIONS[name](faces[:0])) == 0


def test_jpeg_is_as_coarse_as_its_quality(faces):
    errors = [
        np.abs(robustness.compress_jpeg(faces, q).astype(int) - faces).mean() for q in (95, 30, 5)
    ]
    assert errors[0] < errors[1] < errors[2] < 30


def test_blur_and_low_resolution_keep_the_mean_and_lose_detail(faces):
    def detail(batch):
        return np.abs(np.diff(batch.astype(float), axis=2)).mean()

    for corrupted in (
        robustness.blur_faces(faces),
        robustness.reduce_resolution(faces),
        robustness.reduce_resolution(faces, 4),
    ):
        assert abs(corrupted.mean() - faces.mean()) < 1
        assert detail(corrupted) < 0.8 * detail(faces)
    assert detail(robustness.reduce_resolution(faces, 4)) < detail(
        robustness.reduce_resolution(faces, 2)
    )
    even = np.full((1, 112, 112, 3), 77, np.uint8)
    assert (robustness.reduce_resolution(even, 4) == 77).all()


def test_grey_is_luma(faces):
    actual = robustness.to_grayscale(faces)
    expected = faces @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(actual, np.repeat(expected[..., None], 3, 3), atol=1)


def test_brightness_scales_and_clips(faces):
    for factor in (1.4, 0.6):
        expected = np.clip(np.rint(faces.astype(float) * factor), 0, 255)
        assert (robustness.scale_brightness(faces, factor) == expected).all()


@pytest.mark.parametrize("box", [EYES, MOUTH])
def test_occlusion_covers_its_box_and_nothing_else(faces, box):
    x1, y1, x2, y2 = box
    occluded = robustness.occlude(faces, box)
    assert (occluded[:, y1:y2, x1:x2] == robustness.OCCLUDER_LEVEL).all()
    occluded[:, y1:y2, x1:x2] = faces[:, y1:y2, x1:x2]
    assert (occluded == faces).all()


def test_occlusions_lie_over_the_template():
    from utils import TEMPLATE

    for box, points in ((EYES, TEMPLATE[:2]), (MOUTH, TEMPLATE[3:])):
        x1, y1, x2, y2 = box
        assert (points > (x1 + 5, y1 + 5)).all()
        assert (points < (x2 - 5, y2 - 5)).all()


def test_shift_moves_by_ten_pixels_in_all_four_directions():
    faces = np.random.default_rng(0).integers(0, 256, (40, 112, 112, 3), np.uint8)
    moved = robustness.shift_randomly(faces)
    seen = set()
    for before, after in zip(faces, moved, strict=True):
        for direction, (a, b) in {
            "left": (before[:, 10:], after[:, :-10]),
            "right": (before[:, :-10], after[:, 10:]),
            "up": (before[10:], after[:-10]),
            "down": (before[:-10], after[10:]),
        }.items():
            if (a == b).all():
                seen.add(direction)
                break
        else:
            raise AssertionError("moved in no direction")
    assert seen == {"left", "right", "up", "down"}
    assert (robustness.shift_randomly(faces, seed=1) != moved).any()


def test_only_second_images_are_embedded_again_and_once_each():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (40, 112, 112, 3), np.uint8))
    first = np.repeat(np.arange(20), 2)
    second = np.where(np.arange(40) % 2 == 0, first + 20, (first + 3) % 20 + 20)
    same = np.arange(40) % 2 == 0
    images[20:] = images[:20]  # both images of an identity are the same
    pairs = verification.Pairs([], first, second, same, verification.contiguous_folds(40, 4))
    calls = []

    def embed(faces):
        calls.append(len(faces))
        return faces.float().reshape(len(faces), 56, 2, 56, 2, 3).mean((2, 4)).flatten(1) - 127

    clean = embed(images).numpy()
    calls.clear()
    results = robustness.evaluate_corruptions(embed, images, pairs, clean)
    assert calls == [20] * len(CORRUPTIONS)
    assert list(results) == ["clean", *CORRUPTIONS]
    assert results["clean"]["accuracy"] == results["clean"]["accuracy_as_set"] == 1
    assert results["clean"]["matched_cosine"] == pytest.approx(1)
    # Noise that is moved resembles nothing: the clean thresholds refuse all.
    moved = results["moved by 10 pixels"]
    assert moved["accuracy_as_set"] == 0.5
    assert abs(moved["matched_cosine"]) < 0.1
    # By hand: the occluded second images against the clean first ones.
    occluded = embed(torch.from_numpy(robustness.occlude(images.numpy()))).numpy()
    a = clean / np.linalg.norm(clean, axis=1, keepdims=True)
    b = occluded / np.linalg.norm(occluded, axis=1, keepdims=True)
    expected = (a[first] * b[second]).sum(1)[same].mean()
    assert results["eyes covered"]["matched_cosine"] == pytest.approx(expected, abs=1e-6)
    json.dumps(results)
    printed = robustness.robustness_table(results).splitlines()
    assert len(printed) == 2 + len(CORRUPTIONS)
    assert "eyes covered" in printed[9]


def test_the_examples_are_written_as_an_image(faces, tmp_path):
    shown = robustness.corruption_examples(faces[0])
    assert list(shown) == ["clean", *CORRUPTIONS]
    assert (shown["clean"] == faces[0]).all()
    figures.plot_corruptions(tmp_path / "robustness_grid.jpg", shown)
    assert min(cv2.imread(str(tmp_path / "robustness_grid.jpg")).shape[:2]) > 500
