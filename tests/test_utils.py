import warnings

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


class FakeCuda:
    """What get_device asks of torch.cuda, for a machine with `gpus` of one compute capability."""

    def __init__(self, monkeypatch, gpus=1, capability=(9, 0), archs=("sm_75", "sm_80", "sm_90")):
        self.used = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=0: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=0: "Some Card")
        monkeypatch.setattr(torch, "empty", lambda *_, device: self.used.append(device))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_gpu_has_an_index_from_the_start_its_own_under_torchrun(name, monkeypatch):
    cuda = FakeCuda(monkeypatch, gpus=2)
    assert utils.get_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert utils.get_device(name) == torch.device("cuda", 1)
    assert all(device.index is not None for device in cuda.used)  # none is touched by default
    assert utils.get_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes on a machine with 2 GPUs.*node=2"):
        utils.get_device(name)


@pytest.mark.parametrize(
    ("capability", "archs", "works"),
    [
        ((9, 0), ["sm_75", "sm_90"], True),
        ((8, 6), ["sm_75", "sm_80"], True),  # code for 8.0 runs on 8.6 ...
        ((9, 0), ["sm_75", "sm_80"], False),  # ... and not on 9.0
        ((9, 0), ["sm_75", "compute_80"], True),  # PTX does
        ((9, 0), ["sm_90a"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((7, 5), ["sm_75"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((6, 1), ["compute_70"], False),
    ],
)
def test_cards_that_pytorch_has_no_kernels_for(capability, archs, works, monkeypatch, capsys):
    FakeCuda(monkeypatch, capability=capability, archs=archs)
    if works:
        assert utils.get_device("auto") == utils.get_device("cuda") == torch.device("cuda", 0)
        assert capsys.readouterr().out == ""
        return
    said = f"Some Card has compute capability {capability[0]}.{capability[1]}, which this PyTorch"
    assert utils.get_device("auto").type == "cpu"
    assert capsys.readouterr().out.startswith(said)
    with pytest.raises(UserError, match=said):
        utils.get_device("cuda")


def test_a_gpu_whose_driver_is_too_old_is_said(monkeypatch, capsys):
    def is_available():
        warnings.warn("The NVIDIA driver on your system is too old (Triggered at x)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert utils.get_device("auto").type == "cpu"
    said = "There is a GPU, but it cannot be used: The NVIDIA driver on your system is too old\n"
    assert capsys.readouterr().out == said


def test_apples_gpu_is_taken_where_cuda_is_not(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert utils.get_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), None),  # GTX 10xx, P100: no tensor cores
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4, RTX 20
        ((8, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_the_number_format_is_that_of_the_very_device(capability, dtype, monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability
    )
    device = torch.device("cuda", 1)
    assert utils.autocast_dtype(device) is dtype
    assert asked == [device]


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_tile", ""])
def test_a_cpu_trains_in_bfloat16_if_it_has_instructions_for_it(instructions, monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        has = name == instructions
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=has: has)
    expected = torch.bfloat16 if instructions else None
    assert utils.autocast_dtype(torch.device("cpu")) is expected


def test_apples_gpu_trains_in_float32():
    assert utils.autocast_dtype(torch.device("mps")) is None
