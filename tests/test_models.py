import json
import math

import numpy as np
import pytest
import torch

import models
from models import ArcMarginModel, build_model

# Multiply-adds and parameters as published (face.evoLVe and FaceX-Zoo for r50, the MobileFaceNet
# paper for mobilefacenet: "0.99 M parameters" with an embedding of 128).
PARAMETERS = {"r50": 43.59e6, "mobilefacenet": 1.0e6}


@pytest.mark.parametrize("network", models.NETWORKS)
def test_shapes_and_gradients(network):
    if network in ("r100", "r152", "r200"):
        with torch.device("meta"):
            model = build_model(network)
            assert model(torch.empty(2, 3, 112, 112)).shape == (2, 512)
        return
    model = build_model(network, emb_size=64, dropout=0.1)
    embedding = model(torch.randn(2, 3, 112, 112))
    assert embedding.shape == (2, 64)
    embedding.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize(("network", "count"), PARAMETERS.items())
def test_parameter_counts(network, count):
    model = build_model(network, 512 if network == "r50" else 128)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.01)


def expected_iresnet(blocks):
    """Names and shapes of InsightFace's iresnet, spelled out from its definition."""
    shapes = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,)}

    def bn(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (width,)
        shapes[f"{name}.num_batches_tracked"] = ()

    bn("bn1", 64)
    width_in = 64
    for layer, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for index in range(count):
            name = f"layer{layer}.{index}"
            bn(f"{name}.bn1", width_in)
            shapes[f"{name}.conv1.weight"] = (width, width_in, 3, 3)
            bn(f"{name}.bn2", width)
            shapes[f"{name}.prelu.weight"] = (width,)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            bn(f"{name}.bn3", width)
            if index == 0:
                shapes[f"{name}.downsample.0.weight"] = (width, width_in, 1, 1)
                bn(f"{name}.downsample.1", width)
            width_in = width
    bn("bn2", 512)
    shapes["fc.weight"], shapes["fc.bias"] = (512, 25088), (512,)
    bn("features", 512)
    return shapes


@pytest.mark.parametrize(
    ("network", "blocks"),
    {
        "r18": (2, 2, 2, 2),
        "r34": (3, 4, 6, 3),
        "r50": (3, 4, 14, 3),
        "r100": (3, 13, 30, 3),
        "r200": (6, 26, 60, 6),
    }.items(),
)
def test_names_and_shapes_are_insightfaces(network, blocks):
    with torch.device("meta"):
        state = build_model(network).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected_iresnet(blocks)


def test_names_and_shapes_against_the_published_list(real_faces):
    listed = real_faces.parent / "reference" / "iresnet_state_dict.json"
    if not listed.is_file():
        pytest.skip("no list of InsightFace's parameters beside the real faces")
    for network, shapes in json.loads(listed.read_text()).items():
        with torch.device("meta"):
            state = build_model(network).state_dict()
        assert {k: list(v.shape) for k, v in state.items()} == shapes


def test_se_blocks_add_parameters_and_keep_the_rest():
    plain, with_se = build_model("r18").state_dict(), build_model("r18", use_se=True).state_dict()
    assert plain.keys() < with_se.keys()
    with pytest.raises(ValueError, match="mobilefacenet"):
        build_model("mobilefacenet", use_se=True)


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="r49"):
        build_model("r49")


def test_dropout_only_works_in_training():
    model = build_model("tiny", emb_size=16, dropout=0.5)
    images = torch.randn(4, 3, 112, 112)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


# ------------------------------------------------------------------------------ the margin


def arcface_float64(cosine, label, s, m, easy):
    """The definition with angles, in float64: s·cos(θ + m) where that falls with θ."""
    logits = cosine.astype(np.float64).copy()
    for row, column in enumerate(label):
        cos = np.clip(logits[row, column], -1, 1)
        theta = np.arccos(cos)
        if easy:
            value = np.cos(theta + m) if cos > 0 else cos
        else:
            value = np.cos(theta + m) if theta + m < np.pi else cos - m * np.sin(m)
        logits[row, column] = value
    return s * logits


@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize("m", [0.0, 0.3, 0.5, 1.0])
def test_margin_against_the_definition_in_float64(m, easy):
    theta = np.array([0, 1e-3, 0.2, 1.0, np.pi / 2 - 1e-3, np.pi / 2 + 1e-3, 2.0])
    edge = np.pi - m
    theta = np.append(theta, [edge - 1e-3, min(edge + 1e-3, np.pi), np.pi - 1e-3, np.pi])
    cosine = np.stack([np.cos(theta), np.full(len(theta), 0.1), np.full(len(theta), -0.3)], 1)
    label = np.zeros(len(theta), np.int64)
    head = ArcMarginModel(8, 3, margin_s=64.0, margin_m=m, easy_margin=easy)
    logits = head.margin(torch.tensor(cosine, dtype=torch.float32), torch.from_numpy(label))
    # sqrt(1 − cos²) in float32 is off by up to sqrt(1e-7) next to θ = 0 and π.
    expected = arcface_float64(cosine, label, 64.0, m, easy)
    np.testing.assert_allclose(logits.numpy(), expected, atol=64 * 4e-4)
    np.testing.assert_array_equal(logits[:, 1:].numpy(), np.float32(cosine[:, 1:]) * 64)


def test_the_logit_falls_with_the_angle_everywhere():
    cosine = torch.linspace(1, -1, 2001)[:, None].repeat(1, 2)
    head = ArcMarginModel(8, 2, margin_m=0.5)
    logit = head.margin(cosine, torch.zeros(2001, dtype=torch.int64))[:, 0]
    # A step where the branches meet is allowed to fall, never to rise.
    assert (logit.diff() <= 1e-3).all()


@pytest.mark.parametrize("easy", [False, True])
def test_gradient_against_finite_differences(easy):
    head = ArcMarginModel(8, 4, margin_s=4.0, margin_m=0.5, easy_margin=easy)
    theta = torch.tensor([0.05, 0.7, 1.5, 1.7, 2.5, 2.8, 3.1], dtype=torch.float64)
    cosine = (theta.cos()[:, None] * torch.tensor([1.0, 0.3, -0.2, 0.5])).requires_grad_()
    label = torch.zeros(7, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda c: head.margin(c, label), cosine, atol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_stay_finite_where_the_angle_is_0_or_180_degrees(sign):
    head = ArcMarginModel(4, 3)
    embedding = (sign * head.weight.detach()[:1]).clone().requires_grad_()
    head(embedding, torch.tensor([0])).sum().backward()
    assert embedding.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_head_is_float32_under_autocast():
    head = ArcMarginModel(16, 10)
    embedding, label = torch.randn(6, 16), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(embedding, label)
        from_bfloat16 = head(embedding.bfloat16(), label)
    assert logits.dtype == from_bfloat16.dtype == torch.float32
    torch.testing.assert_close(logits, head(embedding, label), rtol=0, atol=0)


def test_logits_ignore_the_lengths_of_embeddings_and_centres():
    head = ArcMarginModel(16, 10)
    embedding, label = torch.randn(6, 16), torch.arange(6)
    before = head(embedding, label)
    with torch.no_grad():
        head.weight.mul_(7)
    torch.testing.assert_close(head(embedding * 1e-3, label), before, rtol=1e-4, atol=1e-3)
    assert before.abs().max() <= 64.0 * (1 + math.sin(0.5))
