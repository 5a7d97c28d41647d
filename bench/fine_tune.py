"""Fine-tuning against its base and against training from scratch, on identities new to all three.

    python -m bench.fine_tune --train-set data/faces_webface_112x112

Of the training set's largest identities 1,000 train the base. Each seed divides the next 700 into
500 to fine-tune on, or to train on from scratch, and 200 to test on: TAR over all pairs of their
images. The recipes are fixed in advance, and last.pt is tested, once. Runs that are finished are
not trained again. The JSON goes to bench/results/fine_tune-<device>-<network>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bench.common import RESULTS, describe_machine
from evaluation.all_pairs import tar_at_low_fars
from evaluation.embed_records import embed_records
from evaluation.embedders import load_embedder
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write
from training.sample_lists import write_held_out
from utils import UserError, exit_on_user_error, get_device, newest_run

BASE, TRAINED, TESTED = 1000, 500, 200  # identities
FARS = ("1e-3", "1e-4")
# Training from scratch has the base's recipe, and twice the epochs of fine-tuning.
COMMON = "--recipe best --batch-size 64 --valid-fraction 0"
RECIPES = {
    "base": "--emb-size 256 --dropout 0.2 --lr 0.05 --epochs 4",
    "from scratch": "--emb-size 256 --dropout 0.2 --lr 0.05 --epochs 4",
    "fine-tuned": "--dropout 0.2 --lr 0.02 --epochs 2",
}
ROOT = Path(__file__).resolve().parent.parent


def train_run(
    args: argparse.Namespace, reader: RecordReader, folder: Path, flags: str, used: np.ndarray
) -> tuple[Path, float]:
    """Train on the identities `used` (k,), unless that is done; last.pt and the seconds it took.

    Raises UserError if train.py fails.
    """
    done = folder / "seconds.json"
    if not done.is_file():
        hold_out = folder / "hold_out.txt"
        write_held_out(hold_out, reader, np.setdiff1d(reader.labels, used))
        command = [sys.executable, "train.py", "--train-set", str(args.train_set)]
        command += ["--runs-dir", str(folder), "--images-dir", str(folder)]
        command += ["--data-dir", str(folder), "--hold-out", str(hold_out)]
        command += ["--device", args.device, *shlex.split(f"{COMMON} {flags}")]
        start = time.perf_counter()
        with (folder / "train.log").open("ab") as log:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ)
        if code.returncode:
            raise UserError(f"{shlex.join(command)} failed; see {folder}/train.log.")
        with atomic_write(done, "w") as file:
            json.dump(time.perf_counter() - start, file)
    return newest_run(folder, "last.pt"), json.loads(done.read_text())


def all_pairs_tars(
    path: Path, reader: RecordReader, tested: np.ndarray, device: torch.device
) -> dict[str, float]:
    """TAR at FARS of a checkpoint over all pairs of images of the identities `tested` (k,)."""
    indices = np.flatnonzero(np.isin(reader.labels, tested))
    decoded, embeddings = embed_records(reader, indices, load_embedder(path, device=device)[0])
    points = tar_at_low_fars(embeddings, reader.labels[indices[decoded]], FARS)["tar_at_far"]
    return {far: point["tar"] for far, point in points.items()}


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over seeds in per cent, by arm, as Markdown."""
    lines = ["| | " + " | ".join(f"TAR at FAR {far}" for far in FARS) + " |"]
    lines.append("|---" * (len(FARS) + 1) + "|")
    for arm in rows[next(iter(rows))]:
        cells = [arm]
        for far in FARS:
            values = [100 * tars[arm][far] for tars in rows.values()]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{deviation}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Train and test; print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fine_tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--train-set", type=Path, required=True, help="folder with train.rec")
    parser.add_argument("--runs", type=Path, default=Path("runs/fine_tune"), help="%(default)s")
    parser.add_argument("--network", default="tiny", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    args = parser.parse_args(argv)
    args.train_set, args.runs = args.train_set.resolve(), args.runs.resolve()
    device, reader = get_device(args.device), RecordReader(args.train_set)
    largest = np.argsort(-np.bincount(reader.labels), kind="stable")[: BASE + TRAINED + TESTED]
    largest = np.random.default_rng(0).permutation(largest)

    def train(arm: str, name: str, more: str, used: np.ndarray) -> tuple[Path, float]:
        folder = args.runs / name
        folder.mkdir(parents=True, exist_ok=True)
        return train_run(args, reader, folder, f"{RECIPES[arm]} {more}", used)

    network = f"--network {args.network}"
    base, seconds = train("base", "base", network, largest[:BASE])
    rows, times = {}, {"base": seconds}
    for seed in args.seeds:
        rest = np.random.default_rng(seed).permutation(largest[BASE:])
        trained, tested = rest[:TRAINED], rest[TRAINED:]
        flags = {"from scratch": network, "fine-tuned": f"--init {shlex.quote(str(base))}"}
        paths = {"base": base}
        for arm, more in flags.items():
            name = f"{arm.replace(' ', '_')}-s{seed}"
            paths[arm], times[name] = train(arm, name, f"{more} --seed {seed}", trained)
        rows[str(seed)] = {
            arm: all_pairs_tars(path, reader, tested, device) for arm, path in paths.items()
        }
    print(table(rows))
    path = RESULTS / f"fine_tune-{device.type}-{args.network}.json"
    result = {"machine": describe_machine(device), "common": COMMON, "recipes": RECIPES}
    result |= {"identities": {"base": BASE, "trained": TRAINED, "tested": TESTED}}
    result |= {"training_seconds": {name: round(value) for name, value in times.items()}}
    with atomic_write(path, "w") as file:
        json.dump(result | {"seeds": rows}, file, indent=1)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
