"""How many wrong labels does label_noise.py find? Plant some, then judge its list.

    python -m bench.planted_noise plant --train-set SET --output PLANTED --share 0.1 --seed 0
    python label_noise.py --train-set PLANTED --checkpoint MODEL --output keep.tsv
    python -m bench.planted_noise judge --train-set PLANTED --keep keep.tsv --name MODEL

The first takes a share of the images and permutes their labels among themselves so that each gets
one that is not its own (classes keep their sizes); it writes the set anew and the truth beside it,
planted.tsv. Real sets have wrong labels of their own, which count as errors where they are found:
give the list that a model makes of the set as it is (plant --keep) to leave those out beforehand.
The last prints recall and precision and writes them into the JSON under the name given.
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
COLUMNS = ("record", "label", "true_label")
LEAST = (1, 3, 5, 10)  # images of a class, for numbers without the smallest classes


# ------------------------------------------------------------------------------ planting


def permuted_labels(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Labels (n,) of which a share is permuted among itself, each to another than it was.

    Raises UserError where that cannot be: one class has more than half of the images drawn.
    """
    rng = np.random.default_rng([seed, 11])
    drawn = rng.choice(len(labels), round(share * len(labels)), replace=False)
    true = labels[drawn]
    if 2 * np.bincount(true, minlength=1).max() > len(true):
        raise UserError("One class has more than half of the images drawn; give another set.")
    new = rng.permutation(true)
    while len(same := np.flatnonzero(new == true)):
        for place in same:
            partner = rng.integers(len(new))
            new[[place, partner]] = new[[partner, place]]
    planted = labels.copy()
    planted[drawn] = new
    return planted


def plant(train_set: Path, output: Path, *, share: float, seed: int, keep: str = "") -> None:
    """Write a set with wrong labels, without the images that a keep.tsv drops, and the truth."""
    reader = RecordReader(train_set)
    if output.resolve() == train_set.resolve():
        raise UserError(f"{output} is the set itself; give another --output.")
    used = training_mask(reader, keep=keep)
    there = np.arange(len(reader)) if used is None else np.flatnonzero(used)
    true = reader.labels[there]
    labels = permuted_labels(true, share, seed)
    order = np.argsort(labels, kind="stable")  # records stand by identity
    write_dataset(output, (reader.encoded(int(i)) for i in there[order]), labels[order])
    rows = zip(RecordReader(output).keys, labels[order], true[order], strict=True)
    with atomic_write(output / TRUTH, "w") as file:
        file.write("\t".join(COLUMNS) + "\n")
        file.writelines("\t".join(map(str, row)) + "\n" for row in rows)
    print(
        f"Wrote {output}: {len(there):,} images, {np.sum(labels != true):,} of them under "
        f"another's label ({output / TRUTH})\n"
        f"Next: python label_noise.py --train-set {output} --checkpoint ..."
    )


# ------------------------------------------------------------------------------ judging


def read_truth(path: Path, reader: RecordReader) -> np.ndarray:
    """The true labels (n,) of the reader's images; UserError where the file has others."""
    if not path.is_file():
        raise UserError(f"There is no {path}; the set was not made by plant.")
    record, label, true = np.loadtxt(path, np.int64, skiprows=1, delimiter="\t", ndmin=2).T
    if not (np.array_equal(record, reader.keys) and np.array_equal(label, reader.labels)):
        raise UserError(f"{path} speaks of other records than those of {reader.path}.")
    return true


def judge(
    labels: np.ndarray, true: np.ndarray, dropped: np.ndarray, other: np.ndarray, least: int
) -> dict[str, Any]:
    """Recall and precision of dropped (n,) bool in the classes of `least` images or more.

    The ceiling of recall counts as lost an image whose class has none that is rightly there;
    `named` is the share of those found whose true class is the one said, other (n,).
    """
    size = np.bincount(labels)[labels]
    wrong, counted = labels != true, size >= least
    right = np.bincount(labels[~wrong], minlength=labels.max() + 1)[labels]
    planted, found = wrong & counted, wrong & counted & dropped
    numbers = {"planted": planted, "dropped": dropped & counted, "found": found}
    counts = {name: int(which.sum()) for name, which in numbers.items()}
    share = {
        "recall": found.sum() / max(planted.sum(), 1),
        "precision": found.sum() / max((dropped & counted).sum(), 1),
        "ceiling": (planted & (right > 0)).sum() / max(planted.sum(), 1),
        "named": (found & (other == true)).sum() / max(found.sum(), 1),
    }
    share = {name: round(float(value), 4) for name, value in share.items()}
    return {"least": least, "images": int(counted.sum())} | counts | share


def judge_list(train_set: Path, keep: Path) -> list[dict[str, Any]]:
    """What a list is worth on a planted set, for each of LEAST; the images listed count alone."""
    reader = RecordReader(train_set)
    true, used = read_truth(train_set / TRUTH, reader), read_keep_list(keep, reader)
    record, other = np.loadtxt(keep, np.int64, skiprows=1, usecols=(0, 3), ndmin=2).T
    listed = np.searchsorted(reader.keys, record)
    columns = reader.labels[listed], true[listed], ~used[listed], other
    return [judge(*columns, least) for least in LEAST]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What judge prints."""
    lines = [
        f"{row['least']:>3} or more  {row['images']:9,}  {row['planted']:7,}  "
        f"{row['dropped']:7,}  {row['recall']:6.1%}  ({row['ceiling']:6.1%})  "
        f"{row['precision']:9.1%}  {row['named']:13.1%}"
        for row in rows
    ]
    head = "classes of   images  planted  dropped  recall (ceiling)  precision  rightly named"
    return "\n".join([head, *lines])


def save(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows under a name into a JSON that may hold others."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(known | {name: rows}, indent=1) + "\n")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Plant, or judge."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.planted_noise", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    planting = commands.add_parser("plant", help="write a set with wrong labels")
    planting.add_argument("--train-set", type=Path, required=True, help="folder with train.rec")
    planting.add_argument("--output", type=Path, required=True, help="folder for the new one")
    planting.add_argument("--share", type=float, default=0.1, help="default: %(default)s")
    planting.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    planting.add_argument("--keep", default="", help="keep.tsv: leave out what it drops")
    judging = commands.add_parser("judge", help="recall and precision of a keep.tsv")
    judging.add_argument("--train-set", type=Path, required=True, help="a planted set")
    judging.add_argument("--keep", type=Path, required=True, help="what label_noise.py wrote of it")
    judging.add_argument("--name", required=True, help="what the numbers are called in the JSON")
    judging.add_argument("--json", type=Path, default=RESULTS / "planted_noise-cpu.json")
    args = parser.parse_args(argv)
    if args.command == "plant":
        plant(args.train_set, args.output, share=args.share, seed=args.seed, keep=args.keep)
        return
    rows = judge_list(args.train_set, args.keep)
    print(table(rows))
    save(args.json, args.name, rows)
    print(f"Wrote {args.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
