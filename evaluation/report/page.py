"""The evaluation as one page: numbers, curves, and the faces that a model gets wrong.

    write_page("runs/<run>/report.html", results, about, read_training(checkpoint))

The page needs no network and no other file: images and plots are in it, and it runs no script.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config, settings_of
from evaluation.pair_sets import SetResult
from evaluation.report import plots
from evaluation.report.markup import name, page, paragraph, section, table, text
from evaluation.report.markup import plots as side_by_side
from evaluation.report.set_sections import SetPages, rate
from fileio.safe_files import atomic_write, make_folder

GALLERY = 20  # pairs of each kind in the page, fewer where there are many sets
_OF_ALL_SETS = 60  # so that the page stays below 8 MB


def write_page(
    path: Path | str,
    results: Sequence[SetResult],
    about: dict[str, Any],
    training: dict[str, Any],
    *,
    compared: Sequence[dict[str, Any]] = (),
    source: str = "",
) -> None:
    """Write the page about one model on one or more sets.

    about is provenance's, training read_training's, compared what lfw.json says of other models;
    source names the original images where the sets' own is not to be had.
    """
    gallery = max(4, min(GALLERY, _OF_ALL_SETS // len(results)))
    parts = []
    contents = [("summary", "Summary")]
    for number, result in enumerate(results):
        anchor = f"set{number}"
        contents.append((anchor, result.test_set.name))
        pages = SetPages(result, anchor, gallery, source)
        parts.append(section(2, anchor, f"Test set: {result.test_set.name}", *pages.sections()))
    contents += [("training", "Training"), ("provenance", "Versions and checksums")]
    parts.insert(0, section(2, "summary", "Summary", *_summary(results, compared)))
    parts.append(section(2, "training", "Training", *_training(training)))
    versions = table("Where these numbers come from", ("what", "value"), about.items(), words=2)
    parts.append(section(2, "provenance", "Versions and checksums", versions))
    model = name(about.get("checkpoint", "model"))
    header = f'<p class="soft">How well {model} tells whether two images show one person.</p>'
    whole = page("Face verification report", header, contents, "".join(parts))
    make_folder(Path(path).parent)
    with atomic_write(path, "w") as file:
        file.write(whole)


# ------------------------------------------------------------------------------ all sets


def _summary(results: Sequence[SetResult], compared: Sequence[dict[str, Any]]) -> Iterator[str]:
    cards = "".join(
        f"<li><span>{text(title)}</span><strong>{value}</strong><span>{text(note)}</span></li>"
        for title, value, note in _cards(results)
    )
    yield f'<ul class="cards">{cards}</ul>'
    fars = list(results[0].metrics["tar_at_far"])
    head = ["set", "pairs", "faces", "missed", "accuracy", "± s.e.", "best threshold"]
    head += [*(f"TAR at FAR {far}" for far in fars), "EER", "AUC"]
    yield table("Every set at a glance", head, [_headline(result, fars) for result in results])
    yield paragraph(
        "Accuracy is the mean over folds, each judged at the threshold that is best on the others. "
        "“Best threshold” is the accuracy at the single threshold that fits all pairs best; it has "
        "seen the pairs that it is scored on. A missed face is one that the detector did not find; "
        "it is cropped from the middle of its image and counts."
    )
    yield from _intervals(results)
    yield from _comparisons(results, compared)


def _intervals(results: Sequence[SetResult]) -> Iterator[str]:
    known = [result for result in results if "intervals" in result.metrics]
    if not known:
        return
    rows = []
    for test_set, _, report, _ in known:
        found = report["intervals"]
        tars = [found["tar_at_far"].get(far) for far in known[0].metrics["tar_at_far"]]
        rows.append([test_set.name, *map(_within, [found["accuracy"], *tars, found["eer"]])])
    fars = [f"TAR at FAR {far}" for far in known[0].metrics["tar_at_far"]]
    caption = f"95 % intervals: {known[0].metrics['resamples']:,} resamples of the people"
    yield table(caption, ["set", "accuracy", *fars, "EER"], rows)


def _within(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{rate(interval[0], 2)} to {rate(interval[1], 2)}"


def _comparisons(results: Sequence[SetResult], compared: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [
        (
            f"{other['checkpoint']}, {result.test_set.name}",
            rate(result.metrics["accuracy"]),
            rate(theirs["accuracy"]),
            theirs["comparison"]["verdict"],
        )
        for other in compared
        for result in results
        if (theirs := other["sets"].get(result.test_set.name)) is not None
    ]
    if rows:
        head = ("other model, set", "this model", "the other", "this one is the first")
        yield table("Beside other models", head, rows, words=4)


def _cards(results: Sequence[SetResult]) -> Iterator[tuple[str, str, str]]:
    """(title, value, note) of what to see first: the accuracies, or more of the only set."""
    for test_set, _, report, _ in results:
        note = f"± {rate(report['standard_error'], 2)} standard error"
        if "intervals" in report:
            note += f", 95 %: {_within(report['intervals']['accuracy'])}"
        title = f"{test_set.name}, accuracy over {len(report['fold_accuracies'])} folds"
        yield title, rate(report["accuracy"], 2), note
    if len(results) == 1:
        for far, tar in report["tar_at_far"].items():
            yield f"TAR at FAR {far}", rate(tar, 2), "true accepts at that rate of false ones"
        yield "Equal error rate", rate(report["eer"], 2), "false accepts = false rejects"


def _headline(result: SetResult, fars: Sequence[str]) -> list[str]:
    report = result.metrics
    tars = [report["tar_at_far"].get(far) for far in fars]
    return [
        result.test_set.name,
        f"{report['pairs']:,}",
        f"{len(result.test_set.images):,}",
        f"{result.test_set.missed:,}",
        rate(report["accuracy"]),
        rate(report["standard_error"]),
        rate(report["best_accuracy"]),
        *("not supported" if tar is None else rate(tar) for tar in tars),
        rate(report["eer"]),
        f"{report['auc']:.6f}",
    ]


# ------------------------------------------------------------------------------ training


def read_training(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of train.py says of its run: config, history, steps, best.

    The weights stay on the disk. The file must have been loaded before, by load_checkpoint.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return {key: loaded[key] for key in ("config", "history", "steps", "best") if key in loaded}


def _training(training: dict[str, Any]) -> Iterator[str]:
    config, history = training.get("config"), training.get("history")
    if not isinstance(config, dict):
        yield paragraph("The model does not come from train.py: its training is not known.")
        return
    curves = list(_curves(history, training.get("steps")))
    if curves:
        yield side_by_side(curves)
    else:
        yield paragraph("The checkpoint holds no training curves.")
    of_others = {field.name for field in fields(Config)} - set(settings_of("train"))
    rows = [(setting, value) for setting, value in config.items() if setting not in of_others]
    settings = table("Configuration of the run", ("setting", "value"), rows, words=2)
    yield f"<details><summary>Configuration of the run</summary>{settings}</details>"


def _curves(history: Any, steps: Any) -> Iterator[tuple[str, str]]:
    """Training curves, as far as a history of train.py is there: it is a stranger's file, too."""
    try:
        train = np.array([point[:4] for point in history["train"]], float).reshape(-1, 4)
        valid, lfw = (np.array(history[key], float).reshape(-1, 3) for key in ("valid", "lfw"))
        epochs = train[:, 0] + train[:, 1] / float(steps)
    except (KeyError, TypeError, ValueError):
        return
    for column, label in ((2, "loss"), (3, "accuracy")):
        if len(train):
            lines = [("training", epochs, train[:, column])]
            if len(valid):
                lines.append(("held-out images", valid[:, 0], valid[:, column - 1]))
            yield plots.curves_figure(lines, label, column == 3), f"{label.title()} over epochs"
    if len(lfw):
        line = [("LFW, mean over folds", lfw[:, 0], lfw[:, 1])]
        yield plots.curves_figure(line, "accuracy", True), "Accuracy on the test set after epochs"


# ------------------------------------------------------------------------------ provenance


def provenance(model: dict[str, Any], results: Sequence[SetResult]) -> dict[str, Any]:
    """What the numbers depend on, by label: files with their SHA-256, seed, convention, versions.

    model is what lfw.json says of it: checkpoint, versions, network, epoch, seed.
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
            with path.open("rb") as file:
                about[f"{label}, SHA-256"] = hashlib.file_digest(file, "sha256").hexdigest()
    for label in ("network", "epoch", "seed"):
        if model.get(label) is not None:
            about[label] = model[label]
    about["convention"] = results[0].metrics["protocol_in_words"]
    return about | model["versions"] | {"written": time.strftime("%Y-%m-%d %H:%M")}
