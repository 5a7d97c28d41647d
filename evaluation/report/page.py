"""The report: one HTML page with the metrics, the curves and the faces that a model gets wrong.

    write_page("runs/<run>/report.html", results, about, read_training(checkpoint))

The page needs no network and no other file: images and plots are inside it. It runs no script.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from config import Config, settings_of
from evaluation.drawing import draw_training_curves
from evaluation.embedding_cache import file_checksum
from evaluation.metrics import ComparedModel, EvaluationInfo, GroupMetrics
from evaluation.pair_sets import SetResult
from evaluation.report.blocks import Group, Plots, Section, Table, Text, percent, render_page
from evaluation.report.plots import svg_plot
from evaluation.report.set_sections import SetSections
from fileio.safe_files import atomic_write, make_folder

# Pairs in each gallery. All sets together share a budget, so that the page stays below 8 MB: of 5
# sets, each gallery has 60 / 5 = 12 pairs.
GALLERY_PAIRS = 20
GALLERY_PAIRS_OF_ALL_SETS = 60


def write_page(
    path: Path | str,
    results: Sequence[SetResult],
    about: dict[str, Any],
    training: dict[str, Any],
    *,
    compared: Sequence[ComparedModel] = (),
    groups: GroupMetrics | None = None,
    source: str = "",
) -> None:
    """Write the page about one model on one or more test sets.

    about is from provenance, training from read_training; compared is lfw.json's list of other
    models, groups eval.json's comparison of the sets. source names the original images; without it,
    each set's own source is used.
    """
    gallery = max(4, min(GALLERY_PAIRS, GALLERY_PAIRS_OF_ALL_SETS // len(results)))
    sections = [Section("summary", "Summary", [*_summary(results, compared, groups)])]
    for number, result in enumerate(results):
        anchor, name = f"set{number}", result.test_set.name
        inner = [*SetSections(result, anchor, gallery, source).sections()]
        sections.append(Section(anchor, f"Test set: {name}", [], inner, contents=name))
    sections.append(Section("training", "Training", [*_training(training)]))
    versions = Table("Provenance", ("what", "value"), [*about.items()], text_columns=2)
    sections.append(Section("provenance", "Versions and checksums", [versions]))
    model = str(about.get("checkpoint", "model"))
    page = render_page("Face verification report", model, sections)
    make_folder(Path(path).parent)
    with atomic_write(path, "w") as file:
        file.write(page)


# ------------------------------------------------------------------------------ all sets


def _summary(
    results: Sequence[SetResult], compared: Sequence[ComparedModel], groups: GroupMetrics | None
) -> Iterator[Any]:
    yield Group("cards", [*_cards(results)])
    fars = list(results[0].metrics["tar_at_far"])
    head = ["set", "pairs", "faces", "missed faces", "accuracy", "± s.e."]
    head += ["best threshold (optimistic)", *(f"TAR at FAR {far}" for far in fars), "EER", "AUC"]
    yield Table("All test sets", head, [_metrics_row(result, fars) for result in results])
    yield Text(
        "Accuracy is the mean over folds, each at the threshold that is best on the other folds. "
        "“Best threshold (optimistic)” is the accuracy at the best threshold on the test pairs "
        "themselves. A missed face is one that the detector did not find: it is cropped from the "
        "centre of its image and is part of all numbers."
    )
    if groups is not None:
        ratio = groups["skewed_error_ratio"]
        rows = [
            ("mean accuracy", percent(groups["mean"])),
            ("standard deviation", percent(groups["deviation"])),
            ("skewed error ratio", "not defined" if ratio is None else f"{ratio:.3f}"),
        ]
        yield Table("The test sets as groups", ("metric", "value"), rows)
        yield Text("The skewed error ratio is the highest error over the lowest.")
    yield from _intervals(results)
    yield from _comparisons(results, compared)


def _cards(results: Sequence[SetResult]) -> Iterator[tuple[str, str, str]]:
    """(title, value, note) of what to see first: all accuracies; of a single set, its rates too."""
    for result in results:
        metrics = result.metrics
        note = f"± {percent(metrics['standard_error'], 2)} standard error"
        if "intervals" in metrics:
            note += f", 95 % interval: {_interval(metrics['intervals']['accuracy'])}"
        title = f"{result.test_set.name}, accuracy over {len(metrics['fold_accuracies'])} folds"
        yield title, percent(metrics["accuracy"], 2), note
    if len(results) == 1:
        metrics = results[0].metrics
        for far, tar in metrics["tar_at_far"].items():
            yield f"TAR at FAR {far}", percent(tar, 2), "true accept rate at this false accept rate"
        yield (
            "Equal error rate",
            percent(metrics["eer"], 2),
            "false accept rate = false reject rate",
        )


def _metrics_row(result: SetResult, fars: Sequence[str]) -> list[str]:
    metrics = result.metrics
    tars = [metrics["tar_at_far"].get(far) for far in fars]
    return [
        result.test_set.name,
        f"{metrics['pairs']:,}",
        f"{len(result.test_set.images):,}",
        "not known" if result.test_set.missed is None else f"{result.test_set.missed:,}",
        percent(metrics["accuracy"]),
        percent(metrics["standard_error"]),
        percent(metrics["best_accuracy"]),
        *("not supported" if tar is None else percent(tar) for tar in tars),
        percent(metrics["eer"]),
        f"{metrics['auc']:.6f}",
    ]


def _intervals(results: Sequence[SetResult]) -> Iterator[Any]:
    with_intervals = [result for result in results if "intervals" in result.metrics]
    if not with_intervals:
        return
    first = with_intervals[0].metrics
    fars = list(first["tar_at_far"])
    rows = []
    for result in with_intervals:
        intervals = result.metrics["intervals"]
        tars = [intervals["tar_at_far"].get(far) for far in fars]
        cells = map(_interval, [intervals["accuracy"], *tars, intervals["eer"]])
        rows.append([result.test_set.name, *cells])
    caption = f"95 % intervals: bootstrap over identities, {first['resamples']:,} resamples"
    head = ["set", "accuracy", *(f"TAR at FAR {far}" for far in fars), "EER"]
    yield Table(caption, head, rows)


def _interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "–"
    low, high = interval
    return f"{percent(low, 2)} to {percent(high, 2)}"


def _comparisons(results: Sequence[SetResult], compared: Sequence[ComparedModel]) -> Iterator[Any]:
    rows = []
    for other in compared:
        for result in results:
            other_metrics = other["sets"].get(result.test_set.name)
            if other_metrics is not None:
                rows.append(
                    (
                        f"{other['checkpoint']}, {result.test_set.name}",
                        percent(result.metrics["accuracy"]),
                        percent(other_metrics["accuracy"]),
                        other_metrics["comparison"]["verdict"],
                    )
                )
    if rows:
        head = ("second model, set", "first: this model", "second", "statistically significant?")
        yield Table("Comparison with other models: accuracy", head, rows, text_columns=4)
        yield Text(
            "Both McNemar's exact test and the bootstrap over identities must show a difference "
            "(conservative)."
        )


# ------------------------------------------------------------------------------ training


def read_training(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of train.py says about its run: config, history, steps, best.

    mmap: the weights stay on disk. The file must have passed load_checkpoint before.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return {key: loaded[key] for key in ("config", "history", "steps", "best") if key in loaded}


def _training(training: dict[str, Any]) -> Iterator[Any]:
    config, history = training.get("config"), training.get("history")
    if not isinstance(config, dict):
        yield Text("The model does not come from train.py: its training is not known.")
        return
    curves = list(_training_curves(history, training.get("steps")))
    if curves:
        yield Plots(curves)
    else:
        yield Text("The checkpoint has no training curves.")
    # A checkpoint holds the settings of all scripts; only those of train.py shaped the model.
    other_scripts = {field.name for field in fields(Config)} - set(settings_of("train"))
    rows = [(setting, value) for setting, value in config.items() if setting not in other_scripts]
    caption = "Configuration of the run"
    settings = Table(caption, ("setting", "value"), rows, text_columns=2)
    yield Group("details", [settings], caption)


def _training_curves(history: Any, steps: Any) -> Iterator[tuple[Markup, str]]:
    """(SVG, caption) of the training curves; nothing if the history is not one of train.py.

    The checkpoint is untrusted input: its history may be anything that torch.load allows.
    """
    try:
        train = np.array([point[:4] for point in history["train"]], float).reshape(-1, 4)
        valid, lfw = (np.array(history[key], float).reshape(-1, 3) for key in ("valid", "lfw"))
        epochs = train[:, 0] + train[:, 1] / float(steps)
    except (KeyError, TypeError, ValueError):
        return
    # train has (epoch, step, loss, accuracy), valid has (epoch, loss, accuracy).
    for column, label in ((2, "loss"), (3, "accuracy")):
        if len(train):
            lines = [("training", epochs, train[:, column])]
            if len(valid):
                lines.append(("held-out images", valid[:, 0], valid[:, column - 1]))
            yield _curves(lines, label), f"{label.title()} over epochs"
    if len(lfw):
        line = ("LFW, mean over folds", lfw[:, 0], lfw[:, 1])
        yield _curves([line], "accuracy"), "Accuracy on the test set after each epoch"


def _curves(lines: list[tuple[str, np.ndarray, np.ndarray]], label: str) -> Markup:
    title = f"{label} over epochs"
    return svg_plot(title, draw_training_curves, lines, label, label == "accuracy")


# ------------------------------------------------------------------------------ provenance


def provenance(model: EvaluationInfo, results: Sequence[SetResult]) -> dict[str, Any]:
    """What the numbers depend on, by label: files with their SHA-256, seed, protocol, versions.

    model is what lfw.json says about it: checkpoint, versions, network, epoch, seed.
    """
    files = {"checkpoint": Path(model["checkpoint"])}
    for result in results:
        path = result.test_set.path
        record = path / "train.rec"
        files[f"test set {result.test_set.name}"] = record if record.is_file() else path
    about: dict[str, Any] = {}
    for label, path in files.items():
        about[label] = path
        if path.is_file():  # a folder of images has no checksum of its own
            about[f"{label}, SHA-256"] = file_checksum(path)
    for label in ("network", "epoch", "seed"):
        if model.get(label) is not None:
            about[label] = model[label]
    if model.get("init"):
        about["fine-tuned from"], about["fine-tuned from, SHA-256"] = (
            model["init"],
            model.get("init_sha256", ""),
        )
    about["protocol"] = results[0].metrics["protocol_in_words"]
    return about | model["versions"] | {"written": time.strftime("%Y-%m-%d %H:%M")}
