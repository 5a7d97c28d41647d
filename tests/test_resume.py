"""Runs that are killed and gone on with, against the run that was not."""

import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import resume
import train
from checkpoints import load_checkpoint
from config import Config, parse_args
from data_gen import ImageStore, split
from locks import locked
from recordio import RecordReader, encode_jpeg, write_bin, write_dataset
from resume import FIXED_ON_RESUME, FREE_ON_RESUME, cut_events, fingerprint
from utils import UserError

FLAGS = "--network tiny --emb-size 16 --batch-size 8 --margin-s 16 --margin-m 0.2 --dropout 0.3 "
FLAGS += "--epochs 3 --valid-fraction 0.2 --log-every 3 --device cpu --schedule cosine "
FLAGS += "--checkpoint-steps 2 --lr 0.02"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 identities of 12 noisy pictures each, and a test set of 24 pairs."""
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    centres = rng.integers(0, 255, (4, 7, 7, 3))
    faces = np.clip(np.repeat(centres, 12, 0) + rng.normal(0, 20, (48, 7, 7, 3)), 0, 255)
    jpegs = [encode_jpeg(np.kron(f, np.ones((16, 16, 1))).astype(np.uint8)) for f in faces]
    write_dataset(folder, jpegs, [i // 12 for i in range(48)])
    write_bin(folder / "lfw.bin", jpegs, [i % 2 == 0 for i in range(24)])
    return folder


class Killer:
    """Sessions of train.py in the processes of tests/killer.py."""

    def __init__(self, folder):
        self.flags = [*FLAGS.split(), "--train-set", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "killer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, cwd, *more, **how):
        """One session; whether it was killed. Anything but that and a good end is a failure."""
        cwd.mkdir(exist_ok=True)
        argv = ["--resume"] if runs_with_a_checkpoint(cwd) else self.flags
        order = {"argv": [*argv, *more], "cwd": str(cwd), **how}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, (cwd / "printed.txt").read_text()
        return killed


def runs_with_a_checkpoint(cwd):
    # Killed before its first checkpoint, a run has done nothing that could be lost.
    for run in cwd.glob("runs/*"):
        if not (run / "last.pt").exists():
            shutil.rmtree(run)
    return list(cwd.glob("runs/*"))


@pytest.fixture(scope="module")
def killer(folder):
    killer = Killer(folder)
    yield killer
    killer.process.stdin.close()
    killer.process.wait()


@pytest.fixture(scope="module")
def unbroken(killer, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("unbroken")
    assert not killer.run(cwd)
    return cwd


def points(cwd):
    """All scalars in the files of the only run: {tag: [(step, value)]}, nothing purged."""
    found = {}
    (run,) = cwd.glob("runs/*")
    for path in sorted(run.glob("events.*")):
        for _, event in resume._frames(path.read_bytes()):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" or value.HasField(
                    "simple_value"
                ):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def assert_same(found, expected, where="checkpoint"):
    """Equal to the last bit, all the way down."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert found.numpy().tobytes() == expected.numpy().tobytes(), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_same(found[place], value, f"{where}[{place}]")
    else:
        assert found == expected, where


def assert_same_run(cwd, unbroken):
    """Checkpoints, logged numbers and TensorBoard; returns how many bytes were compared."""
    (run,), (straight,) = cwd.glob("runs/*"), unbroken.glob("runs/*")
    compared = 0
    for name in ("last.pt", "best.pt"):
        found, expected = load_checkpoint(run / name), load_checkpoint(straight / name)
        assert_same(found, expected)
        compared += (run / name).stat().st_size
    found, expected = points(cwd), points(unbroken)
    rates, straight_rates = found.pop("perf/images_per_s"), expected.pop("perf/images_per_s")
    assert found == expected
    assert [step for step, _ in rates] == [step for step, _ in straight_rates]
    shown = EventAccumulator(str(run))
    shown.Reload()
    for tag, values in expected.items():
        assert [(e.step, e.value) for e in shown.Scalars(tag)] == values
    assert "config/text_summary" in shown.Tags()["tensors"]
    assert not list(run.glob(".*.tmp"))
    return compared


# ------------------------------------------------------------------------------ killed

# Each session ends at one of these, the next goes on.
FAULTS = [
    {"at": "trainer:Trainer.train_step", "count": 4},  # a step after a checkpoint
    {"at": "os:fsync", "count": 2},  # a checkpoint is written, not yet on disk under its name
    {"at": "checkpoints:_link", "count": 1, "after": True},  # the old one has moved up
    {"at": "trainer:Trainer.validate", "count": 1},  # the epoch's last step and its end
    {"at": "lfw_eval:summarise", "count": 1, "after": True},  # valid/ is logged, lfw/ is not
    {"at": "trainer:Trainer.save", "count": 1, "after": True},  # best.pt is new, last.pt is not
    {"at": "pathlib:Path.replace", "count": 5},
]


def test_a_run_killed_at_the_worst_moments_ends_as_the_unbroken_one(killer, unbroken, tmp_path):
    shown = load_checkpoint(next(unbroken.glob("runs/*/last.pt")))
    assert len(shown["history"]["lfw"]) == len(shown["history"]["valid"]) == 3
    kills = sum(killer.run(tmp_path, **fault) for fault in FAULTS)
    assert kills == len(FAULTS)
    assert not killer.run(tmp_path)
    assert_same_run(tmp_path, unbroken)
    assert not killer.run(tmp_path)  # once more: there is nothing to do
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_kills_at_random_moments(killer, tmp_path, seed):
    rng = random.Random(seed)
    longer = ["--epochs", "10", "--seed", str(seed)]
    began = time.monotonic()
    assert not killer.run(tmp_path / "unbroken", *longer)
    seconds = time.monotonic() - began
    kills, writing, compared, run = 0, 0, 0, 0
    while kills < 10:
        cwd = tmp_path / f"killed-{run}"
        how = {"seconds": rng.uniform(0, seconds / 4)}
        if kills % 3 == 2:
            how = {"at": "os:fsync", "count": rng.randint(1, 20)}
        before = load_state(cwd)
        if killer.run(cwd, *(() if before else longer), **how):
            kills += 1
            writing += bool(list(cwd.glob("runs/*/.*.tmp")))
            assert load_state(cwd) >= before  # last.pt is there, whole and no older
        else:  # it came to its end; the rest of the kills are another run's
            compared += assert_same_run(cwd, tmp_path / "unbroken")
            run += 1
    killer.run(cwd, *(() if load_state(cwd) else longer))
    compared += assert_same_run(cwd, tmp_path / "unbroken")
    print(f"{kills} kills, {writing} in a checkpoint's writing; {compared:,} bytes the same")
    assert writing >= 1


def load_state(cwd):
    """(epoch, step) of last.pt, which every kill leaves whole; () where there is none yet."""
    found = [load_checkpoint(path) for path in cwd.glob("runs/*/last.pt")]
    return (found[0]["epoch"], found[0]["step"]) if found else ()
