"""ONNX models written byte by byte (onnx.proto), without the onnx package."""

import numpy as np

EXTERNAL_WEIGHTS = np.random.default_rng(0).normal(0, 0.01, (3 * 112 * 112, 4)).astype(np.float32)


def message(*fields):
    """A protobuf message of (number, int | str | bytes) fields: ONNX without its package."""

    def varint(value):  # 7 bits per byte, the lowest first; the top bit says that more follow
        value &= (1 << 64) - 1
        head, rest = value & 127, value >> 7
        return bytes([head | 128]) + varint(rest) if rest else bytes([head])

    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def onnx_node(kind, inputs, output, *attributes):
    """NodeProto: an operator."""
    return message(*((1, name) for name in inputs), (2, output), (4, kind), *attributes)


def onnx_tensor(name, values):
    """TensorProto with its numbers inside."""
    data_type = {"float32": 1, "int64": 7}[values.dtype.name]
    dims = [(1, size) for size in values.shape]
    return message(*dims, (2, data_type), (8, name), (9, values.tobytes()))


def onnx_value(name, shape):
    """ValueInfoProto of float32; a string in the shape is a size that may vary."""
    dims = [(1, message((1 if isinstance(size, int) else 2, size))) for size in shape]
    return message((1, name), (2, message((1, message((1, 1), (2, message(*dims)))))))


def write_onnx(path, batch, side=112, fixed_reshape=False, weights=None):
    """A convolution, ReLU, and a linear layer (onnx.proto, opset 17); returns their weights."""
    rng = np.random.default_rng(1)
    kernel = rng.normal(0, 0.05, (4, 3, 16, 16)).astype(np.float32)
    matrix = rng.normal(0, 0.05, (4 * (side // 16) ** 2, 8)).astype(np.float32)
    kernel, matrix = weights or (kernel, matrix)
    shape = np.array([batch if fixed_reshape else -1, len(matrix)], np.int64)
    strides = (5, message((1, "strides"), (8, 16), (8, 16), (20, 7)))
    graph = message(
        (1, onnx_node("Conv", ["input", "kernel"], "a", strides)),
        (1, onnx_node("Relu", ["a"], "b")),
        (1, onnx_node("Reshape", ["b", "shape"], "c")),
        (1, onnx_node("MatMul", ["c", "matrix"], "embedding")),
        (2, "faces"),
        (5, onnx_tensor("kernel", kernel)),
        (5, onnx_tensor("matrix", matrix)),
        (5, onnx_tensor("shape", shape)),
        (11, onnx_value("input", [batch, 3, side, side])),
        (12, onnx_value("embedding", [batch, matrix.shape[1]])),
    )
    path.write_bytes(message((1, 8), (7, graph), (8, message((1, ""), (2, 17)))))
    return kernel, matrix


def external_tensor(name, location, **more):
    """A tensor of EXTERNAL_WEIGHTS' shape whose numbers are in the file `location`."""
    entries = [message((1, k), (2, v)) for k, v in {"location": location, **more}.items()]
    dims = [(1, size) for size in EXTERNAL_WEIGHTS.shape]
    return message(*dims, (2, 1), (8, name), *((13, entry) for entry in entries), (14, 1))


def linear_model(*tensors, nodes=(), more=()):
    """A model that multiplies a flattened face with the tensor "matrix", one of `tensors`.

    `nodes` are added to its graph, `more` fields to the model itself.
    """
    graph = message(
        (1, onnx_node("Flatten", ["input"], "a")),
        (1, onnx_node("MatMul", ["a", "matrix"], "embedding")),
        *((1, node) for node in nodes),
        (2, "faces"),
        *((5, tensor) for tensor in tensors),
        (11, onnx_value("input", ["n", 3, 112, 112])),
        (12, onnx_value("embedding", ["n", 4])),
    )
    return message((1, 8), (7, graph), (8, message((1, ""), (2, 17))), *more)


# For the fuzzers: two tensors, one of them an attribute's, that name files.
EXTERNAL_MODEL = linear_model(
    external_tensor("matrix", "x.onnx", offset="0"), nodes=[external_tensor("a", "b")]
)
