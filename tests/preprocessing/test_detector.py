"""MTCNN against plain loops, hand calculations and NumPy re-computations of its layers."""

import importlib.util
import tarfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from preprocessing import detector as face_detector
from preprocessing import mtcnn_networks, mtcnn_ops
from preprocessing.detector import Detection, Detections, FaceDetector, choose_face, find_face
from tests.helpers.tf32 import allowed_tf32, tf32_on
from utils import TEMPLATE, UserError, similarity_transform, warp_face


@pytest.fixture(scope="module")
def detector():
    return FaceDetector("cpu")


def draw_face(height=250, width=250, centre=(125, 125), radius=50, seed=0):
    """An image of noise with a synthetic face, good enough for MTCNN."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), (90, 120, 140), np.uint8)
    (x, y), r = centre, radius

    def at(dx, dy):
        return round(x + dx * r), round(y + dy * r)

    skin, dark = (224, 172, 138), (50, 34, 28)
    cv2.ellipse(image, at(0, -0.25), (round(r * 1.05), round(r * 1.25)), 0, 0, 360, dark, -1)
    cv2.ellipse(image, at(0, 0), (round(r * 0.9), round(r * 1.2)), 0, 0, 360, skin, -1)
    for side in (-1, 1):
        cv2.ellipse(image, at(side * 0.38, -0.2), (r // 5, r // 9), 0, 0, 360, (250,) * 3, -1)
        cv2.circle(image, at(side * 0.38, -0.2), max(1, r // 10), dark, -1)
        cv2.line(image, at(side * 0.6, -0.45), at(side * 0.2, -0.45), dark, max(1, r // 14))
    cv2.line(image, at(0, -0.1), at(-0.12, 0.28), (180, 120, 95), max(1, r // 16))
    cv2.line(image, at(-0.12, 0.28), at(0.12, 0.28), (150, 95, 75), max(1, r // 14))
    cv2.ellipse(image, at(0, 0.62), (round(r * 0.32), r // 9), 0, 0, 360, (170, 60, 60), -1)
    image = cv2.GaussianBlur(image, (0, 0), max(0.6, r / 40)).astype(float)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


# -- the weights ---------------------------------------------------------------------------------


def test_missing_package_is_a_user_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; run pip install"):
        mtcnn_networks.load_weights("pnet")


def test_unknown_weights_are_never_unpickled(monkeypatch, tmp_path):
    folder = tmp_path / "assets" / "weights"
    folder.mkdir(parents=True)
    (folder / "pnet.lz4").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(mtcnn_networks.joblib, "load", lambda file: pytest.fail("was opened"))
    with pytest.raises(UserError, match=r"pnet\.lz4 is not the weight file"):
        mtcnn_networks.load_weights("pnet")


# -- the networks, recomputed in NumPy float64 from Keras' arrays and layout (h, w, channel)


def np_conv(x, kernel, bias):
    kh, kw, _, out = kernel.shape
    h, w = x.shape[0] - kh + 1, x.shape[1] - kw + 1
    y = np.zeros((h, w, out)) + bias
    for i in range(kh):
        for j in range(kw):
            y += x[i : i + h, j : j + w] @ kernel[i, j]
    return y


def np_prelu(x, slope):
    return np.where(x > 0, x, x * slope.reshape(-1))


def np_pool(x, size, same):
    """Stride 2; "same" pads below and to the right only, for the sizes met here."""
    count = [-(-n // 2) if same else (n - size) // 2 + 1 for n in x.shape[:2]]
    y = np.empty((*count, x.shape[2]))
    for i in range(count[0]):
        for j in range(count[1]):
            y[i, j] = x[2 * i : 2 * i + size, 2 * j : 2 * j + size].max((0, 1))
    return y


def np_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True))[..., 1]


def np_network(name, image):
    """The layers as the mtcnn package's Keras models list them; image (h, w, 3) in 0..255."""
    w = [a.astype(np.float64) for a in mtcnn_networks.load_weights(name)]
    x = (image - 127.5) / 128
    pools = {
        "pnet": [(2, True), None, None],
        "rnet": [(3, True), (3, False), None],
        "onet": [(3, True), (3, False), (2, True), None],
    }[name]
    for i, pool in enumerate(pools):
        x = np_prelu(np_conv(x, w[3 * i], w[3 * i + 1]), w[3 * i + 2])
        if pool:
            x = np_pool(x, *pool)
    if name == "pnet":
        return np_conv(x, w[9], w[10]), np_softmax(np_conv(x, w[11], w[12]))
    k = 3 * len(pools)
    x = x.transpose(1, 0, 2).reshape(-1)  # Permute((2, 1, 3)), Flatten
    x = np_prelu(x @ w[k] + w[k + 1], w[k + 2])
    heads = [x @ w[i] + w[i + 1] for i in range(k + 3, len(w), 2)]
    return (*heads[:-1], np_softmax(heads[-1]))


