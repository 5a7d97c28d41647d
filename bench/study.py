"""Train the arms of a study from the same images, several seeds each, and tabulate them.

    python -m bench.study --train-set data/faces_webface_112x112 --lfw data/faces_lfw_112x112 \\
        --hold-out data/held_out.txt                        # every arm of ARMS, seeds 0 to 2
    python -m bench.study ... arcface uniface               # some of them
    python -m bench.study ... arcface "mine=--margin cosface --ema 0.99"      # one of your own
    python -m bench.study ... --network r50 --max-classes 0 --epochs 20 --batch-size 512

All arms see as many images, of the same identities. An arm's learning rate is for batches of
512 and its milestones for 32 epochs, as the paper's are; both are scaled. A run is tested once, at
its end: last.pt, and the averaged weights where the arm has --ema, on LFW, on pairs of the
identities held out, and on all of their pairs. What is done is not done again, so the command may
be stopped and given once more. The JSON goes to bench/results/study-<device>-<network>.json.
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
from data_gen import load_images
from evaluation import verification
from evaluation.all_pairs import low_far
from evaluation.embedders import Embed, load_embedder
from evaluation.evaluate import evaluate_lfw
from evaluation.pair_sets import PairSet, find_pairs, load_set
from fileio.recordio import RecordReader
from fileio.safe_files import atomic_write, make_folder
from tools.held_out import make_pairs
from training.sample_lists import read_held_out
from utils import UserError, core_count, exit_on_user_error, get_device, newest_run

# The first is what the others are held against: InsightFace's recipe.
ARMS = {
    "arcface": "",
    "cosface": "--margin cosface",
    "adaface": "--margin adaface",
    # Without these two its loss may run off in the first steps; its authors have them, too.
    "uniface": "--margin uniface --clip-norm 10 --zero-init",
    "best": "--recipe best --ema 0.99",
}
FARS = ("1e-3", "1e-4", "1e-5")
PAIRS = 6000  # of the identities held out, as held_out.py --make-pairs 6000 chooses them
SETTINGS = ("network", "max_classes", "epochs", "batch_size")
ROOT = Path(__file__).resolve().parent.parent


class Tests:
    """LFW and the identities held out, decoded."""

    def __init__(self, train_set: Path, lfw: Path, hold_out: Path) -> None:
        self.lfw: PairSet = load_set(lfw, find_pairs(lfw, lfw.parent))
        reader = RecordReader(train_set)
        places = np.flatnonzero(np.isin(reader.labels, read_held_out(hold_out, reader)))
        self.people = reader.labels[places]
        self.faces, bad = load_images(reader, places)
        if bad:
            raise UserError(f"{len(bad)} images of {reader.path} cannot be decoded.")
        pairs = make_pairs(self.people, PAIRS, seed=0)
        self.first, self.second = np.array([pair for pair, _ in pairs]).T
        self.same = np.array([same for _, same in pairs])

    def run(self, embed: Embed) -> dict[str, float]:
        """Every number of the study for one model, as fractions."""
        found = {"lfw": evaluate_lfw(embed, self.lfw).metrics["accuracy"]}
        embeddings = embed(self.faces).float().cpu().numpy()
        scores = verification.pair_scores(embeddings, self.first, self.second)
        folds = verification.contiguous_folds(len(scores))
        found["pairs"] = verification.verify(scores, self.same, folds)["accuracy"]
        low = low_far(embeddings, self.people)["tar_at_far"]
        return found | {f"tar_{far}": low[far]["tar"] for far in FARS if far in low}


def train(args: argparse.Namespace, flags: str, seed: int, folder: Path) -> Path:
    """Train one run to its end, going on with what is there; its folder."""
    command = [sys.executable, "train.py", "--runs-dir", str(folder), "--images-dir", str(folder)]
    if any(folder.glob("*/last.pt")):
        command += ["--resume"]
    else:
        cfg, paper = parse_args(shlex.split(flags), "train"), Config()
        milestones = [str(round(at * args.epochs / paper.epochs)) for at in cfg.milestones]
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all arms of a study have in common."""
    return {flag: getattr(args, flag) for flag in SETTINGS}


