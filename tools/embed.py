"""Embed the faces in a folder of photos, as a gallery for tools.search.

    python -m tools.embed photos                      # writes photos.npz
    python -m tools.embed photos.zip --output gallery.npz --checkpoint runs/<run>/best.pt
    python -m tools.embed crops --aligned             # 112x112 faces: not detected again

Photos of any size and format that pre_process.py reads, in folders in folders or an archive; the
face in each is found and aligned by its code. numpy.load reads the file: embeddings (n, d) float32
of unit length, names (paths in the folder), boxes, points, statuses, and what was skipped and why;
"made" says by which model (checksum), from what and how.

After a kill at any point the same command resumes, and ends with the same bytes. Run again after
photos were added, changed, moved or deleted, it embeds those alone whose content is new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from config import Config, parse_args, setting
from tools.photo_faces import (
    MACHINE_SETTINGS,
    MODEL_SETTINGS,
    embed_crops,
    make_detector,
    open_photo_model,
)
from utils import FACE_SIZE, UserError, exit_on_user_error

# What is heavy is imported in the functions that use it, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from evaluation.evaluated_model import EvaluatedModel
    from evaluation.photo_gallery import PhotoGallery
    from fileio.archive_source import Source
    from preprocessing.pipeline import AlignResult


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """Embedding"""

    SHARED: ClassVar[str] = f"workers detect_batch {MACHINE_SETTINGS} {MODEL_SETTINGS}"
    folder: str = setting("", "a folder or an archive of photos", positional="1")
    output: str = setting("", "gallery to write; default: FOLDER.npz")
    aligned: bool = setting(False, "the photos are 112x112 faces, aligned already")


def describe_making(cfg: Settings, model: EvaluatedModel) -> dict[str, Any]:
    """What the rows of a gallery depend on; tools.search opens the same model by it."""
    from preprocessing.summary import library_versions

    made = {name: getattr(cfg, name) for name in MODEL_SETTINGS.split()}
    made |= {name: list(value) for name, value in made.items() if isinstance(value, tuple)}
    made |= {"checkpoint": str(model.checkpoint.resolve()), "checksum": model.checksum}
    made |= {"aligned": cfg.aligned, "source": str(Path(cfg.folder).resolve())}
    return made | {"versions": library_versions()}


def read_digests(source: Source) -> dict[str, bytes]:
    """The digest of each photo by its name; of one that cannot be read, of the reason."""
    from tqdm import tqdm

    from evaluation.photo_gallery import DIGEST_BYTES

    entries, digests = source.entries(), {}
    for entry, data in tqdm(source.read(entries), "reading", len(entries), unit=" images"):
        content = data if isinstance(data, bytes) else data.status.encode()
        digests[entry.name] = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
    return digests


def known_rows(galleries: Sequence[PhotoGallery]) -> dict[bytes, tuple[bool, int]]:
    """Of each digest whether its photo has a face, and its row in the galleries' concatenation."""
    rows: dict[bytes, tuple[bool, int]] = {}
    for has_face, name in ((False, "skipped_digests"), (True, "digests")):
        digests = (digest for gallery in galleries for digest in getattr(gallery, name))
        rows |= {digest.tobytes(): (has_face, i) for i, digest in enumerate(digests)}
    return rows


# ------------------------------------------------------------------------------ new photos


def read_aligned(source: Source, blocks: Iterable[tuple[int, int]]) -> Iterator[list[AlignResult]]:
    """What align_blocks yields, for faces that are aligned already: the same bytes."""
    from preprocessing.pipeline import AlignResult, decode_entry

    for start, stop in blocks:
        block = []
        for entry, data in source.read(source.entries()[start:stop]):
            decoded = decode_entry(entry, data)
            if decoded.image is None:
                block.append(AlignResult(entry, decoded.status))
            elif decoded.image.shape[:2] != (FACE_SIZE, FACE_SIZE):
                block.append(AlignResult(entry, "not_112x112"))
            else:
                block.append(AlignResult(entry, "aligned", data))
        yield block


def embed_block(
    block: Sequence[AlignResult],
    digests: dict[str, bytes],
    model: EvaluatedModel,
    made: dict[str, Any],
) -> PhotoGallery:
    """A gallery of one block of photos."""
    import numpy as np

    from evaluation.photo_gallery import DIGEST_BYTES, PhotoGallery

    def columns(results: list[AlignResult]) -> tuple[np.ndarray, ...]:
        names = np.array([result.entry.name for result in results], dtype=str)
        statuses = np.array([result.status for result in results], dtype=str)
        content = b"".join(digests[result.entry.name] for result in results)
        return names, statuses, np.frombuffer(content, np.uint8).reshape(-1, DIGEST_BYTES)

    def numbers(arrays: Iterable[np.ndarray | None], *shape: int) -> np.ndarray:
        rows = [np.full(shape, np.nan) if array is None else array for array in arrays]
        return np.array(rows, np.float32).reshape(-1, *shape)

    kept = [result for result in block if result.jpeg is not None]
    skipped = [result for result in block if result.jpeg is None]
    embeddings = np.empty((0, 0), np.float32)
    if kept:
        embeddings = embed_crops(model, [result.jpeg for result in kept])
    boxes = numbers((result.box for result in kept), 4)
    points = numbers((result.points for result in kept), 5, 2)
    return PhotoGallery(made, *columns(kept), boxes, points, embeddings, *columns(skipped))


