"""Search a gallery of tools.embed for the faces in photos, or see who is who in it.

    python -m tools.search photos.npz who.jpg                  # the five nearest, or nobody
    python -m tools.search photos.npz a.jpg b.jpg --top 10 --picture sheet.png
    python -m tools.search photos.npz --evaluate               # where folders are people
    python -m tools.search photos.npz --cluster --picture people.png

The photo is embedded by the gallery's own model; if that has changed since, it says so. A photo
whose nearest face is below the threshold is of nobody in the gallery. The more faces a gallery has,
the more alike a wrong one is: the threshold is extrapolated from the model's evaluation to an FPIR
of about 0.01. Where folders are people, --evaluate measures it: it searches each face among the
others and prints rank-1, rank-5, and TPIR with the thresholds at FPIR 0.1 and 0.01. --cluster
prints a line "number <tab> photo" for each face, the largest cluster first. --picture draws the
faces. Exit status: 0, or 1 if a photo is of nobody, 2 an error.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from config import Config, parse_args, setting
from tools.photo_faces import (
    MACHINE_SETTINGS,
    MODEL_SETTINGS,
    embed_crops,
    make_detector,
    open_photo_model,
    read_photo,
)
from utils import UserError, exit_on_user_error

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from evaluation.decisions import Decision
    from evaluation.evaluated_model import EvaluatedModel
    from evaluation.photo_gallery import PhotoGallery

SHEET_ROWS, SHEET_COLUMNS = 20, 10  # faces of --cluster that are drawn


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Search"""

    SHARED: ClassVar[str] = f"seed {MACHINE_SETTINGS}"
    gallery: str = setting("", "a file of tools.embed", positional="1")
    photo: tuple[str, ...] = setting((), "photos to search for", positional="*")
    top: int = setting(5, "nearest faces to show", low=1)
    far: str = setting("", "take the threshold of pairs at this FAR, e.g. 1e-2")
    threshold: float = setting(0.0, "take this cosine; 0: by evaluation and size", low=-1, high=1)
    evaluate: bool = setting(False, "how good a search is, where folders are people")
    cluster: bool = setting(False, "group the faces by person")
    picture: str = setting("", "draw the faces: a .png, .jpg, .pdf or .svg file")
    checkpoint: str = setting("", "the gallery's model; default: where it was")


