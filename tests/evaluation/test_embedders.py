"""embedders.py: each kind of checkpoint against the same sums done by hand."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from evaluation import embedders as emb
from fileio.checkpoint_file import save_checkpoint
from models import build_model
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
    assert about == {"kind": "state dict", "network": "tiny", "notes": ["RGB, mean 0.5, std 0.5"]}
    torch.testing.assert_close(embed(faces), by_hand(network, faces), rtol=0, atol=1e-5)


def test_insightface_iresnet_state_dict(faces, tmp_path):
    """r18 by its published names is read with strict=True, with 512 numbers an embedding."""
    path = tmp_path / "backbone.pth"
    torch.save(build_model("r18").state_dict(), path)
    embed, _ = emb.load_embedder(path, device=CPU, network="r18")
    embeddings = embed(faces[:1])
    assert embeddings.shape == (1, 512)
    assert embeddings.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["a.pt", "a.onnx", "a.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"hello, this is no checkpoint", bytes(5000)])
def test_files_that_are_no_checkpoints_get_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        emb.load_embedder(path, device=CPU)


# ---------------------------------------------------------------- ONNX


class OnnxByHand(torch.nn.Module):
    def __init__(self, kernel, matrix):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.from_numpy(kernel))
        self.matrix = torch.nn.Parameter(torch.from_numpy(matrix))
        self.features = torch.nn.Identity()

    def forward(self, x):
        return F.conv2d(x, self.kernel, stride=16).relu().flatten(1) @ self.matrix


RNG = np.random.default_rng(1)
KERNEL = RNG.normal(0, 0.05, (4, 3, 16, 16)).astype(np.float32)
MATRIX = RNG.normal(0, 0.05, (4 * 49, 8)).astype(np.float32)
MEAN, STD = (np.float32(values).reshape(1, 3, 1, 1) for values in OTHER[:2])
NHWC = ["n", 112, 112, 3]


def node(kind, *inputs, out="x", **attributes):
    return onnx.helper.make_node(kind, inputs, [out], **attributes)


def write_model(
    path,
    before=(),
    after=(),
    outputs=("embedding",),
    shape=("n", 3, 112, 112),
    kind="float",
    **more,
):
    """The model of OnnxByHand; nodes `before` take "input" to "x", `after` add outputs."""
    nodes = list(before) or [node("Identity", "input")]
    nodes += [
        node("Conv", "x", "kernel", out="map", strides=[16, 16]),
        node("Relu", "map", out="relu"),
        node("Reshape", "relu", "flat", out="rows"),
        node("MatMul", "rows", "matrix", out="embedding"),
        *after,
    ]
    tensors = {"kernel": KERNEL, "matrix": MATRIX, "flat": np.array([-1, 196])} | more
    if kind == "float16":
        tensors = {
            k: t.astype(np.float16) if t.dtype.kind == "f" else t for k, t in tensors.items()
        }
    types = {"float": 1, "uint8": 2, "float16": 10}
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "faces",
        [info("input", types[kind], shape)],
        [info(name, 10 if kind == "float16" else 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=opset), path)


def check_onnx(path, faces, spec=emb.TRAIN_INPUT, *, given=None, tolerance=1e-4, batch=64):
    """The embeddings are those of the model on faces normalised by `spec`; returns the notes."""
    embed, info = emb.load_embedder(path, device=CPU, batch=batch, spec=given or spec)
    expected = by_hand(OnnxByHand(KERNEL, MATRIX), faces, *spec)
    torch.testing.assert_close(embed(faces), expected, rtol=0, atol=tolerance)
    assert info["kind"] == "onnx"
    return info["notes"]


@pytest.mark.parametrize(("batch", "flat"), [("n", -1), (1, -1), (1, 1), (3, 3)])
def test_onnx_models_for_any_batch_and_for_one(tmp_path, faces, batch, flat):
    shape = [batch, 3, 112, 112]
    write_model(tmp_path / "m.onnx", shape=shape, flat=np.array([flat, 196]))
    for size in (1, 2, 64):
        notes = check_onnx(tmp_path / "m.onnx", faces, OTHER, batch=size)
    assert notes == ["BGR, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"]


@pytest.mark.parametrize(
    ("flat", "after", "said"),
    [([1, 196], [], True), ([1, -1], [], True), ([-1, 196], ["LpNormalization"], False)],
)
def test_a_batch_declared_free_and_fixed_within(tmp_path, faces, flat, after, said):
    """insightface#2652: two faces at once fail, or become one row of twice the length."""
    nodes = [node("LpNormalization", "embedding", out="unit", axis=1)] if after else []
    outputs = ("unit",) if after else ("embedding",)
    write_model(tmp_path / "m.onnx", after=nodes, outputs=outputs, flat=np.array(flat))
    if after:  # one face at a time, else the mirror image would be summed before normalisation
        notes = emb.load_embedder(tmp_path / "m.onnx", device=CPU)[1]["notes"]
    else:
        notes = check_onnx(tmp_path / "m.onnx", faces)
    assert ("one face at a time, as the graph demands" in notes) == said


