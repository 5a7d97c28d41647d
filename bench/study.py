"""Train the arms of a study on the same images, several seeds each, and compare them in a table.

    python -m bench.study --train-set data/faces_webface_112x112 --lfw data/faces_lfw_112x112 \\
        --hold-out data/held_out.txt                        # all of ARMS, seeds 0 to 2
    python -m bench.study ... arcface uniface               # two of them
    python -m bench.study ... arcface "mine=--margin cosface --ema 0.99"      # an arm of your own
    python -m bench.study ... --network r50 --max-classes 0 --epochs 20 --batch-size 512

All arms see the same number of images of the same identities. As in the ArcFace paper, an arm's
learning rate is for batches of 512 and its milestones for 32 epochs; both are scaled. Each run is
tested once, at its end: last.pt, and the EMA weights if the arm has --ema, on LFW, on pairs of
held-out identities, and on all of their pairs. Finished runs are skipped and interrupted ones
resumed, so the command can be repeated after a kill. The JSON goes to
bench/results/study-<device>-<network>.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.common import RESULTS, describe_machine
from config import Config, parse_args
from evaluation import verification
from evaluation.all_pairs import tar_at_low_fars
from evaluation.embedders import Embed, load_embedder
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_making import make_verification_pairs
from evaluation.pair_sets import PairSet, find_pairs, load_set
from fileio.image_loader import load_images
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder
from training.sample_lists import read_held_out
from utils import UserError, core_count, exit_on_user_error, get_device, newest_run

# The others are compared with the first one: InsightFace's recipe.
ARMS = {
    "arcface": "",
    "cosface": "--margin cosface",
    "adaface": "--margin adaface",
    # Its authors use both of these; without them the loss may diverge in the first steps.
    "uniface": "--margin uniface --clip-norm 10 --zero-init",
    "best": "--recipe best --ema 0.99",
}
STUDY_FARS = ("1e-3", "1e-4", "1e-5")
HELD_OUT_PAIRS = 6000  # those of tools.held_out --make-pairs 6000
COMMON_SETTINGS = ("network", "max_classes", "epochs", "batch_size")
ROOT = Path(__file__).resolve().parent.parent


class StudyTests:
    """The test sets of a study, decoded: LFW, and the held-out identities of the training set."""

    def __init__(self, train_set: Path, lfw: Path, hold_out: Path) -> None:
        self.lfw: PairSet = load_set(lfw, find_pairs(lfw, lfw.parent))
        reader = RecordReader(train_set)
        held_out = np.flatnonzero(np.isin(reader.labels, read_held_out(hold_out, reader)))
        self.identities = reader.labels[held_out]
        self.faces, errors = load_images(reader, held_out)
        if errors:
            raise UserError(f"{len(errors)} images of {reader.path} cannot be decoded.")
        pairs = make_verification_pairs(self.identities, HELD_OUT_PAIRS, seed=0)
        self.first, self.second = np.array([pair for pair, _ in pairs]).T
        self.same = np.array([same for _, same in pairs])

    def run(self, embed: Embed) -> dict[str, float]:
        """All metrics of the study for one model, as fractions."""
        metrics = {"lfw": evaluate_lfw(embed, self.lfw).metrics["accuracy"]}
        embeddings = embed(self.faces).float().cpu().numpy()
        scores = verification.pair_scores(embeddings, self.first, self.second)
        folds = verification.contiguous_folds(len(scores))
        metrics["pairs"] = verification.verify(scores, self.same, folds)["accuracy"]
        tars = tar_at_low_fars(embeddings, self.identities)["tar_at_far"]
        return metrics | {f"tar_{far}": tars[far]["tar"] for far in STUDY_FARS if far in tars}


def train_run(args: argparse.Namespace, flags: str, seed: int, folder: Path) -> Path:
    """Train one run to its end, resuming it if it was interrupted; returns its folder.

    Raises UserError if train.py fails.
    """
    command = [sys.executable, "train.py", "--runs-dir", str(folder), "--images-dir", str(folder)]
    if any(folder.glob("*/last.pt")):
        command += ["--resume"]
    else:
        # An arm's flags are written for the paper's 32 epochs and batches of 512. Example: with
        # 8 epochs and batches of 128 a learning rate of 0.1 becomes 0.025 and milestone 20 is 5.
        cfg, paper = parse_args(shlex.split(flags), "train"), Config()
        milestones = [str(round(m * args.epochs / paper.epochs)) for m in cfg.milestones]
        command += shlex.split(
            f"{flags} --network {args.network} --max-classes {args.max_classes} --seed {seed} "
            f"--epochs {args.epochs} --batch-size {args.batch_size} --valid-fraction 0 "
            f"--lr {cfg.lr * args.batch_size / paper.batch_size} --device {args.device} "
            f"--workers {args.threads}"
        )
        command += ["--milestones", *milestones, "--train-set", str(args.train_set)]
        command += ["--hold-out", str(args.hold_out), "--data-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with (folder / "train.log").open("ab") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
    if code:
        raise UserError(f"{shlex.join(command)} ended with status {code}; see {folder}/train.log.")
    return newest_run(folder, "last.pt").parent


def common_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all arms of a study share."""
    return {flag: getattr(args, flag) for flag in COMMON_SETTINGS}


