"""How many wrong labels does tools.label_noise find? Plant label noise, then score its list.

    python -m bench.planted_noise plant --train-set SET --output PLANTED --noise-rate 0.1 --seed 0
    python -m tools.label_noise --train-set PLANTED --checkpoint MODEL --output keep.tsv
    python -m bench.planted_noise score --train-set PLANTED --keep keep.tsv --name MODEL

The first chooses a fraction of the images and permutes their labels so that each gets a wrong one
and class sizes do not change; it writes a new set, and the true labels to planted.tsv beside it.
Real sets also have label errors of their own, which would count as false alarms when found: give
the keep list of the original set (plant --keep) to leave those images out. The last prints recall
and precision, and writes them to the JSON under the given name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import RESULTS
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write
from training.sample_lists import read_keep_list, training_mask
from utils import UserError, exit_on_user_error

TRUTH = "planted.tsv"
TRUTH_COLUMNS = ("record", "label", "true_label")
MIN_IMAGES = (1, 3, 5, 10)  # per class: results are given for all classes and for larger ones


# ------------------------------------------------------------------------------ planting


def permuted_labels(labels: np.ndarray, noise_rate: float, seed: int) -> np.ndarray:
    """Labels (n,) of which a random fraction is permuted, so that each of those becomes wrong.

    Raises UserError if that is impossible: one class has more than half of the chosen images.
    """
    rng = np.random.default_rng([seed, 11])
    chosen = rng.choice(len(labels), round(noise_rate * len(labels)), replace=False)
    true = labels[chosen]
    if 2 * np.bincount(true, minlength=1).max() > len(true):
        raise UserError("One class has more than half of the chosen images; give another set.")
    # A random permutation leaves some labels right; swap those with random others until none is.
    # A swap may put another label right again, hence the outer loop.
    new = rng.permutation(true)
    while len(unchanged := np.flatnonzero(new == true)):
        for position in unchanged:
            partner = rng.integers(len(new))
            new[[position, partner]] = new[[partner, position]]
    planted = labels.copy()
    planted[chosen] = new
    return planted


def plant(train_set: Path, output: Path, *, noise_rate: float, seed: int, keep: str = "") -> None:
    """Write a set with planted label noise, without the images that a keep.tsv drops.

    The true labels go to planted.tsv beside it. Raises UserError if output is the set itself.
    """
    reader = RecordReader(train_set)
    if output.resolve() == train_set.resolve():
        raise UserError(f"{output} is the set itself; give another --output.")
    used = training_mask(reader, keep=keep)
    images = np.arange(len(reader)) if used is None else np.flatnonzero(used)
    true = reader.labels[images]
    labels = permuted_labels(true, noise_rate, seed)
    order = np.argsort(labels, kind="stable")  # a data set has its records sorted by label
    write_dataset(output, (reader.encoded(int(i)) for i in images[order]), labels[order])
    rows = zip(RecordReader(output).keys, labels[order], true[order], strict=True)
    with atomic_write(output / TRUTH, "w") as file:
        file.write("\t".join(TRUTH_COLUMNS) + "\n")
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    print(
        f"Wrote {output}: {len(images):,} images, {np.sum(labels != true):,} of them with a wrong "
        f"label ({output / TRUTH})\n"
        f"Next: python -m tools.label_noise --train-set {output} --checkpoint ..."
    )


# ------------------------------------------------------------------------------ scoring


def read_truth(path: Path, reader: RecordReader) -> np.ndarray:
    """The true labels (n,) of the reader's images; UserError if the file is of another set."""
    if not path.is_file():
        raise UserError(f"There is no {path}; the set was not made by plant.")
    record, label, true = np.loadtxt(path, np.int64, skiprows=1, delimiter="\t", ndmin=2).T
    if not (np.array_equal(record, reader.keys) and np.array_equal(label, reader.labels)):
        raise UserError(f"{path} belongs to another set than {reader.path}; plant it again.")
    return true


