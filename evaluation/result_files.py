"""The files that lfw_eval.py writes: lfw.json or eval.json, report.html, figures and galleries."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import sklearn
import torch

from evaluation import verification
from evaluation.evaluated_model import EvaluatedModel
from evaluation.figures import (
    plot_angles,
    plot_corruptions,
    plot_robustness,
    roc_figure,
    save_figure,
)
from evaluation.galleries import write_galleries
from evaluation.metrics import (
    ComparedMetrics,
    ComparedModel,
    Comparison,
    EvalJson,
    EvaluationInfo,
    GroupMetrics,
    LfwJson,
)
from evaluation.pair_sets import SetResult
from evaluation.report.page import provenance, read_training, write_page
from evaluation.robustness import corruption_examples
from fileio.safe_files import atomic_write, make_folder

GALLERY_SIZE = 10  # false positives in images_dir, and as many false negatives


def write_metrics(
    model: EvaluatedModel,
    results: Sequence[SetResult],
    compared: list[ComparedModel],
    *,
    several_sets: bool,
    groups: GroupMetrics | None = None,
    source: str = "",
) -> tuple[Path, Path]:
    """Write the metrics and the report into the model's folder; returns the paths of both.

    Metrics go to eval.json by set if several_sets, else those of the only set to lfw.json.
    compared are other models on the same sets, groups what compares the sets. source names
    the original images, for the report.
    """
    info: EvaluationInfo = {
        **model.json_info(),
        "compared_with": compared,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    content: LfwJson | EvalJson
    if several_sets:
        content = {**info, "sets": {result.test_set.name: result.metrics for result in results}}
        if groups is not None:
            content["groups"] = groups
    else:
        content = {**results[0].metrics, **info}
    make_folder(model.folder)
    json_path = model.folder / ("eval.json" if several_sets else "lfw.json")
    with atomic_write(json_path, "w") as file:
        json.dump(content, file, indent=1)
    training = read_training(model.checkpoint) if model.is_ours else {}
    page_path = model.folder / "report.html"
    about = provenance(info, results)
    write_page(page_path, results, about, training, compared=compared, groups=groups, source=source)
    return json_path, page_path


def compared_model(
    other: EvaluatedModel, results: Sequence[SetResult], comparisons: Sequence[Comparison]
) -> ComparedModel:
    """What lfw.json says about another model: its metrics on each set, and how they compare."""
    sets: dict[str, ComparedMetrics] = {
        result.test_set.name: {**result.metrics, "comparison": comparison}
        for result, comparison in zip(results, comparisons, strict=True)
    }
    return {**other.json_info(), "sets": sets}


def write_figures(images_dir: Path, result: SetResult, source: str = "") -> str:
    """Write the figures and the galleries of a result into images_dir; says which, to be printed.

    source names the original images, by default what the set was prepared from. The figures of
    robustness are written if it has been measured.
    """
    metrics, test_set, same = result.metrics, result.test_set, result.test_set.pairs.same
    false_positives, false_negatives = verification.worst_errors(
        result.scores, same, metrics["best_threshold"]
    )
    errors = {"fp": false_positives[:GALLERY_SIZE], "fn": false_negatives[:GALLERY_SIZE]}
    notice = write_galleries(
        images_dir, test_set.pairs, test_set.images, errors, source or test_set.source
    )
    if notice:
        print(notice)
    plot_angles(images_dir / "theta_dist.png", result.scores, same, metrics)
    save_figure(roc_figure(verification.roc(result.scores, same), metrics), images_dir / "roc.png")
    names = ["theta_dist.png", "roc.png"]
    if "robustness" in metrics:
        plot_robustness(images_dir / "robustness.png", metrics["robustness"])
        face = test_set.images[test_set.pairs.second[0]].numpy()
        plot_corruptions(images_dir / "robustness_grid.jpg", corruption_examples(face))
        names += ["robustness.png", "robustness_grid.jpg"]
    return (
        f"{', '.join(names)}, {len(errors['fp'])} false positives and {len(errors['fn'])} false "
        f"negatives in {images_dir}/"
    )
