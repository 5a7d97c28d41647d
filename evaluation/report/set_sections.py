"""The report's sections about one model on one test set: curves, wrong pairs, what is hard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from evaluation import pair_quality, verification
from evaluation.galleries import read_originals
from evaluation.pair_sets import SetResult
from evaluation.report import plots
from evaluation.report.markup import image, name, paragraph, section, table, text
from evaluation.report.markup import plots as side_by_side
from evaluation.significance import correct_predictions
from evaluation.verification import to_degrees
from fileio.images import ImageError, decode_image

CONFUSIONS = 12


def rate(value: float, digits: int = 3) -> str:
    """A fraction in percent, with so many digits after the point."""
    return f"{100 * value:.{digits}f} %"


class SetPages:
    """The sections about one model on one set."""

    def __init__(self, result: SetResult, anchor: str, gallery: int, source: str):
        self.test_set, self.scores, self.report, self.embeddings = result
        self.anchor, self.pairs = anchor, result.test_set.pairs
        threshold = self.report["best_threshold"]
        found = verification.worst_errors(self.scores, self.pairs.same, threshold)
        self.errors = dict(zip(("fp", "fn"), found, strict=True))
        self.shown = {kind: pairs[:gallery] for kind, pairs in self.errors.items()}
        status = self.test_set.faces_status or []
        self.missed = [face for face, what in enumerate(status) if what == "central_crop"]
        self.people = self.test_set.identity
        self.confusions = []
        if self.people is not None:
            self.confusions = pair_quality.nearest_identities(
                self.embeddings, self.people, min(CONFUSIONS, gallery)
            )
        pairs = np.concatenate([*self.shown.values()])
        faces = {*self.pairs.first[pairs].tolist(), *self.pairs.second[pairs].tolist()}
        faces |= {face for confusion in self.confusions for face in confusion.faces}
        faces |= {*self.missed[:gallery]}
        self.gallery = gallery
        self.originals, self.notice = self._read(faces, source or self.test_set.source)
        self.cache: dict[int, str] = {}

    def _read(self, faces: set[int], source: str) -> tuple[dict[str, np.ndarray], str]:
        """The original images of some faces by name, as pixels."""
        names = {self.pairs.names[face] for face in faces}
        files, notice = read_originals(source, names) if names else ({}, "")
        found = {}
        for image_name, data in files.items():
            try:
                found[image_name] = decode_image(data)
            except ImageError:
                notice = notice or f"Some originals in {source} cannot be read."
        return found, notice

    def sections(self) -> Iterator[str]:
        """The markup of each section, in the order of the page."""
        for anchor, title, make in (
            ("curves", "Curves", self._curves),
            ("folds", "Folds", self._folds),
            ("points", "Thresholds to choose from", self._points),
            ("fp", "False positives: two people taken for one", lambda: self._wrong("fp")),
            ("fn", "False negatives: one person taken for two", lambda: self._wrong("fn")),
            ("missed", "Faces that the detector missed", self._missed_faces),
            ("confusions", "Nearest confusions: identities that are close", self._nearest),
            ("quality", "What makes pairs hard", self._quality),
            ("robustness", "Robustness", self._robustness),
        ):
            content = list(make())
            if content:
                yield section(3, f"{self.anchor}-{anchor}", title, *content)

    def _table(self, caption: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
        return table(caption, head, rows, of=self.test_set.name)

    def _curves(self) -> Iterator[str]:
        curve, same = verification.roc(self.scores, self.pairs.same), self.pairs.same
        yield side_by_side(
            [
                (
                    plots.roc_figure(curve, self.report),
                    "ROC: true accept rate over false accept rate",
                ),
                (
                    plots.det_figure(curve, self.report),
                    "DET: both kinds of error, on a normal deviate's scale; dotted: equal",
                ),
                (
                    plots.histogram_figure(self.scores, same, self.report, angles=False),
                    "Scores: cosine of the two embeddings of a pair",
                ),
                (
                    plots.histogram_figure(self.scores, same, self.report, angles=True),
                    "Angles between the two embeddings",
                ),
            ],
            "two",
        )

    def _folds(self) -> Iterator[str]:
        report = self.report
        caption = (
            f"Dashed: the mean, {rate(report['accuracy'])} ± {rate(report['standard_error'])} "
            "standard error"
        )
        rows = [
            (f"{fold}", rate(accuracy), f"{threshold:.4f}", f"{to_degrees(threshold):.2f}°")
            for fold, (accuracy, threshold) in enumerate(
                zip(report["fold_accuracies"], report["fold_thresholds"], strict=True), 1
            )
        ]
        numbers = self._table("Accuracy by fold", ("fold", "accuracy", "threshold", "angle"), rows)
        figure = side_by_side([(plots.folds_figure(report), caption)])
        yield f'<div class="beside">{figure}{numbers}</div>'

    def _points(self) -> Iterator[str]:
        points, calibration = self.report.get("operating_points"), self.report.get("calibration")
        if points:
            head = ("false accepts asked for", "threshold", "angle", "FAR", "FRR")
            rows = [
                (
                    row["wanted"],
                    f"{row['threshold']:.4f}",
                    f"{row['degrees']:.2f}°",
                    rate(row["far"]),
                    rate(row["frr"]),
                )
                for row in points
            ]
            yield self._table(
                "The lowest threshold that keeps to a rate of false accepts", head, rows
            )
        yield from map(paragraph, self.report.get("operating_points_refused", ()))
        if calibration:
            slope, intercept = calibration["slope"], calibration["intercept"]
            yield side_by_side(
                [
                    (
                        plots.reliability_figure(calibration["bins"]),
                        "Reliability: how often pairs of a probability do match",
                    )
                ]
            )
            yield paragraph(
                f"P(same person) = 1 / (1 + exp({-intercept:.3f} - {slope:.3f} × cosine)) where "
                f"{calibration['share_matched']:.0%} of pairs match. Expected calibration error "
                f"{rate(calibration['ece'], 2)}, Brier score {calibration['brier']:.5f}, both on "
                "folds not seen."
            )

    # -------------------------------------------------------------------------- faces

    def _face(self, face: int) -> str:
        """A face's images, the original first where there is one, and its name."""
        if face not in self.cache:
            label = self.pairs.names[face]
            aligned = image(self.test_set.images[face].numpy(), f"{label}, aligned")
            original = self.originals.get(label)
            first = "" if original is None else image(original, f"{label}, original image")
            self.cache[face] = (
                f'<div class="side">{first}{aligned}<p>{name(_short(label))}</p></div>'
            )
        return self.cache[face]

    def _card(self, faces: Sequence[int], caption: str) -> str:
        sides = "".join(map(self._face, faces))
        figcaption = f"<figcaption>{caption}</figcaption>" if caption else ""
        lone = "" if len(faces) == 2 else ' style="grid-template-columns: 1fr"'
        return f'<li><figure><div class="sides"{lone}>{sides}</div>{figcaption}</figure></li>'

    def _wrong(self, kind: str) -> Iterator[str]:
        shown, total = self.shown[kind], len(self.errors[kind])
        threshold = self.report["best_threshold"]
        if not total:
            yield paragraph("None.")
            return
        which = "all of them" if total == len(shown) else f"the worst {len(shown)} of {total:,}"
        side = "at or above" if kind == "fp" else "below"
        yield paragraph(
            f"Worst first, {which}: scores {side} the best single threshold, {threshold:.4f} "
            f"({to_degrees(threshold):.2f}°). {self.notice}"
        )
        cards = [
            self._card(
                (self.pairs.first[pair], self.pairs.second[pair]),
                f"<strong>{rank}.</strong> score {self.scores[pair]:.4f}, angle "
                f"{to_degrees(self.scores[pair]):.2f}°; threshold {threshold:.4f}",
            )
            for rank, pair in enumerate(shown, 1)
        ]
        yield f'<ul class="pairs">{"".join(cards)}</ul>'

    def _missed_faces(self) -> Iterator[str]:
        if self.test_set.faces_status is None:
            yield paragraph("The set comes aligned; what a detector missed is not known.")
        elif not self.missed:
            yield paragraph("None: every face was found.")
        else:
            shown = self.missed[: self.gallery]
            yield paragraph(
                f"{len(self.missed):,} of {len(self.test_set.images):,} faces, cropped from the "
                f"middle of their images; {len(shown)} of them here."
            )
            cards = "".join(self._card([face], "") for face in shown)
            yield f'<ul class="pairs lone">{cards}</ul>'

    def _nearest(self) -> Iterator[str]:
        if self.people is None:
            yield paragraph("The set does not say who is in its images, only which pairs match.")
            return
        yield paragraph(
            "The mean embeddings of these identities are the closest of all, whether a pair of the "
            "protocol compares them or not. Shown are their two most similar images. What stands "
            "here can be a mistake of the model, siblings, or one person under two names."
        )
        cards = [
            self._card(
                found.faces,
                f"<strong>{rank}.</strong> cosine {found.cosine:.4f}, "
                f"{to_degrees(found.cosine):.2f}°: {name(found.first)} and {name(found.second)}",
            )
            for rank, found in enumerate(self.confusions, 1)
        ]
        yield f'<ul class="pairs">{"".join(cards)}</ul>'

    # -------------------------------------------------------------------------- measures

    def _quality(self) -> Iterator[str]:
        faces = pair_quality.face_qualities(self.test_set.images, self.test_set.points)
        values = pair_quality.worse_values(faces, self.pairs)
        wrong = ~correct_predictions(
            self.scores, self.pairs.same, self.pairs.folds, self.report["fold_thresholds"]
        )
        missing = ""
        if self.test_set.points is None:
            missing = " The set comes aligned: pose and resolution are not known."
        yield paragraph(
            "Pairs in bins of equal size by the worse of their two faces, each judged at its "
            "fold's threshold; ± is the binomial standard error. Light and sharpness are measured "
            "on the aligned face, pose (an estimate) and eye distance on the detector's five "
            f"points in the original image.{missing}"
        )
        figures, tables = [], []
        head = ("", "pairs", "accuracy", "± s.e.", "false positives", "false negatives")
        for key, series in values.items():
            title, unit, _ = pair_quality.QUALITIES[key]
            rows = pair_quality.accuracy_by_quality(series, wrong, self.pairs.same)
            if not rows:
                continue
            figures.append((plots.bins_figure(rows, unit, title), text(title)))
            cells = [
                (
                    f"{plots.shown(row['low'])} – {plots.shown(row['high'])}",
                    f"{row['pairs']:,}",
                    rate(row["accuracy"], 2),
                    rate(row["standard_error"], 2),
                    row["false_positives"],
                    row["false_negatives"],
                )
                for row in rows
            ]
            tables.append(self._table(f"{title} ({unit})", (unit, *head[1:]), cells))
        yield side_by_side(figures)
        yield f"<details><summary>The same as tables</summary>{''.join(tables)}</details>"

    def _robustness(self) -> Iterator[str]:
        found = self.report.get("robustness")
        if not found:
            return
        yield paragraph(
            "The second image of every pair made worse, the first left as it is. “Threshold as "
            "set” keeps the thresholds of the clean pairs, as a system in use would."
        )
        figure = side_by_side([(plots.robustness_figure(found), "Accuracy by corruption")])
        head = ("second image", "accuracy", "± s.e.", "threshold as set")
        head += (*(f"TAR at FAR {far}" for far in found["clean"]["tar_at_far"]), "EER", "cosine")
        rows = [
            (
                what,
                *(rate(row[key]) for key in ("accuracy", "standard_error", "accuracy_as_set")),
                *map(rate, row["tar_at_far"].values()),
                rate(row["eer"]),
                f"{row['matched_cosine']:.3f}",
            )
            for what, row in found.items()
        ]
        numbers = self._table(
            "Accuracy under corruptions; cosine: mean of matched pairs", head, rows
        )
        yield f'<div class="beside">{figure}{numbers}</div>'


def _short(image_name: str) -> str:
    """LFW's "Name/Name_0001" without the folder, which says the same; others as they are."""
    folder, _, file = image_name.rpartition("/")
    return file if folder and file.startswith(folder) else image_name
