"""How good is a model on LFW: accuracy, ROC, and the pairs it gets wrong.

    python lfw_eval.py                                      # the newest run's best.pt
    python lfw_eval.py --checkpoint runs/<run>/last.pt
    python lfw_eval.py --checkpoint backbone.pth --network r50     # InsightFace's iresnet
    python lfw_eval.py --checkpoint model.onnx --input-mean 0.485 0.456 0.406 \\
        --input-std 0.229 0.224 0.225                       # any ONNX model of 112x112 faces
    python lfw_eval.py --lfw data/faces_webface_112x112/cfp_fp.bin
    python lfw_eval.py --sets lfw,cfp_fp,agedb_30           # one table, runs/<run>/eval.json
    python lfw_eval.py --as insightface                     # by the convention of others
    python lfw_eval.py --against runs/<other>/best.pt       # is the difference more than chance?

It prints a table: ten-fold accuracy with its standard error, the single best threshold, TAR at FAR,
AUC and EER, 95 % intervals, thresholds to choose from, and last.pt beside best.pt. The same goes to
runs/<run>/lfw.json (runs/<file's name>/lfw.json for models of others). Embeddings are kept in
runs/<run>/embeddings/. Into images/ go theta_dist.png, roc.png and up to ten false positives and
false negatives, worst first: {i}_fp_0.jpg beside {i}_fp_1.jpg, {i}_fn_0.jpg beside {i}_fn_1.jpg.
All of it, with more of the pairs and what makes them hard, is on one page, runs/<run>/report.html;
--robustness adds the same pairs under corruptions.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sklearn
import torch

from config import Config, parse_args
from evaluation import robustness, verification
from evaluation.evaluate import (
    Model,
    compare_results,
    evaluate_set,
    measure_robustness,
    open_model,
    set_statistics,
)
from evaluation.figures import (
    plot_angles,
    plot_corruptions,
    plot_robustness,
    plot_roc,
)
from evaluation.galleries import write_galleries
from evaluation.pair_sets import SetResult, find_pairs, find_set, load_set
from evaluation.protocols import PROTOCOLS, Protocol
from evaluation.report.page import provenance, read_training, write_page
from evaluation.tables import comparison_table, set_table, summary_table
from evaluation.verification import worst_errors
from fileio.safe_files import atomic_write, make_folder
from utils import UserError, exit_on_user_error, keep_freed_memory, newest_run

GALLERY = 10  # false positives, and false negatives, that are shown


# ------------------------------------------------------------------------------ the script


def choose_protocol(cfg: Config) -> Protocol:
    """The convention that the flags ask for; UserError where --as and others disagree."""
    own = cfg.flip, cfg.fuse, cfg.subtract_mean, cfg.metric, cfg.threshold
    flags = ("flip", "fuse", "subtract_mean", "metric", "threshold")
    if not cfg.as_:
        return Protocol(*own)
    clash = [flag.replace("_", "-") for flag in flags if flag in cfg.given]
    if clash:
        raise UserError(f"--as {cfg.as_} fixes --{clash[0]}; leave one of the two away.")
    return PROTOCOLS[cfg.as_]


def choose_sets(cfg: Config) -> list[Path]:
    """The sets that the flags ask for, or LFW where it is; raises UserError where one is not."""
    if cfg.sets and cfg.lfw:
        raise UserError("--lfw names one test set and --sets several; leave one of the two away.")
    if cfg.lfw and not Path(cfg.lfw).exists():
        raise UserError(f"There is no test set at {cfg.lfw}; correct --lfw.")
    names = [name for name in cfg.sets.split(",") if name] or [cfg.lfw or "lfw"]
    found = [
        Path(name) if name == cfg.lfw else find_set(name, cfg.data_dir, cfg.train_set)
        for name in names
    ]
    if None in found:
        name = names[found.index(None)]
        looked = f"{Path(cfg.data_dir, f'faces_{name}_112x112')} and no {name}.bin"
        if name == "lfw":
            raise UserError(
                f"There is no prepared LFW at {looked} beside the training set; get LFW and "
                "prepare it (python pre_process.py --download-lfw), or try everything on drawn "
                "faces (make demo)."
            )
        raise UserError(
            f"There is no prepared set at {looked} in {cfg.data_dir} or beside the training set, "
            "nor a file or folder of that name; correct --sets."
        )
    if not (cfg.lfw or cfg.sets) and found[0].suffix == ".bin":
        print(f"LFW's images are not prepared; using {found[0]} instead.")
    return found


def evaluate_sets(
    cfg: Config, model: Model, paths: Sequence[Path], protocol: Protocol
) -> list[SetResult]:
    """Every set in turn, with its table printed as soon as it is done."""
    results: list[SetResult] = []
    for path in paths:
        test_set = load_set(path, find_pairs(path, cfg.data_dir, cfg.pairs), cfg.workers)
        if test_set.name in [result.test_set.name for result in results]:
            test_set = dataclasses.replace(test_set, name=str(path).replace("/", "_"))
        print(
            f"Test set: {test_set.path}, {len(test_set.pairs.same):,} pairs of "
            f"{len(test_set.images):,} faces, {test_set.missed} of them missed by the detector and "
            "cropped centrally"
        )
        results.append(evaluate_set(model, test_set, protocol))
        results[-1].metrics.update(set_statistics(results[-1], cfg.seed))
        print(set_table(results[-1].metrics))
        if cfg.robustness:
            found = measure_robustness(model, results[-1], protocol)
            results[-1].metrics["robustness"] = found
            print(robustness.robustness_table(found))
    return results


def other_models(cfg: Config, model: Model) -> list[Model]:
    """The other end of the run (last.pt beside best.pt), and what --against names."""
    found = []
    other = {"best.pt": "last.pt", "last.pt": "best.pt"}.get(model.checkpoint.name, "")
    beside = model.checkpoint.parent / other
    if other and model.about["kind"] == "ours" and beside.is_file():
        try:
            found.append(open_model(cfg, beside))
        except UserError as error:
            print(f"Without {other}: {error}")
        if found and found[0].about["epoch"] == model.about["epoch"]:
            print(f"{other} is of the same epoch, {model.about['epoch']}.")
            found = []
    return found + ([open_model(cfg, Path(cfg.against))] if cfg.against else [])


def compare_models(
    cfg: Config, model: Model, other: Model, results: Sequence[SetResult], protocol: Protocol
) -> dict[str, Any]:
    """Another model on the same sets, and whether it differs; prints the table."""
    theirs = [evaluate_set(other, result.test_set, protocol) for result in results]
    compared = [compare_results(*both, cfg.seed) for both in zip(results, theirs, strict=True)]
    names = [describe_model(entry) for entry in (model, other)]
    print(comparison_table(names, results, theirs, compared))
    sets = {
        mine.test_set.name: their.metrics | {"comparison": found}
        for mine, their, found in zip(results, theirs, compared, strict=True)
    }
    return other.about | {"sets": sets}


def describe_model(model: Model) -> str:
    """A model's file with its network and epoch."""
    epoch = model.about.get("epoch")
    of_epoch = "" if epoch is None else f", epoch {epoch}"
    return f"{model.checkpoint} ({model.about['network']}{of_epoch})"


