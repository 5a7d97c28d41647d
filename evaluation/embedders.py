"""Any checkpoint as one function: aligned faces in, embeddings out.

    from evaluation.embedders import load_embedder
    embed, info = load_embedder("runs/20250101-120000-r50-s0/best.pt", device=torch.device("cpu"))
    embed(faces)  # (n, 112, 112, 3) uint8 RGB -> (n, d) float32, L2-normalised

Three kinds of file are read: a checkpoint of train.py, a state dict of InsightFace's iresnet, and
an ONNX model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from data_gen import normalise
from evaluation.metrics import ModelInfo
from evaluation.onnx_backends import ONNX_BACKENDS, default_onnx_backend, in_fixed_batches
from fileio.checkpoint_file import check_weights, load_checkpoint
from fileio.onnx_file import check_onnx
from models import build_model
from utils import UserError, conv_layout, exact_float32, is_out_of_memory

# Aligned faces (n, 112, 112, 3) uint8 RGB on the CPU -> embeddings (n, d) float32 on the CPU.
Embed = Callable[[Tensor], Tensor]

_Result = TypeVar("_Result")


class InputSpec(NamedTuple):
    """A model's input: (x - mean) / std per channel of pixels x in [0, 1], in RGB or BGR order."""

    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    bgr: bool = False


TRAIN_INPUT = InputSpec()  # of the networks of train.py: RGB in [-1, 1]
# On CPUs larger batches are hardly faster, and r50's activations of 64 faces already take 200 MB
# per layer.
CPU_BATCH = 64


# ------------------------------------------------------------------------------ batches


def embedding_batch(device: torch.device, batch: int) -> int:
    """How many faces a network embeds at a time on a device where `batch` are asked for."""
    return min(batch, CPU_BATCH) if device.type == "cpu" else batch


def in_batches_that_fit(work: Callable[[int], _Result], batch: int) -> _Result:
    """`work(batch)`, repeated with half the batch while memory does not suffice for it.

    Raises UserError if it does not suffice for one image.
    """
    while True:
        try:
            return work(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        # Not in the except clause: the error keeps the tensors of what has failed alive.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if batch == 1:
            raise UserError(
                f"Memory does not suffice for evaluating one image at a time ({reason}); free "
                "some, or take --device cpu."
            )
        batch //= 2
        print(f"Memory is full: evaluating {batch} images at a time.")


def preprocess_faces(faces: Tensor, spec: InputSpec) -> Tensor:
    """Faces (n, 112, 112, 3) uint8 RGB to a model's input (n, 3, 112, 112)."""
    images = normalise(faces)  # (n, 3, 112, 112) in [-1, 1]
    if (spec.mean, spec.std) != (TRAIN_INPUT.mean, TRAIN_INPUT.std):
        mean, std = images.new_tensor((spec.mean, spec.std))[..., None, None]  # (3, 1, 1) each
        images = (images * 0.5 + 0.5 - mean) / std
    images = images.flip(1) if spec.bgr else images
    return images.contiguous(memory_format=conv_layout(images.device))


def embed_in_batches(
    forward: Callable[[Tensor], Tensor],
    faces: Tensor,
    *,
    flip: bool,
    batch: int,
    spec: InputSpec,
    device: torch.device,
    progress: str = "",
    unnormalised: bool = False,
) -> Tensor:
    """Embeddings (n, d) float32 of faces (n, 112, 112, 3) uint8 RGB, each face embedded once.

    forward takes inputs (b, 3, 112, 112) to embeddings (b, d). With flip the embedding of the
    mirror image is added before the sum is L2-normalised; unnormalised leaves out the latter.
    progress is the title of a progress bar, none if empty. Raises UserError where embeddings are
    not finite.
    """
    batches = []
    with tqdm(total=len(faces), desc=progress, unit="img", disable=not progress) as bar:
        for chunk in faces.split(batch):
            images = preprocess_faces(chunk.to(device), spec)
            embedding = forward(images).float()
            if flip:
                embedding = embedding + forward(images.flip(3)).float()
            batches.append(embedding if unnormalised else F.normalize(embedding))
            bar.update(len(chunk))
    embeddings = torch.cat(batches).cpu()
    broken = int((~embeddings.isfinite().all(1)).sum())
    if broken:
        raise UserError(
            f"The model's embeddings of {broken} of {len(faces)} faces are not finite numbers; "
            "its training has diverged, or the checkpoint is corrupt."
        )
    return embeddings


# ------------------------------------------------------------------------------ PyTorch


def torch_embedder(
    model: nn.Module,
    device: torch.device,
    flip: bool = True,
    batch: int = 256,
    *,
    spec: InputSpec = TRAIN_INPUT,
    progress: str = "",
    unnormalised: bool = False,
) -> Embed:
    """The embedding function of a network; training may change the weights between two calls.

    It runs in float32: under bfloat16 cosines change by 0.003 on average and by up to 0.02, more
    than the 0.001 to which thresholds and TARs are quoted (MobileFaceNet on aligned faces).
    """

    def embed(faces: Tensor) -> Tensor:
        def embed_by(batch: int) -> Tensor:
            return embed_in_batches(
                fold_batch_norm(model),
                faces,
                flip=flip,
                batch=batch,
                spec=spec,
                device=device,
                progress=progress,
                unnormalised=unnormalised,
            )

        autocast_off = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(), autocast_off, exact_float32():
            return in_batches_that_fit(embed_by, embedding_batch(device, batch))

    return embed


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with each batch norm folded into the convolution before it.

    The embeddings are the same up to rounding; the model itself and its mode stay as they are.
    """
    was_training = model.training
    with torch.no_grad():
        folded = fuse(model.eval())  # folds running statistics, hence evaluation mode
    model.train(was_training)
    return folded.to(memory_format=conv_layout(next(folded.parameters()).device))


# ------------------------------------------------------------------------------ ONNX


def onnx_embedder(
    path: Path | str,
    device: torch.device,
    flip: bool = True,
    batch: int = 256,
    *,
    spec: InputSpec = TRAIN_INPUT,
    progress: str = "",
    unnormalised: bool = False,
    backend: str = "",
) -> Embed:
    """The embedding function of an ONNX model, whose first output is the embedding.

    backend is "onnxruntime" or "opencv", default_onnx_backend() if empty. A model exported for a
    fixed batch size (often 1) is run at that size. Raises UserError where the file is not an ONNX
    model of 112x112 faces.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    check_onnx(path)
    backend = backend or default_onnx_backend()
    try:
        run, fixed_batch = ONNX_BACKENDS[backend](path, device)
        # Two black faces tell whether the model takes 112x112 and gives one embedding per face.
        black = np.zeros((2, 3, 112, 112), np.float32)
        shape = in_fixed_batches(run, fixed_batch or 2)(black).shape
    except Exception as error:  # both libraries raise their own types, some of them bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be used with {backend} as an ONNX model of (n, 3, 112, 112) faces "
            f"({reason}); give another --checkpoint."
        ) from None
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(
            f"{path} gives an output of shape {shape} for 2 faces instead of one embedding each."
        )
    run = in_fixed_batches(run, fixed_batch or min(batch, CPU_BATCH))

    def embed(faces: Tensor) -> Tensor:
        return embed_in_batches(
            lambda images: torch.from_numpy(run(images.contiguous().numpy())),
            faces,
            flip=flip,
            batch=batch,
            spec=spec,
            device=torch.device("cpu"),
            progress=progress,
            unnormalised=unnormalised,
        )

    return embed


