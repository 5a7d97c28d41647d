"""embedders.py: each kind of checkpoint against the same sums done by hand."""

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation import embedders as emb
from fileio.checkpoint_file import save_checkpoint
from models import build_model
from tests.helpers.onnx_files import write_onnx
from tests.helpers.tf32 import allowed_tf32, tf32_on
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (5, 112, 112, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = build_model("tiny", emb_size=16)
    with torch.no_grad():  # statistics unlike those of a fresh network
        for _ in range(3):
            model(torch.randn(4, 3, 112, 112) * 0.5)
    return model.eval()


def by_hand(model, faces, mean=(0.5,) * 3, std=(0.5,) * 3, bgr=False, flip=True):
    """The definition, in float64, one face at a time."""
    model = model.double()
    out = []
    for face in faces:
        x = face.double().permute(2, 0, 1) / 255
        x = torch.stack([(x[c] - mean[c]) / std[c] for c in range(3)])
        x = x[[2, 1, 0]] if bgr else x
        views = [x, torch.flip(x, [2])] if flip else [x]
        with torch.no_grad():
            embedding = sum(_float64_forward(model, view[None])[0] for view in views)
        out.append(embedding / embedding.norm())
    model.float()
    return torch.stack(out).float()


def _float64_forward(model, x):
    """IResNet.forward ends in .float(); the last layer is float64 here."""
    last, model.features = model.features, torch.nn.Identity()
    embedding = last(model(x).double())
    model.features = last
    return embedding


OTHER = emb.InputSpec((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("spec", [emb.InputSpec(), OTHER])
def test_torch_embedder_is_what_it_says(network, faces, spec, flip):
    embed = emb.torch_embedder(network, CPU, flip, batch=2, spec=spec)
    expected = by_hand(network, faces, *spec, flip=flip)
    torch.testing.assert_close(embed(faces), expected, rtol=0, atol=1e-5)


def test_torch_embedder_ignores_autocast_and_keeps_the_mode(network, faces):
    embed = emb.torch_embedder(network, CPU)
    expected = embed(faces)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embed(faces), expected)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.eval()
    embed(faces)
    assert not network.training


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny", {"use_se": True}), ("r18", {}), ("mobilefacenet", {})],
)
def test_the_fast_way_scores_as_the_plain_one(name, options, faces):
    torch.manual_seed(0)
    model = build_model(name, emb_size=32, **options)
    with torch.no_grad():  # statistics and slopes unlike those of a fresh network
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    model.eval()
    folded = emb.fold_batch_norm(model)
    kept = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert kept < sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    x = emb.preprocess_faces(faces, emb.TRAIN_INPUT).contiguous()
    with torch.no_grad():
        plain = F.normalize(model(x) + model(x.flip(3)))
    fast = emb.torch_embedder(model, CPU)(faces)
    torch.testing.assert_close(fast @ fast.T, plain @ plain.T, rtol=0, atol=1e-5)  # cosines


def test_batches_shrink_while_memory_is_full(faces, monkeypatch, capsys):
    """Then the embeddings are those of the smaller batches; without memory there is a sentence."""
    model, sizes = build_model("tiny", 8).eval(), []
    normalise, most = emb.normalise, [3]

    def full(images):
        sizes.append(len(images))
        if len(images) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return normalise(images)

    want = emb.torch_embedder(model, CPU, batch=2)(faces[:5])
    monkeypatch.setattr(emb, "normalise", full)
    embed = emb.torch_embedder(model, CPU, batch=5)
    assert torch.equal(embed(faces[:5]), want)
    assert sizes == [5, 2, 2, 1]
    assert capsys.readouterr().out == "Memory is full: evaluating 2 images at a time.\n"
    most[0] = 0
    with pytest.raises(UserError, match=r"one image at a time \(OutOfMemoryError: CUDA out of"):
        embed(faces[:5])
    most[0] = 5
    monkeypatch.setattr(emb, "normalise", lambda images: torch.zeros(len(images), 2, 112, 112))
    with pytest.raises(RuntimeError, match="channels"):
        embed(faces[:5])


def test_embeddings_are_computed_without_tf32(faces, monkeypatch):
    """Training switches it on for its own float32; scores are quoted to three digits."""
    normalise, seen = emb.normalise, []

    def watched(images):
        seen.append(allowed_tf32())
        return normalise(images)

    monkeypatch.setattr(emb, "normalise", watched)
    with tf32_on():
        emb.torch_embedder(build_model("tiny", 8), torch.device("cpu"))(faces)
        assert allowed_tf32() == [True, True]
    assert seen == [[False, False]]


def test_embeddings_that_are_not_numbers_are_refused(faces):
    def diverged(images):
        return torch.full((len(images), 4), float("nan"))

    with pytest.raises(UserError, match="5 of 5 faces are not finite"):
        emb.embed_in_batches(diverged, faces, flip=True, batch=2, spec=emb.InputSpec(), device=CPU)


# ---------------------------------------------------------------- kinds of checkpoints


def test_our_checkpoint_brings_its_network(network, faces, tmp_path):
    path = tmp_path / "best.pt"
    config = {"network": "tiny", "use_se": False, "emb_size": 16, "seed": 3}
    save_checkpoint(path, {"config": config, "model": network.state_dict(), "epoch": 7})
    embed, about = emb.load_embedder(path, device=CPU, network="r50")
    assert about == {"kind": "ours", "network": "tiny", "epoch": 7, "seed": 3}
    torch.testing.assert_close(embed(faces), by_hand(network, faces), rtol=0, atol=1e-5)


def test_a_plain_state_dict_takes_the_network_from_the_flag(network, faces, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(network.state_dict(), path)
    embed, about = emb.load_embedder(path, device=CPU, network="tiny")
    assert about == {"kind": "state dict", "network": "tiny"}
    torch.testing.assert_close(embed(faces), by_hand(network, faces), rtol=0, atol=1e-5)


def test_insightface_iresnet_state_dict(faces, tmp_path):
    """r18 by its published names is read with strict=True, with 512 numbers an embedding."""
    path = tmp_path / "backbone.pth"
    torch.save(build_model("r18").state_dict(), path)
    embed, _ = emb.load_embedder(path, device=CPU, network="r18")
    embeddings = embed(faces[:1])
    assert embeddings.shape == (1, 512)
    assert embeddings.norm().item() == pytest.approx(1)


def test_wrong_network_or_weights_get_a_sentence(network, tmp_path):
    path = tmp_path / "backbone.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(UserError, match="not those of network r18"):
        emb.load_embedder(path, device=CPU, network="r18")
    torch.save({**network.state_dict(), "extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="Unexpected key"):
        emb.load_embedder(path, device=CPU, network="tiny")
    torch.save({"state_dict": network.state_dict()}, path)
    with pytest.raises(UserError, match="neither a checkpoint"):
        emb.load_embedder(path, device=CPU, network="tiny")


@pytest.mark.parametrize("name", ["a.pt", "a.onnx"])
@pytest.mark.parametrize("content", [None, b"", b"hello, this is no checkpoint", bytes(5000)])
def test_files_that_are_no_checkpoints_get_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        emb.load_embedder(path, device=CPU)


def test_a_whole_pickled_module_is_refused(network, tmp_path):
    torch.save(network, tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"module\.pth"):
        emb.load_embedder(tmp_path / "module.pth", device=CPU, network="tiny")


# ---------------------------------------------------------------- ONNX

BACKENDS = ["onnxruntime", "opencv"]


class OnnxByHand(torch.nn.Module):
    def __init__(self, kernel, matrix):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.from_numpy(kernel))
        self.matrix = torch.nn.Parameter(torch.from_numpy(matrix))
        self.features = torch.nn.Identity()

    def forward(self, x):
        return F.conv2d(x, self.kernel, stride=16).relu().flatten(1) @ self.matrix


@pytest.mark.parametrize(("batch", "fixed"), [("n", False), (1, False), (1, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_onnx_models_for_any_batch_and_for_one(tmp_path, faces, backend, batch, fixed):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    weights = write_onnx(tmp_path / "m.onnx", batch, fixed_reshape=fixed)
    expected = by_hand(OnnxByHand(*weights), faces, *OTHER)
    for size in (1, 2, 64):
        embed = emb.onnx_embedder(tmp_path / "m.onnx", CPU, batch=size, spec=OTHER, backend=backend)
        torch.testing.assert_close(embed(faces), expected, rtol=0, atol=1e-4)


def test_onnx_model_for_a_fixed_batch_of_three(tmp_path, faces):
    pytest.importorskip("onnxruntime")
    weights = write_onnx(tmp_path / "m.onnx", 3, fixed_reshape=True)
    embed, about = emb.load_embedder(tmp_path / "m.onnx", device=CPU)
    expected = by_hand(OnnxByHand(*weights), faces)
    torch.testing.assert_close(embed(faces), expected, rtol=0, atol=1e-4)
    assert about["kind"] == "onnx"


@pytest.mark.parametrize("backend", BACKENDS)
def test_onnx_model_of_another_size_gets_a_sentence(tmp_path, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    write_onnx(tmp_path / "m.onnx", "n", side=64)
    with pytest.raises(UserError, match="112, 112"):
        emb.onnx_embedder(tmp_path / "m.onnx", CPU, backend=backend)


def test_without_onnxruntime_opencv_takes_over(monkeypatch, tmp_path, faces):
    write_onnx(tmp_path / "m.onnx", "n")
    expected = emb.load_embedder(tmp_path / "m.onnx", device=CPU)[0](faces)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    embed, about = emb.load_embedder(tmp_path / "m.onnx", device=CPU)
    assert "opencv" in about["network"]
    torch.testing.assert_close(embed(faces), expected, rtol=0, atol=1e-4)
