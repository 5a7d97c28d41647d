"""Run an ONNX model on NumPy arrays, by onnxruntime or by OpenCV.

    from evaluation.onnx_backends import ONNX_BACKENDS, default_onnx_backend, in_fixed_batches
    run, fixed_batch = ONNX_BACKENDS[default_onnx_backend()]("model.onnx", torch.device("cpu"))
    embeddings = in_fixed_batches(run, fixed_batch or 64)(inputs)

The file is untrusted: fileio.onnx_file.check_onnx must have passed it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

# Inputs (n, 3, 112, 112) float32 -> the model's first output, (n, d).
RunModel = Callable[[np.ndarray], np.ndarray]


def default_onnx_backend() -> str:
    """onnxruntime where it is installed (twice as fast), else OpenCV, which always is."""
    return "onnxruntime" if importlib.util.find_spec("onnxruntime") else "opencv"


def in_fixed_batches(run: RunModel, size: int) -> RunModel:
    """Run a model on exactly `size` inputs at a time, the last batch padded with zeros.

    Example: 5 inputs at size 3 are padded to 6 and run as 3 + 3; the sixth output is dropped.
    """

    def run_padded(inputs: np.ndarray) -> np.ndarray:
        padding = np.zeros((-len(inputs) % size, *inputs.shape[1:]), np.float32)
        padded = np.concatenate([inputs, padding])
        outputs = [run(padded[start : start + size]) for start in range(0, len(padded), size)]
        # Some exports give (size, d, 1, 1): one row per input.
        return np.concatenate([out.reshape(len(out), -1) for out in outputs])[: len(inputs)]

    return run_padded


def _open_onnxruntime(path: Path | str, device: torch.device) -> tuple[RunModel, int]:
    """A function (n, 3, 112, 112) -> (n, d), and the model's fixed batch size (0: any)."""
    import onnxruntime  # optional, and slow to import

    wanted = ["CPUExecutionProvider"]
    if device.type == "cuda":
        wanted.insert(0, "CUDAExecutionProvider")
    available = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(
        str(path), providers=[provider for provider in wanted if provider in available]
    )
    (entry, *_) = session.get_inputs()
    dtype = np.float16 if entry.type == "tensor(float16)" else np.float32

    def run(inputs: np.ndarray) -> np.ndarray:
        return session.run(None, {entry.name: inputs.astype(dtype, copy=False)})[0]

    return run, entry.shape[0] if isinstance(entry.shape[0], int) else 0


def _open_opencv(path: Path | str, device: torch.device) -> tuple[RunModel, int]:
    """The same by OpenCV, on the CPU; only a try tells whether the batch size is fixed to 1."""
    net = cv2.dnn.readNetFromONNX(str(path))

    def run(inputs: np.ndarray) -> np.ndarray:
        net.setInput(inputs)
        return net.forward()

    # A model exported for a batch of 1 either fails on two inputs or silently reshapes them into
    # something else. It takes any batch if two at once equal one at a time.
    two = np.random.default_rng(0).random((2, 3, 112, 112), np.float32)
    one_at_a_time = in_fixed_batches(run, 1)(two)
    try:
        at_once = run(two)
    except cv2.error:
        return run, 1
    equal = at_once.shape == one_at_a_time.shape and np.allclose(
        at_once, one_at_a_time, rtol=1e-3, atol=1e-4
    )
    return run, 0 if equal else 1


ONNX_BACKENDS = {"onnxruntime": _open_onnxruntime, "opencv": _open_opencv}