# ------------------------------------------------------------------------------ any checkpoint


def load_embedder(
    checkpoint: Path | str,
    *,
    device: torch.device,
    network: str = "r50",
    use_se: bool = False,
    flip: bool = True,
    batch: int = 256,
    spec: InputSpec = TRAIN_INPUT,
    progress: str = "",
    unnormalised: bool = False,
) -> tuple[Embed, ModelInfo]:
    """The embedding function of a checkpoint, and its kind, network and, of ours, epoch and seed.

    A checkpoint of train.py says itself which network it holds; network, use_se and spec are for
    third-party models. The other options are those of embed_in_batches. Raises UserError where the
    file is none of the three kinds.
    """
    if Path(checkpoint).suffix.lower() == ".onnx":
        embed = onnx_embedder(
            checkpoint,
            device,
            flip,
            batch,
            spec=spec,
            progress=progress,
            unnormalised=unnormalised,
        )
        return embed, {"kind": "onnx", "network": f"ONNX by {default_onnx_backend()}"}
    loaded = load_checkpoint(checkpoint)
    config, state = loaded.get("config"), loaded.get("model")
    info: ModelInfo
    if isinstance(state, dict) and isinstance(config, dict) and {"network", "use_se"} <= {*config}:
        network, use_se = config["network"], config["use_se"]
        info = {"kind": "ours"}
        # These go into lfw.json, and the file is untrusted: an "epoch" may be any object.
        if type(loaded.get("epoch")) is int:
            info["epoch"] = loaded["epoch"]
        if type(config.get("seed")) is int:
            info["seed"] = config["seed"]
        spec = TRAIN_INPUT
    elif loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        state, info = loaded, {"kind": "state dict"}
    else:
        raise UserError(
            f"{checkpoint} is neither a checkpoint of train.py nor a plain state dict; "
            "give another --checkpoint."
        )
    info["network"] = network
    embed = torch_embedder(
        _build_with_weights(network, use_se, state, checkpoint).to(device),
        device,
        flip,
        batch,
        spec=spec,
        progress=progress,
        unnormalised=unnormalised,
    )
    return embed, info


def _build_with_weights(network: str, use_se: bool, state: dict, path: Path | str) -> nn.Module:
    """A network with the weights of a state dict; UserError where a key is missing or unknown."""
    check_weights(state, path)
    try:
        # InsightFace's last layer: its rows are the embedding dimension.
        emb_size = len(state["fc.weight"]) if "fc.weight" in state else 512
        # On the meta device a hostile embedding dimension allocates nothing; assign=True then
        # takes over the tensors of the file, whose size the file itself limits.
        with torch.device("meta"):
            model = build_model(network, emb_size=emb_size, use_se=use_se)
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        if len(reason) > 200:
            reason = reason[:200] + "..."
        raise UserError(
            f"The weights in {path} are not those of network {str(network)[:40]} ({reason}); "
            "name theirs with --network."
        ) from None
    return model.float()
