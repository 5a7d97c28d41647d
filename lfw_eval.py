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
worst first: {i}_fp_0.jpg beside {i}_fp_1.jpg, {i}_fn_0.jpg beside {i}_fn_1.jpg. All of it, with
more of the pairs, stands in one page, report.html beside lfw.json. --robustness adds a table of
the same pairs under corruptions and robustness.png.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

import robustness
import verification
from config import Config, parse_args
from embedders import Embed, InputSpec, load_embedder
from eval_sets import SetResult, TestSet, find_lfw, load_set
from figures import plot_angles, plot_robustness, plot_roc, write_galleries
from report import provenance, read_training, write_report
from utils import (
    UserError,
    atomic_write,
    exit_with_sentence,
    get_device,
    keep_freed_memory,
    make_folder,
    newest_run,
)
from verification import worst_errors

GALLERY = 10  # false positives, and false negatives, that are shown


# ------------------------------------------------------------------------------ the numbers


def summarise(scores: np.ndarray, test_set: TestSet) -> dict[str, Any]:
    """All numbers of lfw.json that the scores of the pairs give; see verification.verify."""
    return verification.verify(scores, test_set.pairs.same, test_set.pairs.folds) | {
        "faces": len(test_set.images),
        "missed_faces": test_set.missed,
    }


def evaluate_lfw(embed: Embed, test_set: TestSet) -> SetResult:
    """Embed every face once and report on the pairs: accuracy, threshold, tar_at_far, auc, ...

    For the loop of train.py: load_set once, then call this each epoch with torch_embedder(model).
    """
    embeddings = embed(test_set.images).float().cpu().numpy()
    scores = verification.pair_scores(embeddings, test_set.pairs.first, test_set.pairs.second)
    return SetResult(test_set, scores, summarise(scores, test_set), embeddings)


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
    path = choose_lfw(cfg)
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
    test_set = load_set(path, cfg.pairs or Path(cfg.data_dir, "pairs.txt"), cfg.workers)
    print(
        f"Test set: {test_set.path}, {len(test_set.pairs.same):,} pairs of "
        f"{len(test_set.images):,} faces, {test_set.missed} of them missed by the detector and "
        "cropped centrally"
    )
    start = time.perf_counter()
    result = evaluate_lfw(embed, test_set)
    _, scores, report, embeddings = result
    positives, negatives = worst_errors(scores, test_set.pairs.same, report["best_threshold"])
    report |= {
        "false_positives": len(positives),
        "false_negatives": len(negatives),
        "checkpoint": str(checkpoint),
        **about,
        "flip": cfg.flip,
        "test_set": str(test_set.path),
        "seconds": round(time.perf_counter() - start, 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    print(table(report))

    images_dir = Path(cfg.images_dir)
    if cfg.robustness:
        found = robustness.measure(embed, test_set.images, test_set.pairs, embeddings)
        report["robustness"] = found
        print(robustness.table(found))
        plot_robustness(images_dir / "robustness.png", found)
    errors = {"fp": positives[:GALLERY], "fn": negatives[:GALLERY]}
    notice = write_galleries(
        images_dir, test_set.pairs, test_set.images, errors, cfg.lfw_source or test_set.source
    )
    if notice:
        print(notice)
    plot_angles(images_dir / "theta_dist.png", scores, test_set.pairs.same, report)
    plot_roc(images_dir / "roc.png", verification.roc(scores, test_set.pairs.same), report)
    ours = about["kind"] == "ours"
    folder = checkpoint.parent if ours else Path(cfg.runs_dir) / checkpoint.stem
    make_folder(folder)
    with atomic_write(folder / "lfw.json", "w") as file:
        json.dump(report, file, indent=1)
    write_report(
        folder / "report.html",
        [result],
        provenance(report, checkpoint, [test_set.path]),
        training=read_training(checkpoint) if ours else None,
        source=cfg.lfw_source,
    )
    print(
        f"Wrote {folder / 'lfw.json'}, {folder / 'report.html'} and, into {images_dir}/, "
        f"theta_dist.png, roc.png, {len(errors['fp'])} false positives and "
        f"{len(errors['fn'])} false negatives."
    )


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "lfw_eval"))
