import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from tools.augment_grid import synthetic_crops
from training import augment
from training.augment import (
    AUGMENTATIONS,
    DOWNSAMPLING,
    JITTER_ORDERS,
    TRANSFORMS,
    UPSAMPLING,
    AugmentPolicy,
    build_augmentation,
    hashed_uniform,
)

INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


@pytest.fixture(scope="module")
def faces():
    """12 synthetic faces, (12, 3, 112, 112) float32 in 0 to 255."""
    return synthetic_crops(12).permute(0, 3, 1, 2).contiguous().float()


def as_images(images):
    return images.permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize("down", DOWNSAMPLING)
@pytest.mark.parametrize("up", UPSAMPLING)
def test_low_resolution_is_opencvs(faces, down, up):
    # At some sizes (36, 72, 100 ...) OpenCV's nearest, which computes in floating point, takes the
    # pixel before the one that k * 112 / size says.
    small = np.array([22, 23, 28, 37, 45, 56, 60, 75, 90, 99, 111, 112])
    ways = torch.full((12,), DOWNSAMPLING.index(down)), torch.full((12,), UPSAMPLING.index(up))
    results = augment.lower_resolution(faces, torch.from_numpy(small), *ways)
    for image, result, size in zip(as_images(faces), as_images(results), small, strict=True):
        expected = cv2.resize(image, (size, size), interpolation=INTERPOLATIONS[down])
        expected = cv2.resize(expected, (112, 112), interpolation=INTERPOLATIONS[up])
        np.testing.assert_allclose(result, expected.clip(0, 255), atol=0.02)


def test_blur_is_opencvs_within_the_image(faces):
    sigmas = np.linspace(0.3, 3, 12, dtype=np.float32)
    results = augment.gaussian_blur(faces, torch.from_numpy(sigmas))
    for image, result, sigma in zip(as_images(faces), as_images(results), sigmas, strict=True):

        def gauss(image, sigma=float(sigma)):
            return cv2.GaussianBlur(image, (61, 61), sigma, borderType=cv2.BORDER_CONSTANT)

        expected = gauss(image) / gauss(np.ones_like(image))
        np.testing.assert_allclose(result, expected, atol=0.02)


def test_jitter_is_torchvisions_in_any_order(faces):
    rng = np.random.default_rng(0)
    factors = rng.uniform(0.5, 1.5, (12, 3)).astype(np.float32)
    orders = JITTER_ORDERS[np.arange(12) % 6]
    results = augment.colour_jitter(faces, torch.from_numpy(factors), torch.from_numpy(orders))
    steps = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for i in range(12):
        expected = faces[i] / 255
        for step in orders[i]:
            expected = steps[step](expected, float(factors[i, step]))
        torch.testing.assert_close(results[i] / 255, expected, rtol=0, atol=2e-5)


def test_grey_is_torchvisions(faces):
    expected = TF.rgb_to_grayscale(faces / 255, 3)
    torch.testing.assert_close(augment.to_grey(faces) / 255, expected, rtol=0, atol=1e-5)


def test_zero_outside_keeps_the_rectangle_where_it_is(faces):
    boxes = augment.random_crop_boxes(np.random.default_rng(0).random((12, 4)), 0.2)
    results = augment.zero_outside(faces, torch.from_numpy(boxes))
    for image, result, (top, left, height, width) in zip(faces, results, boxes, strict=True):
        expected = torch.zeros_like(image)
        inside = slice(None), slice(top, top + height), slice(left, left + width)
        expected[inside] = image[inside]
        assert torch.equal(result, expected)


def test_random_crop_boxes_have_the_areas_and_aspects_asked_for():
    boxes = augment.random_crop_boxes(np.random.default_rng(0).random((20000, 4)), 0.2)
    assert boxes[:, :2].min() == 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() == 112
    area, aspect = boxes[:, 2:].prod(1) / 112**2, boxes[:, 3] / boxes[:, 2]
    assert 0.19 < area.min() < 0.21
    assert area.max() == 1
    assert 0.73 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.36
    # Uniform below the areas at which sides are cut: a quarter of 0.2 to 1 is 0.2 to 0.4.
    assert np.mean(area < 0.4) == pytest.approx(0.25, abs=0.015)


# ------------------------------------------------------------------------------ a batch


def test_hashed_uniform_is_uniform_and_uncorrelated():
    numbers = hashed_uniform(np.arange(20000), seed=0, epoch=0, count=5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = np.stack([np.histogram(column, 10, (0, 1))[0] for column in numbers.T])
    assert np.all(abs(histogram - 2000) < 200)
    assert np.all(abs(np.corrcoef(numbers.T) - np.eye(5)) < 0.03)
    for seed, epoch in ((1, 0), (0, 1)):
        other = hashed_uniform(np.arange(20000), seed, epoch, 5)
        assert abs(np.corrcoef(numbers[:, 0], other[:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("name", ["mild", "adaface"])
def test_a_batch_gives_what_its_images_give_one_by_one(name):
    faces, positions = synthetic_crops(4).repeat(16, 1, 1, 1), np.arange(100, 164)
    before = faces.clone()
    augmentation = build_augmentation(name, seed=3, epoch=2)
    expected = augmentation(faces, positions)
    assert expected.dtype == torch.uint8
    assert expected.shape == faces.shape
    assert torch.equal(faces, before)
    shuffled = np.random.default_rng(0).permutation(64)
    for part in np.array_split(shuffled, 5):
        alone = augmentation(faces[part], positions[part])
        # Sums may come out in another order, and half a level to another side.
        assert (alone.int() - expected[part].int()).abs().max() <= 1
    assert torch.equal(augmentation(faces, positions), expected)
    assert not torch.equal(build_augmentation(name, seed=3, epoch=3)(faces, positions), expected)


def test_images_change_with_the_probability_of_the_policy():
    faces, positions = synthetic_crops(1).expand(512, -1, -1, -1), np.arange(512)
    for name, policy in AUGMENTATIONS.items():
        augmentation = build_augmentation(name, seed=0, epoch=0)
        if name == "none":
            assert augmentation is None
            continue
        changed = (augmentation(faces, positions) != faces).flatten(1).any(1).float().mean().item()
        unchanged = np.prod([1 - getattr(policy, transform) for transform in TRANSFORMS])
        assert changed == pytest.approx(1 - unchanged, abs=0.06)  # 2.7 standard errors


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_each_transform_changes_a_face_and_leaves_it_a_face(transform):
    faces = synthetic_crops(8)
    policy = AugmentPolicy(**{transform: 1.0})
    changed = augment.augment_batch(faces, np.arange(8), policy=policy, seed=0, epoch=0).float()
    assert (changed != faces).flatten(1).any(1).all()
    for face, result in zip(faces.float(), changed, strict=True):
        seen = result.sum(2) > 0  # a crop blackens the rest
        pixels = torch.stack([face[seen].flatten(), result[seen].flatten()])
        correlation = torch.corrcoef(pixels)[0, 1]
        assert correlation > 0.6
