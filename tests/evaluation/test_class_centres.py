"""class_centres.py against plain loops over images and classes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.class_centres import (
    MAX_ROUNDS,
    SLACK,
    angles_to_centres,
    dominant_centres,
    leave_one_out,
)

CLASSES = 24


def unit(values):
    return F.normalize(torch.from_numpy(values).float())


@pytest.fixture(scope="module")
def crowd():
    """Classes of 1 to 9 images around random directions, a sixth of them under another label."""
    rng = np.random.default_rng(3)
    truth = np.repeat(np.arange(CLASSES), rng.integers(1, 10, CLASSES))
    vectors = rng.normal(size=(CLASSES, 16))[truth] + 0.5 * rng.normal(size=(len(truth), 16))
    labels = truth.copy()
    some = rng.choice(len(truth), len(truth) // 6, replace=False)
    labels[some] = rng.permutation(labels[some])
    assert {1, 2} <= set(np.bincount(labels).tolist())
    return unit(vectors), labels, truth


def angle_between(a, b):
    return np.degrees(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def by_loops(vectors, labels, nearer_by, max_angle):
    """leave_one_out as its docstring has it, one image at a time, in float64."""
    vectors, kept = vectors.double().numpy(), [True] * len(labels)
    for turn in range(MAX_ROUNDS):
        slack, rows, now = ([*SLACK] + [0] * MAX_ROUNDS)[turn], [], []
        for i, label in enumerate(labels):
            sums = {}
            for j, its in enumerate(labels):
                if kept[j] and j != i:
                    sums[its] = sums.get(its, 0) + vectors[j]
            mine = angle_between(vectors[i], sums[label]) if label in sums else 0.0
            others = {c: angle_between(vectors[i], s) for c, s in sums.items() if c != label}
            other = min(others, key=others.get)
            rows.append((mine, other, others[other]))
            wrong = mine - others[other] > nearer_by + slack
            wrong |= mine > max_angle and not slack
            now.append(label not in sums or not wrong)
        for label in set(labels):
            members = [i for i in range(len(labels)) if labels[i] == label]
            if not any(now[i] for i in members):
                now[max(members, key=lambda i: rows[i][2])] = True
        if now == kept and not slack:
            break
        kept = now
    return [np.array(column) for column in zip(*rows, strict=True)], np.array(now)


@pytest.mark.parametrize(("nearer_by", "max_angle"), [(12.0, 180.0), (0.0, 180.0), (30.0, 50.0)])
def test_images_are_left_out_as_by_plain_loops(crowd, nearer_by, max_angle):
    vectors, labels, truth = crowd
    asked = {"nearer_by": nearer_by, "max_angle": max_angle}
    result, kept = leave_one_out(vectors, torch.from_numpy(labels), CLASSES, **asked)
    (angle, other, other_angle), expected = by_loops(vectors, labels.tolist(), **asked)
    np.testing.assert_allclose(result.angle, angle, atol=0.02)
    np.testing.assert_allclose(result.other_angle, other_angle, atol=0.02)
    assert np.array_equal(result.other, other)
    assert np.array_equal(kept, expected)
    assert set(labels[kept]) == set(labels)
    if nearer_by == 12:
        wrong = labels != truth
        assert (wrong & ~kept).sum() >= 0.8 * wrong.sum()
        assert (wrong & ~kept).sum() >= 0.9 * (~kept).sum()


def test_classes_of_one_and_of_two():
    east, north, up = np.eye(3)
    near = lambda v: v + 0.1 * np.ones(3)  # noqa: E731
    vectors = unit(np.stack([east, near(east), north, near(north), east, up, up]))
    # Class 2 has an image of class 0 and one like no class; class 3 has one image.
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    vectors[5] = unit(np.array([[-1.0, -1.0, 0.2]]))
    result, kept = leave_one_out(vectors, labels, 5, nearer_by=12.0)
    assert kept.tolist() == [True, True, True, True, False, True, True]
    assert result.angle[[5, 6]].tolist() == [0.0, 0.0]
    assert result.other[4] == 0
    assert 4 not in result.other  # a class without images is never the nearest


def test_a_crowds_dominant_centres_are_those_of_most_images():
    rng = np.random.default_rng(0)
    weight, vectors = unit(rng.normal(size=(3 * CLASSES, 8))), unit(rng.normal(size=(2500, 8)))
    labels = rng.integers(0, CLASSES, 2500)
    result = dominant_centres(vectors, torch.from_numpy(labels), 5 * weight, CLASSES)
    for label in range(CLASSES):
        votes = [0, 0, 0]
        for vector in vectors[labels == label]:
            votes[int(np.argmax([vector @ weight[3 * label + k] for k in range(3)]))] += 1
        assert torch.allclose(result[label], weight[3 * label + int(np.argmax(votes))], atol=1e-6)


def test_what_a_noisy_sub_centre_caught_is_far_from_the_dominant_one():
    rng = np.random.default_rng(0)
    clean, noise = np.eye(16)[:4], np.eye(16)[4:8]  # of each of 4 classes
    labels, wrong = np.repeat(np.arange(4), 10), np.tile(np.arange(10) >= 8, 4)
    vectors = unit(np.where(wrong[:, None], noise[labels], clean[labels])
                   + 0.05 * rng.normal(size=(40, 16)))  # fmt: skip
    rows = torch.from_numpy(np.stack([noise, clean], 1).reshape(8, 16)).float()
    centres = dominant_centres(vectors, torch.from_numpy(labels), rows, 4)
    assert torch.equal(centres, torch.from_numpy(clean).float())
    result = angles_to_centres(vectors, torch.from_numpy(labels), centres)
    assert np.array_equal(result.keep_mask(nearer_by=180.0, max_angle=75.0), ~wrong)


def test_scores_are_the_angles_one_by_one():
    rng = np.random.default_rng(0)
    vectors, labels = unit(rng.normal(size=(3000, 8))), rng.integers(0, 30, 3000)
    centres = torch.from_numpy(rng.normal(size=(30, 8))).float()
    result = angles_to_centres(vectors, torch.from_numpy(labels), centres)
    directions = (
        centres.double().numpy() / np.linalg.norm(centres.double().numpy(), axis=1)[:, None]
    )
    angles = np.degrees(np.arccos(np.clip(vectors.double().numpy() @ directions.T, -1, 1)))
    rows = np.arange(3000)
    np.testing.assert_allclose(result.angle, angles[rows, labels], atol=0.02)
    angles[rows, labels] = 999
    np.testing.assert_allclose(result.other_angle, angles.min(1), atol=0.02)
    assert np.mean(result.other == angles.argmin(1)) > 0.999
    expected = (result.angle - result.other_angle <= 5) & (result.angle <= 60)
    assert np.array_equal(result.keep_mask(nearer_by=5, max_angle=60), expected)
