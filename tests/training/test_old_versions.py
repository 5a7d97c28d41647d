"""Files that an earlier version wrote, before the modules moved into folders, are still read.

tests/data/old_run holds what that version made on a CPU with one thread: a training set, an LFW
folder, lists of images to leave out, and two checkpoints in the middle of the second epoch. To keep
them small, their large tensors are left out. `rebuild` fills these with numbers, as was done before
the earlier version resumed and evaluated the two runs; its results are stored with them.
"""

import json
import lzma
import math
import shutil

import numpy as np
import pytest
import torch

import lfw_eval
import train
from config import parse_args
from evaluation.pair_sets import load_set
from fileio.checkpoint_file import load_checkpoint, save_checkpoint
from fileio.index_tsv import read_index
from fileio.recordio import RecordReader
from tests.helpers.paths import ROOT
from training.sample_lists import training_mask

OLD = ROOT / "tests" / "data" / "old_run"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A working folder with the old data sets and lists in data/."""
    shutil.copytree(OLD, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def rebuild(folder, name):
    """Write runs/<name>/last.pt as the old version had it; what else is in the stored file."""
    stored = load_checkpoint(folder / "data" / f"{name}.checkpoint")
    rng = np.random.default_rng(7)
    for path, (shape, scale) in stored["large"].items():
        owner, *keys, last = stored["checkpoint"], *path.split("/")
        if keys[0] == "optimizer":  # its parameters are numbered
            keys[2] = int(keys[2])
        for key in keys:
            owner = owner[key]
        values = rng.integers(-127, 128, shape) / 128 * scale
        owner[last] = torch.from_numpy(values.astype(np.float32))
    run = folder / "runs" / name
    run.mkdir(parents=True)
    save_checkpoint(run / "last.pt", stored["checkpoint"])
    shutil.copy(folder / "data" / f"{name}.lfw.json", run / "lfw.json")
    return stored


def samples(state):
    """Three values, the mean and the norm of each tensor of network, head and average (n, 5)."""
    rows = []
    for part in ("model", "head", "ema"):
        for tensor in state.get(part, {}).values():
            values = tensor.double().flatten()
            three = values[torch.linspace(0, len(values) - 1, 3).long()]
            rows.append(torch.cat([three, values.mean()[None], values.norm()[None]]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["subcenter", "adaface"])
def test_an_old_run_resumes_to_the_weights_that_the_old_version_came_to(old, name):
    stored = rebuild(old, name)
    train.main(parse_args(["--resume", "runs/" + name], "train"))
    state = load_checkpoint(old / "runs" / name / "last.pt")
    assert (state["epoch"], state["step"]) == (2, 0)
    actual, expected = samples(state), stored["samples"].double()
    assert actual.shape == expected.shape
    # As a share of the tensor's norm. On the machine that made the files the largest is 1e-7; other
    # instruction sets or two threads bring rounding errors of up to 2e-5, and a momentum that is
    # not loaded one of 3e-2.
    difference = (actual - expected).abs() / expected[:, -1:].clamp(min=0.1)
    print(f"largest difference, as a share of its tensor's norm: {difference.max():.1e}")
    assert difference.max() < 1e-4
    for part, points in stored["history"].items():
        np.testing.assert_allclose(state["history"][part], points, rtol=1e-4)
    assert state["best"] == pytest.approx(stored["best"], rel=1e-4)


@pytest.mark.parametrize("name", ["subcenter", "adaface"])
def test_an_old_checkpoint_is_evaluated_as_before(old, name):
    rebuild(old, name)
    expected = json.loads((old / "runs" / name / "lfw.json").read_text())
    argv = ["--checkpoint", f"runs/{name}/last.pt", "--device", "cpu"]
    lfw_eval.main(parse_args(argv, "lfw_eval"))
    actual = json.loads((old / "runs" / name / "lfw.json").read_text())
    assert (old / "runs" / name / "report.html").is_file()
    assert list(actual) == list(expected)
    for key in ("accuracy", "threshold", "best_threshold", "auc", "eer", "fold_thresholds"):
        assert actual[key] == pytest.approx(expected[key], rel=1e-4), key
    for key in ("pairs", "matched_pairs", "missed_faces", "network", "epoch", "seed", "kind"):
        assert actual[key] == expected[key], key


def test_old_lists_and_indexes_are_read(old):
    reader = RecordReader("data/faces_webface_112x112")
    mask = training_mask(reader, keep="data/keep.tsv")
    assert np.flatnonzero(~mask).tolist() == [5, 20]
    both = training_mask(reader, keep="data/keep.tsv", hold_out="data/held_out.txt")
    assert np.flatnonzero(~both).tolist() == [5, 20, *range(24, 32)]
    lfw = load_set("data/faces_lfw_112x112", "data/pairs.txt")
    assert (len(lfw.images), lfw.missed, len(lfw.pairs.same)) == (7, 1, 8)
    table = read_index("data/faces_lfw_112x112", RecordReader("data/faces_lfw_112x112"))
    assert len(table.record) == 7
    assert not math.isnan(float(table.score[0]))
