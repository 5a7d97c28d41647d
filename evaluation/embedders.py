"""A checkpoint of any kind to one function: aligned faces in, embeddings out.

    from evaluation.embedders import load_embedder
    embed, kind = load_embedder("runs/20250101-120000-r50-s0/best.pt", device=torch.device("cpu"))
    embed(faces)  # (n, 112, 112, 3) uint8 RGB -> (n, d) float32, each of length 1

Kinds: a checkpoint of train.py, a state dict of InsightFace's iresnet, an ONNX model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from data_gen import normalise
from fileio.checkpoint_file import check_weights, load_checkpoint
from fileio.onnx_file import check_onnx
from models import build_model
from utils import UserError

Embed = Callable[[Tensor], Tensor]


class InputSpec(NamedTuple):
    """What pixels a model expects: (x - mean) / std of x in [0, 1], in RGB or BGR order."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    bgr: bool = False


OURS = InputSpec()
# On CPUs larger batches are hardly faster, and r50's layers of 64 faces already take 200 MB each.
CPU_BATCH = 64


def prepare(faces: Tensor, spec: InputSpec) -> Tensor:
    """Faces (n, 112, 112, 3) uint8 RGB to a model's input (n, 3, 112, 112), channels_last."""
    images = normalise(faces)
    if spec[:2] != OURS[:2]:
        mean, std = images.new_tensor(spec[:2])[..., None, None]  # (3, 1, 1) each
        images = (images * 0.5 + 0.5 - mean) / std
    return images.flip(1) if spec.bgr else images


def embed_in_batches(
    forward: Callable[[Tensor], Tensor],
    faces: Tensor,
    *,
    flip: bool,
    batch: int,
    spec: InputSpec,
    device: torch.device,
    progress: str = "",
    raw: bool = False,
) -> Tensor:
    """Embed each face once, and its mirror image: (n, 112, 112, 3) uint8 to (n, d) of length 1.

    forward takes inputs (b, 3, 112, 112) to embeddings (b, d); those of a face and of its mirror
    image are summed before the length is divided out, which raw leaves as it is. progress is the
    title of a bar, none if empty. Raises UserError where the model gives numbers that are not
    finite.
    """
    parts = []
    with tqdm(total=len(faces), desc=progress, unit="img", disable=not progress) as bar:
        for chunk in faces.split(batch):
            images = prepare(chunk.to(device), spec)
            embedding = forward(images).float()
            if flip:
                embedding = embedding + forward(images.flip(3)).float()
            parts.append(embedding if raw else F.normalize(embedding))
            bar.update(len(chunk))
    embeddings = torch.cat(parts).cpu()
    broken = int((~embeddings.isfinite().all(1)).sum())
    if broken:
        raise UserError(
            f"The model's embeddings of {broken} of {len(faces)} faces are not finite numbers; "
            "its training has diverged, or the checkpoint is damaged."
        )
    return embeddings


def torch_embedder(
    model: nn.Module,
    device: torch.device,
    flip: bool = True,
    batch: int = 256,
    *,
    spec: InputSpec = OURS,
    progress: str = "",
    raw: bool = False,
) -> Embed:
    """The embedding function of a network, which train.py may go on training in between.

    In float32 on purpose: under bfloat16 cosines move by up to 0.02 and by 0.003 on average, more
    than the 0.001 to which thresholds and TARs are quoted (MobileFaceNet on aligned faces).
    """
    batch = min(batch, CPU_BATCH) if device.type == "cpu" else batch

    def embed(faces: Tensor) -> Tensor:
        forward = fold_batch_norm(model)
        had_tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # it keeps no more bits than float16
        try:
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                return embed_in_batches(
                    forward, faces, flip=flip, batch=batch, spec=spec, device=device,
                    progress=progress, raw=raw,
                )  # fmt: skip
        finally:
            torch.backends.cudnn.allow_tf32 = had_tf32

    return embed


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy for evaluation in which convolutions do the batch normalisations that follow them.

    Same embeddings but for rounding; the model itself stays as it was, in whichever mode.
    """
    was_training = model.training
    with torch.no_grad():
        folded = fuse(model.eval())
    model.train(was_training)
    return folded.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ ONNX


def onnx_embedder(
    path: Path | str,
    device: torch.device,
    flip: bool = True,
    batch: int = 256,
    *,
    spec: InputSpec = OURS,
    progress: str = "",
    raw: bool = False,
    backend: str = "",
) -> Embed:
    """The embedding function of an ONNX model; its first output is the embedding.

    backend is "onnxruntime" or "opencv"; by default the first where it is installed (twice as
    fast), else the second. Models exported for a fixed batch (often of one) get just that.
    Raises UserError where the file is no ONNX model, or not of 112x112 faces.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    check_onnx(path)
    backend = backend or default_backend()
    black = np.zeros((2, 3, 112, 112), np.float32)
    try:
        run, size = ONNX_BACKENDS[backend](path, device)
        shape = in_chunks(run, size or 2)(black).shape
    except Exception as error:  # both libraries raise kinds of their own, some bare Exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be used with {backend} as an ONNX model of (n, 3, 112, 112) faces "
            f"({reason}); give another --checkpoint."
        ) from None
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(f"{path} gives {shape} numbers for 2 faces instead of one embedding each.")
    run = in_chunks(run, size or min(batch, CPU_BATCH))

    def embed(faces: Tensor) -> Tensor:
        return embed_in_batches(
            lambda images: torch.from_numpy(run(images.contiguous().numpy())),
            faces, flip=flip, batch=batch, spec=spec, device=torch.device("cpu"),
            progress=progress, raw=raw,
        )  # fmt: skip

    return embed