def claim(args: argparse.Namespace, flags: str, folder: Path) -> None:
    """Write what a run is to be into its folder; UserError where another has begun there."""
    sets = {"train_set": str(args.train_set), "hold_out": str(args.hold_out)}
    wanted = {"flags": flags} | settings_of(args) | sets
    path = folder / "arm.json"
    if not path.is_file():
        make_folder(folder)
        with atomic_write(path, "w") as file:
            json.dump(wanted, file, indent=1)
    elif json.loads(path.read_text()) != wanted:
        raise UserError(
            f"{folder} has a run of other flags or of another set; name another folder with --runs."
        )


@functools.cache
def load_tests(train_set: Path, lfw: Path, hold_out: Path) -> Tests:
    """The tests, once in each process."""
    return Tests(train_set, lfw, hold_out)


def one_run(args: argparse.Namespace, name: str, flags: str, seed: int) -> None:
    """Train and test one arm with one seed, and write study.json into its folder."""
    torch.set_num_threads(args.threads)
    tests = load_tests(args.train_set, args.lfw, args.hold_out)
    folder = args.runs / name / f"s{seed}"
    claim(args, flags, folder)
    began = time.time()
    run = train(args, flags, seed, folder)
    found: dict[str, Any] = {"seconds": round(time.time() - began)}
    for kind, file in {"raw": "last.pt", "ema": "best_ema.pt"}.items():
        if (run / file).is_file():
            found[kind] = tests.run(load_embedder(run / file, device=args.device)[0])
    with atomic_write(folder / "study.json", "w") as file:
        json.dump(found, file, indent=1)


def collect(args: argparse.Namespace, arms: dict[str, str]) -> dict[str, dict[str, Any]]:
    """{arm: {"flags", "seeds": {seed: numbers}}}; "<arm>, averaged" for --ema."""
    rows: dict[str, dict[str, Any]] = {}
    for name, flags in arms.items():
        for seed in args.seeds:
            folder = args.runs / name / f"s{seed}"
            claim(args, flags, folder)
            found = json.loads((folder / "study.json").read_text())
            for kind, title in {"raw": name, "ema": f"{name}, averaged"}.items():
                if kind in found:
                    row = rows.setdefault(title, {"flags": flags, "seeds": {}})
                    row["seeds"][str(seed)] = found[kind]
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds in per cent, as Markdown; differences to the first."""
    columns = ["lfw", "pairs", *(f"tar_{far}" for far in FARS)]
    titles = ["LFW", "held-out pairs", *(f"TAR at {far}" for far in FARS)]
    lines = ["| arm | " + " | ".join([*titles, "pairs, against the first"]) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    first: list[float] = []
    for name, row in rows.items():
        cells = [name]
        for column in columns:
            values = [100 * seed[column] for seed in row["seeds"].values() if column in seed]
            cells.append(spread(values) if values else "")
        values = [100 * seed["pairs"] for seed in row["seeds"].values()]
        first = first or values
        error = (variance_of_mean(values) + variance_of_mean(first)) ** 0.5
        gain = statistics.mean(values) - statistics.mean(first)
        cells.append("" if values is first else f"{gain:+.2f} ± {error:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation (of one run: none)."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def variance_of_mean(values: list[float]) -> float:
    """The square of the standard error of a mean (of one value: 0)."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("arms", nargs="*", default=list(ARMS), help="NAME or NAME=FLAGS")
    parser.add_argument("--train-set", type=Path, required=True, help="folder with train.rec")
    parser.add_argument("--lfw", type=Path, required=True, help="prepared LFW folder")
    parser.add_argument("--hold-out", type=Path, required=True, help="list of held_out.py")
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
    """Run what is not done yet, `--jobs` at a time, and print and write the table."""
    args = parse(argv)
    arms = dict(arm.split("=", 1) if "=" in arm else (arm, ARMS.get(arm)) for arm in args.arms)
    for name, flags in arms.items():
        if flags is None:
            raise UserError(f"There is no arm {name!r}; there are {', '.join(ARMS)}.")
    todo = [
        (name, flags, seed)
        for seed in args.seeds
        for name, flags in arms.items()
        if not (args.runs / name / f"s{seed}" / "study.json").is_file()
    ]
    # Processes, as torch.fx, with which networks are folded, changes what other threads do.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        work = [pool.submit(one_run, args, *run) for run in todo]
        for run in tqdm(work, unit="run", disable=None):
            run.result()
    rows = collect(args, arms)
    print(table(rows))
    path = RESULTS / f"study-{args.device.type}-{args.network}.json"
    report = {"machine": describe_machine(args.device), "settings": settings_of(args), "arms": rows}
    with atomic_write(path, "w") as file:
        json.dump(report, file, indent=1)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
