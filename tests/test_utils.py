import cv2
import numpy as np
import pytest
import torch

import utils
from utils import TEMPLATE, UserError, similarity_transform, warp_face


def umeyama(source, target):
    """Umeyama 1991, equations 34 to 43, with the singular value decomposition."""
    mean_source, mean_target = source.mean(0), target.mean(0)
    covariance = (target - mean_target).T @ (source - mean_source) / len(source)
    u, d, vt = np.linalg.svd(covariance)
    sign = np.ones(2)
    if np.linalg.det(covariance) < 0:
        sign[1] = -1
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / (source - mean_source).var(0).sum()
    shift = mean_target - scale * rotation @ mean_source
    return np.hstack([scale * rotation, shift[:, None]])


def test_similarity_transform_equals_umeyama():
    rng = np.random.default_rng(0)
    points = TEMPLATE * rng.uniform(0.5, 3, (50, 1, 1)) + rng.normal(0, 6, (50, 5, 2)) + 40
    expected = np.stack([umeyama(p, TEMPLATE) for p in points])
    np.testing.assert_allclose(similarity_transform(points), expected, atol=1e-9)


def test_similarity_transform_of_a_rotated_and_scaled_template_is_exact():
    angle, scale, shift = 0.3, 1.7, np.array([20.0, -5.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = TEMPLATE @ (scale * rotation).T + shift
    matrix = similarity_transform(points)
    np.testing.assert_allclose(points @ matrix[:, :2].T + matrix[:, 2], TEMPLATE, atol=1e-9)
    np.testing.assert_allclose(matrix[:, :2], rotation.T / scale, atol=1e-12)


def test_points_that_coincide_give_zeros_and_not_nan():
    assert np.all(similarity_transform(np.ones((5, 2))) == 0)


def test_warp_face_puts_the_points_on_the_template():
    image = np.zeros((250, 250, 3), np.uint8)
    points = (TEMPLATE - 56) @ np.array([[0.0, 1.4], [-1.4, 0.0]]) + 125  # turned by 90 degrees
    for point in points:
        cv2.circle(image, tuple(round(v) for v in point), 4, (255, 255, 255), -1)
    face = warp_face(image, similarity_transform(points))
    assert face.shape == (112, 112, 3)
    for x, y in TEMPLATE:
        assert face[round(y), round(x)].min() > 200


def test_newest_run_goes_by_the_time_in_the_name(tmp_path):
    for name in ("20250102-000000-r50-s0", "20250101-000000-tiny-s0", "20250301-000000-tiny-s1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.pt").touch()
    (tmp_path / "20250401-000000-r50-s0").mkdir()  # has no checkpoint yet
    found = utils.newest_run(tmp_path, "best.pt")
    assert found.parent.name == "20250301-000000-tiny-s1"
    with pytest.raises(UserError, match="train first"):
        utils.newest_run(tmp_path, "last.pt")


def test_user_errors_become_one_sentence_and_status_2(capsys, tmp_path):
    @utils.exit_on_user_error
    def main(kind):
        if kind == "user":
            raise UserError("There is no data.")
        if kind == "os":
            (tmp_path / "absent").read_text()
        if isinstance(kind, Exception):
            raise kind
        raise RuntimeError("a bug")

    for kind, text in (("user", "There is no data."), ("os", "No such file")):
        with pytest.raises(SystemExit) as ended:
            main(kind)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert text in error
        assert "Traceback" not in error
    for error, text in (
        (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory (OutOfMemory"),
        (RuntimeError("CUDA error: out of memory"), "out of GPU memory (RuntimeError: CUDA error"),
        (MemoryError(), "out of memory (MemoryError"),
        (RuntimeError("can't allocate memory: you tried to allocate 9 bytes"), "9 bytes"),
        (cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes"), "9 bytes"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(error)
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert text in printed
        assert "a smaller --batch-size" in printed
    with pytest.raises(RuntimeError):  # bugs keep their traceback
        main("bug")


def test_devices():
    assert utils.get_device("cpu").type == "cpu"
    assert utils.get_device("auto").type in ("cpu", "cuda")
    for name in ("no-such-device", "cuda:99"):
        with pytest.raises(UserError, match=name):
            utils.get_device(name)