def embed_new(
    cfg: Settings,
    source: Source,
    digests: dict[str, bytes],
    parts: Path,
    model: EvaluatedModel,
    made: dict[str, Any],
) -> list[PhotoGallery]:
    """Galleries of a source's photos, block by block; each is a file in the folder `parts`.

    Blocks and batches follow from the list of photos alone, and what is left of a list after some
    blocks has the same further blocks: so a resumed run gives the same numbers.
    """
    from tqdm import tqdm

    from evaluation.photo_gallery import open_gallery, save_gallery
    from preprocessing.pipeline import BLOCK_IMAGES, align_blocks, plan_blocks

    blocks = plan_blocks(source.entries(), max(BLOCK_IMAGES, cfg.detect_batch))
    options = {"crop_missed": False, "detect_batch": cfg.detect_batch, "workers": cfg.workers}
    if cfg.aligned:
        results = read_aligned(source, blocks)
    else:
        results = align_blocks(source, blocks, make_detector(cfg), **options)
    first = len(list(parts.glob("*.npz")))
    paths = [parts / f"{number:07d}.npz" for number in range(first, first + len(blocks))]
    bar = tqdm(total=len(source.entries()), unit=" images", desc="embedding")
    with contextlib.closing(results), bar:
        for path, block in zip(paths, results, strict=True):
            save_gallery(path, embed_block(block, digests, model, made))
            bar.update(len(block))
    return [open_gallery(path) for path in paths]


def update_gallery(
    cfg: Settings, source: Source, galleries: list[PhotoGallery], parts: Path, model: EvaluatedModel
) -> PhotoGallery:
    """The gallery of a source: rows of earlier galleries, and what is new embedded."""
    import numpy as np

    from evaluation.photo_gallery import open_gallery, select_rows

    made = describe_making(cfg, model)
    resumed = [open_gallery(path) for path in sorted(parts.glob("*.npz"))]
    resumed = [part for part in resumed if part.made == made]
    if resumed:
        done = sum(len(part.names) + len(part.skipped_names) for part in resumed)
        print(f"Resuming after {done:,} new photos.")
    galleries = [*galleries, *resumed]
    digests = read_digests(source)
    known = known_rows(galleries)
    new: dict[bytes, Any] = {}  # equal files are embedded once
    for entry in source.entries():
        if digests[entry.name] not in known:
            new.setdefault(digests[entry.name], entry)
    if new:
        some = source.restricted_to(list(new.values()))
        galleries += embed_new(cfg, some, digests, parts, model, made)
        known = known_rows(galleries)
    names, rows = {}, {}
    for has_face in (True, False):
        found = [(name, known[digest]) for name, digest in digests.items()]
        names[has_face] = np.array([n for n, row in found if row[0] is has_face], dtype=str)
        rows[has_face] = np.array([i for _, (face, i) in found if face is has_face], np.int64)
    print(f"{cfg.folder}: {len(digests):,} photos, {len(new):,} of them new")
    gallery = select_rows(galleries, rows[True], rows[False], made)
    # Files that were moved have new names, and equal ones a name each.
    return dataclasses.replace(gallery, names=names[True], skipped_names=names[False])


# ------------------------------------------------------------------------------ the command


def open_existing(output: Path, made: dict[str, Any]) -> list[PhotoGallery]:
    """The gallery that is to be brought up to date, if any; UserError if another model made it."""
    from evaluation.photo_gallery import open_gallery

    if not output.exists():
        return []
    gallery = open_gallery(output)
    if any(gallery.made.get(name) != made[name] for name in ("checksum", "flip", "aligned")):
        raise UserError(
            f"{output} was made by {gallery.made.get('checkpoint')} or with another --flip or "
            "--aligned; move it away or give another --output."
        )
    return [gallery]


def print_counts(gallery: PhotoGallery, source: Source) -> None:
    """What was kept, what was skipped and why."""
    from preprocessing.summary import format_counts

    count, dimension = gallery.embeddings.shape
    statuses = format_counts(Counter(gallery.statuses.tolist()))
    print(f"  kept {count:,} faces, {dimension} numbers each ({statuses})")
    skipped = f"  skipped {len(gallery.skipped_names):,}"
    if len(gallery.skipped_names):
        skipped += f" ({format_counts(Counter(gallery.skipped_statuses.tolist()))}): "
        skipped += ", ".join(gallery.skipped_names[:5].tolist())
        skipped += ", ..." if len(gallery.skipped_names) > 5 else ""
    print(skipped)
    if source.skipped.counts:
        print(f"  not photos: {format_counts(source.skipped.counts)}")


@exit_on_user_error
def main(cfg: Settings) -> None:
    """Embed a folder."""
    from evaluation.photo_gallery import save_gallery
    from fileio.archives import open_source
    from fileio.locks import lock_folder
    from fileio.safe_files import make_folder

    started = time.perf_counter()
    folder = Path(cfg.folder)
    output = Path(cfg.output or folder.with_name(f"{folder.resolve().name}.npz"))
    if output.suffix != ".npz":
        raise UserError(f"--output {output} should end in .npz.")
    with open_source(folder, output.parent) as source:
        source.needs_identities = False
        if not source.entries():
            raise UserError(f"{folder} holds no images.")
        model, _ = open_photo_model(cfg)
        galleries = open_existing(output, describe_making(cfg, model))
        parts = output.with_name(f"{output.name}.part")
        make_folder(parts)
        with lock_folder(parts, "tools.embed"):
            gallery = update_gallery(cfg, source, galleries, parts, model)
            if len(gallery):
                save_gallery(output, gallery)
            shutil.rmtree(parts)
        if not len(gallery):
            raise UserError(f"No face was found in any of the photos in {folder}.")
        print_counts(gallery, source)
    seconds = time.perf_counter() - started
    print(f"Wrote {output} in {seconds:.1f} s; python -m tools.search {output} PHOTO searches it.")


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "embed", Settings, __doc__))
