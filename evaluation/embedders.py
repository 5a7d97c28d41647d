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
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from data_gen import normalise
from evaluation.metrics import ModelInfo
from evaluation.third_party_weights import build_with_weights
from fileio.checkpoint_file import check_weights, load_checkpoint, named_tensors
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

    def embed(faces: Tensor) -> Tensor:
        def embed_by(batch: int) -> Tensor:
            return embed_in_batches(
                fold_batch_norm(model), faces, flip=flip, batch=batch, device=device, **options
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
    loaded = load_network(checkpoint, network=network, use_se=use_se, spec=spec)
    model = loaded.model.to(device)
    return torch_embedder(model, device, spec=loaded.spec, **options), loaded.info


class LoadedNetwork(NamedTuple):
    """A network with the weights of a checkpoint, and what is known about it."""

    model: nn.Module  # on the CPU, float32
    spec: InputSpec
    info: ModelInfo
    config: dict[str, Any]  # the settings of its run; none of a third-party checkpoint


def load_network(
    checkpoint: Path | str,
    *,
    network: str = "r50",
    use_se: bool = False,
    spec: InputSpec = TRAIN_INPUT,
) -> LoadedNetwork:
    """The network of a checkpoint that is no ONNX model; arguments and errors as load_embedder."""
    loaded = load_checkpoint(checkpoint, third_party=True)
    config, state = loaded.get("config"), loaded.get("model")
    info: ModelInfo = {"kind": "ours"}
    if isinstance(state, dict) and isinstance(config, dict) and {"network", "use_se"} <= {*config}:
        network, use_se, spec = config["network"], config["use_se"], TRAIN_INPUT
        # These go into lfw.json, and the file is untrusted: an "epoch" may be any object.
        for name, value in (("epoch", loaded.get("epoch")), ("seed", config.get("seed"))):
            if type(value) is int:
                info[name] = value
        for name in ("init", "init_sha256"):
            if type(value := config.get(name)) is str and value:
                info[name] = value
        check_weights(state, checkpoint)
        model, _ = build_with_weights(network, use_se, state, checkpoint)
    else:
        tensors, config = named_tensors(loaded), {}
        if not tensors:
            raise UserError(f"{checkpoint} holds no weights; give another --checkpoint.")
        model, notes = build_with_weights(network, use_se, tensors, checkpoint)
        info = {"kind": "state dict", "notes": [describe_input(spec), *notes]}
    info["network"] = network
    return LoadedNetwork(model, spec, info, config)


def describe_input(spec: InputSpec) -> str:
    """The pixels that a model is given: "RGB, mean 0.5, std 0.5", "RGB, 0..255"."""
    order = "BGR" if spec.bgr else "RGB"
    if set(spec.mean) == {0.0} and set(spec.std) <= {1.0, 1 / 255}:
        return f"{order}, 0..{round(1 / spec.std[0])}"
    mean, std = (" ".join(f"{v:g}" for v in dict.fromkeys(values)) for values in spec[:2])
    return f"{order}, mean {mean}, std {std}"
