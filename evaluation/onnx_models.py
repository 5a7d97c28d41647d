"""An ONNX model on NumPy arrays, by onnxruntime: which input it wants, which output to take.

from evaluation.onnx_models import in_fixed_batches, open_onnx
model = open_onnx("model.onnx", torch.device("cpu"))
embeddings = in_fixed_batches(model.run, model.batch or 64)(inputs)
model.notes  # what was chosen, to be told to the user
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch

from fileio.onnx_file import graph_normalisation, read_onnx
from utils import UserError

# Inputs (n, 3, 112, 112) float32 -> embeddings (n, d) float32.
RunModel = Callable[[np.ndarray], np.ndarray]

_TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64, "uint8": np.uint8}


class OnnxModel(NamedTuple):
    """An ONNX model that has been tried on two faces."""

    run: RunModel
    batch: int  # the only size that it takes, 0: any
    white: int  # 255 or 1 if it normalises pixels 0..255 or 0..1 by itself, 0 if it does not
    notes: list[str]


def open_onnx(path: Path | str, device: torch.device) -> OnnxModel:
    """Open a model and find out by trying how it is run.

    Its input may be (n, 3, 112, 112) or (n, 112, 112, 3), of floats or uint8; the batch may be
    fixed, by its declaration or by a reshape within. Raises UserError where it cannot be used.
    """
    model, _ = read_onnx(path)
    white, operators = graph_normalisation(model)
    notes = [f"normalised by the graph itself ({', '.join(operators)})"] if operators else []
    try:
        session = _session(path, device)
        (entry, *_) = session.get_inputs()
        dtype = _TYPES[entry.type.removeprefix("tensor(").removesuffix(")")]
        if dtype == np.uint8:
            white, notes = 255, notes or ["uint8 input"]
        declared = [size if isinstance(size, int) and size > 0 else 0 for size in entry.shape]
        fixed = declared[0]
        faces = np.random.default_rng(0).random((fixed or 2, 3, 112, 112), np.float32)
        faces = faces * white if white else faces * 2 - 1
        outputs, nhwc = _try_layouts(session, entry.name, dtype, declared, faces[: fixed or 1])
    except Exception as error:  # onnxruntime raises its own types, some of them bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be used with onnxruntime as an ONNX model of (n, 3, 112, 112) faces "
            f"({reason}); give another --checkpoint."
        ) from None
    name, note = _embedding_output(path, outputs)

    def run(images: np.ndarray) -> np.ndarray:
        inputs = _as_input(images, dtype, nhwc)
        (values,) = session.run([name], {entry.name: inputs})
        return values.astype(np.float32)

    if not fixed and not _takes_any_batch(run, faces):
        fixed = 1
        note.append("one face at a time, as the graph demands")
    return OnnxModel(run, fixed, white, notes + note)


def in_fixed_batches(run: RunModel, size: int) -> RunModel:
    """Run a model on exactly `size` inputs at a time, the last batch padded with zeros.

    Example: 5 inputs at size 3 are padded to 6 and run as 3 + 3; the sixth output is dropped.
    """

    def run_padded(inputs: np.ndarray) -> np.ndarray:
        padding = np.zeros((-len(inputs) % size, *inputs.shape[1:]), np.float32)
        padded = np.concatenate([inputs, padding])
        outputs = [run(padded[start : start + size]) for start in range(0, len(padded), size)]
        # Some exports give (size, d, 1, 1): one row per input.
        return np.concatenate([out.reshape(size, -1) for out in outputs])[: len(inputs)]

    return run_padded


def _session(path: Path | str, device: torch.device) -> onnxruntime.InferenceSession:
    wanted = ["CPUExecutionProvider"]
    if device.type == "cuda":
        wanted.insert(0, "CUDAExecutionProvider")
    available = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    return onnxruntime.InferenceSession(
        str(path), options, providers=[provider for provider in wanted if provider in available]
    )


def _as_input(images: np.ndarray, dtype: Any, nhwc: bool) -> np.ndarray:
    """Images (n, 3, 112, 112) float32 in a model's layout and type."""
    images = images.transpose(0, 2, 3, 1) if nhwc else images
    images = np.rint(images).clip(0, 255) if dtype == np.uint8 else images
    return np.ascontiguousarray(images, dtype)


def _try_layouts(
    session: onnxruntime.InferenceSession,
    name: str,
    dtype: Any,
    declared: Sequence[int],
    faces: np.ndarray,
) -> tuple[dict[str, np.ndarray], bool]:
    """The outputs for some faces, and whether the input is NHWC; raises if neither layout runs."""
    likely_nhwc = declared[-1] == 3 and declared[1] != 3
    failures = []
    for nhwc in (likely_nhwc, not likely_nhwc):
        try:
            values = session.run(None, {name: _as_input(faces, dtype, nhwc)})
        except Exception as error:
            failures.append(error)
            continue
        return dict(zip((out.name for out in session.get_outputs()), values, strict=True)), nhwc
    raise failures[0]


def _embedding_output(path: Path | str, outputs: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    """The name of the output that is (n, d) with d > 1, and a note if there are others.

    Raises UserError if there is none, or several of which none is called an embedding.
    """
    rows = {name: _rows(values) for name, values in outputs.items()}
    found = {name: values for name, values in rows.items() if values is not None}
    shapes = ", ".join(f"{name} {values.shape}" for name, values in outputs.items())
    if not found:
        raise UserError(
            f"{path} gives no embedding of (n, d) numbers but {shapes}; give another --checkpoint."
        )
    called = [name for name in found if "embed" in name.lower()]
    if len(called) == 1:
        found = {called[0]: found[called[0]]}
    first, *others = found.items()
    for name, values in others:
        if values.shape != first[1].shape or not _parallel(values, first[1]):
            raise UserError(
                f"{path} has several outputs that may be the embedding ({first[0]} and {name} of "
                f"{shapes}); write a model with one of them (onnx.utils.extract_model)."
            )
    return first[0], [f"output {first[0]} of {shapes}"] if len(outputs) > 1 else []


def _rows(values: np.ndarray) -> np.ndarray | None:
    """An output as (n, d) with d > 1, else None: a norm (n, 1), or a feature map (n, c, 7, 7).

    Some models give (n, d, 1, 1), some for a single face (d).
    """
    values = values[None] if values.ndim == 1 else values
    sizes = [size for size in values.shape[1:] if size != 1]
    return values.reshape(len(values), -1) if values.ndim and len(sizes) == 1 else None


def _parallel(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether rows (n, d) differ in their lengths alone: an embedding and its normalised form."""
    a, b = (values.astype(np.float64) for values in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return bool(np.allclose((a * b).sum(1), lengths, rtol=1e-3))


def _takes_any_batch(run: RunModel, two: np.ndarray) -> bool:
    """Whether two faces at once give what they give one at a time.

    A model exported for a batch of 1 but declared for any either fails on two or reshapes them
    into something else.
    """
    one_at_a_time = in_fixed_batches(run, 1)(two)
    try:
        at_once = run(two).reshape(2, -1)
    except Exception:  # onnxruntime's, or a shape that is not two rows
        return False
    tolerance = 0.01 * float(np.abs(one_at_a_time).max())
    return at_once.shape == one_at_a_time.shape and np.allclose(
        at_once, one_at_a_time, rtol=0.01, atol=tolerance, equal_nan=True
    )
