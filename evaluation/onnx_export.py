"""A network of ours as an ONNX model, checked against PyTorch before a file gets its name.

model = export_onnx(network, spec, options)                 # the bytes of a .onnx file
difference = largest_difference(model, network, faces, spec, options)
"""

from __future__ import annotations

import copy
import json
import warnings
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.embedders import InputSpec, preprocess_faces
from utils import FACE_SIZE

OPSET = 18  # of 2022: read by onnxruntime 1.14 and newer, TensorRT 8.6, OpenVINO 2023
INPUT, OUTPUT = "input", "embedding"


class ExportOptions(NamedTuple):
    """What the graph does besides the network."""

    raw_pixels: bool = False  # (n, 112, 112, 3) uint8 RGB in; else (n, 3, 112, 112) float32
    normalised: bool = False  # L2-normalised embeddings out
    fp16: bool = False  # weights and activations of 16 bits; input and output stay float32


class _Graph(nn.Module):
    """The network between its input and its output, as the options want them."""

    def __init__(self, network: nn.Module, spec: InputSpec, options: ExportOptions) -> None:
        super().__init__()
        self.network, self.bgr, self.options = network, spec.bgr, options
        # (x / 255 - mean) / std as one product and one difference, (1, 3, 1, 1) each.
        std = torch.tensor(spec.std)[:, None, None]
        self.register_buffer("factor", 1 / (255 * std))
        self.register_buffer("offset", torch.tensor(spec.mean)[:, None, None] / std)

    def forward(self, images: Tensor) -> Tensor:
        """Images to (n, d) float32."""
        if self.options.raw_pixels:
            images = images.permute(0, 3, 1, 2).float() * self.factor - self.offset
            images = images.flip(1) if self.bgr else images
        if self.options.fp16:
            images = images.half()
        embedding = self.network(images).float()
        return F.normalize(embedding) if self.options.normalised else embedding


def export_onnx(network: nn.Module, spec: InputSpec, options: ExportOptions) -> bytes:
    """A .onnx file with the input "input", the output "embedding" and any batch size.

    The network, on the CPU, is in float32 and stays so. Metadata says how pixels become the input.
    """
    graph = _Graph(network, spec, options).eval()
    if options.fp16:
        graph = _half(graph)
    images = torch.zeros(2, 3, FACE_SIZE, FACE_SIZE)
    if options.raw_pixels:
        images = torch.zeros(2, FACE_SIZE, FACE_SIZE, 3, dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            graph,
            (images,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for key, value in _metadata(spec, options).items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _half(graph: _Graph) -> _Graph:
    """A copy in float16, but for the last batch norm, which all our networks feed with float32."""
    graph = copy.deepcopy(graph)
    graph.network.half()
    [m for m in graph.network.modules() if isinstance(m, nn.BatchNorm1d)][-1].float()
    return graph


def _metadata(spec: InputSpec, options: ExportOptions) -> dict[str, str]:
    """How aligned faces become the input, for software and people that read a graph's metadata."""
    if options.raw_pixels:
        pixels = {"input": f"(n, {FACE_SIZE}, {FACE_SIZE}, 3) uint8 RGB"}
    else:
        order = "BGR" if spec.bgr else "RGB"
        pixels = {
            "input": f"(n, 3, {FACE_SIZE}, {FACE_SIZE}) {order}, (pixel / 255 - mean) / std",
            "mean": json.dumps(spec.mean),
            "std": json.dumps(spec.std),
        }
    return {**pixels, "embedding": "L2-normalised" if options.normalised else "unnormalised"}


def largest_difference(
    model: bytes, network: nn.Module, faces: Tensor, spec: InputSpec, options: ExportOptions
) -> float:
    """How far onnxruntime's embeddings of faces (n, 112, 112, 3) uint8 RGB are from PyTorch's.

    The largest absolute difference of an element, both L2-normalised, whether the faces come in one
    batch or one by one.
    """
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = preprocess_faces(faces, spec).contiguous()
    with torch.inference_mode():
        expected = F.normalize(network(images)).numpy()
    feed = (faces if options.raw_pixels else images).numpy()
    batches = [feed, *np.split(feed, len(feed))]
    results = [session.run([OUTPUT], {INPUT: batch})[0] for batch in batches]
    got = np.stack([results[0], np.concatenate(results[1:])])
    got /= np.linalg.norm(got, axis=2, keepdims=True)
    return float(np.abs(got - expected).max())