def default_backend() -> str:
    """The faster of the libraries that can run ONNX models here."""
    return "onnxruntime" if importlib.util.find_spec("onnxruntime") else "opencv"


def in_chunks(run: Callable[[np.ndarray], np.ndarray], size: int) -> Callable:
    """Run a model on exactly size inputs at a time; the last ones are filled up with zeros."""

    def chunked(inputs: np.ndarray) -> np.ndarray:
        padding = np.zeros((-len(inputs) % size, *inputs.shape[1:]), np.float32)
        padded = np.concatenate([inputs, padding])
        parts = [run(padded[start : start + size]) for start in range(0, len(padded), size)]
        return np.concatenate([part.reshape(len(part), -1) for part in parts])[: len(inputs)]

    return chunked


def _open_onnxruntime(path: Path | str, device: torch.device) -> tuple[Callable, int]:
    """A function (n, 3, 112, 112) -> (n, d), and the batch that it is fixed to (0: any)."""
    import onnxruntime

    providers = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [p for p in providers if p in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(path), providers=providers)
    (entry, *_) = session.get_inputs()
    kind = np.float16 if entry.type == "tensor(float16)" else np.float32

    def run(inputs: np.ndarray) -> np.ndarray:
        return session.run(None, {entry.name: inputs.astype(kind, copy=False)})[0]

    return run, entry.shape[0] if isinstance(entry.shape[0], int) else 0


def _open_opencv(path: Path | str, device: torch.device) -> tuple[Callable, int]:
    """The same by OpenCV, which runs on the CPU and cannot say what batch a model is fixed to."""
    net = cv2.dnn.readNetFromONNX(str(path))

    def run(inputs: np.ndarray) -> np.ndarray:
        net.setInput(inputs)
        return net.forward()

    two = np.random.default_rng(0).random((2, 3, 112, 112), np.float32)
    single = in_chunks(run, 1)(two)
    try:
        both = run(two)
    except cv2.error:
        return run, 1
    alike = both.shape == single.shape and np.allclose(both, single, rtol=1e-3, atol=1e-4)
    return run, 0 if alike else 1


ONNX_BACKENDS = {"onnxruntime": _open_onnxruntime, "opencv": _open_opencv}


# ------------------------------------------------------------------------------ any checkpoint


def load_embedder(
    checkpoint: Path | str,
    *,
    device: torch.device,
    network: str = "r50",
    use_se: bool = False,
    flip: bool = True,
    batch: int = 256,
    spec: InputSpec = OURS,
    progress: str = "",
    raw: bool = False,
) -> tuple[Embed, dict[str, Any]]:
    """The embedding function of a file, and what the file is (kind, network, epoch, seed ...).

    The network of a checkpoint of ours comes from the config in it; network, use_se and spec are
    for models of others. Raises UserError where the file is none of the three kinds.
    """
    options: dict[str, Any] = {"flip": flip, "batch": batch, "progress": progress, "raw": raw}
    if Path(checkpoint).suffix.lower() == ".onnx":
        embed = onnx_embedder(checkpoint, device, spec=spec, **options)
        return embed, {"kind": "onnx", "network": f"ONNX by {default_backend()}"}
    loaded = load_checkpoint(checkpoint)
    config, state = loaded.get("config"), loaded.get("model")
    if isinstance(state, dict) and isinstance(config, dict) and {"network", "use_se"} <= {*config}:
        network, use_se = config["network"], config["use_se"]
        numbers = {"epoch": loaded.get("epoch"), "seed": config.get("seed")}
        # a stranger's may be anything; these go into lfw.json
        about = {"kind": "ours"} | {k: v for k, v in numbers.items() if type(v) is int}
        spec = OURS
    elif loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        state, about = loaded, {"kind": "state dict"}
    else:
        raise UserError(
            f"{checkpoint} is neither a checkpoint of train.py nor a plain state dict; "
            "give another --checkpoint."
        )
    model = _filled(network, use_se, state, checkpoint)
    model = model.to(device, memory_format=torch.channels_last)
    embed = torch_embedder(model, device, spec=spec, **options)
    return embed, about | {"network": network}


def _filled(network: str, use_se: bool, state: dict, path: Path | str) -> nn.Module:
    """The network with the weights of a state dict, all of them and no others."""
    check_weights(state, path)
    try:
        emb_size = len(state["fc.weight"]) if "fc.weight" in state else 512
        with torch.device("meta"):  # no memory for sizes that the file only claims
            model = build_model(network, emb_size=emb_size, use_se=use_se)
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:200] + "..."
        raise UserError(
            f"The weights in {path} are not those of network {str(network)[:40]} ({reason}); "
            "name theirs with --network."
        ) from None
    return model.float()
