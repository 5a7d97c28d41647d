"""Compare the faces in two photos: one person or two?

    python -m tools.compare a.jpg b.jpg                        # the newest run's best.pt
    python -m tools.compare a.jpg b.jpg --picture verdict.png
    python -m tools.compare a.jpg b.jpg --far 1e-2             # its threshold at this FAR
    python -m tools.compare a.jpg b.jpg --checkpoint model.onnx --threshold 0.3

The face in each photo is found and aligned by the code of pre_process.py; of several it is the
large and central one. It prints the cosine and the angle of the two embeddings and, from the
model's own evaluation (runs/<run>/lfw.json of lfw_eval.py), the probability that it is one person,
the thresholds that it supports, and the verdict. The threshold is that of the ten-fold accuracy
unless --far or --threshold chooses another. --picture draws both photos with the faces that were
found, the aligned faces and the verdict. Exit status: 0 same person, 1 different, 2 an error.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

from config import Config, parse_args, setting
from tools.photo_faces import (
    MACHINE_SETTINGS,
    MODEL_SETTINGS,
    embed_crops,
    make_detector,
    open_photo_model,
    read_photo,
)
from utils import UserError, exit_on_user_error


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Comparison"""

    SHARED: ClassVar[str] = f"{MACHINE_SETTINGS} {MODEL_SETTINGS}"
    first: str = setting("", "a photo", positional="1")
    second: str = setting("", "another photo", positional="1")
    far: str = setting("", "take the threshold at this FAR, e.g. 1e-2; default: the accuracy's")
    threshold: float = setting(0.0, "take this cosine; 0: the evaluation's", low=-1, high=1)
    picture: str = setting("", "draw both photos and the verdict: a .png, .jpg, .pdf or .svg file")


@exit_on_user_error
def main(cfg: Settings) -> int:
    """Compare two photos; returns the exit status."""
    from evaluation.face_sheets import PhotoPanel, check_figure_path, plot_comparison
    from evaluation.verification import to_degrees
    from fileio.images import decode_image

    if cfg.picture:
        check_figure_path(cfg.picture)
    model, decision = open_photo_model(cfg)
    threshold, origin = decision.choose_threshold(cfg.far, cfg.threshold)
    detector = make_detector(cfg)
    photos = [read_photo(path, detector) for path in (cfg.first, cfg.second)]
    first, second = embed_crops(model, [photo.face.jpeg for photo in photos])
    cosine = float(first @ second)
    measured = f"cosine {cosine:.4f}, {to_degrees(cosine):.2f} degrees"
    (probability,) = decision.format_probabilities([cosine])
    if probability:
        measured += f", probability of one person {probability}"
        measured += f" (where {100 * decision.genuine_share:.0f} % of pairs are)"
    print("\n".join([measured, *(decision.rows or [decision.problem])]))
    same, verdict = False, "none"
    if threshold is not None:
        same = cosine >= threshold
        person, relation = ("same person", "at least") if same else ("different people", "below")
        verdict = f"{person}: {cosine:.4f} is {relation} {threshold:.4f} ({origin})"
    print(f"Verdict: {verdict}")
    if cfg.picture:
        panels = [
            PhotoPanel(
                name,
                decode_image(data),
                decode_image(face.jpeg),
                face.box,
                face.points,
                face.others,
            )
            for name, data, face in photos
        ]
        plot_comparison(Path(cfg.picture), panels, f"{measured}\n{verdict}")
        print(f"Wrote {cfg.picture}.")
    if threshold is None:
        raise UserError("Without an evaluation name a threshold, say --threshold 0.3.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(parse_args(sys.argv[1:], "compare", Settings, __doc__)))
