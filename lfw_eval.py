"""How good is a model on LFW: accuracy, ROC, and the pairs it gets wrong.

    python lfw_eval.py                                      # the newest run's best.pt
    python lfw_eval.py --checkpoint runs/<run>/last.pt
    python lfw_eval.py --checkpoint backbone.pth --network r50     # InsightFace's iresnet
    python lfw_eval.py --checkpoint model.onnx --input-mean 0.485 0.456 0.406 \\
        --input-std 0.229 0.224 0.225                       # any ONNX model of 112x112 faces
    python lfw_eval.py --lfw data/faces_webface_112x112/cfp_fp.bin

It prints a table of ten-fold accuracy with its standard error, the single best threshold, TAR at
FAR, AUC and EER; the same goes to runs/<run>/lfw.json (runs/<file's name>/lfw.json for models of
others). Into images/ go theta_dist.png, roc.png and up to ten false positives and false negatives,
worst first: {i}_fp_0.jpg beside {i}_fp_1.jpg, {i}_fn_0.jpg beside {i}_fn_1.jpg.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from torch import Tensor

import verification
from config import Config, parse_args
from data_gen import load_images
from embedders import Embed, InputSpec, load_embedder
from figures import picture_name, plot_angles, plot_roc, write_galleries
from index_tsv import read_index
from recordio import RecordError, RecordReader, decode_jpeg, read_bin
from utils import (
    UserError,
    atomic_write,
    exit_with_sentence,
    get_device,
    keep_freed_memory,
    make_folder,
    newest_run,
)

GALLERY = 10  # false positives, and false negatives, that are shown


@dataclass(frozen=True)
class LfwSet:
    """A test set in memory: the aligned faces that its pairs use, each once, and the pairs."""

    path: Path
    images: Tensor  # (n, 112, 112, 3) uint8 RGB, in the order of pairs.names
    pairs: verification.Pairs
    missed: int  # faces among them that the detector did not find: cropped centrally
    source: str = ""  # the archive or folder that the pictures came from, where known


# ------------------------------------------------------------------------------ the test set


def find_lfw(data_dir: Path | str, train_set: Path | str = "") -> Path | None:
    """The prepared LFW, else an lfw.bin in the training set's folder or in data_dir, else None."""
    data_dir = Path(data_dir)
    train_set = Path(train_set) if train_set else data_dir / "faces_webface_112x112"
    prepared = data_dir / "faces_lfw_112x112"
    found = [prepared] if (prepared / "train.rec").is_file() else []
    found += [p for p in (train_set / "lfw.bin", data_dir / "lfw.bin") if p.is_file()]
    return found[0] if found else None


def load_lfw(path: Path | str, pairs_path: Path | str, workers: int = 0) -> LfwSet:
    """Decode the faces of a prepared folder that pairs.txt names, or all of a .bin set.

    A .bin carries its pairs, and its folds are contiguous tenths. Raises UserError where files are
    missing or damaged, or where pairs.txt names pictures that the folder has not.
    """
    path = Path(path)
    lfw = _load_bin(path) if path.suffix == ".bin" else _load_folder(path, pairs_path, workers)
    if lfw.pairs.same.all() or not lfw.pairs.same.any():
        raise UserError(f"{path}: the pairs are all of one kind; both kinds are needed.")
    if len(np.unique(lfw.pairs.folds)) < 2:
        raise UserError(f"{pairs_path} has one fold only; cross-validation needs two or more.")
    return lfw


