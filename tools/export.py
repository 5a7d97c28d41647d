"""Export a model: ONNX, or safetensors, with a model card beside it.

    python -m tools.export                                  # the newest run's best.pt: best.onnx
    python -m tools.export runs/<run>/best.pt --output face.onnx --raw-pixels --normalised
    python -m tools.export backbone.pth --network r50 --output r50.safetensors

The ONNX model has an input "input", an output "embedding" and any batch size. It is run in
onnxruntime on aligned faces before it gets its name, and must give PyTorch's embeddings to 1e-4.
The card (<output>.md) has the settings of the run, and the metrics if lfw_eval.py has written them.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from config import Config, parse_args, setting
from utils import FACE_SIZE, UserError, exit_on_user_error, newest_run

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.embedders import LoadedNetwork
    from evaluation.metrics import LfwJson

CHECKED_FACES = 32
LIMIT, LIMIT_FP16 = 1e-4, 1e-2  # of the difference of an element of an L2-normalised embedding


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Export"""

    SHARED: ClassVar[str] = "data_dir runs_dir network use_se input_mean input_std bgr"
    checkpoint: str = setting(
        "", "as lfw_eval.py takes it; default: the newest run's best.pt", positional="?"
    )
    output: str = setting("", "*.onnx or *.safetensors; default: the checkpoint's name, .onnx")
    raw_pixels: bool = setting(False, "ONNX: (n, 112, 112, 3) uint8 RGB in, nothing to prepare")
    normalised: bool = setting(False, "ONNX: L2-normalised embeddings out")
    fp16: bool = setting(False, "ONNX: 16 bits inside; half the file, differences up to 1e-2")
    data_licence: str = setting("", "terms of the training data, for the card")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Write the model and its card."""
    import torch

    from evaluation.embedders import InputSpec, load_network
    from evaluation.embedding_cache import file_checksum
    from evaluation.evaluated_model import results_folder
    from evaluation.model_card import model_card
    from fileio.safe_files import atomic_write, make_folder

    checkpoint = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt"))
    output = Path(cfg.output or checkpoint.with_suffix(".onnx"))
    check_output(cfg, checkpoint, output)
    spec = InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr)
    loaded = load_network(checkpoint, network=cfg.network, use_se=cfg.use_se, spec=spec)
    print(f"Model: {checkpoint} ({loaded.info['network']})")
    if output.suffix == ".onnx":
        data = checked_onnx(cfg, loaded, output)
    else:
        data = safetensors_file(loaded)
    metrics = read_metrics(results_folder(checkpoint, loaded.info, cfg.runs_dir), checkpoint)
    weights = {"checkpoint": checkpoint, "SHA-256 of the checkpoint": file_checksum(checkpoint)}
    versions = {"Python": platform.python_version(), "PyTorch": torch.__version__}
    provenance = weights | versions
    card = model_card(
        output.stem, loaded.config, loaded.info, metrics, provenance, cfg.data_licence
    )
    card_path = output.with_suffix(".md")
    make_folder(output.parent)
    for path, content in ((output, data), (card_path, card.encode())):
        with atomic_write(path) as file:
            file.write(content)
    print(f"Wrote {output}, {len(data) / 1e6:.1f} MB, and {card_path}.")


def check_output(cfg: Settings, checkpoint: Path, output: Path) -> None:
    """Raise UserError where the two paths, or the options, do not go together."""
    if checkpoint.suffix.lower() == ".onnx":
        raise UserError(f"{checkpoint} is an ONNX model already; name a checkpoint.")
    if output.suffix not in (".onnx", ".safetensors"):
        raise UserError(f"--output {output} must end in .onnx or .safetensors.")
    if output.resolve() == checkpoint.resolve():
        raise UserError(f"--output {output} would replace the checkpoint; name another file.")
    given = [name for name in ("raw_pixels", "normalised", "fp16") if getattr(cfg, name)]
    if output.suffix == ".safetensors" and given:
        flag = given[0].replace("_", "-")
        raise UserError(f"--{flag} is for ONNX; a safetensors file holds the weights as they are.")


def checked_onnx(cfg: Settings, loaded: LoadedNetwork, output: Path) -> bytes:
    """The ONNX model; UserError where onnxruntime's embeddings are not PyTorch's."""
    from evaluation.onnx_export import ExportOptions, export_onnx, largest_difference

    options = ExportOptions(cfg.raw_pixels, cfg.normalised, cfg.fp16)
    data = export_onnx(loaded.model, loaded.spec, options)
    faces, origin = some_faces(cfg)
    difference = largest_difference(data, loaded.model, faces, loaded.spec, options)
    limit = LIMIT_FP16 if cfg.fp16 else LIMIT
    print(
        f"onnxruntime against PyTorch on {len(faces)} {origin}, in a batch and one by one: largest "
        f"difference {difference:.1e} (limit {limit:g})"
    )
    if not difference <= limit:
        raise UserError(
            f"The exported model's embeddings differ from PyTorch's; {output} is not written."
        )
    return data


def some_faces(cfg: Settings) -> tuple[Tensor, str]:
    """Aligned faces (n, 112, 112, 3) uint8 RGB of the prepared LFW, and what they are, in words.

    Without a prepared set they are noise, which a network takes as well.
    """
    import numpy as np
    import torch

    from evaluation.face_folders import open_face_folder

    folder = Path(cfg.data_dir, "faces_lfw_112x112")
    if folder.is_dir():
        reader = open_face_folder(folder).reader
        images = [reader.image(i) for i in range(min(CHECKED_FACES, len(reader)))]
        return torch.from_numpy(np.stack(images)), f"faces of {folder}"
    shape = (CHECKED_FACES, FACE_SIZE, FACE_SIZE, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return torch.from_numpy(noise), f"images of noise ({folder} is not prepared)"


def safetensors_file(loaded: LoadedNetwork) -> bytes:
    """The weights by the names of the state dict; network and settings are in the metadata."""
    import safetensors.torch

    weights = {name: value.contiguous() for name, value in loaded.model.state_dict().items()}
    about = {"format": "pt", "network": loaded.info["network"], "config": json.dumps(loaded.config)}
    return safetensors.torch.save(weights, about)


def read_metrics(folder: Path, checkpoint: Path) -> LfwJson | None:
    """lfw.json in the folder of a checkpoint's results, if it is of this checkpoint."""
    try:
        metrics = json.loads((folder / "lfw.json").read_text("utf-8"))
        return metrics if Path(metrics["checkpoint"]).name == checkpoint.name else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "export", Settings, __doc__))
