"""From a photo to an embedding, as tools.compare, tools.embed and tools.search do it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from config import Config
from utils import FACE_SIZE, UserError, get_device, newest_run

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from evaluation.decisions import Decision
    from evaluation.evaluated_model import EvaluatedModel
    from preprocessing.detector import FaceDetector
    from preprocessing.pipeline import AlignResult

# The shared settings of a model that embeds photos. The second line is what embeddings depend on.
MACHINE_SETTINGS = "runs_dir device eval_batch"
MODEL_SETTINGS = "checkpoint network use_se flip input_mean input_std bgr"


class Photo(NamedTuple):
    """A photo's file, and its face."""

    name: str
    data: bytes
    face: AlignResult


def open_photo_model(cfg: Config) -> tuple[EvaluatedModel, Decision]:
    """The model of --checkpoint (by default the newest run's best.pt), and its own evaluation."""
    from evaluation.decisions import read_decision
    from evaluation.embedders import InputSpec
    from evaluation.evaluated_model import open_model

    model = open_model(
        Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt")),
        runs_dir=cfg.runs_dir,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        batch=cfg.eval_batch,
        flip=cfg.flip,
    )
    print(f"Model: {model}")
    # The command that evaluates it: with the flags that lfw_eval.py needs to open it likewise.
    command = ["python", "lfw_eval.py", "--checkpoint", str(model.checkpoint)]
    for name in ("runs_dir", *MODEL_SETTINGS.split()[1:]):
        value, flag = getattr(cfg, name), name.replace("_", "-")
        if value == getattr(Config, name):
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return model, read_decision(model, cfg.flip, shlex.join(command))


def make_detector(cfg: Config) -> FaceDetector:
    """MTCNN as pre_process.py has it, with OpenCV's threads and warnings as there."""
    import cv2

    from preprocessing.detector import FaceDetector

    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return FaceDetector(get_device(cfg.device))


def read_photo(path: str, detector: FaceDetector, aligned: bool = False) -> Photo:
    """The large central face of a photo, aligned; `aligned`: a photo of 112x112 is one already.

    Raises UserError where the file cannot be read, is no image, or shows no face.
    """
    from fileio.archive_source import Entry
    from fileio.images import ImageError, decode_image
    from preprocessing.pipeline import AlignResult, align_and_encode, decode_entry, find_faces

    if not Path(path).is_file():
        raise UserError(f"There is no photo {path}.")
    data = Path(path).read_bytes()
    entry = Entry(path, "", len(data), None)
    try:
        height, width = decode_image(data).shape[:2]
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None
    if aligned and height == width == FACE_SIZE:
        return Photo(path, data, AlignResult(entry, "aligned", data))
    decoded = decode_entry(entry, data)
    face = align_and_encode(decoded, find_faces(detector, [decoded], [0])[0], crop_missed=False)
    if face.jpeg is None:
        raise UserError(
            f"No face was found in {path} ({width}x{height} pixels); take a photo in which the "
            "face is larger, lighter or turned to the camera."
        )
    if len(face.others):
        print(f"{path} shows {1 + len(face.others)} faces; the large central one is taken.")
    return Photo(path, data, face)


def embed_crops(model: EvaluatedModel, jpegs: Sequence[bytes]) -> np.ndarray:
    """Embeddings (n, d) float32, L2-normalised, of aligned faces as encoded images."""
    import numpy as np
    import torch

    from fileio.images import decode_image

    return model.embed(torch.from_numpy(np.stack([decode_image(jpeg) for jpeg in jpegs]))).numpy()