def claim_folder(args: argparse.Namespace, flags: str, folder: Path) -> None:
    """Write a run's settings to arm.json in its folder; UserError if it has other ones already.

    Without this, a study with other settings would count old runs as its own.
    """
    sets = {"train_set": str(args.train_set), "hold_out": str(args.hold_out)}
    settings = {"flags": flags} | common_settings(args) | sets
    path = folder / "arm.json"
    if not path.is_file():
        make_folder(folder)
        with atomic_write(path, "w") as file:
            json.dump(settings, file, indent=1)
    elif json.loads(path.read_text()) != settings:
        raise UserError(
            f"{folder} has a run with other flags or another data set; name another folder with "
            "--runs."
        )


@functools.cache
def load_tests(train_set: Path, lfw: Path, hold_out: Path) -> StudyTests:
    """The tests, decoded once per process."""
    return StudyTests(train_set, lfw, hold_out)


def run_and_test(args: argparse.Namespace, name: str, flags: str, seed: int) -> None:
    """Train and test one arm with one seed, and write study.json into its folder."""
    torch.set_num_threads(args.threads)
    tests = load_tests(args.train_set, args.lfw, args.hold_out)
    folder = args.runs / name / f"s{seed}"
    claim_folder(args, flags, folder)
    began = time.time()
    run = train_run(args, flags, seed, folder)
    results: dict[str, Any] = {"seconds": round(time.time() - began)}
    for kind, file in {"raw": "last.pt", "ema": "best_ema.pt"}.items():
        if (run / file).is_file():
            results[kind] = tests.run(load_embedder(run / file, device=args.device)[0])
    with atomic_write(folder / "study.json", "w") as file:
        json.dump(results, file, indent=1)


def collect(args: argparse.Namespace, arms: dict[str, str]) -> dict[str, dict[str, Any]]:
    """{arm: {"flags", "seeds": {seed: metrics}}}; EMA weights have a row "<arm>, EMA weights"."""
    rows: dict[str, dict[str, Any]] = {}
    for name, flags in arms.items():
        for seed in args.seeds:
            folder = args.runs / name / f"s{seed}"
            claim_folder(args, flags, folder)
            results = json.loads((folder / "study.json").read_text())
            for kind, title in {"raw": name, "ema": f"{name}, EMA weights"}.items():
                if kind in results:
                    row = rows.setdefault(title, {"flags": flags, "seeds": {}})
                    row["seeds"][str(seed)] = results[kind]
    return rows


def study_table(rows: dict[str, dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds in per cent, as Markdown.

    The last column is the difference to the first arm on held-out pairs and its standard error,
    sqrt(v1 / n1 + v2 / n2) of the two means (Welch).
    """
    columns = ["lfw", "pairs", *(f"tar_{far}" for far in STUDY_FARS)]
    titles = ["LFW", "held-out pairs", *(f"TAR at {far}" for far in STUDY_FARS)]
    lines = ["| arm | " + " | ".join([*titles, "pairs, against the first"]) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    first: list[float] = []
    for name, row in rows.items():
        cells = [name]
        for column in columns:
            values = [100 * seed[column] for seed in row["seeds"].values() if column in seed]
            cells.append(mean_and_deviation(values) if values else "")
        values = [100 * seed["pairs"] for seed in row["seeds"].values()]
        first = first or values  # the first arm is compared with itself: no gain to show
        error = (variance_of_mean(values) + variance_of_mean(first)) ** 0.5
        gain = statistics.mean(values) - statistics.mean(first)
        cells.append("" if values is first else f"{gain:+.2f} ± {error:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_deviation(values: list[float]) -> str:
    """Mean ± standard deviation; the mean alone if there is only one value."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def variance_of_mean(values: list[float]) -> float:
    """Squared standard error of a mean; 0 if there is only one value."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def parse_study_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("arms", nargs="*", default=list(ARMS), help="NAME or NAME=FLAGS")
    parser.add_argument("--train-set", type=Path, required=True, help="folder with train.rec")
    parser.add_argument("--lfw", type=Path, required=True, help="prepared LFW folder")
    parser.add_argument("--hold-out", type=Path, required=True, help="list by tools.held_out")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/study"), help="default: %(default)s"
    )
    parser.add_argument("--network", default="tiny", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    for flag, default in {"max_classes": 1000, "epochs": 8, "batch_size": 128, "jobs": 1}.items():
        parser.add_argument(
            f"--{flag.replace('_', '-')}", type=int, default=default, help="default: %(default)s"
        )
    args = parser.parse_args(argv)
    for name in ("train_set", "lfw", "hold_out", "runs"):
        setattr(args, name, getattr(args, name).resolve())  # train.py runs in its own folder
    args.device = get_device(args.device)
    args.threads = max(1, core_count() // args.jobs)
    return args


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Train and test unfinished runs, `--jobs` at a time; print the table and write the JSON."""
    args = parse_study_arguments(argv)
    arms = dict(arm.split("=", 1) if "=" in arm else (arm, ARMS.get(arm)) for arm in args.arms)
    for name, flags in arms.items():
        if flags is None:
            raise UserError(f"There is no arm {name!r}; there are {', '.join(ARMS)}.")
    unfinished = [
        (name, flags, seed)
        for seed in args.seeds
        for name, flags in arms.items()
        if not (args.runs / name / f"s{seed}" / "study.json").is_file()
    ]
    # Processes, not threads: torch.fx, which folds batch normalisation, is not thread-safe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        work = [pool.submit(run_and_test, args, *run) for run in unfinished]
        for run in tqdm(work, unit="run", disable=None):
            run.result()
    rows = collect(args, arms)
    print(study_table(rows))
    path = RESULTS / f"study-{args.device.type}-{args.network}.json"
    results = {
        "machine": describe_machine(args.device),
        "settings": common_settings(args),
        "arms": rows,
    }
    with atomic_write(path, "w") as file:
        json.dump(results, file, indent=1)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
