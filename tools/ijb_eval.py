"""How good is a model on IJB-B or IJB-C: TAR at FAR of templates, and identification.

    python -m tools.ijb_eval --ijb data/IJBC                       # the newest run's best.pt
    python -m tools.ijb_eval --ijb data/IJBC --checkpoint backbone.pth --network r50
    python -m tools.ijb_eval --ijb data/IJBC --no-flip --no-norm-weight --no-detector-score

The folder holds meta/ and loose_crop/ as InsightFace passes them around (see ijb_files.py). Every
image is aligned by the five points that are given for it and embedded once; the features are kept
in runs/<run>/embeddings/. It prints TAR at FAR 1e-1 to 1e-6 (1:1) and, where the lists for it are
there, rank-1, rank-5 and TPIR at FPIR 0.1 and 0.01 (1:N); the same goes to runs/<run>/ijbc.json,
and the ROC to images/ijbc_roc.png.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import ClassVar

from config import Config, parse_args, setting
from evaluation.embedders import InputSpec, load_embedder
from evaluation.embedding_cache import model_checksum, open_features, save_features
from evaluation.figures import plot_template_roc
from evaluation.ijb import embed_images, images_checksum, report_on, table
from evaluation.ijb_files import read_ijb
from evaluation.templates import IJB_FARS
from fileio.safe_files import atomic_write, make_folder
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
    """Embed the images, where that has not been done, and report on both protocols."""
    keep_freed_memory()
    if not cfg.ijb:
        raise UserError("Name the folder with meta/ and loose_crop/: --ijb data/IJBC.")
    ijb = read_ijb(cfg.ijb)
    checkpoint = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt"))
    spec = InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr)
    embed, about = load_embedder(
        checkpoint,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        flip=cfg.flip,
        batch=cfg.eval_batch,
        spec=spec,
        unnormalised=True,
    )
    print(f"Model: {checkpoint} ({about['network']})")
    ours = about["kind"] == "ours"
    folder = checkpoint.parent if ours else Path(cfg.runs_dir) / checkpoint.stem
    key = f"{model_checksum(checkpoint, spec, cfg.flip)} {images_checksum(ijb)}"
    path = folder / "embeddings" / f"{ijb.name}-{checkpoint.stem}.npy"
    features = open_features(path, key, len(ijb.files))
    if features is None:
        save_features(path, key, embed_images(ijb, embed, cfg.workers))
        features = open_features(path, key, len(ijb.files))
    start = time.perf_counter()
    report, far, tar = report_on(ijb, features, cfg.detector_score, cfg.norm_weight)
    report |= about | {
        "checkpoint": str(checkpoint),
        "set": ijb.name,
        "flip": cfg.flip,
        "detector_score": cfg.detector_score,
        "norm_weight": cfg.norm_weight,
        "seconds": round(time.perf_counter() - start, 2),
    }
    print(
        f"{ijb.name}: {report['pictures']:,} images in {report['templates']:,} templates, "
        f"{report['pairs']:,} pairs, {report['matched_pairs']:,} of them matched"
    )
    print(table(report))
    plot = Path(cfg.images_dir) / f"{ijb.name}_roc.png"
    rates = {name: report["tar_at_far"][name]["tar"] for name in IJB_FARS}
    plot_template_roc(plot, far, tar, rates, f"IJB-{ijb.name[-1].upper()}, 1:1")
    make_folder(folder)
    with atomic_write(folder / f"{ijb.name}.json", "w") as file:
        json.dump(report, file, indent=1)
    print(f"Wrote {folder / f'{ijb.name}.json'} and {plot}.")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "ijb_eval", Settings, __doc__))
