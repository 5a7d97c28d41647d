"""A checkpoint of any kind, opened for evaluation; lfw_eval.py and the tools open theirs here.

from evaluation.evaluated_model import open_model
model = open_model(Path("model.onnx"), runs_dir="runs", device=torch.device("cpu"))
model.embed(faces), model.folder, str(model)
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from evaluation.embedders import TRAIN_INPUT, Embed, InputSpec, load_embedder
from evaluation.embedding_cache import model_checksum
from evaluation.metrics import ModelInfo


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A checkpoint as an embedding function, with what is known about it."""

    checkpoint: Path
    embed: Embed
    info: ModelInfo  # kind and network, of our checkpoints also epoch and seed
    folder: Path  # of its results
    spec: InputSpec

    @property
    def is_ours(self) -> bool:
        """Whether train.py wrote the checkpoint."""
        return self.info["kind"] == "ours"

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of the model's files and of its input: embeddings are cached by it."""
        settings = (self.spec, self.info["network"], *self.info.get("notes", []))
        return model_checksum(self.checkpoint, *settings)

    def __str__(self) -> str:
        """The file, its network and epoch: "runs/<run>/best.pt (r50, epoch 31)".

        Of third-party models also their input: "backbone.pth (r50; RGB, mean 0.5, std 0.5)".
        """
        epoch = f", epoch {self.info['epoch']}" if "epoch" in self.info else ""
        notes = "".join(f"; {note}" for note in self.info.get("notes", []))
        return f"{self.checkpoint} ({self.info['network']}{epoch}{notes})"

    def json_info(self) -> ModelInfo:
        """What lfw.json and eval.json say about the model."""
        return {**self.info, "checkpoint": str(self.checkpoint), "checksum": self.checksum}


def open_model(
    checkpoint: Path,
    *,
    runs_dir: Path | str,
    device: torch.device,
    spec: InputSpec = TRAIN_INPUT,
    **options: Any,
) -> EvaluatedModel:
    """Load a checkpoint; the options are those of load_embedder, whose errors it raises.

    The results of our checkpoints go to the run's folder, those of third-party models to
    runs_dir/<name of the file>-<first 8 digits of its SHA-256>: many are called backbone.pth.
    """
    embed, info = load_embedder(checkpoint, device=device, spec=spec, **options)
    folder = results_folder(checkpoint, info, runs_dir)
    return EvaluatedModel(checkpoint, embed, info, folder, spec)


def results_folder(checkpoint: Path, info: ModelInfo, runs_dir: Path | str) -> Path:
    """Where the results of a model are; see open_model."""
    if info["kind"] == "ours":
        return checkpoint.parent
    return Path(runs_dir, f"{checkpoint.stem}-{model_checksum(checkpoint)[:8]}")