def draw(cfg: Config, result: SetResult) -> str:
    """Write the figures and the galleries of a set into images_dir; returns what was written."""
    images_dir, report = Path(cfg.images_dir), result.metrics
    test_set, same = result.test_set, result.test_set.pairs.same
    wrong = worst_errors(result.scores, same, report["best_threshold"])
    errors = {kind: found[:GALLERY] for kind, found in zip(("fp", "fn"), wrong, strict=True)}
    source = cfg.lfw_source or test_set.source
    notice = write_galleries(images_dir, test_set.pairs, test_set.images, errors, source)
    if notice:
        print(notice)
    plot_angles(images_dir / "theta_dist.png", result.scores, same, report)
    plot_roc(images_dir / "roc.png", verification.roc(result.scores, same), report)
    if cfg.robustness:
        plot_robustness(images_dir / "robustness.png", report["robustness"])
        face = test_set.images[test_set.pairs.second[0]].numpy()
        plot_corruptions(images_dir / "robustness_grid.jpg", robustness.corruption_examples(face))
    names = "theta_dist.png, roc.png" + ", robustness.png, robustness_grid.jpg" * cfg.robustness
    return (
        f"into {images_dir}/, {names}, {len(errors['fp'])} false positives and "
        f"{len(errors['fn'])} false negatives"
    )


def write_report(
    cfg: Config, model: Model, results: Sequence[SetResult], compared: list[dict[str, Any]]
) -> str:
    """lfw.json of one set, or eval.json of those that --sets named, and report.html of either."""
    about = model.about | {
        "compared_with": compared,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    report = results[0].metrics | about
    if cfg.sets:
        report = about | {"sets": {result.test_set.name: result.metrics for result in results}}
    make_folder(model.folder)
    path = model.folder / ("eval.json" if cfg.sets else "lfw.json")
    with atomic_write(path, "w") as file:
        json.dump(report, file, indent=1)
    training = read_training(model.checkpoint) if model.about["kind"] == "ours" else {}
    page = model.folder / "report.html"
    origin = provenance(about, results)
    write_page(page, results, origin, training, compared=compared, source=cfg.lfw_source)
    return f"{path}, {page}"


@exit_on_user_error
def main(cfg: Config) -> None:
    """Evaluate one checkpoint; write the report, the figures and the galleries."""
    keep_freed_memory()
    protocol, paths = choose_protocol(cfg), choose_sets(cfg)
    model = open_model(cfg, Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt")))
    which = "" if cfg.checkpoint else "the newest run's "
    print(f"Model: {which}{describe_model(model)}")
    results = evaluate_sets(cfg, model, paths, protocol)
    if cfg.sets:
        print(summary_table(results))
    drawn = draw(cfg, results[0])
    path = write_report(cfg, model, results, [])  # whatever is wrong with the other models
    others = other_models(cfg, model)
    compared = [compare_models(cfg, model, other, results, protocol) for other in others]
    if compared:
        write_report(cfg, model, results, compared)
    print(f"Wrote {path} and, {drawn}.")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "lfw_eval", doc=__doc__))
