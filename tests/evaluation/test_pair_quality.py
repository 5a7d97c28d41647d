"""Quality measures of faces made for them; bins and confusions against plain loops."""

import itertools

import cv2
import numpy as np
import pytest
import torch

from evaluation import pair_quality
from evaluation.pair_quality import (
    accuracy_by_quality,
    estimate_pose,
    face_qualities,
    nearest_identities,
    worse_values,
)
from evaluation.verification import Pairs
from utils import TEMPLATE

# Left eye, right eye, nose, corners of the mouth: x, y, and z towards the viewer, as in a face
# whose nose stands half an eye distance before the eyes.
FACE = np.array([[-30, -25, 0], [30, -25, 0], [0, 5, 30], [-22, 35, 8], [22, 35, 8.0]])


def turned(yaw, pitch=0.0, roll=0.0, scale=1.0):
    """FACE turned (degrees) and seen from far away: (5, 2) pixels."""
    a, b, c = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return scale * (FACE @ (about_z @ about_x @ about_y).T)[:, :2] + (125, 110)


@pytest.mark.parametrize("yaw", [-60, -20, 0, 35, 80])
@pytest.mark.parametrize("roll", [-25, 0, 10])
def test_pose_of_a_turned_head(yaw, roll):
    points = np.stack([turned(yaw, roll=roll, scale=scale) for scale in (0.5, 1, 3)])
    actual_yaw, actual_roll, distance = estimate_pose(points)
    np.testing.assert_allclose(actual_yaw, yaw, atol=1e-6)
    np.testing.assert_allclose(actual_roll, roll, atol=1e-6)
    np.testing.assert_allclose(distance, 60 * np.cos(np.radians(yaw)) * np.array([0.5, 1, 3]))


def test_pitch_hardly_changes_yaw_and_missing_points_give_nan():
    assert estimate_pose(turned(30, pitch=15)[None])[0] == pytest.approx(30, abs=5)
    assert abs(estimate_pose(TEMPLATE[None])[0]) < 2  # the template looks ahead
    values = np.array(estimate_pose(np.full((1, 5, 2), np.nan)))
    assert np.isnan(values).all()


def test_brightness_and_sharpness():
    rng = np.random.default_rng(0)
    noise = rng.integers(100, 156, (112, 112, 3), np.uint8)
    faces = [noise, noise // 2, cv2.GaussianBlur(noise, (0, 0), 2), np.full_like(noise, 60)]
    actual = face_qualities(torch.from_numpy(np.stack(faces)), None)
    assert actual.keys() == {"brightness", "sharpness"}
    assert actual["brightness"][0] == pytest.approx(2 * actual["brightness"][1], rel=0.02)
    assert actual["brightness"][3] == 60
    sharp = actual["sharpness"]
    assert sharp[0] > sharp[1] > sharp[2] > sharp[3] == 0
    with_points = face_qualities(torch.from_numpy(np.stack(faces[:1])), turned(-20)[None])
    assert with_points["yaw"] == pytest.approx(20)  # the side does not matter
    assert with_points.keys() == pair_quality.QUALITIES.keys()


def test_a_pair_is_as_bad_as_its_worse_face():
    pairs = Pairs([], np.array([0, 1, 2]), np.array([1, 2, 2]), None, None)
    faces = {"sharpness": np.array([5.0, 3, np.nan]), "yaw": np.array([5.0, 3, np.nan])}
    actual = worse_values(faces, pairs)
    np.testing.assert_array_equal(actual["sharpness"], [3, 3, np.nan])
    np.testing.assert_array_equal(actual["yaw"], [5, 3, np.nan])


def test_bins_hold_every_known_pair_once():
    rng = np.random.default_rng(0)
    values, same = rng.normal(size=503), rng.random(503) < 0.5
    wrong = rng.random(503) < 0.2 + 0.2 * (values > 0)
    values[:3] = np.nan
    rows = accuracy_by_quality(values, wrong, same)
    assert [row["pairs"] for row in rows] == [100] * 5
    assert sum(row["false_positives"] for row in rows) == (wrong & ~same)[3:].sum()
    assert sum(row["false_negatives"] for row in rows) == (wrong & same)[3:].sum()
    for row, after in itertools.pairwise(rows):
        assert row["low"] <= row["high"] < after["low"]
    inside = (values >= rows[2]["low"]) & (values <= rows[2]["high"])
    accuracy = 1 - wrong[inside].mean()
    assert rows[2]["accuracy"] == pytest.approx(accuracy)
    assert rows[2]["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / 100) ** 0.5)


def test_equal_values_share_a_bin_and_no_value_gives_no_bin():
    same = np.arange(60) % 2 == 0
    rows = accuracy_by_quality(np.repeat([1.0, 2.0], 30), same, same)
    assert [(row["low"], row["high"], row["pairs"]) for row in rows] == [(1, 1, 30), (2, 2, 30)]
    rows = accuracy_by_quality(np.ones(60), same, same)
    assert [(row["pairs"], row["accuracy"]) for row in rows] == [(60, 0.5)]
    assert accuracy_by_quality(np.full(60, np.nan), same, same) == []


@pytest.mark.parametrize("chunk", [7, 1024])
def test_confusions_against_a_plain_loop(chunk):
    rng = np.random.default_rng(1)
    identities = [f"p{rng.integers(30):02d}" for _ in range(120)]
    embeddings = rng.normal(size=(120, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    names = sorted(set(identities))
    means = [embeddings[[p == name for p in identities]].sum(0) for name in names]
    means = [mean / np.linalg.norm(mean) for mean in means]
    expected = sorted(
        (
            (float(means[i] @ means[j]), names[i], names[j])
            for i in range(len(names))
            for j in range(i + 1, len(names))
        ),
        reverse=True,
    )[:12]
    actual = nearest_identities(embeddings, identities, 12, chunk)
    assert [(c.first, c.second) for c in actual] == [(a, b) for _, a, b in expected]
    np.testing.assert_allclose([c.cosine for c in actual], [c for c, *_ in expected], atol=1e-6)
    for confusion in actual:
        a, b = confusion.faces
        assert (identities[a], identities[b]) == (confusion.first, confusion.second)
        left = [i for i, p in enumerate(identities) if p == confusion.first]
        right = [i for i, p in enumerate(identities) if p == confusion.second]
        closest = max(embeddings[i] @ embeddings[j] for i in left for j in right)
        assert embeddings[a] @ embeddings[b] == pytest.approx(closest, abs=1e-6)


def test_confusions_of_few_identities():
    embeddings = np.eye(3, dtype=np.float32)
    assert nearest_identities(embeddings, ["a", "a", "a"], 5) == []
    assert len(nearest_identities(embeddings, ["a", "b", "c"], 5)) == 3
