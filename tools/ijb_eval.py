"""Evaluate a model on IJB-B or IJB-C: TAR at FAR of templates, and identification.

    python -m tools.ijb_eval --ijb data/IJBC                       # the newest run's best.pt
    python -m tools.ijb_eval --ijb data/IJBC --checkpoint backbone.pth --network r50
    python -m tools.ijb_eval --ijb data/IJBC --no-flip --no-norm-weight --no-detector-score

The folder holds meta/ and loose_crop/ of InsightFace's download (see evaluation/ijb_files.py).
Every image is aligned by its five points in the metadata and embedded once; the features are cached
in runs/<run>/embeddings/. After a kill the same command resumes. It prints TAR at FAR 1e-1 to 1e-6
(1:1) and, if the folder has the lists for it, rank-1, rank-5 and TPIR at FPIR 0.1 and 0.01 (1:N).
The metrics go to runs/<run>/ijbc.json, the ROC to images/ijbc_roc.png.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import ClassVar

from config import Config, parse_args, setting
from utils import (
    UserError,
    exit_on_user_error,
    get_device,
    keep_freed_memory,
    newest_run,
)


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """IJB-B and IJB-C"""

    SHARED: ClassVar[str] = (
        "runs_dir images_dir device workers flip network use_se eval_batch checkpoint input_mean "
        "input_std bgr"
    )
    ijb: str = setting("", "folder of IJB-B or IJB-C, with meta/ and loose_crop/")
    detector_score: bool = setting(True, "weight images by the detector's score, as InsightFace")
    norm_weight: bool = setting(True, "weight images by the norm of their embedding, likewise")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Evaluate a checkpoint by both protocols, print the table, write the JSON and the plot."""
    # Imported here, so that --help answers at once.
    from evaluation.embedders import InputSpec
    from evaluation.evaluated_model import open_model
    from evaluation.figures import plot_template_roc
    from evaluation.ijb import evaluate_ijb, ijb_table, load_or_embed
    from evaluation.ijb_files import read_ijb
    from evaluation.templates import IJB_FARS
    from fileio.safe_files import atomic_write, make_folder

    keep_freed_memory()
    if not cfg.ijb:
        raise UserError("Name the folder with meta/ and loose_crop/: --ijb data/IJBC.")
    ijb = read_ijb(cfg.ijb)
    model = open_model(
        Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt")),
        runs_dir=cfg.runs_dir,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        batch=cfg.eval_batch,
        flip=cfg.flip,
        unnormalised=True,
    )
    print(f"Model: {model}")
    features = load_or_embed(ijb, model, cfg.flip, cfg.workers)
    start = time.perf_counter()
    metrics, far, tar = evaluate_ijb(
        ijb, features, detector_score=cfg.detector_score, norm_weight=cfg.norm_weight
    )
    seconds = round(time.perf_counter() - start, 2)
    print(
        f"{ijb.name}: {metrics['pictures']:,} images in {metrics['templates']:,} templates, "
        f"{metrics['pairs']:,} pairs, {metrics['matched_pairs']:,} of them genuine"
    )
    print(ijb_table(metrics))
    plot_path = Path(cfg.images_dir) / f"{ijb.name}_roc.png"
    rates = {name: metrics["tar_at_far"][name]["tar"] for name in IJB_FARS}
    plot_template_roc(plot_path, far, tar, rates, f"IJB-{ijb.name[-1].upper()}, 1:1")
    content = {
        **metrics,
        **model.info,
        "checkpoint": str(model.checkpoint),
        "set": ijb.name,
        "flip": cfg.flip,
        "detector_score": cfg.detector_score,
        "norm_weight": cfg.norm_weight,
        "seconds": seconds,
    }
    json_path = model.folder / f"{ijb.name}.json"
    make_folder(model.folder)
    with atomic_write(json_path, "w") as file:
        json.dump(content, file, indent=1)
    print(f"Wrote {json_path} and {plot_path}.")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "ijb_eval", Settings, __doc__))