def stack(images, channels):
    """(n, h, w, 3) pixels as a network takes them; a fourth channel must not matter."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    if channels == 3:
        return x
    return torch.cat([x, torch.full_like(x[:, :1], 77.0)], 1)


@pytest.mark.parametrize("size", [(12, 12), (25, 30), (17, 41)])
def test_pnet_is_its_layers(size):
    images = np.random.default_rng(1).integers(0, 256, (2, *size, 3)).astype(np.float64)
    offsets, scores = mtcnn_networks.PNet()(stack(images, 3))
    for i, image in enumerate(images):
        expected_offsets, expected_scores = np_network("pnet", image)
        np.testing.assert_allclose(offsets[i].permute(1, 2, 0), expected_offsets, atol=1e-4)
        np.testing.assert_allclose(scores[i], expected_scores, atol=1e-4)


def test_rnet_is_its_layers():
    images = np.random.default_rng(2).integers(0, 256, (3, 24, 24, 3)).astype(np.float64)
    offsets, scores = mtcnn_networks.RNet()(stack(images, 4))
    for i, image in enumerate(images):
        expected_offsets, expected_scores = np_network("rnet", image)
        np.testing.assert_allclose(offsets[i], expected_offsets, atol=1e-4)
        np.testing.assert_allclose(scores[i], expected_scores, atol=1e-4)


def test_onet_is_its_layers():
    images = np.random.default_rng(3).integers(0, 256, (3, 48, 48, 3)).astype(np.float64)
    offsets, scores, points = mtcnn_networks.ONet()(stack(images, 4))
    for i, image in enumerate(images):
        expected_offsets, expected_points, expected_scores = np_network("onet", image)
        np.testing.assert_allclose(offsets[i], expected_offsets, atol=1e-4)
        np.testing.assert_allclose(points[i].T.reshape(-1), expected_points, atol=1e-4)
        np.testing.assert_allclose(scores[i], expected_scores, atol=1e-4)


# -- between the networks ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (12, 33), (40, 40), (80, 61)])
def test_area_resize_averages_what_each_pixel_covers(size):
    image = np.random.default_rng(4).integers(0, 256, (2, 40, 61, 3)).astype(np.float32)
    result = mtcnn_ops.area_resize(torch.from_numpy(image), *size).numpy()

    def weights(old, new):
        w = np.zeros((new, old))
        for i in range(new):
            for j in range(old):
                low, high = i * old / new, (i + 1) * old / new
                w[i, j] = max(0.0, min(high, j + 1) - max(low, j)) * new / old
        return w

    expected = np.einsum("ih,nhwc,jw->nijc", weights(40, size[0]), image, weights(61, size[1]))
    np.testing.assert_allclose(result, expected, atol=1e-2)


def test_cell_boxes_by_hand():
    # Cell x 3, y 5 begins at pixel 2 * 3 + 1 = 7 and 2 * 5 + 1 = 11 and ends at 2 * 3 + 12 = 18 and
    # 22; an offset of 1 is 11 pixels; scale 0.5 doubles.
    offsets = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -1.0, 0.5]])
    boxes = mtcnn_ops.cell_boxes(torch.tensor([3, 3]), torch.tensor([5, 5]), offsets, 0.5)
    assert boxes.tolist() == [[14, 22, 36, 44], [36, 22, 14, 55]]


def test_apply_offsets_by_hand():
    # Pixels 10 to 19 count as 10 wide and 0 to 19 as 20 high.
    boxes = torch.tensor([[10.0, 0.0, 19.0, 19.0]])
    moved = mtcnn_ops.apply_offsets(boxes, torch.tensor([[0.1, 0.2, -0.3, 0.4]]))
    np.testing.assert_allclose(moved, [[11, 4, 16, 27]], atol=1e-5)


def test_to_square_keeps_the_centre():
    square = mtcnn_ops.to_square(torch.tensor([[10.0, 20.0, 20.0, 50.0], [0.0, 0.0, 8.0, 4.0]]))
    assert square.tolist() == [[0, 20, 30, 50], [0, -2, 8, 6]]


def plain_nms(boxes, scores, groups, threshold, method):
    """One image after another, one pair after another."""
    kept = []
    for group in sorted(set(groups.tolist())):
        members = [i for i in range(len(boxes)) if groups[i] == group]
        members.sort(key=lambda i: -scores[i])
        for position, i in enumerate(members):
            suppressed = False
            for j in members[:position]:
                width = min(boxes[i][2], boxes[j][2]) - max(boxes[i][0], boxes[j][0])
                height = min(boxes[i][3], boxes[j][3]) - max(boxes[i][1], boxes[j][1])
                both = max(width, 0) * max(height, 0)
                area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], boxes[j])]
                base = min(area) if method == "min" else sum(area) - both
                suppressed = suppressed or both / base > threshold
            if not suppressed:
                kept.append(i)
    return kept


@pytest.mark.parametrize("method", ["union", "min"])
@pytest.mark.parametrize("most", [2048, 30])
def test_nms_is_the_plain_loop(method, most, monkeypatch):
    monkeypatch.setattr(mtcnn_ops, "MAX_BOXES", most)  # 30: several steps for the pairs
    rng = np.random.default_rng(5)
    groups = rng.permutation(np.repeat([0, 2, 3, 7], [1, 30, 12, 25]))
    corner = rng.uniform(0, 60, (len(groups), 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 50, (len(groups), 2))], 1)
    scores = rng.permutation(len(groups)) / len(groups)
    kept = mtcnn_ops.mtcnn_nms(
        *(torch.from_numpy(a) for a in (boxes, scores, groups)), 0.4, method
    ).tolist()
    assert kept == plain_nms(boxes, scores, groups, 0.4, method)
    assert 4 < len(kept) < len(groups)


def test_nms_of_nothing_is_nothing():
    none = torch.zeros(0, dtype=torch.long)
    assert len(mtcnn_ops.mtcnn_nms(torch.zeros(0, 4), torch.zeros(0), none, 0.5)) == 0


def test_nms_bounds_what_competes(monkeypatch):
    monkeypatch.setattr(mtcnn_ops, "MAX_BOXES", 3)
    boxes = torch.arange(6.0)[:, None] * 100 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])
    kept = mtcnn_ops.mtcnn_nms(boxes, scores, torch.zeros(6, dtype=torch.long), 0.5)
    assert kept.tolist() == [1, 3, 5]


@pytest.mark.parametrize("size", [24, 48])
def test_crop_samples_the_box_bilinearly(size):
    rng = np.random.default_rng(6)
    images = rng.integers(0, 256, (2, 30, 50, 3)).astype(np.uint8)
    boxes = np.array([[3.3, 4.7, 20.1, 25.2], [-6.0, -2.5, 12.0, 15.5], [30.0, 10.0, 60.0, 40.0]])
    index = [0, 1, 1]
    packed = mtcnn_ops.pack_pixels(torch.from_numpy(images))
    crops = mtcnn_ops.crop_and_resize(
        packed, torch.tensor(index), torch.from_numpy(boxes).float(), size
    )
    for crop, i, (x1, y1, x2, y2) in zip(crops.numpy(), index, boxes, strict=True):
        for row in range(0, size, 5):
            for column in range(0, size, 5):
                # crop_and_resize: the box over the image's size, times its size less one
                y = (y1 + (y2 - y1) * row / (size - 1)) / 30 * 29
                x = (x1 + (x2 - x1) * column / (size - 1)) / 50 * 49
                expected = np.full(3, 127.5)  # zero after normalisation
                if 0 <= y <= 29 and 0 <= x <= 49:
                    top, left = int(y), int(x)
                    bottom, right = min(top + 1, 29), min(left + 1, 49)
                    a, b, c, d = (
                        images[i, r, q].astype(float)
                        for r, q in ((top, left), (top, right), (bottom, left), (bottom, right))
                    )
                    upper, lower = a + (b - a) * (x - left), c + (d - c) * (x - left)
                    expected = upper + (lower - upper) * (y - top)
                np.testing.assert_allclose(crop[:3, row, column], expected, atol=0.01)


# -- the whole detector --------------------------------------------------------------------------


def test_default_smallest_face_is_a_step_of_the_pyramid_from_20_pixels():
    assert face_detector.default_min_face(250, 250) == pytest.approx(20 / 0.709**2)
    assert face_detector.default_min_face(100, 300) == 20
    assert face_detector.default_min_face(1, 1) == 20
    full = face_detector.pyramid_scales(250, 250, 20)
    fewer = face_detector.pyramid_scales(250, 250, face_detector.default_min_face(250, 250))
    assert fewer == pytest.approx(full[2:])
    assert len(full) == 8  # 150, 106, 75, 53, 37, 26, 19, 13 pixels; 9 would be under 12


def test_synthetic_faces_are_found_where_they_are(detector):
    centres = [(125, 125), (110, 130), (140, 120)]
    images = np.stack([draw_face(centre=c, radius=50, seed=i) for i, c in enumerate(centres)])
    for (x, y), faces in zip(centres, detector.detect(images), strict=True):
        assert len(faces.boxes) == 1
        assert faces.scores[0] > 0.9
        assert faces.boxes.dtype == faces.scores.dtype == faces.points.dtype == np.float32
        left, right, nose, mouth_left, mouth_right = faces.points[0]
        assert np.linalg.norm(left - (x - 19, y - 10)) < 6
        assert np.linalg.norm(right - (x + 19, y - 10)) < 6
        assert np.linalg.norm(nose - (x, y + 12)) < 8
        assert np.linalg.norm((mouth_left + mouth_right) / 2 - (x, y + 31)) < 7
        assert mouth_left[0] < mouth_right[0]


def test_two_faces_best_score_first(detector):
    image = np.concatenate([draw_face(radius=60), draw_face(radius=40, seed=1)], 1)
    (faces,) = detector.detect(image[None])
    assert len(faces.boxes) == 2
    assert faces.scores[0] >= faces.scores[1]
    assert sorted((faces.boxes[:, 0] > 250).tolist()) == [False, True]


def test_batch_and_single_agree(detector):
    images = np.stack([draw_face(radius=35 + 2 * i, seed=i) for i in range(19)])
    together = detector.detect(images)  # a part of 16 and a part of 3
    for image, faces in zip(images, together, strict=True):
        (alone,) = detector.detect(image[None])
        for a, b in zip(alone, faces, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_same_batch_gives_the_same_bits(detector):
    images = np.stack([draw_face(radius=35 + 2 * i, seed=i) for i in range(19)])
    one_thread = FaceDetector("cpu", threads=1)
    for a, b in zip(detector.detect(images), one_thread.detect(images), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_of_the_caller_are_left_alone(detector):
    before = torch.get_num_threads()
    detector.detect(draw_face()[None])
    assert torch.get_num_threads() == before


def test_a_gpu_detects_without_tf32(detector, monkeypatch):
    """With it, points move: a GPU would align other faces than a CPU."""
    monkeypatch.setattr(detector, "on_cpu", False)  # this detector's device is the CPU all the same
    run, seen = FaceDetector._run, []

    def watched(self, *arguments):
        seen.append(allowed_tf32())
        return run(self, *arguments)

    monkeypatch.setattr(FaceDetector, "_run", watched)
    with tf32_on():
        detector.detect(np.zeros((1, 60, 60, 3), np.uint8))
        assert allowed_tf32() == [True, True]
    assert seen
    assert all(settings == [False, False] for settings in seen)


def test_tensors_and_read_only_arrays_are_taken_too(detector):
    image = draw_face()[None]
    (expected,) = detector.detect(image)
    frozen = image.copy()
    frozen.flags.writeable = False
    for images in (torch.from_numpy(image), frozen, image[:, :, ::-1][:, :, ::-1]):
        (faces,) = detector.detect(images)
        assert np.array_equal(faces.points, expected.points)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (11, 11), (12, 12), (13, 40), (20, 20)])
def test_tiny_images_have_no_faces(detector, size):
    images = np.random.default_rng(7).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    assert [d.status for d in find_face(detector, images)] == ["no_face", "no_face"]


def test_no_images_no_faces(detector):
    assert detector.detect(np.zeros((0, 250, 250, 3), np.uint8)) == []


def test_large_images_are_shrunk_and_coordinates_are_not(detector, monkeypatch):
    image = draw_face(400, 320, (150, 190), 80)[None]
    (expected,) = detector.detect(image)
    monkeypatch.setattr(face_detector, "MAX_DETECTOR_SIDE", 170)
    (faces,) = detector.detect(image)
    assert len(faces.boxes) == len(expected.boxes) == 1
    assert np.abs(faces.points - expected.points).max() < 4
    assert np.abs(faces.points.mean((0, 1)) - expected.points.mean((0, 1))).max() < 1.5


# -- choosing, retrying, the central crop --------------------------------------------------------


def faces_at(*boxes):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Detections(
        boxes, np.ones(len(boxes), np.float32), np.zeros((len(boxes), 5, 2), np.float32)
    )


@pytest.mark.parametrize(
    ("boxes", "chosen"),
    [
        ([], None),
        ([(0, 0, 10, 10)], 0),
        ([(80, 80, 120, 120), (75, 75, 175, 175)], 1),  # both central: the larger
        ([(0, 0, 100, 100), (80, 80, 170, 170)], 1),  # nearly as large: the central one
        ([(10, 60, 140, 190), (110, 110, 140, 140)], 0),  # much larger, a little off: it
        # areas 6,400 and 2,500; centres 85 and 0 pixels off: 6,400 - 2 * 85^2 < 2,500
        ([(0, 85, 80, 165), (100, 100, 150, 150)], 1),
    ],
)
def test_choose_face_is_large_and_central(boxes, chosen):
    assert choose_face(faces_at(*boxes), 250, 250) == chosen


def test_choose_face_knows_width_from_height():
    faces = faces_at((130, 40, 170, 80), (40, 130, 80, 170))  # centres (150, 60) and (60, 150)
    assert choose_face(faces, 120, 300) == 0
    assert choose_face(faces, 300, 120) == 1


def test_small_faces_are_found_in_the_retry(detector):
    images = np.stack(
        [draw_face(radius=50), draw_face(radius=6), np.zeros((250, 250, 3), np.uint8)]
    )
    first, second, third = find_face(detector, images)
    assert first.status == "ok"
    assert second.status == "retried"
    assert np.linalg.norm(second.points.mean(0) - (125, 127)) < 5
    assert third == Detection("no_face")


def test_retry_gives_the_given_images_coordinates(detector):
    image = draw_face(radius=40)[None]
    (expected,) = detector.detect(image)
    (faces,) = face_detector.retry_detection(detector, image)
    best = choose_face(faces, 250, 250)
    assert np.abs(faces.points[best] - expected.points[0]).max() < 4


@pytest.mark.parametrize("size", [(250, 250), (200, 300), (1, 1)])
def test_central_crop_points_align_the_central_square(size):
    height, width = size
    points = face_detector.central_crop_points(height, width)
    matrix = similarity_transform(points)
    side = face_detector.CENTRAL_CROP * min(size)
    corners = np.array([[width - side, height - side, 2], [width + side, height + side, 2]]) / 2
    np.testing.assert_allclose(corners @ matrix.T, [[0, 0], [112, 112]], atol=1e-6)
    assert warp_face(np.zeros((height, width, 3), np.uint8), matrix).shape == (112, 112, 3)


# -- real faces ----------------------------------------------------------------------------------


def test_real_faces_are_found_and_lie_where_lfw_puts_them(detector, real_faces):
    images = []
    with tarfile.open(real_faces / "lfw-deepfunneled.tgz") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                data = np.frombuffer(tar.extractfile(member).read(), np.uint8)
                images.append(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))
            if len(images) == 48:
                break
    detections = find_face(detector, np.stack(images))
    assert [d.status for d in detections] == ["ok"] * 48
    aligned = similarity_transform(np.stack([d.points for d in detections]))
    points = np.einsum("nij,nkj->nki", aligned[..., :2], np.stack([d.points for d in detections]))
    residual = np.linalg.norm(points + aligned[:, None, :, 2] - TEMPLATE, axis=2)
    assert np.median(residual) < 4  # the five points have a face's shape
    assert np.median([d.score for d in detections]) > 0.99