BY_255 = {"a": MEAN * 255, "b": 1 / (STD * 255)}
OWN_NORMALISATIONS = {
    "mxnet": ([node("Sub", "input", "a", out="y"), node("Mul", "y", "b")], BY_255, 255),
    "divide first": (
        [node("Div", "input", "c", out="y"), node("Sub", "y", "a", out="z"), node("Div", "z", "b")],
        {"a": MEAN, "b": STD, "c": np.float32(255)},
        255,
    ),
    "add": (
        [node("Mul", "a", "input", out="y"), node("Add", "b", "y")],
        {"a": 1 / (STD * 255), "b": -MEAN / STD},
        255,
    ),
    "batch norm": (
        [node("BatchNormalization", "input", "w", "o", "m", "v", epsilon=0.0)],
        {"w": np.ones(3), "o": np.zeros(3), "m": MEAN.ravel() * 255, "v": (STD.ravel() * 255) ** 2},
        255,
    ),
    "constant nodes": (
        [
            node("Constant", out="a", value=onnx.numpy_helper.from_array(MEAN * 255)),
            node("Identity", "input", out="i"),
            node("Sub", "i", "a", out="y"),
            node("Mul", "y", "b"),
        ],
        {"b": BY_255["b"]},
        255,
    ),
    "of 0..1": (
        [node("Sub", "input", "a", out="y"), node("Div", "y", "b")],
        {"a": MEAN, "b": STD},
        1,
    ),
    "NHWC": (
        [
            node("Sub", "input", "a", out="y"),
            node("Mul", "y", "b", out="z"),
            node("Transpose", "z", perm=[0, 3, 1, 2]),
        ],
        {name: value.ravel() for name, value in BY_255.items()},
        255,
    ),
}


@pytest.mark.parametrize("given", [emb.InputSpec(), OTHER._replace(bgr=False)])
@pytest.mark.parametrize("name", OWN_NORMALISATIONS)
def test_a_graph_with_a_normalisation_of_its_own_gets_plain_pixels(tmp_path, faces, name, given):
    """insightface#113: normalised twice, the demo's LFW gave 73.8 % in place of 98.0 %."""
    before, tensors, white = OWN_NORMALISATIONS[name]
    tensors = {key: np.float32(value) for key, value in tensors.items()}
    shape = NHWC if name == "NHWC" else ("n", 3, 112, 112)
    write_model(tmp_path / "m.onnx", before, shape=shape, **tensors)
    notes = check_onnx(tmp_path / "m.onnx", faces, OTHER._replace(bgr=False), given=given)
    assert notes[0] == f"RGB, 0..{white}"
    assert notes[1].startswith("normalised by the graph itself (")


def test_a_batch_norm_of_normalised_pixels_is_none_of_pixels(tmp_path, faces):
    """The first layer of some networks: it takes away what little mean is left."""
    tensors = {"w": np.ones(3), "o": np.zeros(3), "m": np.float32([-0.1, 0.1, 0]), "v": np.ones(3)}
    tensors = {name: np.float32(value) for name, value in tensors.items()}
    write_model(tmp_path / "m.onnx", [node("BatchNormalization", "input", *tensors)], **tensors)
    assert emb.load_embedder(tmp_path / "m.onnx", device=CPU)[1]["notes"] == [
        "RGB, mean 0.5, std 0.5"
    ]


@pytest.mark.parametrize("shape", [NHWC, ["n", None, None, None], [1, 112, 112, 3]])
@pytest.mark.parametrize("kind", ["float", "uint8", "float16"])
def test_other_layouts_and_types(tmp_path, faces, shape, kind):
    to_float = {"uint8": [node("Cast", "input", out="f", to=1)]}.get(kind, [])
    scale = {"a": np.float32(127.5), "b": np.float32(1 / 127.5)} if kind == "uint8" else {}
    before = [*to_float]
    if scale:
        before += [node("Sub", "f", "a", out="y"), node("Mul", "y", "b", out="z")]
    before += [node("Transpose", "z" if scale else "input", perm=[0, 3, 1, 2])]
    write_model(tmp_path / "m.onnx", before, shape=shape, kind=kind, **scale)
    check_onnx(tmp_path / "m.onnx", faces, tolerance=2e-3 if kind == "float16" else 1e-4)


NORM = node("ReduceL2", "embedding", out="norm", axes=[1], keepdims=1)


@pytest.mark.parametrize(
    ("outputs", "after"),
    [
        (("embedding", "norm"), [NORM]),
        (("norm", "embedding"), [NORM]),
        (("map", "embedding"), []),
        (("unit", "embedding", "norm"), [NORM, node("Div", "embedding", "norm", out="unit")]),
        (("logits", "embedding"), [node("MatMul", "embedding", "classes", out="logits")]),
    ],
)
def test_the_embedding_is_found_among_outputs(tmp_path, faces, outputs, after):
    write_model(tmp_path / "m.onnx", after=after, outputs=outputs, classes=MATRIX[:8])
    notes = check_onnx(tmp_path / "m.onnx", faces)
    assert notes[-1].startswith("output embedding of ")


def test_outputs_that_could_all_be_the_embedding_are_a_sentence(tmp_path):
    after = [node("Tanh", "embedding", out="a"), node("MatMul", "a", "classes", out="b")]
    write_model(tmp_path / "m.onnx", after=after, outputs=("a", "b"), classes=MATRIX[:8])
    with pytest.raises(
        UserError, match=r"several outputs .* \(a and b of a \(1, 8\), b \(1, 8\)\)"
    ):
        emb.load_embedder(tmp_path / "m.onnx", device=CPU)
    write_model(tmp_path / "m.onnx", outputs=("map",))
    with pytest.raises(UserError, match=r"no embedding of \(n, d\) numbers but map \(1, 4, 7, 7\)"):
        emb.load_embedder(tmp_path / "m.onnx", device=CPU)


def test_onnx_model_of_another_size_gets_a_sentence(tmp_path):
    write_model(tmp_path / "m.onnx", shape=["n", 3, 64, 64])
    with pytest.raises(UserError, match="112, 112"):
        emb.load_embedder(tmp_path / "m.onnx", device=CPU)
