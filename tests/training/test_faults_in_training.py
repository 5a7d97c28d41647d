"""train.py on a disk that fails: a sentence, what was there stays, --resume comes to the same.

Every call of a run that writes, syncs or renames fails in turn; then a file system that is full.
"""

import shutil
import subprocess
import sys

import pytest

import train
from config import parse_args
from fileio.checkpoint_file import load_checkpoint
from tests.helpers.faults import FailingDisk
from tests.helpers.tiny import FLAGS, assert_same, write_tiny_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture
def start(folder, tmp_path, capsys, monkeypatch):
    """Begin or resume the run of a folder; its exit status and what it complains of."""
    monkeypatch.setattr("training.run_report.plot_curves", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def start(base):
        argv = f"{FLAGS} --epochs 1 --train-set {folder} --images-dir {tmp_path}".split()
        if list(base.glob("runs/*/last.pt")):
            argv = ["--resume"]
        try:
            train.main(parse_args([*argv, "--runs-dir", f"{base}/runs"], "train"))
            code = 0
        except SystemExit as ended:
            code = ended.code
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return code, "".join(line for line in lines if line.startswith("train.py:"))

    return start


def states(base):
    """What is in last.pt and best.pt, but for where the run was told to be."""
    (run,) = base.glob("runs/[!.]*")
    loaded = [load_checkpoint(run / name) for name in ("last.pt", "best.pt")]
    return [{k: v for k, v in state.items() if k != "config"} for state in loaded]


def fail_each(start, tmp_path, stays, step=1):
    """Let every step-th call of a run fail, then resume without; returns how many did.

    Of the hundreds of writes only the first and the last of a file count.
    """
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, 1 << 30)
        assert start(tmp_path / "straight") == (0, "")
    straight, names = states(tmp_path / "straight"), disk.names
    edges = [i + 1 for i in range(len(names)) if set(names[max(0, i - 1) : i + 2]) != {"write"}]
    for fail_at in edges[::step]:
        base = tmp_path / f"{fail_at}"
        with pytest.MonkeyPatch.context() as patch:
            FailingDisk(patch, fail_at, stays)
            code, sentence = start(base)
        assert code == 2
        assert " cannot be written (" in sentence
        for run in base.glob("runs/[!.]*"):
            assert not list(run.glob(".*.tmp"))
            if not (run / "last.pt").exists():
                shutil.rmtree(run)  # nothing was done that could be lost
        assert start(base) == (0, "")
        assert_same(states(base), straight)
        shutil.rmtree(base)
    return len(edges[::step])


def test_train_after_some_failing_calls(start, tmp_path):
    assert fail_each(start, tmp_path, False, 9) > 4


@pytest.mark.slow
@pytest.mark.parametrize("stays", [False, True], ids=["once", "for-good"])
def test_train_after_each_failing_call(start, tmp_path, stays):
    calls = fail_each(start, tmp_path, stays)
    print(f"{calls} calls of a run failed in turn; it came to the same each time")


@pytest.mark.parametrize("kilobytes", [16, 4_000, 10_000, 14_000, 20_000])
def test_a_full_disk(kilobytes, start, tmp_path):
    assert start(tmp_path / "straight") == (0, "")
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")

    mount(f"size={kilobytes}k")
    try:
        code, sentence = start(disk)
        assert code == 2
        assert "cannot be written (No space left on device): make room" in sentence
        assert not list(disk.rglob("*.tmp"))
        mount("remount,ro")
        if list(disk.glob("runs/*/last.pt")):
            before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
            code, sentence = start(disk)
            assert code == 2
            assert "Read-only file system" in sentence
            assert before == {path: path.read_bytes() for path in before}
        else:
            shutil.rmtree(disk / "runs", ignore_errors=True)
        mount("remount,rw,size=100m")
        for run in disk.glob("runs/[!.]*"):
            if not (run / "last.pt").exists():
                shutil.rmtree(run)
        assert start(disk) == (0, "")
        assert_same(states(disk), states(tmp_path / "straight"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
