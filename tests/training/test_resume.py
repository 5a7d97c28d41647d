"""Runs that are killed and resumed, against an uninterrupted run."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from config import Config, fixed_on_resume, parse_args, settings_of
from data_gen import ImageStore, make_split
from fileio.checkpoint_file import load_checkpoint
from fileio.images import encode_jpeg
from fileio.locks import lock_folder
from fileio.record_writer import write_dataset
from fileio.recordio import RecordReader
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set
from training import event_log as events
from training import resume
from training.run import Run
from utils import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


class Killer:
    """Sessions of train.py in the processes of tests/helpers/killer.py."""

    def __init__(self, folder):
        self.flags = [*FLAGS.split(), "--train-set", str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "helpers" / "killer.py")],
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
    for run in cwd.glob("runs/[!.]*"):
        if not (run / "last.pt").exists():
            shutil.rmtree(run)
    return list(cwd.glob("runs/[!.]*"))


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
    scalars = {}
    (run,) = cwd.glob("runs/[!.]*")
    for path in sorted(run.glob("events.*")):
        for _, event in events.read_event_frames(path.read_bytes()):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" or value.HasField(
                    "simple_value"
                ):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def steps_by_tag(cwd):
    """{tag: [step]} of all that the only run has logged, images and curves included."""
    steps = {}
    (run,) = cwd.glob("runs/[!.]*")
    for path in sorted(run.glob("events.*")):
        for _, event in events.read_event_frames(path.read_bytes()):
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps


def assert_same_run(cwd, unbroken):
    """Checkpoints, logged numbers and TensorBoard; returns how many bytes were compared."""
    (run,), (straight,) = cwd.glob("runs/[!.]*"), unbroken.glob("runs/[!.]*")
    compared = 0
    for name in ("last.pt", "best.pt"):
        actual, expected = load_checkpoint(run / name), load_checkpoint(straight / name)
        assert_same(actual, expected)
        assert (run / name).read_bytes() == (straight / name).read_bytes()
        compared += (run / name).stat().st_size
    actual, expected = points(cwd), points(unbroken)
    rates, straight_rates = actual.pop("perf/images_per_s"), expected.pop("perf/images_per_s")
    assert actual == expected
    assert [step for step, _ in rates] == [step for step, _ in straight_rates]
    assert steps_by_tag(cwd) == steps_by_tag(unbroken)
    assert {"lfw/roc", "lfw/pr"} < steps_by_tag(cwd).keys()
    assert (run / "projector_config.pbtxt").read_bytes() == (
        straight / "projector_config.pbtxt"
    ).read_bytes()
    shown = EventAccumulator(str(run))
    shown.Reload()
    for tag, values in expected.items():
        assert [(e.step, e.value) for e in shown.Scalars(tag)] == values
    assert "config/text_summary" in shown.Tags()["tensors"]
    assert not list(run.glob(".*.tmp"))
    return compared


# ------------------------------------------------------------------------------ killed

# Each session ends at one of these, the next resumes.
FAULTS = [
    {"at": "training.run:Run.train_step", "count": 4},  # a step after a checkpoint
    {"at": "os:fsync", "count": 2},  # a checkpoint is written, not yet on disk under its name
    {
        "at": "training.checkpoints:_rotate",
        "count": 1,
        "after": True,
    },  # the old one has moved up
    {"at": "training.run:Run.validate", "count": 1},  # the epoch's last step and its end
    # valid/ is logged, lfw/ is not
    {"at": "evaluation.evaluate:pair_set_metrics", "count": 1, "after": True},
    {
        "at": "training.epochs:log_evaluation",
        "count": 1,
        "after": True,
    },  # all of it is logged, not saved
    {
        "at": "training.run_state:RunState.save",
        "count": 1,
        "after": True,
    },  # best.pt is new, last.pt is not
    {"at": "pathlib:Path.replace", "count": 3},
]


def test_a_run_killed_at_the_worst_moments_ends_as_the_unbroken_one(killer, unbroken, tmp_path):
    shown = load_checkpoint(next(unbroken.glob("runs/*/last.pt")))
    assert len(shown["history"]["lfw"]) == len(shown["history"]["valid"]) == 2
    kills = sum(killer.run(tmp_path, **fault) for fault in FAULTS)
    assert kills == len(FAULTS)
    assert not killer.run(tmp_path)
    assert_same_run(tmp_path, unbroken)
    assert not killer.run(tmp_path)  # once more: there is nothing to do
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_run_killed_and_compiled_anew_ends_as_the_unbroken_one(
    killer, tmp_path, monkeypatch
):
    compiled = ("--compile", "on", "--checkpoint-every", "1")
    assert not killer.run(tmp_path / "unbroken", *compiled)
    kills = [
        killer.run(tmp_path / "killed", *more, at="training.run:Run.train_step", count=3)
        for more in (compiled, ("--compile", "auto"))
    ]
    assert kills == [True, True]
    assert not killer.run(tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


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
            assert load_state(cwd) >= before  # last.pt is there, complete and no older
        else:  # it came to its end; the rest of the kills are another run's
            compared += assert_same_run(cwd, tmp_path / "unbroken")
            run += 1
    killer.run(cwd, *(() if load_state(cwd) else longer))
    compared += assert_same_run(cwd, tmp_path / "unbroken")
    print(f"{kills} kills, {writing} in a checkpoint's writing; {compared:,} bytes the same")
    assert writing >= 1


def load_state(cwd):
    """(epoch, step) of last.pt, which every kill leaves complete; () if there is none yet."""
    states = [load_checkpoint(path) for path in cwd.glob("runs/*/last.pt")]
    return (states[0]["epoch"], states[0]["step"]) if states else ()


# ------------------------------------------------------------------------------ the same run


@pytest.fixture
def start(folder, tmp_path, capsys, monkeypatch):
    """Run train.main in this process; its exit status and what it printed."""

    def run(*argv, resumed=True):
        where = ["--runs-dir", f"{tmp_path}/runs", "--images-dir", f"{tmp_path}/images"]
        if not resumed:
            where += [*FLAGS.split(), "--train-set", str(folder), "--epochs", "1"]
        code = 0
        monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
        try:
            train.main(parse_args([*where, *argv], "train"))
        except SystemExit as error:
            code = error.code
        return code, "".join(capsys.readouterr())

    return run


def test_which_settings_a_resumed_run_may_change():
    """No weight depends on these, but for `epochs` under a schedule that ends with them (which
    train.py says) and for rounding on another `device`."""
    free = {"data_dir", "runs_dir", "images_dir", "train_set", "keep", "hold_out", "lfw", "resume"}
    free |= {"device", "workers", "cache", "eval_batch", "epochs", "checkpoint_activations"}
    free |= {"log_every", "checkpoint_every"}
    assert set(settings_of("train")) - fixed_on_resume() == free


def test_every_fixed_setting_is_refused_by_name_and_every_free_one_taken():
    old = Config()
    saved = dataclasses.asdict(old)
    for name in set(settings_of("train")) - {"margin_option"}:
        value = getattr(old, name)
        if isinstance(value, bool):
            other = not value
        else:
            other = (1,) if isinstance(value, tuple) else f"{value}x"
            other = value + 1 if isinstance(value, (int, float)) else other
        same = dataclasses.replace(old, given=(name,))
        changed = dataclasses.replace(old, **{name: other}, given=(name,))
        assert getattr(resume.resumed_config(same, saved, Path("r")), name) == value
        if name not in fixed_on_resume():
            assert getattr(resume.resumed_config(changed, saved, Path("r")), name) == other
        else:
            with pytest.raises(UserError, match=f"--{name.replace('_', '-')} "):
                resume.resumed_config(changed, saved, Path("r"))


def test_a_run_keeps_to_what_auto_has_decided():
    saved = dataclasses.asdict(dataclasses.replace(Config(), compile="on"))
    asked = parse_args(["--compile", "auto"], "train")
    assert resume.resumed_config(asked, saved, Path("r")).compile == "on"
    with pytest.raises(UserError, match=r"another --compile \(it has on\)"):
        resume.resumed_config(parse_args(["--compile", "off"], "train"), saved, Path("r"))


def test_a_best_epoch_counts_as_one_only_once_it_is_written(start, tmp_path, monkeypatch):
    def full(self, name):
        raise UserError(f"{name} cannot be written (No space left on device).")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", full)
        code, printed = start(resumed=False)
    (run,) = tmp_path.glob("runs/[!.]*")
    assert code == 2
    assert "best.pt cannot be written (No space left on device). All steps are saved" in printed
    state = load_checkpoint(run / "last.pt")
    assert (state["epoch"], state["step"], state["best"]) == (0, 4, {})
    assert not state["history"]["valid"]
    assert start("--resume")[0] == 0
    state, best = load_checkpoint(run / "last.pt"), load_checkpoint(run / "best.pt")
    assert (state["epoch"], len(state["history"]["valid"])) == (1, 1)
    assert best["best"] == state["best"] != {}


def test_other_images_are_refused(start, folder, tmp_path):
    start(resumed=False)
    for change in ("labels", "images", "fewer"):
        other = tmp_path / change
        reader = RecordReader(folder)
        jpegs = [reader.encoded(i) for i in range(len(reader))]
        labels = [i // 12 for i in range(48)]
        if change == "labels":
            labels[12] = 0
        elif change == "images":
            jpegs[5] = encode_jpeg(np.zeros((112, 112, 3), np.uint8))
        else:
            jpegs, labels = jpegs[:-1], labels[:-1]
        write_dataset(other, jpegs, labels)
        code, printed = start("--resume", "--epochs", "2", "--train-set", str(other))
        assert code == 2
        assert "trained on other images" in printed
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)  # the same set elsewhere is the same set
    code, printed = start("--resume", "--epochs", "2", "--train-set", str(moved))
    assert code == 0
    assert "cosine schedule ends with the run: from here on" in printed


def test_the_fingerprint_covers_ids_labels_and_split(folder):
    reader = RecordReader(folder)
    parts = make_split(reader.labels, valid_fraction=0.2)
    store = ImageStore(reader, parts, torch.device("cpu"), cache="none")
    expected = store.fingerprint(parts.train, parts.valid)
    assert store.fingerprint(parts.train, parts.valid) == expected
    assert store.fingerprint(parts.train[1:], parts.valid) != expected
    assert store.fingerprint(parts.valid, parts.train) != expected
    store.labels[3] += 1
    assert store.fingerprint(parts.train, parts.valid) != expected
    store.labels[3] -= 1
    reader.keys[0] = 0
    assert store.fingerprint(parts.train, parts.valid) != expected


def test_a_second_train_on_one_run_is_refused(start, tmp_path):
    start(resumed=False)
    (run,) = tmp_path.glob("runs/[!.]*")
    with lock_folder(run, "train.py"):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        code, printed = start("--resume", "--epochs", "2")
    assert code == 2
    assert f"is in use by train.py, process {os.getpid()} on " in printed
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_corrupt_checkpoint_is_reported_and_the_one_before_taken(start, unbroken, tmp_path):
    start(resumed=False)
    (run,) = tmp_path.glob("runs/[!.]*")
    state = load_checkpoint(run / "last-1.pt")
    assert (state["epoch"], state["step"]) == (0, 4)
    data = bytearray((run / "last.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "last.pt").write_bytes(data)
    code, printed = start("--resume")
    assert code == 0
    assert "last.pt is corrupt (its checksum does not match); taking last-1.pt" in printed
    assert (run / "damaged-last.pt").read_bytes() == data
    assert load_checkpoint(run / "last.pt")["epoch"] == 1
    for path in run.glob("last*.pt"):
        path.write_bytes(b"nothing")
    code, printed = start("--resume")
    assert code == 2
    assert "last.pt is corrupt" in printed


def test_checkpoints_that_are_no_state_of_the_run_are_sentences(start, tmp_path):
    start(resumed=False)
    (run,) = tmp_path.glob("runs/[!.]*")
    complete = load_checkpoint(run / "last.pt")
    torch.manual_seed(0)
    for change, text in (
        ({"model": {"x": torch.zeros(1)}}, "is not a state of this run"),
        ({"optimizer": {}}, "is not a state of this run"),
        ({"random": {}}, "is not a state of this run"),
        ({"window": None}, "is not a checkpoint of this train.py (see its window)"),
        ({"epoch": torch.tensor(1)}, "(see its epoch)"),
        ({"step": 5}, "(see its step)"),
        ({"step": 2}, "(see its history)"),  # whose two steps are nowhere
        ({"history": {"train": []}}, "(see its history)"),
        ({"best": {}}, "(see its best)"),
        ({"head": {"weight": torch.full((4, 16), torch.nan)}}, "not finite"),
        ({"num_classes": 7}, "7 identities"),
        ({"config": complete["config"] | {"batch_size": "x"}}, "--batch-size cannot be x"),
        ({"config": complete["config"] | {"warp": 9}}, "'warp' is not a setting of this version"),
    ):
        torch.save({**complete, **change}, run / "last.pt")
        code, printed = start("--resume", "--epochs", "2")
        assert (code, text in printed, "Traceback" in printed) == (2, True, False), printed
    torch.save({**complete, "precision": "float8 on abacus"}, run / "last.pt")
    code, printed = start("--resume", "--epochs", "2")
    assert code == 0
    assert "was computed in float8 on abacus; the run continues in" in printed


def test_the_clock_asks_for_checkpoints_too(start, tmp_path, monkeypatch):
    saved = []
    save = Run.save_last
    monkeypatch.setattr(
        Run, "save_last", lambda self, *a: (saved.append(self.step), save(self, *a))
    )
    start("--checkpoint-every", "1e-9m", resumed=False)
    assert saved == [0, 1, 2, 3, 4, 0]
    saved.clear()
    start("--resume", "--epochs", "2", "--checkpoint-every", "0")
    assert saved == [0]