def score_dropped(
    labels: np.ndarray,
    true: np.ndarray,
    dropped: np.ndarray,
    suggested: np.ndarray,
    min_images: int,
) -> dict[str, Any]:
    """Recall and precision of the dropped images in classes of `min_images` or more.

    labels, true and suggested (n,) are classes, dropped (n,) bool. "ceiling" is the highest
    possible recall: an image cannot be found if no image of its class has the right label. "named"
    is the fraction of the planted images found whose suggested class is the true one.
    """
    wrong, counted = labels != true, np.bincount(labels)[labels] >= min_images
    correct_in_class = np.bincount(labels[~wrong], minlength=labels.max() + 1)[labels]
    planted, all_dropped = wrong & counted, dropped & counted
    found = planted & dropped
    rates = {
        "recall": found.sum() / max(planted.sum(), 1),
        "precision": found.sum() / max(all_dropped.sum(), 1),
        "ceiling": (planted & (correct_in_class > 0)).sum() / max(planted.sum(), 1),
        "named": (found & (suggested == true)).sum() / max(found.sum(), 1),
    }
    counts = {
        "least": min_images,
        "images": int(counted.sum()),
        "planted": int(planted.sum()),
        "dropped": int(all_dropped.sum()),
        "found": int(found.sum()),
    }
    return counts | {name: round(float(value), 4) for name, value in rates.items()}


def score_keep_list(train_set: Path, keep: Path) -> list[dict[str, Any]]:
    """score_dropped of a keep.tsv of a planted set, for each of MIN_IMAGES.

    Only images in the list count: that of a network trained on some of the classes has only those.
    """
    reader = RecordReader(train_set)
    true, used = read_truth(train_set / TRUTH, reader), read_keep_list(keep, reader)
    record, suggested = np.loadtxt(keep, np.int64, skiprows=1, usecols=(0, 3), ndmin=2).T
    listed = np.searchsorted(reader.keys, record)
    columns = reader.labels[listed], true[listed], ~used[listed], suggested
    return [score_dropped(*columns, min_images) for min_images in MIN_IMAGES]


def noise_table(rows: Sequence[dict[str, Any]]) -> str:
    """The results of score_keep_list as text."""
    lines = [
        f"{row['least']:>3} or more  {row['images']:9,}  {row['planted']:7,}  "
        f"{row['dropped']:7,}  {row['recall']:6.1%}  ({row['ceiling']:6.1%})  "
        f"{row['precision']:9.1%}  {row['named']:13.1%}"
        for row in rows
    ]
    head = "classes of   images  planted  dropped  recall (ceiling)  precision  class correct"
    return "\n".join([head, *lines])


def save_results(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Add the rows under a name to a JSON file, which may have others already."""
    results = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(results | {name: rows}, indent=1) + "\n")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Plant label noise, or score a keep list."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.planted_noise", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant", help="write a set with wrong labels")
    planting.add_argument("--train-set", type=Path, required=True, help="folder with train.rec")
    planting.add_argument("--output", type=Path, required=True, help="folder for the new set")
    planting.add_argument("--noise-rate", type=float, default=0.1, help="default: %(default)s")
    planting.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    planting.add_argument(
        "--keep", default="", help="leave out the images that this keep.tsv drops"
    )
    scoring = commands.add_parser("score", help="recall and precision of a keep.tsv")
    scoring.add_argument("--train-set", type=Path, required=True, help="a planted set")
    scoring.add_argument("--keep", type=Path, required=True, help="the list by tools.label_noise")
    scoring.add_argument("--name", required=True, help="of the results in the JSON")
    scoring.add_argument("--json", type=Path, default=RESULTS / "planted_noise-cpu.json")
    args = parser.parse_args(argv)
    if args.command == "plant":
        plant(
            args.train_set, args.output, noise_rate=args.noise_rate, seed=args.seed, keep=args.keep
        )
        return
    rows = score_keep_list(args.train_set, args.keep)
    print(noise_table(rows))
    save_results(args.json, args.name, rows)
    print(f"Wrote {args.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
