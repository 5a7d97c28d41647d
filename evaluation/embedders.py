"""Any checkpoint as one function: aligned faces in, embeddings out.

    from evaluation.embedders import load_embedder
    embed, info = load_embedder("runs/20250101-120000-r50-s0/best.pt", device=torch.device("cpu"))
    embed(faces)  # (n, 112, 112, 3) uint8 RGB -> (n, d) float32, L2-normalised

Three kinds of file are read: a checkpoint of train.py, third-party weights of one of our networks
(a state dict in any wrapping, .safetensors), and an ONNX model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from data_gen import normalise
from evaluation.metrics import ModelInfo
from evaluation.third_party_weights import build_with_weights
from fileio.checkpoint_file import check_weights, load_checkpoint, named_tensors
from utils import UserError, exact_float32

# Aligned faces (n, 112, 112, 3) uint8 RGB on the CPU -> embeddings (n, d) float32 on the CPU.
Embed = Callable[[Tensor], Tensor]


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


def preprocess_faces(faces: Tensor, spec: InputSpec) -> Tensor:
    """Faces (n, 112, 112, 3) uint8 RGB to a model's input (n, 3, 112, 112), channels_last."""
    images = normalise(faces)  # (n, 3, 112, 112) in [-1, 1]
    if (spec.mean, spec.std) != (TRAIN_INPUT.mean, TRAIN_INPUT.std):
        mean, std = images.new_tensor((spec.mean, spec.std))[..., None, None]  # (3, 1, 1) each
        images = (images * 0.5 + 0.5 - mean) / std
    return images.flip(1) if spec.bgr else images


def embed_in_batches(
    forward: Callable[[Tensor], Tensor],
    faces: Tensor,
    *,
    flip: bool,
    batch: int,
    device: torch.device,
    spec: InputSpec = TRAIN_INPUT,
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
    **options: Any,
) -> Embed:
    """The embedding function of a network; training may change the weights between two calls.

    The options are those of embed_in_batches. It runs in float32: under bfloat16 cosines change by
    0.003 on average and by up to 0.02, more than the 0.001 to which thresholds and TARs are quoted
    (MobileFaceNet on aligned faces).
    """
    batch = min(batch, CPU_BATCH) if device.type == "cpu" else batch

    def embed(faces: Tensor) -> Tensor:
        forward = fold_batch_norm(model)
        autocast_off = torch.autocast(device.type, enabled=False)
        with torch.inference_mode(), autocast_off, exact_float32():
            return embed_in_batches(
                forward, faces, flip=flip, batch=batch, device=device, **options
            )

    return embed


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode with each batch norm folded into the convolution before it.

    The embeddings are the same up to rounding; the model itself and its mode stay as they are.
    """
    was_training = model.training
    with torch.no_grad():
        folded = fuse(model.eval())  # folds running statistics, hence evaluation mode
    model.train(was_training)
    return folded.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ ONNX


def onnx_embedder(
    path: Path | str,
    device: torch.device,
    flip: bool = True,
    batch: int = 256,
    *,
    spec: InputSpec = TRAIN_INPUT,
    **options: Any,
) -> tuple[Embed, InputSpec, list[str]]:
    """The embedding function of an ONNX model, the input it is given, and what to say about it.

    A model whose graph begins with a normalisation of its own gets pixels as they are, whatever
    `spec` says. The options are those of embed_in_batches. Raises UserError where the file is no
    ONNX model of 112x112 faces with one embedding each.
    """
    from evaluation.onnx_models import in_fixed_batches, open_onnx  # onnxruntime takes 0.4 s

    model = open_onnx(path, device)
    if model.white:
        spec = InputSpec((0.0,) * 3, (1 / model.white,) * 3, spec.bgr)
    # Batches of the size that a model demands are padded, others are as small as on any CPU.
    run = in_fixed_batches(model.run, model.batch or min(batch, CPU_BATCH))

    def embed(faces: Tensor) -> Tensor:
        return embed_in_batches(
            lambda images: torch.from_numpy(run(images.contiguous().numpy())),
            faces,
            flip=flip,
            batch=batch,
            spec=spec,
            device=torch.device("cpu"),
            **options,
        )

    return embed, spec, model.notes


# ------------------------------------------------------------------------------ any checkpoint


def load_embedder(
    checkpoint: Path | str,
    *,
    device: torch.device,
    network: str = "r50",
    use_se: bool = False,
    spec: InputSpec = TRAIN_INPUT,
    **options: Any,
) -> tuple[Embed, ModelInfo]:
    """The embedding function of a checkpoint, and its kind, network, input, epoch and seed.

    A checkpoint of train.py says itself which network it holds; network, use_se and spec are for
    third-party models. The options are those of torch_embedder and embed_in_batches. Raises
    UserError where the file is none of the three kinds.
    """
    if Path(checkpoint).suffix.lower() == ".onnx":
        embed, spec, notes = onnx_embedder(checkpoint, device, spec=spec, **options)
        notes = [describe_input(spec), *notes]
        return embed, {"kind": "onnx", "network": "ONNX", "notes": notes}
    loaded = load_checkpoint(checkpoint, third_party=True)
    config, state = loaded.get("config"), loaded.get("model")
    info: ModelInfo = {"kind": "ours"}
    if isinstance(state, dict) and isinstance(config, dict) and {"network", "use_se"} <= {*config}:
        network, use_se, spec = config["network"], config["use_se"], TRAIN_INPUT
        # These go into lfw.json, and the file is untrusted: an "epoch" may be any object.
        for name, value in (("epoch", loaded.get("epoch")), ("seed", config.get("seed"))):
            if type(value) is int:
                info[name] = value
        check_weights(state, checkpoint)
        model, _ = build_with_weights(network, use_se, state, checkpoint)
    else:
        tensors = named_tensors(loaded)
        if not tensors:
            raise UserError(f"{checkpoint} holds no weights; give another --checkpoint.")
        model, notes = build_with_weights(network, use_se, tensors, checkpoint)
        info = {"kind": "state dict", "notes": [describe_input(spec), *notes]}
    info["network"] = network
    model = model.to(device, memory_format=torch.channels_last)
    return torch_embedder(model, device, spec=spec, **options), info


def describe_input(spec: InputSpec) -> str:
    """The pixels that a model is given: "RGB, mean 0.5, std 0.5", "RGB, 0..255"."""
    order = "BGR" if spec.bgr else "RGB"
    if set(spec.mean) == {0.0} and set(spec.std) <= {1.0, 1 / 255}:
        return f"{order}, 0..{round(1 / spec.std[0])}"
    mean, std = (" ".join(f"{v:g}" for v in dict.fromkeys(values)) for values in spec[:2])
    return f"{order}, mean {mean}, std {std}"