def _load_folder(folder: Path, pairs_path: Path | str, workers: int) -> LfwSet:
    pairs_path = Path(pairs_path)
    reader = RecordReader(folder)
    table = read_index(folder, reader)
    if not pairs_path.is_file():
        raise UserError(
            f"There is no {pairs_path}; get LFW's pairs.txt (python pre_process.py --download-lfw "
            "fetches it too) or name one with --pairs."
        )
    try:
        pairs = verification.parse_pairs(pairs_path.read_text("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise UserError(f"{pairs_path} is not in the form of LFW's pairs.txt: {error}.") from None
    # Whatever the archive's root is called, a picture is Name/Name_0001 and its suffix.
    rows = {
        picture_name(source): row
        for row, source in enumerate(table.source)
        if table.record[row] >= 0
    }
    missing = [name for name in pairs.names if name not in rows]
    if missing:
        raise UserError(
            f"{pairs_path} names {len(missing)} of {len(pairs.names)} pictures that {folder} does "
            f"not have ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}); prepare the LFW "
            "archive that belongs to it with pre_process.py."
        )
    used = np.array([rows[name] for name in pairs.names])
    places = np.searchsorted(reader.keys, table.record[used])
    images, errors = load_images(reader, places, workers=workers)
    if errors:
        raise UserError(f"{next(iter(errors.values()))} Prepare {folder} again.")
    missed = sum(table.status[row] == "central_crop" for row in used)
    return LfwSet(folder, images, pairs, missed, _source_of(folder / "report.json"))


def _source_of(report: Path) -> str:
    """What pre_process.py read the pictures from, empty where no report tells."""
    if not report.is_file():
        return ""
    try:
        return str(json.loads(report.read_text("utf-8"))["source"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{report} is damaged; delete it or run pre_process.py again.") from None


def _load_bin(path: Path) -> LfwSet:
    jpegs, same = read_bin(path)
    # A face that stands in several pairs is stored once for each: embed it once.
    places: dict[bytes, int] = {}
    where = np.array([places.setdefault(jpeg, len(places)) for jpeg in jpegs])
    images = np.empty((len(places), 112, 112, 3), np.uint8)
    numbers = np.unique(where, return_index=True)[1]  # where each face stands first
    for jpeg, place in places.items():
        try:
            image = decode_jpeg(jpeg)
        except RecordError as error:
            raise UserError(f"Picture {numbers[place]} of {path}: {error}") from None
        if image.shape != images.shape[1:]:
            height, width = image.shape[:2]
            raise UserError(f"{path} holds a picture of {width}x{height}; faces must be 112x112.")
        images[place] = image
    names = [f"{path.stem}/{number}" for number in numbers]
    folds = verification.contiguous_folds(len(same))
    pairs = verification.Pairs(names, where[0::2], where[1::2], np.asarray(same, bool), folds)
    return LfwSet(path, torch.from_numpy(images), pairs, missed=0)


# ------------------------------------------------------------------------------ the numbers


def score_pairs(embed: Embed, lfw: LfwSet) -> np.ndarray:
    """Cosine of every pair, (pairs,) float64; embed takes all faces (n, 112, 112, 3) at once."""
    embeddings = embed(lfw.images).float().cpu().numpy()
    return verification.pair_scores(embeddings, lfw.pairs.first, lfw.pairs.second)


def summarise(scores: np.ndarray, lfw: LfwSet) -> dict[str, Any]:
    """All numbers of lfw.json that the scores of the pairs give; see verification.verify."""
    return verification.verify(scores, lfw.pairs.same, lfw.pairs.folds) | {
        "faces": len(lfw.images),
        "missed_faces": lfw.missed,
    }


def evaluate_lfw(embed: Embed, lfw: LfwSet) -> dict[str, Any]:
    """Embed every face once and report on the pairs: accuracy, threshold, tar_at_far, auc, ...

    For the loop of train.py: load_lfw once, then call this each epoch with torch_embedder(model).
    """
    return summarise(score_pairs(embed, lfw), lfw)


def worst_errors(
    scores: np.ndarray, same: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs accepted and refused wrongly at a threshold, worst first: indices (fp,), (fn,)."""
    order = np.argsort(scores, kind="stable")
    refused = scores[order] < threshold
    false_negatives = order[refused & same[order]]
    false_positives = order[~refused & ~same[order]][::-1]
    return false_positives, false_negatives


# ------------------------------------------------------------------------------ the script


def table(report: dict[str, Any]) -> str:
    """What the script prints of a report, one line a number."""

    def percent(value: float) -> str:
        return f"{100 * value:8.3f} %"

    folds = len(report["fold_accuracies"])
    mismatched = report["pairs"] - report["matched_pairs"]
    lines = [
        (
            f"accuracy, {folds} folds",
            percent(report["accuracy"]),
            f"+- {100 * report['standard_error']:.3f} standard error; thresholds of "
            f"{report['threshold']:.4f} on average, {report['threshold_degrees']:.2f} degrees",
        ),
        (
            "best single threshold",
            percent(report["best_accuracy"]),
            f"at {report['best_threshold']:.4f}, {report['best_threshold_degrees']:.2f} degrees; "
            f"{report['false_positives']} false positives, {report['false_negatives']} negatives",
        ),
    ]
    for far, tar in report["tar_at_far"].items():
        note = f"rests on {round(float(far) * mismatched)} mismatched pairs"
        lines.append((f"TAR at FAR {far}", percent(tar), note))
    lines += [("AUC", f"{report['auc']:10.6f}", ""), ("EER", percent(report["eer"]), "")]
    return "\n".join(f"{name:<22}{value:>12}  {note}".rstrip() for name, value, note in lines)


def choose_lfw(cfg: Config) -> Path:
    """The set that the flags ask for, or that is there; raises UserError where none is."""
    found = Path(cfg.lfw) if cfg.lfw else find_lfw(cfg.data_dir, cfg.train_set)
    if found is None:
        raise UserError(
            f"There is no prepared LFW at {Path(cfg.data_dir, 'faces_lfw_112x112')} and no lfw.bin "
            "beside the training set; get LFW and prepare it (python pre_process.py "
            "--download-lfw), or try everything on drawn faces (make demo)."
        )
    if not found.exists():
        raise UserError(f"There is no test set at {found}; correct --lfw.")
    if found.suffix == ".bin" and not cfg.lfw:
        print(f"LFW's pictures are not prepared; using {found} instead.")
    return found


@exit_with_sentence
def main(cfg: Config) -> None:
    """Evaluate one checkpoint; write the report, the figures and the galleries."""
    keep_freed_memory()
    test_set = choose_lfw(cfg)
    checkpoint = Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt"))
    embed, about = load_embedder(
        checkpoint,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        flip=cfg.flip,
        batch=cfg.eval_batch,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        progress="embedding",
    )
    epoch = f", epoch {about['epoch']}" if about.get("epoch") is not None else ""
    which = "" if cfg.checkpoint else "the newest run's "
    print(f"Model: {which}{checkpoint} ({about['network']}{epoch})")
    lfw = load_lfw(test_set, cfg.pairs or Path(cfg.data_dir, "pairs.txt"), cfg.workers)
    print(
        f"Test set: {lfw.path}, {len(lfw.pairs.same):,} pairs of {len(lfw.images):,} faces, "
        f"{lfw.missed} of them missed by the detector and cropped centrally"
    )
    start = time.perf_counter()
    scores = score_pairs(embed, lfw)
    report = summarise(scores, lfw)
    positives, negatives = worst_errors(scores, lfw.pairs.same, report["best_threshold"])
    report |= {
        "false_positives": len(positives),
        "false_negatives": len(negatives),
        "checkpoint": str(checkpoint),
        **about,
        "flip": cfg.flip,
        "test_set": str(lfw.path),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    print(table(report))

    images_dir = Path(cfg.images_dir)
    errors = {"fp": positives[:GALLERY], "fn": negatives[:GALLERY]}
    notice = write_galleries(
        images_dir, lfw.pairs, lfw.images, errors, cfg.lfw_source or lfw.source
    )
    if notice:
        print(notice)
    plot_angles(images_dir / "theta_dist.png", scores, lfw.pairs.same, report)
    plot_roc(images_dir / "roc.png", verification.roc(scores, lfw.pairs.same), report)
    ours = about["kind"] == "ours"
    folder = checkpoint.parent if ours else Path(cfg.runs_dir) / checkpoint.stem
    make_folder(folder)
    with atomic_write(folder / "lfw.json", "w") as file:
        json.dump(report, file, indent=1)
    print(
        f"Wrote {folder / 'lfw.json'} and, into {images_dir}/, theta_dist.png, roc.png, "
        f"{len(errors['fp'])} false positives and {len(errors['fn'])} false negatives."
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "lfw_eval"))
