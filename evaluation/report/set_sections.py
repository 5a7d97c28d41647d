"""The sections of the report about one model on one test set: curves, errors, hard pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from evaluation import drawing, pair_quality, verification
from evaluation.drawing import format_measure
from evaluation.galleries import read_originals
from evaluation.pair_sets import SetResult
from evaluation.report.blocks import (
    Card,
    Gallery,
    Group,
    Plots,
    Section,
    Table,
    Text,
    inline_image,
    percent,
)
from evaluation.report.plots import HEIGHT, svg_plot
from evaluation.significance import correct_predictions
from evaluation.verification import to_degrees
from fileio.images import ImageError, decode_image

CONFUSIONS = 12  # pairs of identities at most


class SetSections:
    """The sections about one model on one test set.

    gallery is the number of pairs in each gallery; anchor begins the ids of all sections.
    """

    def __init__(self, result: SetResult, anchor: str, gallery: int, source: str):
        self.test_set, self.scores, self.metrics, self.embeddings = result
        self.anchor, self.gallery, self.pairs = anchor, gallery, result.test_set.pairs
        false_positives, false_negatives = verification.worst_errors(
            self.scores, self.pairs.same, self.metrics["best_threshold"]
        )
        self.errors = {"fp": false_positives, "fn": false_negatives}
        self.shown = {kind: indices[:gallery] for kind, indices in self.errors.items()}
        statuses = self.test_set.faces_status or []
        self.missed = [face for face, status in enumerate(statuses) if status == "central_crop"]
        self.identities = self.test_set.identity
        self.confusions = []
        if self.identities is not None:
            self.confusions = pair_quality.nearest_identities(
                self.embeddings, self.identities, min(CONFUSIONS, gallery)
            )
        # Reading an archive takes seconds, so the originals of all galleries are read in one pass.
        shown_pairs = np.concatenate([*self.shown.values()])
        faces = {*self.pairs.first[shown_pairs].tolist(), *self.pairs.second[shown_pairs].tolist()}
        faces |= {face for confusion in self.confusions for face in confusion.faces}
        faces |= {*self.missed[:gallery]}
        self.originals, self.notice = self._read_originals(faces, source or self.test_set.source)
        self.face_images: dict[int, list[Markup]] = {}  # a face may be in several galleries

    def _read_originals(self, faces: set[int], source: str) -> tuple[dict[str, np.ndarray], str]:
        """The original images of faces by name, as pixels, and a notice if some are missing."""
        names = {self.pairs.names[face] for face in faces}
        files, notice = read_originals(source, names) if names else ({}, "")
        originals = {}
        for image_name, data in files.items():
            try:
                originals[image_name] = decode_image(data)
            except ImageError:
                notice = notice or f"Some originals in {source} cannot be read."
        return originals, notice

    def sections(self) -> Iterator[Section]:
        """Each section, in the order of the page; empty ones are left out."""
        for anchor, title, content in (
            ("curves", "Curves", self._curves()),
            ("folds", "Folds", self._folds()),
            ("points", "Operating points and calibration", self._operating_points()),
            ("fp", "False positives: impostor pairs accepted", self._gallery("fp")),
            ("fn", "False negatives: genuine pairs rejected", self._gallery("fn")),
            ("missed", "Faces that the detector missed", self._missed_faces()),
            ("confusions", "Nearest confusions: the most similar identities", self._confusions()),
            ("quality", "Accuracy by image quality and pose", self._quality()),
            ("robustness", "Robustness to corruptions", self._robustness()),
        ):
            blocks = list(content)
            if blocks:
                yield Section(f"{self.anchor}-{anchor}", title, blocks)

    def _table(self, caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
        return Table(caption, head, rows, region=self.test_set.name)

    # -------------------------------------------------------------------------- scores

    def _curves(self) -> Iterator[Any]:
        scores, same, metrics = self.scores, self.pairs.same, self.metrics
        curve = verification.roc(scores, same)
        roc = f"ROC curve: AUC {metrics['auc']:.5f}, equal error rate {metrics['eer']:.3%}"
        det = "DET curve: false reject rate against false accept rate"
        histogram = "Histogram of the {} of genuine and impostor pairs"
        pairs = (drawing.draw_histogram, scores, same, metrics)
        plots = [
            (
                svg_plot(roc, drawing.draw_roc, curve, metrics),
                "ROC: true accept rate against false accept rate",
            ),
            (
                svg_plot(det, drawing.draw_det, curve, metrics),
                "DET: false reject rate against false accept rate, on the scale of a normal "
                "deviate; dotted: equal error rates",
            ),
            (
                svg_plot(histogram.format("scores"), *pairs, False),
                "Scores: cosine of the two embeddings of a pair",
            ),
            (
                svg_plot(histogram.format("angles"), *pairs, True),
                "Angles between the two embeddings of a pair",
            ),
        ]
        yield Plots(plots, "two")

    def _folds(self) -> Iterator[Any]:
        metrics = self.metrics
        mean, error = percent(metrics["accuracy"]), percent(metrics["standard_error"])
        folds = zip(metrics["fold_accuracies"], metrics["fold_thresholds"], strict=True)
        rows = [
            (f"{fold}", percent(accuracy), f"{threshold:.4f}", f"{to_degrees(threshold):.2f}°")
            for fold, (accuracy, threshold) in enumerate(folds, 1)
        ]
        numbers = self._table("Accuracy by fold", ("fold", "accuracy", "threshold", "angle"), rows)
        svg = svg_plot(f"Accuracy by fold, mean {mean}", drawing.draw_folds, metrics, height=2.3)
        caption = f"Dashed: mean, {mean} ± {error} standard error"
        yield Group("beside", [Plots([(svg, caption)]), numbers])

    def _operating_points(self) -> Iterator[Any]:
        points, calibration = self.metrics.get("operating_points"), self.metrics.get("calibration")
        if points:
            head = ("target FAR", "threshold", "angle", "FAR", "FRR")
            rows = [
                (
                    point["wanted"],
                    f"{point['threshold']:.4f}",
                    f"{point['degrees']:.2f}°",
                    percent(point["far"]),
                    percent(point["frr"]),
                )
                for point in points
            ]
            yield self._table("The lowest threshold that keeps to a target FAR", head, rows)
        yield from map(Text, self.metrics.get("operating_points_refused", ()))
        if calibration:
            title = "Reliability: fraction of genuine pairs against predicted probability"
            svg = svg_plot(title, drawing.draw_reliability, calibration["bins"])
            caption = "Reliability diagram: fraction of genuine pairs by predicted probability"
            yield Plots([(svg, caption)])
            slope, intercept = calibration["slope"], calibration["intercept"]
            genuine = percent(calibration["share_matched"], 0)
            yield Text(
                f"P(same identity) = 1 / (1 + exp({-intercept:.3f} - {slope:.3f} × cosine)), by "
                f"Platt scaling, where {genuine} of pairs are genuine. "
                f"Expected calibration error (ECE) {percent(calibration['ece'], 2)}, Brier score "
                f"{calibration['brier']:.5f}, both on held-out folds."
            )

    # -------------------------------------------------------------------------- galleries

    def _card(self, faces: Sequence[int], **caption: Any) -> Card:
        """The faces, each with its original first if there is one, and its name."""
        shown = []
        for face in faces:
            label = self.pairs.names[face]
            if face not in self.face_images:
                aligned = inline_image(self.test_set.images[face].numpy(), f"{label}, aligned")
                original = self.originals.get(label)
                self.face_images[face] = [aligned]
                if original is not None:
                    image = inline_image(original, f"{label}, original image")
                    self.face_images[face].insert(0, image)
            shown.append((self.face_images[face], _without_repeated_folder(label)))
        return Card(shown, **caption)

    def _gallery(self, kind: str) -> Iterator[Any]:
        """The false positives ("fp") or false negatives ("fn"), worst first."""
        shown, total = self.shown[kind], len(self.errors[kind])
        threshold = self.metrics["best_threshold"]
        if not total:
            yield Text("None.")
            return
        extent = "all of them" if total == len(shown) else f"the worst {len(shown)} of {total:,}"
        side = "at or above" if kind == "fp" else "below"
        yield Text(
            f"Worst first, {extent}: scores {side} the best threshold on the test pairs, "
            f"{threshold:.4f} ({to_degrees(threshold):.2f}°). {self.notice}"
        )
        cards = []
        for rank, pair in enumerate(shown, 1):
            score = self.scores[pair]
            caption = f"score {score:.4f}, angle {to_degrees(score):.2f}°; "
            caption += f"threshold {threshold:.4f}"
            faces = (self.pairs.first[pair], self.pairs.second[pair])
            cards.append(self._card(faces, rank=rank, caption=caption))
        yield Gallery(cards)

    def _missed_faces(self) -> Iterator[Any]:
        if self.test_set.faces_status is None:
            yield Text("The set comes aligned; missed faces are not known.")
        elif not self.missed:
            yield Text("None: every face was detected.")
        else:
            shown = self.missed[: self.gallery]
            yield Text(
                f"{len(self.missed):,} of {len(self.test_set.images):,} faces, cropped from the "
                f"centre of their images; {len(shown)} are shown."
            )
            yield Gallery([self._card([face]) for face in shown])

    def _confusions(self) -> Iterator[Any]:
        if self.identities is None:
            yield Text(
                "The set does not name the identities of its images, only which pairs are genuine."
            )
            return
        yield Text(
            "The identities whose mean embeddings are most similar, whether or not the test pairs "
            "compare them, each with their two most similar images. An entry may be an error of "
            "the model, a pair of siblings, or one identity under two names."
        )
        cards = []
        for rank, confusion in enumerate(self.confusions, 1):
            caption = f"cosine {confusion.cosine:.4f}, {to_degrees(confusion.cosine):.2f}°"
            names = (confusion.first, confusion.second)
            cards.append(self._card(confusion.faces, rank=rank, caption=caption, names=names))
        yield Gallery(cards)

    # -------------------------------------------------------------------------- hard pairs

    def _quality(self) -> Iterator[Any]:
        qualities = pair_quality.face_qualities(self.test_set.images, self.test_set.points)
        values = pair_quality.worse_values(qualities, self.pairs)
        wrong = ~correct_predictions(
            self.scores, self.pairs.same, self.pairs.folds, self.metrics["fold_thresholds"]
        )
        notice = ""
        if self.test_set.points is None:
            notice = " The set comes aligned: pose and resolution are not known."
        yield Text(
            "Pairs in bins of equal size by the worse of their two faces, each pair at its fold's "
            "threshold; ± is the binomial standard error. Brightness and sharpness are measured on "
            "the aligned face, pose (an estimate) and eye distance on the detector's five "
            f"landmarks in the original image.{notice}"
        )
        plots, tables = [], []
        head = ("pairs", "accuracy", "± s.e.", "false positives", "false negatives")
        for key, pair_values in values.items():
            title, unit, _ = pair_quality.QUALITIES[key]
            rows = pair_quality.accuracy_by_quality(pair_values, wrong, self.pairs.same)
            if not rows:
                continue
            svg = svg_plot(f"Accuracy by {title}", drawing.draw_quality, rows, unit, height=2.3)
            plots.append((svg, title))
            cells = [
                (
                    f"{format_measure(row['low'])} – {format_measure(row['high'])}",
                    f"{row['pairs']:,}",
                    percent(row["accuracy"], 2),
                    percent(row["standard_error"], 2),
                    row["false_positives"],
                    row["false_negatives"],
                )
                for row in rows
            ]
            tables.append(self._table(f"{title} ({unit})", (unit, *head), cells))
        yield Plots(plots)
        yield Group("details", tables, "The same as tables")

    def _robustness(self) -> Iterator[Any]:
        results = self.metrics.get("robustness")
        if not results:
            return
        yield Text(
            "The second image of every pair is corrupted, the first is not. “Clean threshold” "
            "keeps the thresholds fitted to clean pairs, as a deployed system would."
        )
        height = max(HEIGHT, 0.27 * len(results) + 1.2)
        title, draw = "Accuracy under each corruption", drawing.draw_robustness
        plot = Plots([(svg_plot(title, draw, results, height=height), "Accuracy by corruption")])
        head = ("second image", "accuracy", "± s.e.", "clean threshold")
        head += tuple(f"TAR at FAR {far}" for far in results["clean"]["tar_at_far"])
        head += ("EER", "genuine cosine")
        rows = [
            (
                corruption,
                percent(row["accuracy"]),
                percent(row["standard_error"]),
                percent(row["accuracy_as_set"]),
                *map(percent, row["tar_at_far"].values()),
                percent(row["eer"]),
                f"{row['matched_cosine']:.3f}",
            )
            for corruption, row in results.items()
        ]
        caption = "Accuracy under corruptions; genuine cosine: mean over the genuine pairs"
        yield Group("beside", [plot, self._table(caption, head, rows)])


def _without_repeated_folder(image_name: str) -> str:
    """LFW's "Ann_Lee/Ann_Lee_0001" is "Ann_Lee_0001"; other names stay as they are."""
    folder, _, file = image_name.rpartition("/")
    return file if folder and file.startswith(folder) else image_name
