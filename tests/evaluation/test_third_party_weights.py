"""third_party_weights.py: the same network in others' wrappings, and under others' names."""

import argparse
import collections
import datetime
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from evaluation.embedders import TRAIN_INPUT, load_embedder, preprocess_faces
from models import build_model
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (3, 112, 112, 3), dtype=np.uint8))


def randomised(model):
    """Batch norms and slopes unlike those of a fresh network, so that none can be left out."""
    generator = torch.Generator().manual_seed(1)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 1:
            low = 0.5 if name.endswith("var") else -0.3 if name.endswith("mean") else 0.1
            value.data.uniform_(low, low + 0.6, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomised(build_model("tiny", emb_size=16))


@torch.no_grad()
def embeddings_of(model, faces):
    x = preprocess_faces(faces, TRAIN_INPUT)
    return F.normalize(model(x) + model(x.flip(3)))


def check(path, model, faces, *notes, **options):
    embed, info = load_embedder(path, device=CPU, network="tiny", **options)
    torch.testing.assert_close(embed(faces), embeddings_of(model, faces), rtol=0, atol=1e-5)
    assert info["notes"] == ["RGB, mean 0.5, std 0.5", *notes]


# ------------------------------------------------------------------------------ wrappings


class Settings:
    """A class that only the author of a checkpoint has."""

    def __init__(self):
        self.lr = 0.1


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


HEAD = torch.ones(20, 16)
WRAPPINGS = {
    "plain": (lambda s: dict(s), []),
    "ordered": (collections.OrderedDict, []),
    "module": (lambda s: under("module.", s), ["weights of module"]),
    "model": (lambda s: under("model.", s), ["weights of model"]),
    "backbone": (lambda s: under("backbone.", s), ["weights of backbone"]),
    "net": (lambda s: under("net.", s), ["weights of net"]),
    "compiled": (lambda s: under("_orig_mod.", s), []),
    "compiled within DDP": (lambda s: under("module._orig_mod.", s), ["weights of module"]),
    "state_dict": (lambda s: {"epoch": 3, "state_dict": dict(s)}, ["weights of state_dict"]),
    "model key": (lambda s: {"model": dict(s), "epoch": 3}, ["weights of model"]),
    "ema": (lambda s: {"ema": dict(s)}, ["weights of ema"]),
    "two of them": (
        lambda s: {"net": dict(s), "ema": {k: t * 2 for k, t in s.items()}},
        ["weights of net", "not of ema"],
    ),
    "arcface_torch": (
        lambda s: {
            "epoch": 3,
            "state_dict_backbone": dict(s),
            "state_dict_softmax_fc": {"weight": HEAD},
            "state_optimizer": {"state": {0: {"momentum_buffer": HEAD * float("nan")}}},
        },
        ["weights of state_dict_backbone"],
    ),
    "MagFace": (
        lambda s: {"state_dict": under("features.module.", s) | {"fc.weight": HEAD.T}},
        ["weights of state_dict.features.module"],
    ),
    "Lightning": (
        lambda s: {
            "pytorch-lightning_version": "1.4",
            "state_dict": under("model.", s) | {"head.kernel": HEAD},
            "hyper_parameters": argparse.Namespace(arch="ir_50", path=pathlib.Path("x")),
            "callbacks": {Settings: Settings()},
        },
        ["weights of state_dict.model"],
    ),
    "values of numpy": (
        lambda s: {"best": np.float64(0.98), "roc": np.ones(3), "state_dict": dict(s)},
        ["weights of state_dict"],
    ),
    "when": (lambda s: {"at": datetime.datetime.now(), "net": dict(s)}, ["weights of net"]),
    "no counters": (lambda s: {k: t for k, t in s.items() if "num_batches" not in k}, []),
    "with a head": (lambda s: dict(s) | {"head.weight": HEAD}, ["without head.weight"]),
}


@pytest.mark.parametrize("name", WRAPPINGS)
@pytest.mark.parametrize("old_format", [False, True])
def test_wrapped_weights(tmp_path, network, faces, name, old_format):
    wrap, notes = WRAPPINGS[name]
    path = tmp_path / "x.pth"
    torch.save(wrap(network.state_dict()), path, _use_new_zipfile_serialization=not old_format)
    check(path, network, faces, *notes)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors(tmp_path, network, faces, prefix):
    save_file(under(prefix, network.state_dict()), tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors", network, faces, *["weights of model"] * bool(prefix))
    data = (tmp_path / "model.safetensors").read_bytes()
    for corrupt in (b"", data[:100], data[:-5], b"\xff" * 8 + data):
        (tmp_path / "model.safetensors").write_bytes(corrupt)
        with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
            load_embedder(tmp_path / "model.safetensors", device=CPU)


def test_a_pickled_module_gives_its_weights_and_runs_nothing(tmp_path, network, faces):
    torch.save(network, tmp_path / "x.pth")
    check(tmp_path / "x.pth", network, faces)
    torch.save({"model": nn.DataParallel(network)}, tmp_path / "x.pth")
    check(tmp_path / "x.pth", network, faces, "weights of model.module")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_gives_its_weights_and_runs_nothing(tmp_path, network, faces):
    traced = torch.jit.trace(network, torch.zeros(1, 3, 112, 112))
    torch.jit.save(traced, tmp_path / "x.pt")
    check(tmp_path / "x.pt", network, faces)


@pytest.mark.parametrize("third_party", [torch.device("cpu"), Settings()])
def test_pytorchs_advice_reaches_nobody(tmp_path, third_party):
    """It advises to set weights_only=False, which would run what is in the file."""
    torch.save({"x": third_party, "model": {}}, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        load_embedder(tmp_path / "x.pth", device=CPU)
    assert "weights_only" not in str(error.value)
    assert str(error.value).endswith("x.pth holds no weights; give another --checkpoint.")


# ------------------------------------------------------------------------------ names


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x):
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """A residual unit as face.evoLVe (no second batch norm) or AdaFace define it."""

    def __init__(self, before, after, stride, has_bn2, use_se):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride)
        if before != after:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, after, 3, 1, 1, bias=False),
            *[nn.BatchNorm2d(after)] * has_bn2,
            nn.PReLU(after),
            nn.Conv2d(after, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            *[Gate(after)] * use_se,
        )

    def forward(self, x):
        return self.res_layer(x) + self.shortcut_layer(x)


