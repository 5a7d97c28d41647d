import json

import pytest
import torch

import models
from models import build_model

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


@pytest.mark.parametrize("network", ["tiny", "mobilefacenet"])
def test_zero_init_makes_blocks_their_shortcuts(network):
    model = build_model(network, 16, zero_init=True).eval()
    seen = 0
    for block in model.modules():
        plain = isinstance(block, models.IRBlock) and block.downsample is None
        if plain or (isinstance(block, models.Bottleneck) and block.residual):
            convolution = block.conv1 if plain else block.layers[0][0]
            x = torch.randn(2, convolution.in_channels, 8, 8)
            assert torch.equal(block(x), x)
            seen += 1
    assert seen >= 2
    torch.manual_seed(0)
    zero = build_model(network, 16, zero_init=True).state_dict()
    torch.manual_seed(0)
    usual = build_model(network, 16).state_dict()
    assert 0 < sum(not torch.equal(zero[k], usual[k]) for k in zero) <= 15
