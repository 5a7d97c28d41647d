"""What an ONNX file says before it is run: its files of weights, and the pixels that it wants.

    model, weight_files = read_onnx("model.onnx")  # UserError if it names a file outside its folder
    white, operators = graph_normalisation(model)  # 255, ["Sub", "Mul"]: it takes pixels 0..255

An ONNX model may keep its weights in other files ("external data") and names them inside. A name
such as "../../secret", "/etc/passwd" or a link would make the library that runs the model read
whatever it points to: onnxruntime refuses such names from 1.24 on, which needs Python 3.11.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import numpy_helper

from utils import UserError


def read_onnx(path: Path | str) -> tuple[onnx.ModelProto, list[Path]]:
    """An ONNX model without its external weights, and the files of those, in its own folder.

    Raises UserError if a file is not there, or if `path` is no ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is corrupt or not an ONNX model ({reason}); give another --checkpoint."
        ) from None
    if not model.graph.node:
        raise UserError(f"{path} is no ONNX model, or one of no layers; give another --checkpoint.")
    folder = path.parent.resolve()
    weight_files = set()
    for name in _external_names(model):
        try:  # joined as onnxruntime would; links are followed, or they would lead outside
            target = Path(os.path.realpath(folder / name))
            is_inside = target.is_relative_to(folder) and target.is_file()
        except (OSError, ValueError):  # too long, or with a zero byte
            is_inside = False
        if not is_inside:
            raise UserError(
                f"{path} keeps weights in {name[:100]!r}, which is no file in its own "
                "folder; put all of a model's files into one, or give another --checkpoint."
            )
        weight_files.add(target)
    return model, sorted(weight_files)


def _external_names(message: Message) -> Iterator[str]:
    """The file names in all tensors of a message: initialisers, attributes, subgraphs ..."""
    if isinstance(message, onnx.TensorProto):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type:
            for part in [value] if isinstance(value, Message) else value:
                yield from _external_names(part)


# Operators that leave a pixel's value as it is.
_UNCHANGED = {"Identity", "Cast", "Transpose", "Gather", "Slice", "Clip", "Dropout"}
_UNCHANGED |= {"QuantizeLinear", "DequantizeLinear"}


def graph_normalisation(model: onnx.ModelProto) -> tuple[int, list[str]]:
    """The value of a white pixel in the input, and the operators that tell it; (0, []) if none do.

    Many exports (InsightFace's of mxnet, for one) begin with a normalisation of their own: Sub and
    Mul by constants, or batch norm. The value that it takes to zero is the middle of the pixels
    that it wants: 127.5 of 0..255, or 0.5 of 0..1; about zero it is of pixels normalised before.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    name = next((entry.name for entry in graph.input if entry.name not in constants), "")
    scale, shift, operators = 1.0, 0.0, []
    for _ in graph.node:  # no more steps than that, should it be a circle
        users = [node for node in graph.node if name in node.input]
        if len(users) != 1:
            break
        (node,) = users
        if node.op_type not in _UNCHANGED:
            step = _affine(node, name, constants)
            if step is None:
                break
            scale, shift = scale * step[0], shift * step[0] + step[1]
            operators.append(node.op_type)
        name = node.output[0]
    if not operators or scale == 0:
        return 0, []
    middle = -shift / scale
    if middle > 30 or abs(scale) < 1 / 20:  # 1/255 to 1/58 in all networks that are known
        return 255, operators
    return (1, operators) if 0.3 < middle < 0.7 else (0, [])


def _affine(
    node: onnx.NodeProto, name: str, constants: dict[str, onnx.TensorProto]
) -> tuple[float, float] | None:
    """(scale, shift), the mean over channels, if a node maps `name` to scale * name + shift."""
    try:
        values = [
            numpy_helper.to_array(constants[other]).astype(np.float64)
            for other in node.input
            if other != name
        ]
    except (KeyError, ValueError, TypeError, OSError):  # no constants, or in another file
        return None
    if node.op_type == "BatchNormalization" and len(values) == 4:
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        weight, bias, mean, variance = values
        factor = weight / np.sqrt(variance + epsilon)
        return float(factor.mean()), float((bias - mean * factor).mean())
    if len(values) != 1 or (node.op_type in ("Sub", "Div") and node.input[0] != name):
        return None
    value = float(values[0].mean())
    if node.op_type == "Div" and value == 0:
        return None
    return {
        "Add": (1.0, value),
        "Sub": (1.0, -value),
        "Mul": (value, 0.0),
        "Div": (1 / value if value else 0.0, 0.0),
    }.get(node.op_type)