def their_network(has_bn2, use_se, affine):
    """A network with the blocks of our tiny."""
    widths = [(32, 32, 2), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    model = nn.Sequential()
    model.input_layer = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.PReLU(32)
    )
    model.body = nn.Sequential(*(Unit(*width, has_bn2, use_se) for width in widths))
    model.output_layer = nn.Sequential(
        nn.BatchNorm2d(128),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(128 * 7 * 7, 16),
        nn.BatchNorm1d(16, affine=affine),
    )
    return randomised(model)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("has_bn2", "use_se", "affine"),
    [(True, False, False), (False, False, True), (False, True, True)],
    ids=["AdaFace, CVLface", "face.evoLVe IR", "face.evoLVe IR-SE"],
)
def test_networks_under_other_names(tmp_path, faces, has_bn2, use_se, affine, prefix):
    torch.manual_seed(0)
    model = their_network(has_bn2, use_se, affine)
    torch.save({"state_dict": under(prefix, model.state_dict())}, tmp_path / "x.ckpt")
    note = f"weights of state_dict.{prefix}".rstrip(".")
    check(tmp_path / "x.ckpt", model, faces, note, use_se=use_se)


def sentence(tmp_path, state, network):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError) as error:
        load_embedder(tmp_path / "x.pth", device=CPU, network=network)
    return str(error.value)


def test_what_differs_is_named_by_the_files_own_names(tmp_path):
    state = under("net.", their_network(True, False, False).state_dict())
    del state["net.body.1.shortcut_layer.0.weight"], state["net.body.2.res_layer.1.weight"]
    state["net.body.7.res_layer.0.weight"] = torch.ones(3)
    state["net.output_layer.0.weight"] = torch.ones(3)
    text = sentence(tmp_path, state, "tiny")
    assert "missing: layer2.0.downsample.0.weight, layer2.1.conv1.weight" in text
    assert "unknown: net.body.7.res_layer.0.weight" in text
    assert "of another shape: net.output_layer.0.weight is (3,), not (128,)" in text


def test_the_network_that_fits_is_named(tmp_path):
    state = build_model("tiny", use_se=True).state_dict()
    text = sentence(tmp_path, state, "r18")
    assert "not those of network r18: missing: " in text
    assert text.endswith("They are those of --network tiny --use-se.")
    assert "of no other --network" in sentence(tmp_path, {"a": torch.ones(1)}, "tiny")


def test_a_larger_network_is_not_taken_for_a_smaller(tmp_path):
    """r34 has all parameters of r18, of the same shapes, and more."""
    with torch.device("meta"):
        state = build_model("r34", 8).state_dict()
    state = {k: torch.zeros(t.shape, dtype=t.dtype) for k, t in state.items()}
    text = sentence(tmp_path, state, "r18")
    assert "unknown: layer1.2.bn1.weight" in text
    assert text.endswith("They are those of --network r34.")
