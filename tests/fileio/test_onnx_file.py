"""onnx_file.py on models written here byte by byte, whose weights lie in other files."""

import shutil

import numpy as np
import pytest
import torch

from evaluation import embedders
from fileio.onnx_file import read_onnx
from tests.helpers.bounded import within
from tests.helpers.onnx_files import (
    EXTERNAL_WEIGHTS,
    external_tensor,
    linear_model,
    message,
    onnx_node,
    onnx_tensor,
)
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A folder for the model, with a file of weights in it and one beside it."""
    folder = tmp_path / "models"
    (folder / "deeper").mkdir(parents=True)
    EXTERNAL_WEIGHTS.tofile(folder / "m.data")
    shutil.copy(folder / "m.data", folder / "deeper")
    shutil.copy(folder / "m.data", tmp_path / "secret")
    (folder / "link").symlink_to("../secret")
    (folder / "inner").symlink_to("m.data")
    return folder


def refused(path, *words):
    with pytest.raises(UserError) as error:
        read_onnx(path)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and str(path) in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "location", ["m.data", "./m.data", "deeper/m.data", "inner", "deeper/../m.data"]
)
def test_weights_in_the_same_folder_are_read(folder, location):
    path = folder / "m.onnx"
    path.write_bytes(linear_model(external_tensor("matrix", location)))
    assert [file.name for file in read_onnx(path)[1]] == ["m.data"]
    faces = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 112, 112, 3), np.uint8))
    embed, _ = embedders.load_embedder(path, device=CPU, flip=False)
    flat = embedders.preprocess_faces(faces, embedders.TRAIN_INPUT).flatten(1)
    wanted = torch.nn.functional.normalize(flat @ torch.from_numpy(EXTERNAL_WEIGHTS))
    torch.testing.assert_close(embed(faces), wanted, rtol=0, atol=1e-4)


OUTSIDE = ["../secret", "deeper/../../secret", "link", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "", "."]


@pytest.mark.parametrize("location", [*OUTSIDE, "absent.data", "n" * 4000])
def test_weights_elsewhere_are_refused(folder, location):
    path = folder / "m.onnx"
    path.write_bytes(linear_model(external_tensor("matrix", location)))
    refused(path, "m.onnx")
    with pytest.raises(UserError, match=r"in its own folder|not an ONNX model"):
        embedders.load_embedder(path, device=CPU)


def test_wherever_a_model_can_hold_a_tensor(folder):
    """Attributes, lists of them, graphs in them, sparse tensors, functions, training."""
    tensor, matrix = external_tensor("t", "../secret"), onnx_tensor("matrix", EXTERNAL_WEIGHTS)
    graph = message((5, tensor))
    sparse = message((1, tensor))
    attributes = [(5, tensor), (10, tensor), (6, graph), (11, graph), (22, sparse), (23, sparse)]
    attributes += [(6, message((1, message((5, message((1, "a"), (5, tensor)))))))]
    models = [
        linear_model(
            matrix, nodes=[onnx_node("Constant", [], "c", (5, message((1, "value"), inside)))]
        )
        for inside in attributes
    ]
    # A second graph field: protobuf merges it into the first.
    models.append(linear_model(matrix, more=[(7, message((15, message((2, tensor)))))]))
    models.append(linear_model(matrix, more=[(20, message((2, graph)))]))
    function = message((7, message((5, message((5, tensor))))))
    models.append(linear_model(matrix, more=[(25, function)]))
    path = folder / "m.onnx"
    path.write_bytes(linear_model(matrix))
    read_onnx(path)
    for content in models:
        path.write_bytes(content)
        refused(path, "'../secret'")


def test_a_key_said_twice_counts_as_protobuf_reads_it(folder):
    """The last one of a field is what a library sees."""
    entry = message((2, "m.data"), (1, "offset"), (1, "location"), (2, "../secret"))
    tensor = message((8, "matrix"), (13, entry), (14, 1))
    (folder / "m.onnx").write_bytes(linear_model(tensor))
    refused(folder / "m.onnx", "'../secret'")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ORTM" * 10,
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a graph of 2^63 bytes
        b"\x3a\x05abc",
        b"\xff" * 20,
        b"\x0b\x0c",  # groups
        linear_model(external_tensor("matrix", "m.data"))[:-3],
    ],
)
def test_what_is_no_model_is_a_sentence(folder, content):
    (folder / "m.onnx").write_bytes(content)
    refused(folder / "m.onnx", "ONNX model")


def test_graphs_in_graphs_without_end(folder):
    inside = message((5, onnx_tensor("x", np.zeros(1, np.float32))))
    for _ in range(3000):
        inside = message((1, message((5, message((6, inside))))))
    (folder / "m.onnx").write_bytes(message((7, inside)))
    refused(folder / "m.onnx", "not an ONNX model")


def test_a_large_file_takes_no_memory(folder):
    """3 million empty nodes, and weights that are only skipped."""
    (folder / "m.onnx").write_bytes(message((7, b"\x0a\0" * 500_000), (7, message((5, bytes(0))))))
    within(20, read_onnx, folder / "m.onnx")
