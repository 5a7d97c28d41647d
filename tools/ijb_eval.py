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
import hashlib
import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from config import Config, parse_args, setting
from evaluation.embedders import Embed, InputSpec, load_embedder
from evaluation.embedding_cache import model_checksum, open_features, save_features
from evaluation.figures import plot_template_roc
from evaluation.ijb_files import Ijb, read_ijb, read_pairs, read_subjects
from evaluation.templates import (
    IJB_FARS,
    Identification,
    build_templates,
    identify,
    roc_points,
    score_pairs,
    tar_at_fars,
    tar_line,
)
from fileio.images import ImageError, decode_image
from fileio.safe_files import atomic_write, make_folder
from utils import (
    UserError,
    core_count,
    exit_on_user_error,
    get_device,
    keep_freed_memory,
    newest_run,
    similarity_transform,
    warp_face,
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


BLOCK = 1024  # images aligned while the block before is embedded


# ------------------------------------------------------------------------------ features


def align(ijb: Ijb, number: int) -> np.ndarray:
    """The face of an image, (112, 112, 3) uint8 RGB, by the points given for it."""
    path = ijb.images / ijb.files[number]
    try:
        image = decode_image(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no {path}, which the metadata in {ijb.meta} names.") from None
    except ImageError as error:
        raise UserError(f"{path}: {error}") from None
    return warp_face(image, similarity_transform(ijb.points[number]))


def embed_images(ijb: Ijb, embed: Embed, workers: int) -> np.ndarray:
    """Features of all images, (n, d) float32, in the length that the network gives them."""
    count, features = len(ijb.files), np.empty((0, 0), np.float32)
    with (
        ThreadPoolExecutor(workers or core_count()) as pool,
        tqdm(total=count, desc=f"embedding {ijb.name}", unit="img") as bar,
    ):

        def submit(start: int) -> list[Future]:
            return [pool.submit(align, ijb, i) for i in range(start, min(start + BLOCK, count))]

        waiting = submit(0)
        for start in range(0, count, BLOCK):
            faces = np.stack([future.result() for future in waiting])
            waiting = submit(start + BLOCK)
            found = embed(torch.from_numpy(faces)).float().cpu().numpy()
            if not start:
                features = np.empty((count, found.shape[1]), np.float32)
            features[start : start + len(found)] = found
            bar.update(len(faces))
    return features


def images_checksum(ijb: Ijb) -> str:
    """SHA-256 of the names, points and sizes in bytes of all images: reading them takes hours."""
    digest = hashlib.sha256("\n".join(ijb.files).encode())
    digest.update(np.ascontiguousarray(ijb.points))
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(ijb.images)}
    digest.update(repr([sizes.get(name) for name in ijb.files]).encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------ the numbers


def verify_templates(
    ijb: Ijb, ids: np.ndarray, embeddings: np.ndarray
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The 1:1 protocol: a report, and FAR and TAR of the ROC, (points,) each."""
    first, second, same = read_pairs(ijb, ids)
    scores = score_pairs(embeddings, first, second)
    try:
        points = tar_at_fars(scores, same)
    except ValueError as error:
        raise UserError(f"{ijb.meta}/{ijb.name}_template_pair_label.txt: {error}.") from None
    far, tar = roc_points(scores, same)
    report = {"pairs": len(same), "matched_pairs": int(same.sum()), "tar_at_far": points}
    return report, far, tar


def identify_templates(
    ijb: Ijb, ids: np.ndarray, embeddings: np.ndarray
) -> dict[str, Identification]:
    """The 1:N protocol by gallery, and with both together; empty where the lists are not there."""
    names = ("G1", "G2") if ijb.name == "ijbc" else ("S1", "S2")
    paths = [ijb.meta / f"{ijb.name}_1N_gallery_{name}.csv" for name in names]
    probe_path = ijb.meta / f"{ijb.name}_1N_probe_mixed.csv"
    if not any(path.exists() for path in (*paths, probe_path)):
        return {}
    probes, probe_subjects = read_subjects(probe_path, ids)
    galleries = dict(zip(names, (read_subjects(path, ids) for path in paths), strict=True))
    both = [np.concatenate(columns) for columns in zip(*galleries.values(), strict=True)]
    found = {}
    for name, (gallery, subjects) in (galleries | {"+".join(names): tuple(both)}).items():
        try:
            found[name] = identify(
                embeddings[probes], probe_subjects, embeddings[gallery], subjects
            )
        except ValueError as error:
            raise UserError(f"The 1:N lists in {ijb.meta}, gallery {name}: {error}.") from None
    return found


def table(report: dict[str, Any]) -> str:
    """What the script prints of a report."""
    lines = [tar_line(far, point) for far, point in report["tar_at_far"].items()]
    for name, found in report["identification"].items():
        others = "mated probes without their mate" if found["best_non_mates"] else "other probes"
        tpir = ", ".join(f"{100 * rate:.2f} % at {fpir}" for fpir, rate in found["tpir"].items())
        lines.append(
            f"gallery {name:<7}rank-1 {100 * found['rank1']:.2f} %, rank-5 "
            f"{100 * found['rank5']:.2f} %, TPIR at FPIR {tpir} ({found['mated']:,} mated probes, "
            f"{found['others']:,} {others})"
        )
    return "\n".join(lines)


def report_on(
    ijb: Ijb, features: np.ndarray, detector_score: bool, norm_weight: bool
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Both protocols from features (n, d): a report, and FAR and TAR of the ROC."""
    weights = ijb.detector_scores if detector_score else None
    try:
        ids, embeddings = build_templates(
            features, ijb.template_of, ijb.media_of, weights, unit_length=not norm_weight
        )
    except ValueError as error:
        raise UserError(f"The templates of {ijb.name}: {error}.") from None
    report, far, tar = verify_templates(ijb, ids, embeddings)
    found = identify_templates(ijb, ids, embeddings)
    identification = {name: result.report() for name, result in found.items()}
    report |= {"pictures": len(features), "templates": len(ids), "identification": identification}
    return report, far, tar


# ------------------------------------------------------------------------------ the script


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
        raw=True,
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
