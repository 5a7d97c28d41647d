"""The pipeline: blocks and batches, coordinates in the originals, order, and the crops."""

import cv2
import numpy as np
import pytest

from fileio.archive_source import ArchiveError, Entry
from fileio.archives import open_source
from fileio.images import decode_image
from preprocessing import pipeline
from preprocessing.detector import CENTRAL_CROP, Detection, FaceDetector, find_face
from preprocessing.pipeline import (
    AlignResult,
    DecodedImage,
    align_and_encode,
    align_blocks,
    align_face,
    decode_entry,
    find_faces,
    plan_batches,
    plan_blocks,
    prefetch,
)
from tests.helpers.synthetic_faces import (
    casia_files,
    face,
    image_without_face,
    same_pixels,
    write_zip,
)
from utils import TEMPLATE, similarity_transform, warp_face

ENTRY = Entry("s/a/1.jpg", "a", 1, None)


@pytest.fixture(scope="module")
def detector():
    return FaceDetector()


def entries_of(*sizes):
    return [Entry(f"s/a/{i}.jpg", "a", size, None) for i, size in enumerate(sizes)]


def test_blocks_are_bounded_in_number_and_bytes(monkeypatch):
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 100)
    assert plan_blocks([]) == []
    assert plan_blocks(entries_of(1, 1, 1, 1, 1), 2) == [(0, 2), (2, 4), (4, 5)]
    assert plan_blocks(entries_of(60, 40, 1, 500, 2, 3), 9) == [(0, 2), (2, 3), (3, 4), (4, 6)]


def test_batches_hold_one_size_each():
    shapes = [(40, 40), (30, 40), (40, 40), (10, 40), (40, 40), (30, 40)]
    images = [DecodedImage(ENTRY, "", np.zeros((*shape, 3), np.uint8)) for shape in shapes]
    images.append(DecodedImage(ENTRY, "unreadable"))
    assert plan_batches(images, 2) == [[0, 2], [4], [1, 5]]  # the fourth is too small
    large = [DecodedImage(ENTRY, "", np.zeros((1000, 1000, 3), np.uint8))] * 5
    assert [len(batch) for batch in plan_batches(large, 32)] == [2, 2, 1]


def test_prefetch_keeps_order_and_asks_early():
    asked = []
    items = prefetch((asked.append(i) or i for i in range(5)), 2)
    assert next(items) == 0
    assert asked == [0, 1, 2]
    assert list(items) == [1, 2, 3, 4]


def test_usual_images_are_aligned_by_one_warp(detector):
    """The oracle is the three steps written out: detect, transform, warp."""
    image = decode_entry(ENTRY, face(1))
    (detection,) = find_face(detector, image.image[None])
    result = align_and_encode(image, detection, crop_missed=False)
    matrix = similarity_transform(detection.points.astype(np.float64))
    expected = warp_face(decode_image(face(1)), matrix)
    assert result.status == "ok"
    assert same_pixels(decode_image(result.jpeg), expected, 3)
    np.testing.assert_allclose(result.points, detection.points, atol=1e-4)


def test_large_images_are_searched_small_and_cut_from_the_original(detector):
    """A face enlarged eight times, its points given in the copy: they and the crop come back."""
    usual = decode_entry(ENTRY, face(2))
    expected = align_and_encode(usual, find_face(detector, usual.image[None])[0], False)
    large = cv2.resize(usual.image, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    image = decode_entry(ENTRY, cv2.imencode(".png", large[..., ::-1])[1].tobytes())
    assert image.image.shape == (1024, 1024, 3)
    # Whole numbers are centres of pixels, so x in the usual image is 8 (x + 0.5) - 0.5 here
    zoom = 1024 / 250
    given = Detection(
        "ok", 1.0, (expected.box + 0.5) * zoom - 0.5, (expected.points + 0.5) * zoom - 0.5
    )
    got = align_and_encode(image, given, False)
    np.testing.assert_allclose(got.points, (expected.points + 0.5) * 8 - 0.5)
    np.testing.assert_allclose(got.box, (expected.box + 0.5) * 8 - 0.5)
    assert same_pixels(decode_image(got.jpeg), decode_image(expected.jpeg), 3)
    # and the detector does find it there
    (found,) = find_face(detector, image.image[None])
    assert np.abs(found.points - given.points).max() < 5 * zoom


def test_halving_first_is_the_same_crop_without_aliasing():
    """A fine chequerboard has to become even grey, and a gradient to stay what it is."""
    y, x = np.mgrid[:900, :900]
    points = TEMPLATE * 7.3 + 30
    board = np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    assert np.ptp(align_face(board, points)[5:-5, 5:-5].astype(int)) <= 2
    ramp = np.repeat((x / 4).astype(np.uint8)[..., None], 3, axis=2)
    plain = warp_face(ramp, similarity_transform(points))
    assert same_pixels(align_face(ramp, points), plain, 1)


def test_missed_faces_are_skipped_or_cropped(detector):
    image = decode_entry(ENTRY, image_without_face())
    missed = Detection("no_face")
    assert align_and_encode(image, missed, False) == AlignResult(ENTRY, "no_face")
    cropped = align_and_encode(image, missed, True)
    assert cropped.status == "central_crop"
    assert cropped.points is None
    side = CENTRAL_CROP * 250
    start = round((250 - side) / 2)
    square = image.image[start : start + round(side), start : start + round(side)]
    centre = cv2.resize(square, (112, 112), interpolation=cv2.INTER_LINEAR)
    assert same_pixels(decode_image(cropped.jpeg), centre, 8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (19, 200)])
def test_tiny_images(shape):
    data = cv2.imencode(".png", np.full((*shape, 3), 90, np.uint8))[1].tobytes()
    image = decode_entry(ENTRY, data)
    assert plan_batches([image], 4) == []
    assert align_and_encode(image, Detection("no_face"), False).status == "too_small"
    cropped = align_and_encode(image, Detection("no_face"), True)
    assert decode_image(cropped.jpeg).shape == (112, 112, 3)


def test_a_very_long_image(detector):
    data = cv2.imencode(".png", np.full((30, 20_000, 3), 90, np.uint8))[1].tobytes()
    image = decode_entry(ENTRY, data)
    assert min(image.image.shape[:2]) == pipeline.MIN_IMAGE_SIDE
    assert find_faces(detector, [image], [0])[0].status == "no_face"


def test_reasons_come_through():
    assert decode_entry(ENTRY, ArchiveError("no", "too_large")).status == "too_large"
    assert decode_entry(ENTRY, b"").status == "empty_file"
    assert decode_entry(ENTRY, face(1)[:3000]).status == "truncated"
    assert (
        align_and_encode(DecodedImage(ENTRY, "truncated"), Detection("no_face"), True).jpeg is None
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_come_in_order_whatever_the_threads(workers, detector, tmp_path):
    files = casia_files(2, 4) | {"CASIA-WebFace/0001000/900.jpg": image_without_face()}
    with open_source(write_zip(tmp_path / "x.zip", files)) as source:
        entries = source.entries()
        blocks = plan_blocks(entries, 2)
        results = list(align_blocks(source, blocks, detector, False, 2, workers))
        rest = list(align_blocks(source, blocks[3:], detector, False, 2, workers))
    assert [len(block) for block in results] == [2, 2, 2, 2, 1]
    assert [face.entry for block in results for face in block] == entries
    statuses = [face.status for block in results for face in block]
    assert statuses == ["ok"] * 4 + ["no_face"] + ["ok"] * 4
    jpegs = [face.jpeg for block in results for face in block]
    assert [face.jpeg for block in rest for face in block] == jpegs[6:]