def open_gallery_model(cfg: Settings, gallery: PhotoGallery) -> tuple[EvaluatedModel, Decision]:
    """The model that made the gallery, and its evaluation; UserError if it is another one now."""
    made = {}
    for name in MODEL_SETTINGS.split():
        value, default = gallery.made.get(name), getattr(Config, name)
        value = tuple(value) if isinstance(value, list) else value
        # The file is untrusted: a value may be anything.
        kinds = [[*map(type, v)] if isinstance(v, tuple) else type(v) for v in (value, default)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{cfg.gallery} is corrupt: it does not say which model made it.")
        made[name] = value
    checkpoint = cfg.checkpoint or made["checkpoint"]
    if not Path(checkpoint).is_file():
        raise UserError(
            f"{cfg.gallery} was made by {checkpoint}, which is not there; name it with "
            "--checkpoint, or make the gallery again (python -m tools.embed)."
        )
    model, decision = open_photo_model(
        dataclasses.replace(cfg, **made | {"checkpoint": checkpoint})
    )
    if model.checksum != gallery.made.get("checksum"):
        raise UserError(
            f"{cfg.gallery} was made by another model than {checkpoint} is now: their embeddings "
            "cannot be compared. Name its own with --checkpoint, or make another gallery "
            "(python -m tools.embed)."
        )
    return model, decision


def read_gallery_crops(gallery: PhotoGallery, rows: list[int]) -> dict[int, np.ndarray]:
    """The aligned faces of some rows, as far as the gallery's source still has their photos."""
    from fileio.archive_source import ArchiveError
    from fileio.archives import open_source
    from fileio.images import ImageError, decode_image
    from preprocessing.pipeline import align_face

    wanted = {gallery.names[row]: row for row in rows}
    crops: dict[int, np.ndarray] = {}
    try:
        with open_source(str(gallery.made.get("source"))) as source:
            source.needs_identities = False
            for entry, data in source.read([e for e in source.entries() if e.name in wanted]):
                row = wanted[entry.name]
                try:
                    image = decode_image(b"" if isinstance(data, ArchiveError) else data)
                except ImageError:
                    continue
                points = gallery.points[row]
                crops[row] = align_face(image, points) if points[0, 0] == points[0, 0] else image
    except ArchiveError as error:
        print(f"The photos of the gallery cannot be drawn. {error}")
    return crops


# ------------------------------------------------------------------------------ photos


def search_photos(cfg: Settings, gallery: PhotoGallery) -> int:
    """Search for each photo and print what is nearest; returns the exit status."""
    import numpy as np

    from evaluation.photo_search import nearest
    from fileio.images import decode_image

    model, decision = open_gallery_model(cfg, gallery)
    threshold, origin = decision.choose_threshold(cfg.far, cfg.threshold, len(gallery))
    detector = make_detector(cfg)
    aligned = gallery.made.get("aligned") is True
    photos = [read_photo(path, detector, aligned) for path in cfg.photo]
    queries = embed_crops(model, [photo.face.jpeg for photo in photos])
    started = time.perf_counter()
    rows, scores = nearest(gallery.embeddings, queries, min(cfg.top, len(gallery)))
    milliseconds = 1000 * (time.perf_counter() - started) / len(photos)
    print(f"Gallery: {len(gallery):,} faces; {milliseconds:.1f} ms per search")
    if threshold is None:
        print(f"Somebody or nobody is not decided without a threshold. {decision.problem}")
    else:
        print(f"Threshold: {threshold:.4f} ({origin})")
    found = [threshold is None or best >= threshold for best in scores[:, 0].tolist()]
    for path, known, photo_rows, photo_scores in zip(cfg.photo, found, rows, scores, strict=True):
        verdict = "" if threshold is None else "found" if known else "nobody in the gallery"
        print(f"{path}: {verdict or 'the nearest'}")
        print(nearest_table(gallery.names[photo_rows], photo_scores, decision))
    if cfg.picture:
        draw_results(
            cfg,
            gallery,
            [decode_image(photo.face.jpeg) for photo in photos],
            rows,
            scores,
            threshold,
        )
    return 0 if np.all(found) else 1


def nearest_table(names: np.ndarray, scores: np.ndarray, decision: Decision) -> str:
    """A line per face: score, angle, probability where it is known, photo."""
    from evaluation.verification import to_degrees

    lines = [f"  {'cosine':>8} {'degrees':>8} {'probability':>12}  photo"]
    for row in zip(scores, decision.format_probabilities(scores), names, strict=True):
        score, probability, name = row
        lines.append(f"  {score:8.4f} {to_degrees(score):8.2f} {probability:>12}  {name}")
    return "\n".join(lines)


def draw_results(
    cfg: Settings,
    gallery: PhotoGallery,
    queries: list[np.ndarray],
    rows: np.ndarray,
    scores: np.ndarray,
    threshold: float | None,
) -> None:
    """A sheet with a row per photo: its face, then the nearest, framed from the threshold on."""
    from evaluation.face_sheets import Cell, plot_sheet

    crops = read_gallery_crops(gallery, rows.ravel().tolist())
    sheet = []
    for path, query, photo_rows, photo_scores in zip(cfg.photo, queries, rows, scores, strict=True):
        cells = [Cell(query, f"{Path(path).name[-23:]}\n")]
        for row, score in zip(photo_rows.tolist(), photo_scores.tolist(), strict=True):
            caption = f"{gallery.names[row][-23:]}\n{score:.4f}"
            stressed = threshold is not None and score >= threshold
            cells.append(Cell(crops.get(row), caption, stressed))
        sheet.append(cells)
    shown = "" if threshold is None else f" (framed: cosine of at least {threshold:.4f})"
    plot_sheet(Path(cfg.picture), sheet, f"Photos, and the nearest in {cfg.gallery}{shown}")
    print(f"Wrote {cfg.picture}.")


# ------------------------------------------------------------------------------ the gallery


def evaluate_gallery(cfg: Settings, gallery: PhotoGallery) -> None:
    """Search each face among the others, and print the rates."""
    from evaluation.photo_search import evaluate_search
    from evaluation.tables import format_interval

    try:
        metrics = evaluate_search(gallery.embeddings, gallery.folders, cfg.seed)
    except ValueError as error:
        raise UserError(
            f"--evaluate needs folders that are people, some with two photos: in {cfg.gallery} "
            f"{error}."
        ) from None
    print(
        f"{metrics.searches:,} faces in {metrics.identities:,} folders, each searched among the "
        f"others; {metrics.mated:,} have another one in their folder"
    )
    rates = {"rank-1": metrics.rank1, "rank-5": metrics.rank5}
    rates |= {f"TPIR at FPIR {fpir}": rate for fpir, rate in metrics.tpir.items()}
    for name, rate in rates.items():
        text = f"{name:<20}{100 * rate.value:7.2f} %  95 % {format_interval(rate.interval)}"
        print(text if rate.threshold is None else f"{text}  threshold {rate.threshold:.4f}")
    print("95 % intervals resample folders; of 0 or 100 %, the exact binomial over folders.")


def cluster_gallery(cfg: Settings, gallery: PhotoGallery) -> None:
    """Group the faces by person, print the groups, draw the largest."""
    import numpy as np

    from evaluation.face_sheets import Cell, plot_sheet
    from evaluation.photo_search import cluster

    threshold, origin = cfg.threshold, "as given by --threshold"
    if not threshold:
        _, decision = open_gallery_model(cfg, gallery)
        threshold, origin = decision.choose_threshold(cfg.far, faces=len(gallery))
        if threshold is None:
            raise UserError(f"--cluster needs a threshold, say --threshold 0.3. {decision.problem}")
    labels = cluster(gallery.embeddings, threshold)
    sizes = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    for row in order.tolist():
        print(f"{labels[row] + 1}\t{gallery.names[row]}")
    title = (
        f"{len(labels):,} faces of {len(sizes):,} people, {np.sum(sizes == 1):,} of them seen once"
    )
    print(f"{title}; mean cosine above {threshold:.4f} ({origin})")
    if cfg.picture:
        groups = [np.flatnonzero(labels == label) for label in range(min(len(sizes), SHEET_ROWS))]
        shown = [group[:SHEET_COLUMNS].tolist() for group in groups]
        crops = read_gallery_crops(gallery, [row for group in shown for row in group])
        sheet = [
            [Cell(crops.get(row), f"{i}: {gallery.names[row][-20:]}") for row in group]
            for i, group in enumerate(shown, 1)
        ]
        plot_sheet(Path(cfg.picture), sheet, f"{title}; the largest {len(sheet)}")
        print(f"Wrote {cfg.picture}.")


@exit_on_user_error
def main(cfg: Settings) -> int:
    """Search, evaluate or cluster; returns the exit status."""
    from evaluation.face_sheets import check_figure_path
    from evaluation.photo_gallery import open_gallery

    if bool(cfg.photo) + cfg.evaluate + cfg.cluster != 1:
        raise UserError("Name photos to search for, or --evaluate, or --cluster: one of the three.")
    if cfg.picture:
        check_figure_path(cfg.picture)
    gallery = open_gallery(Path(cfg.gallery))
    if cfg.evaluate:
        evaluate_gallery(cfg, gallery)
    elif cfg.cluster:
        cluster_gallery(cfg, gallery)
    else:
        return search_photos(cfg, gallery)
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args(sys.argv[1:], "search", Settings, __doc__)))
